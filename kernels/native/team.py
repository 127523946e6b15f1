"""The threads that compute a decoder's steps."""

import os
import weakref

from triode.kernels.native.library import NativeLibrary
from triode.kernels.native.places import Places, take_places


class Team:
    """The caller of a step and `num_threads - 1` helpers, which end when this is dropped.

    Each helper stays on a CPU of its own, which no other team's has (`places.py`), while the caller's thread, which is not
    ours, runs where it likes.

    Raises:
        OSError: the system starts no more threads.
    """

    def __init__(self, library: NativeLibrary, num_threads: int) -> None:
        self.num_threads = num_threads
        places = take_places(num_threads - 1)
        try:
            self.handle = library.open_team(num_threads - 1, places.cpus or None)
        except OSError:
            places.release()
            raise
        # A forked child has the memory of these threads, but not the threads.
        self.close = weakref.finalize(self, _close, library, self.handle, places, os.getpid())
        """End the helpers, and leave their CPUs to others."""
        self.close.atexit = False


def _close(library: NativeLibrary, handle: int, places: Places, owner: int) -> None:
    if os.getpid() == owner:
        library.close_team(handle)
        places.release()
