"""Decode steps as captured work, for each size of the batch.

A size is computed operation by operation the first time, which compiles what it needs, and captured the second time.
Graphs share one memory pool, and all work on the same buffers; their launch parameters depend on the size alone.
"""

from collections.abc import Callable
from functools import partial

from triode.models.cuda.gpu import Gpu

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Decode steps are padded to one of these numbers of rows, or to a multiple of 64 beyond."""

SEGMENT_BUCKETS = (4, 16, 64, 256, 1024)
"""Attention is launched for rows of up to so many segments of 512 tokens."""


def bucket_for(num_rows: int) -> int:
    """The smallest size that holds so many rows."""
    return next((bucket for bucket in BUCKETS if num_rows <= bucket), -(-num_rows // 64) * 64)


def segment_bucket_for(num_segments: int) -> int:
    """The smallest length that holds so many segments."""
    return next((bucket for bucket in SEGMENT_BUCKETS if num_segments <= bucket), num_segments)


class Programs:
    """One kind of work, by its launch parameters."""

    def __init__(self, work: Callable[..., None], gpu: Gpu) -> None:
        self._work = work
        self._gpu = gpu
        self._captured: dict[tuple[int, ...], Callable[[], None] | None] = {}

    @property
    def num_captured(self) -> int:
        """How many graphs there are."""
        return sum(replay is not None for replay in self._captured.values())

    def run(self, *sizes: int) -> None:
        """Do the work for these launch parameters."""
        if sizes not in self._captured:
            self._captured[sizes] = None
            self._work(*sizes)
            return
        replay = self._captured[sizes]
        if replay is None:
            replay = self._captured[sizes] = self._gpu.capture(partial(self._work, *sizes))
        replay()
