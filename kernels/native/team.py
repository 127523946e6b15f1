"""The threads that compute a decoder's steps, and on which CPUs they stay."""

import os
import weakref

from triode.kernels.native.cpus import allowed_cpus
from triode.kernels.native.library import NativeLibrary

VARIABLE = "TRIODE_PIN_THREADS"
"""Environment variable: 0 leaves it to the system where each thread runs."""


class Team:
    """The caller of a step and `num_threads - 1` helpers, which end when this is dropped.

    Each helper stays on a CPU of its own, while the caller's thread, which is not ours, runs where it likes. There are no
    such places if `num_threads` is more than this process may use, nor if the environment says so.
    """

    def __init__(self, library: NativeLibrary, num_threads: int) -> None:
        self.num_threads = num_threads
        self.handle = library.open_team(num_threads - 1, _places(num_threads))
        # A forked child has the memory of these threads, but not the threads.
        closing = weakref.finalize(self, _close, library, self.handle, os.getpid())
        closing.atexit = False


def _close(library: NativeLibrary, handle: int, owner: int) -> None:
    if os.getpid() == owner:
        library.close_team(handle)


def _places(num_threads: int) -> tuple[int, ...] | None:
    cpus = allowed_cpus()
    if num_threads > len(cpus) or os.environ.get(VARIABLE, "1") == "0":
        return None
    return cpus[1:num_threads]
