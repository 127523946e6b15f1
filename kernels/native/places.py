"""CPUs that helper threads stay on: each is one team's alone, whichever of a user's processes or engines it belongs to.

Two threads that spin on the same CPU wait for each other while another CPU is idle. So a team takes an advisory lock on a
file for each of its CPUs and holds it as long as it lives; the system gives it back when a process dies. Where locks
cannot be had, or too few CPUs are left, the system chooses where threads run.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from triode.kernels.native.cpus import allowed_cpus

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

VARIABLE = "TRIODE_PIN_THREADS"
"""Environment variable: 0 leaves it to the system where each thread runs."""


class Places:
    """CPUs that are held until `release`."""

    def __init__(self, cpus: tuple[int, ...], locks: tuple[int, ...]) -> None:
        self.cpus = cpus
        self._locks = locks

    def release(self) -> None:
        """Leave them to others."""
        for lock in self._locks:
            os.close(lock)


NO_PLACES = Places((), ())


def take_places(num_helpers: int) -> Places:
    """A CPU for each helper; none at all if that is not to be had, or if the environment says so.

    The first allowed CPU is the last to be taken: it is for the thread that calls, which is not ours to pin.
    """
    allowed = allowed_cpus()
    if not num_helpers or num_helpers >= len(allowed) or os.environ.get(VARIABLE, "1") == "0":
        return NO_PLACES
    locks: dict[int, int] = {}
    for cpu in (*allowed[1:], allowed[0]):
        if len(locks) < num_helpers and (lock := _lock(cpu)) is not None:
            locks[cpu] = lock
    places = Places(tuple(locks), tuple(locks.values()))
    if len(locks) == num_helpers:
        return places
    places.release()
    return NO_PLACES


def held_elsewhere(cpus: Sequence[int]) -> tuple[int, ...]:
    """Those that a team holds at the moment."""
    free = {cpu: lock for cpu in cpus if (lock := _lock(cpu)) is not None}
    for lock in free.values():
        os.close(lock)
    return tuple(cpu for cpu in cpus if cpu not in free)


def _lock(cpu: int) -> int | None:
    """The open file that is the lock; None if somebody has it, or if there can be none."""
    try:
        if fcntl is None:
            raise OSError("this system has no such locks")
        # Nothing is ever written there: whoever else can make such a folder or file can at most keep places from us.
        folder = Path(tempfile.gettempdir()) / f"triode-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        file = os.open(folder / f"cpu-{cpu}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file
