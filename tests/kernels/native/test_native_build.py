"""Compiling at first use: once, whole or not at all, and with a reason where it cannot be done."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from triode.kernels.native.build import SOURCES, NativeUnavailable, build, find_compiler
from triode.kernels.native.isa import INSTRUCTION_SETS, VARIABLE, candidates, supported

PORTABLE = INSTRUCTION_SETS["portable"]
# Stands in for a compiler: answers --version, counts its runs, and writes its target in two halves.
COMPILER = """\
#!{python}
import pathlib, sys, time
if "--version" in sys.argv:
    print("{version}")
    sys.exit()
with open("{log}", "a") as log:
    print("run", file=log)
target = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
target.write_text("half")
if {fails}:
    sys.exit("step.cpp:1:1: error: no such thing")
target.write_text("half and half")
"""


class FakeCompiler:
    """A `c++` that does as told; `runs` counts its compilations."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._log = folder / "log"
        patch.setenv("CXX", str(folder / "c++"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        self.install()

    def install(self, version: str = "1", fails: bool = False) -> None:
        script = self._folder / "c++"
        script.write_text(COMPILER.format(python=sys.executable, version=version, log=self._log, fails=fails))
        script.chmod(0o755)

    @property
    def runs(self) -> int:
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0

    def cached(self) -> list[str]:
        return sorted(path.suffix for path in (self._folder / "cache" / "triode" / "native").iterdir())


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    return FakeCompiler(tmp_path, monkeypatch)


def nothing(_: str) -> None:
    pass


def test_a_second_use_compiles_nothing(compiler: FakeCompiler) -> None:
    said: list[str] = []
    first = build(PORTABLE, said.append)
    assert first.read_text() == "half and half"
    assert build(PORTABLE, said.append) == first
    assert compiler.runs == 1
    assert len(said) == 1
    assert "portable (once; kept in" in said[0]


def test_whoever_comes_while_it_compiles_waits_for_it(compiler: FakeCompiler) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build(PORTABLE, nothing), range(4)))
    assert len(paths) == 1
    assert compiler.runs == 1


def test_another_compiler_or_instruction_set_has_its_own_object(compiler: FakeCompiler) -> None:
    first = build(PORTABLE, nothing)
    compiler.install(version="2")
    second = build(PORTABLE, nothing)
    third = build(INSTRUCTION_SETS["avx2"], nothing)
    assert len({first, second, third}) == 3


def test_a_failure_leaves_nothing_and_says_why(compiler: FakeCompiler) -> None:
    compiler.install(fails=True)
    with pytest.raises(NativeUnavailable, match=r"cannot compile .*: step\.cpp:1:1: error: no such thing"):
        build(PORTABLE, nothing)
    assert compiler.cached() == [".lock"]
    compiler.install()
    assert build(PORTABLE, nothing).exists()


def test_without_a_compiler_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler-anywhere")
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler: no-such-compiler-anywhere is not installed"):
        find_compiler()


def test_a_cache_that_cannot_be_written_is_named(compiler: FakeCompiler, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(NativeUnavailable, match="set XDG_CACHE_HOME"):
        build(PORTABLE, nothing)


def test_without_a_home_the_reason_is_said(compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(NativeUnavailable, match=r"set XDG_CACHE_HOME.*home directory"):
        build(PORTABLE, nothing)


def test_the_environment_forces_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "portable")
    assert candidates() == (PORTABLE,)
    monkeypatch.setenv(VARIABLE, "sse17")
    with pytest.raises(ValueError, match=r"must be one of .*portable on this processor, got 'sse17'"):
        candidates()
    monkeypatch.delenv(VARIABLE)
    assert candidates() == supported()


def test_every_source_is_part_of_the_digest_and_of_the_wheel() -> None:
    sources = {path.name for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp")}
    included = {
        line.split('"')[1]
        for name in sources
        for line in (SOURCES / name).read_text().splitlines()
        if line.startswith('#include "')
    }
    assert included | {"step.cpp"} == sources
    assert "kernels/native/*.h" in (Path(__file__).parents[3] / "pyproject.toml").read_text()
