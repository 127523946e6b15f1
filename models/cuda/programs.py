"""Steps as captured work: decode steps for each size of the batch, short prefill steps for a few shapes.

Launching a step kernel by kernel takes the host longer than a short step takes the device, so only prefill steps of many
tokens are launched that way. A start captures the sizes that steps choose from; any other is computed operation by operation
the first time, which loads what it needs, and captured the second time. Graphs share one memory pool, and all work on the same
buffers; their launch parameters depend on the size alone.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

from triode.models.cuda.gpu import Gpu

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Decode steps are padded to one of these numbers of rows, or to a multiple of 64 beyond."""

PREFILL_TOKENS = (16, 32, 48, 64, 128, 256, 384, 512, 640, 768, 896, 1024)
"""Short prefill and mixed steps are padded to one of these numbers of tokens, ..."""
PREFILL_ROWS = (1, 4, 16, 64, 256)
"""... and of rows."""

SEGMENT_BUCKETS = (4, 16, 64, 256, 1024)
"""Attention is launched for rows of up to so many segments of 512 tokens."""


def bucket_for(num_rows: int) -> int:
    """The smallest size that holds so many rows."""
    return next((bucket for bucket in BUCKETS if num_rows <= bucket), -(-num_rows // 64) * 64)


def prefill_shape(num_tokens: int, num_rows: int, max_rows: int) -> tuple[int, int] | None:
    """Tokens and rows of the smallest captured step that holds so many; None where there is none."""
    tokens = next((size for size in PREFILL_TOKENS if num_tokens <= size), None)
    rows = next((size for size in PREFILL_ROWS if num_rows <= size), max_rows)
    return None if tokens is None else (tokens, min(rows, max_rows))


def prefill_sizes(max_tokens: int, max_rows: int, max_row_tokens: int) -> Iterator[tuple[int, int]]:
    """The most tokens, and the fewest rows that hold them, of each captured step of at most so many."""
    row_limits = [min(size, max_rows) for size in (*PREFILL_ROWS, max_rows)]
    for fewer_tokens, most_tokens in pairwise((0, *PREFILL_TOKENS)):
        for fewer_rows, most_rows in pairwise((0, *row_limits)):
            num_tokens = min(most_tokens, max_tokens, most_rows * max_row_tokens)
            num_rows = max(fewer_rows + 1, -(-num_tokens // max_row_tokens))
            # At least one row has several tokens.
            if num_tokens > max(fewer_tokens, num_rows) and num_rows <= most_rows:
                yield num_tokens, num_rows


def decode_sizes(max_rows: int) -> Iterator[int]:
    """The most rows of each captured decode step of at most so many."""
    num_rows = 0
    while num_rows < max_rows:
        num_rows = min(bucket_for(num_rows + 1), max_rows)
        yield num_rows


def segment_bucket_for(num_segments: int) -> int:
    """The smallest length that holds so many segments."""
    return next((bucket for bucket in SEGMENT_BUCKETS if num_segments <= bucket), num_segments)


Kinds = tuple[tuple[tuple[int, ...], ...], ...]
"""Launch parameters that occur, of each work."""


class Programs:
    """One kind of work, by its launch parameters."""

    def __init__(self, work: Callable[..., None], gpu: Gpu) -> None:
        self._work = work
        self._gpu = gpu
        self._captured: dict[tuple[int, ...], Callable[[], None] | None] = {}

    @property
    def kinds(self) -> tuple[tuple[int, ...], ...]:
        """The launch parameters that have occurred."""
        return tuple(self._captured)

    def capture(self, *sizes: int) -> None:
        """What the work for these launch parameters needs has been compiled and loaded: capture it before it is done."""
        self._captured[sizes] = self._gpu.capture(partial(self._work, *sizes))

    def forget(self) -> None:
        """Drop the graphs, and the work itself, which holds on to whoever holds this."""
        self._captured.clear()
        del self._work

    def run(self, *sizes: int) -> None:
        """Do the work for these launch parameters."""
        if sizes not in self._captured:
            self._captured[sizes] = None
            self._work(*sizes)
            return
        if self._captured[sizes] is None:
            self.capture(*sizes)
        replay = self._captured[sizes]
        assert replay is not None, "it has just been captured"
        replay()
