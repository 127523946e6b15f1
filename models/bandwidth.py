"""How fast this machine reads memory: what bounds a decode step, which reads every weight once."""

from time import perf_counter

import torch

from triode.kernels.native.library import NativeLibrary
from triode.kernels.native.team import Team

_BUFFER_BYTES = 2**28
"""More than any last-level cache that a process has to itself."""
_SECONDS = 0.4


def read_bandwidth(library: NativeLibrary, num_threads: int) -> float:
    """Bytes a second that so many threads read, in huge pages where the system grants them: the best pass of some 40."""
    buffer = torch.empty(_BUFFER_BYTES, dtype=torch.uint8)
    library.prefer_huge_pages(buffer.data_ptr(), _BUFFER_BYTES)
    # Pages that nothing was written to are all the same one.
    buffer.fill_(1)
    team = Team(library, num_threads)
    end_s = perf_counter() + _SECONDS
    best_s = float("inf")
    while (start_s := perf_counter()) < end_s:
        library.read(buffer.data_ptr(), _BUFFER_BYTES, team.handle)
        best_s = min(best_s, perf_counter() - start_s)
    return _BUFFER_BYTES / best_s
