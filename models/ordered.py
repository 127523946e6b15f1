"""Compiled steps that are ordered before the ones before them are done, so that nothing of Python's lies between two steps.

A thread of the library computes orders one after the other. The tokens that a step finds are the queries of the next one, which
is ordered with their places left open.

    S wanted query tokens     N tokens that the order before finds     R rows     C blocks in the longest table
"""

import os
import weakref
from collections import deque
from collections.abc import Sequence
from ctypes import Structure, addressof, c_double, c_int64
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from triode.kernels.native.library import NativeLibrary, OrderStruct

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PendingTokens:
    """Query tokens that nobody knows yet."""

    index_N: Indices
    """Where in the batch they belong."""
    source_N: Indices
    """Which of the tokens they are that the order before finds."""


class Outcome(Structure):
    """What an order leaves behind, besides tokens."""

    _fields_ = (("is_computed", c_int64), ("seconds", c_double))

    is_computed: int
    seconds: float


class OrderedStep:
    """One order. `token_S` and `seconds` are there once it is done."""

    __slots__ = ("_kept", "_outcome", "number", "token_S")

    def __init__(self, token_S: Indices, outcome: Outcome, kept: object) -> None:
        """`kept` is all that the order's addresses point to."""
        self.number = 0
        self.token_S = token_S
        """The likeliest token behind each wanted one, -1 where none is possible."""
        self._outcome = outcome
        self._kept = kept

    @property
    def seconds(self) -> float:
        """How long it took."""
        return float(self._outcome.seconds)

    def check(self) -> None:
        """Raises ValueError: the batch named what does not exist; nothing was computed."""
        if not self._outcome.is_computed:
            raise ValueError("batch must hold tokens, positions, slots and blocks that exist, got one that does not")


class Results:
    """Memory for an order's results, and where it is."""

    def __init__(self, num_wanted: int) -> None:
        self.token_S = np.zeros(num_wanted, np.int64)
        self.outcome = Outcome()
        self._tokens = self.token_S.ctypes.data
        self._outcome = addressof(self.outcome)

    def fill(self, struct: OrderStruct) -> None:
        """Name it to the library."""
        struct.tokens = self._tokens
        struct.is_computed = self._outcome
        struct.seconds = self._outcome + Outcome.seconds.offset  # type: ignore[attr-defined]


class DecodingRun:
    """Rows that decode together, step after step: an order like the one before it, one token further.

    The library moves the arrays of the batch itself. Python has only to add blocks to their tables.
    """

    def __init__(self, order: OrderStruct, results: Results, kept: tuple[object, ...], table_RC: Indices) -> None:
        """`order` is the first one, in which each row has one query token, which is wanted; its table has room."""
        self._order = order
        self._table_RC = table_RC
        # The library writes to one, Python reads another, and the next one is not to be either of them.
        self._ring = deque([results, *(Results(len(table_RC)) for _ in range(3))])
        self._all_R = np.arange(len(table_RC))
        self._kept = (kept, self._ring, self._all_R)
        batch = order.batch
        order.positions, order.start, order.slots = batch.positions, batch.start, batch.slots
        order.num_pending = len(table_RC)
        order.pending = order.sources = self._all_R.ctypes.data

    @property
    def num_columns(self) -> int:
        """Blocks that a row can have."""
        return int(self._table_RC.shape[1])

    def set_blocks(self, row: int, first: int, block_ids: Sequence[int]) -> None:
        """More blocks of a row. Those that a step reads, which may be under way, are not among them."""
        self._table_RC[row, first : first + len(block_ids)] = block_ids

    def has_block(self, row: int, column: int) -> bool:
        """Whether a row's table has that block."""
        return bool(self._table_RC[row, column])

    def next(self) -> tuple[OrderedStep, OrderStruct]:
        """The next step, and what to submit."""
        order = self._order
        order.previous_tokens = order.tokens
        self._ring.rotate(-1)
        results = self._ring[0]
        results.fill(order)
        return OrderedStep(results.token_S, results.outcome, self._kept), order


class OrderBook:
    """The library's thread, and what its orders need.

    Raises:
        OSError: the system starts no more threads.
    """

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        self._handle = library.open_pipeline()
        self._outstanding: deque[OrderedStep] = deque()
        # Orders that nobody waits for are computed at the end, and what they need is kept until then.
        self.close = weakref.finalize(self, _close, library, self._handle, self._outstanding, os.getpid())
        """Compute what has been ordered, and end the thread."""
        self.close.atexit = False

    def submit(self, step: OrderedStep, struct: OrderStruct) -> None:
        """Have a step computed after those before it."""
        while self._outstanding and self.wait(self._outstanding[0], 0.0):
            self._outstanding.popleft()
        self._outstanding.append(step)
        step.number = self._library.submit(self._handle, struct)

    def wait(self, step: OrderedStep, wait_s: float | None = None) -> bool:
        """Whether a step is done, after waiting for at most `wait_s`; None is for ever."""
        return self._library.wait(self._handle, step.number, wait_s)

    def wait_for_all(self) -> None:
        """Until nothing is under way."""
        if self._outstanding:
            self.wait(self._outstanding[-1])


def _close(library: NativeLibrary, handle: int, _: "deque[OrderedStep]", owner: int) -> None:
    # A forked child has the memory of the thread, but not the thread.
    if os.getpid() == owner:
        library.close_pipeline(handle)
