"""Compiles the native step where it is first used, and finds it again afterwards.

The wheel carries sources. `c++` (or what CXX names) turns them into one shared object per instruction set, in some
seconds, in `$XDG_CACHE_HOME/triode/native`. The name of the object is a digest of all that determines it, so nothing
stale is ever loaded. Processes that need it at the same time wait for the first one.
"""

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from triode.kernels.native.isa import InstructionSet, processor_name

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SOURCES = Path(__file__).parent
MAIN = "step.cpp"
_COMMON_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-fPIC",
    "-shared",
    # A row's result must not depend on where the compiler saw a multiplication and an addition that it could fuse.
    "-ffp-contract=off",
    "-fno-math-errno",
)
_COMPILE_TIMEOUT_S = 300


class NativeUnavailable(Exception):
    """There is no native step here, and why."""


class UnknownInstructions(NativeUnavailable):
    """The compiler does not know the instruction set."""


class WrongResults(NativeUnavailable):
    """A build does not compute here what it should."""


def find_compiler() -> tuple[str, ...]:
    """The command that compiles C++: what CXX holds, or `c++`.

    Raises:
        NativeUnavailable: there is none.
    """
    command = shlex.split(os.environ.get("CXX", "c++"))
    if not command or shutil.which(command[0]) is None:
        raise NativeUnavailable(f"no C++ compiler: {' '.join(command) or 'CXX'} is not installed")
    return tuple(command)


def build(isa: InstructionSet, announce: Callable[[str], None]) -> Path:
    """The shared object for `isa`, compiled if it is not in the cache.

    Args:
        isa: what to compile for.
        announce: called once before compiling, with what a user should know about the wait.

    Raises:
        UnknownInstructions: the compiler is too old for `isa`.
        NativeUnavailable: no compiler, or it fails.
    """
    if fcntl is None:
        raise NativeUnavailable("the native step is not built on Windows")
    command = (*find_compiler(), *flags_for(isa))
    folder = _cache_folder()
    target = folder / f"step-{isa.name}-{_digest(command)}.so"
    if target.exists():
        return target
    with _lock(folder / f"{target.name}.lock"):
        if not target.exists():
            announce(f"Compiling the CPU kernels for {isa.name} (once; kept in {folder})")
            _compile(command, target)
    return target


def flags_for(isa: InstructionSet) -> tuple[str, ...]:
    """What the compiler is told besides its files. It tunes for this processor, unless the build is for another machine."""
    tune = ("-mtune=native",) if isa.machine in (None, platform.machine()) else ()
    return (*_COMMON_FLAGS, *isa.flags, *tune)


def _cache_folder() -> Path:
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise NativeUnavailable(f"there is no place for compiled kernels (set XDG_CACHE_HOME): {error}") from error
    folder = Path(base) / "triode" / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NativeUnavailable(f"cannot write compiled kernels to {folder} (set XDG_CACHE_HOME): {error}") from error
    return folder


def _digest(command: tuple[str, ...]) -> str:
    digest = sha256()
    for path in sorted([*SOURCES.glob("*.h"), SOURCES / MAIN]):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update("\0".join((*command, _compiler_version(command[0]), processor_name())).encode())
    return digest.hexdigest()[:16]


def _compiler_version(compiler: str) -> str:
    try:
        finished = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"{compiler} does not run: {error}") from error
    return finished.stdout


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time, and given back by the system if that process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(command: tuple[str, ...], target: Path) -> None:
    # Written beside its final place and renamed, so that nobody ever loads half a file.
    handle, unfinished = tempfile.mkstemp(dir=target.parent, prefix=target.stem, suffix=".tmp")
    os.close(handle)
    try:
        finished = subprocess.run(
            [*command, str(SOURCES / MAIN), "-o", unfinished],
            capture_output=True,
            text=True,
            timeout=_COMPILE_TIMEOUT_S,
            check=False,
        )
        if finished.returncode:
            kind = NativeUnavailable if _knows(command) else UnknownInstructions
            raise kind(f"{command[0]} cannot compile the CPU kernels: {_first_error(finished.stderr)}")
        Path(unfinished).replace(target)
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailable(f"{command[0]} took more than {_COMPILE_TIMEOUT_S} s for the CPU kernels") from error
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _knows(command: tuple[str, ...]) -> bool:
    """Whether the compiler takes these flags at all."""
    nothing = ("-fsyntax-only", "-x", "c++", os.devnull)
    return not subprocess.run([*command, *nothing], capture_output=True, timeout=30, check=False).returncode


def _first_error(output: str) -> str:
    lines = output.splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "it says nothing")
