"""The tests of the compiled step in builds that check every access and every conversion."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from triode.kernels.native.build import NativeUnavailable, build, find_compiler
from triode.kernels.native.isa import INSTRUCTION_SETS, VARIABLE, InstructionSet, supported

MODELS = Path(__file__).parents[2] / "models"
PORTABLE = INSTRUCTION_SETS["portable"]
# Optimising takes most of the time of such a build.
COMPILER = """\
#!{python}
import os, sys
arguments = ["-O0" if argument == "-O3" else argument for argument in sys.argv[1:]]
os.execvp("{compiler}", ["{compiler}", *arguments, "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
"""


def sanitized(
    isas: tuple[InstructionSet, ...], compiler: str, patch: pytest.MonkeyPatch, cache: Path
) -> Mapping[str, str]:
    """Builds for these; the environment in which tests use them."""
    patch.setenv("CXX", compiler)
    patch.setenv("XDG_CACHE_HOME", str(cache))
    # Here, because the compiler itself must not be checked.
    for isa in isas:
        build(isa, lambda _: None)
    found = (
        subprocess.run(
            [*find_compiler(), f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("asan", "ubsan")
    )
    return {**os.environ, "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}


def run_tests(environment: Mapping[str, str], chosen: str, *files: str) -> None:
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "-x",
            "-p",
            "no:cacheprovider",
            *(MODELS / file for file in files),
            "-k",
            chosen,
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    assert "skipped" not in finished.stdout, finished.stdout[-4000:]


def compiler() -> str:
    try:
        return find_compiler()[0]
    except NativeUnavailable as reason:
        pytest.skip(str(reason))


def test_no_table_makes_a_step_leave_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "c++"
    script.write_text(COMPILER.format(python=sys.executable, compiler=compiler()))
    script.chmod(0o755)
    monkeypatch.setenv(VARIABLE, PORTABLE.name)
    environment = sanitized((PORTABLE,), str(script), monkeypatch, tmp_path)
    run_tests(environment, "not threads and not long and not avx", "test_native_fuzz.py", "test_native_cache.py")


@pytest.mark.slow
def test_no_step_reads_or_writes_out_of_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = supported()[0]
    command = f"{compiler()} -g -fsanitize=address,undefined -fno-sanitize-recover=all"
    environment = sanitized((best, PORTABLE), command, monkeypatch, tmp_path)
    chosen = f"not threads and not refused_where and ({best.name} or {PORTABLE.name} or nan or number or index or batch or table or ranks)"
    files = tuple(
        f"test_{name}.py" for name in ("native_step", "native_cache", "native_fuzz", "wanted_tokens", "ranks")
    )
    run_tests(environment, chosen, *files)
