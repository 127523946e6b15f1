"""AheadRunner: an `EagerRunner` over the compiled step that launches a step while the one before it is computed.

Rows that take the likeliest token need nothing of Python's between two steps: the library finds their tokens and goes on with
the next order (`models/ordered.py`). While it computes one, `launch` prepares the next. A plan with copied blocks or a new
sequence in a slot waits until nothing is under way. So does one that asks for more (random draws, guides, logprobs,
embeddings), and is then computed as `EagerRunner` does.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch

from triode.cache.pool import KVPool
from triode.kernels.threads import cpu_threads
from triode.models.eager import EagerRunner, RowSet, RunnerSettings, append_samples, step_result
from triode.models.native import NativeDecoder
from triode.models.ordered import DecodingRun, OrderedStep, PendingTokens
from triode.models.runner import nobody_waits
from triode.models.sampler import likeliest
from triode.models.slots import IntArray, SlotState
from triode.models.step import StepPlan, StepResult, TableChange

_READY_WAIT_S = 0.0005
"""How long `is_ready` waits for a step that is under way: asking again and again would take a processor from it."""
_ROOM_BLOCKS = 8
"""Blocks that a row may get before its table is packed anew."""
_NOTHING: dict[SlotState, int] = {}


@dataclass(eq=False, slots=True)
class _Flight:
    """A step that was ordered."""

    plan: StepPlan
    rows: RowSet
    step: OrderedStep
    prepare_s: float
    token_of: dict[SlotState, int]
    """Which of the tokens that it finds belongs to a sequence."""
    result: StepResult | None = None
    """There once it is settled."""


class _Run:
    """Plans that differ from each other in nothing but that each row is one token further."""

    def __init__(self, decoding: DecodingRun, flight: _Flight, block_size_tokens: int) -> None:
        self.decoding = decoding
        self.rows = flight.rows
        self.token_of = flight.token_of
        self._block_size = block_size_tokens
        self._row_of = {slot: row for row, slot in enumerate(flight.plan.slots)}
        self._last = flight.plan
        self._starts = _one_further(flight.plan)

    def continues(self, plan: StepPlan) -> bool:
        """Whether a plan is the next one."""
        last = self._last
        return (
            plan.start_positions == self._starts
            and plan.num_query_tokens == last.num_query_tokens
            and plan.slots == last.slots
            and plan.epochs == last.epochs
            and plan.outputs == last.outputs
            and not plan.admissions
            and not plan.copies
            and max(self._starts) < self.decoding.num_columns * self._block_size
            and all(map(self._fits, plan.table_changes))
        )

    def go_on(self, plan: StepPlan) -> None:
        """Take the next plan."""
        for change in plan.table_changes:
            row = self._row_of.get(change.slot)
            if row is not None:
                self.decoding.set_blocks(row, change.first_block, change.block_ids)
        for row, start in enumerate(plan.start_positions):
            is_there = start % self._block_size or self.decoding.has_block(row, start // self._block_size)
            assert is_there, f"step {plan.step_id} lacks a block"
        self._last = plan
        self._starts = _one_further(plan)

    def _fits(self, change: TableChange) -> bool:
        """Whether a change adds blocks that no step has read, and there is room for them."""
        row = self._row_of.get(change.slot)
        if row is None:
            return True
        is_new = change.first_block * self._block_size >= self._starts[row]
        return is_new and change.first_block + len(change.block_ids) <= self.decoding.num_columns


def _one_further(plan: StepPlan) -> tuple[int, ...]:
    return tuple([start + 1 for start in plan.start_positions])


class AheadRunner(EagerRunner):
    """Runs plans over one compiled decoder and one pool.

    Raises:
        OSError: the system starts no more threads.
    """

    def __init__(self, decoder: NativeDecoder, pool: KVPool, **settings: Unpack[RunnerSettings]) -> None:
        super().__init__(decoder, pool, **settings)
        self._native = decoder
        decoder.begin_orders()
        # Held while sequences are read or grow: `launch` and `collect` are called by different threads.
        self._sequences = threading.Lock()
        self._unsettled: deque[_Flight] = deque()
        self._launched: deque[_Flight | StepResult] = deque()
        self._run: _Run | None = None
        self.hand_over: Callable[[], None] = nobody_waits

    def is_ready(self) -> bool:
        """Whether the oldest step is done, after a moment of waiting for it."""
        if not self._launched:
            return False
        oldest = self._launched[0]
        return isinstance(oldest, StepResult) or self._native.wait(oldest.step, _READY_WAIT_S)

    def collect(self) -> StepResult:
        """The oldest result; waits for it."""
        oldest = self._launched.popleft()
        if isinstance(oldest, StepResult):
            return oldest
        self._native.wait(oldest.step)
        with self._sequences:
            while oldest.result is None:
                self._settle_first()
        return oldest.result

    def close(self) -> None:
        """Let what is under way end, and drop decoder and pool, and with them their memory."""
        while self._unsettled:
            self._native.wait(self._unsettled.popleft().step)
        self._launched.clear()
        for part in ("_native", "_run"):
            self.__dict__.pop(part, None)
        super().close()

    def _begin(self, plan: StepPlan, start_s: float) -> None:
        """Order the step, or compute it at once if it asks for more than the likeliest tokens."""
        with self._sequences:
            if self._run is not None and self._run.continues(plan):
                self._launched.append(self._go_on(plan, self._run, start_s))
                return
            self._run = None
        with torch.inference_mode(), cpu_threads(self._num_threads):
            with self._sequences:
                if plan.admissions or plan.copies:
                    self._settle(0)
                rows = self._apply(plan)
                if _goes_ahead(rows):
                    # An order knows only the tokens of the one before it.
                    self._settle(1)
                    self._launched.append(self._order(plan, rows, start_s))
                    return
                self._settle(0)
            # Nothing is left to settle: whoever collects the step before this one, in another thread or here, need not
            # wait for it.
            self.hand_over()
            self._launched.append(self._compute(plan, rows, start_s))

    def _num_columns(self, num_blocks: int) -> int:
        return num_blocks + _ROOM_BLOCKS

    def _known_tokens(self, rows: RowSet) -> IntArray:
        coming = self._coming()
        return np.array([state.num_tokens + (state in coming) for state in rows.states])

    def _coming(self) -> dict[SlotState, int]:
        """Sequences that get a token from the step that is under way, and which."""
        return self._unsettled[-1].token_of if self._unsettled else _NOTHING

    def _order(self, plan: StepPlan, rows: RowSet, start_s: float) -> _Flight:
        batch = self._pack(plan, rows)
        pending = self._pending(plan, rows, batch.rows.query_start_R1[1:] - 1)
        before = self._unsettled[-1].step if self._unsettled else None
        step, decoding = self._native.order(batch, self._pool.keys, self._pool.values, pending, before)
        token_of = {rows.states[row]: index for index, row in enumerate(rows.sampled)}
        flight = _Flight(plan, rows, step, time.perf_counter() - start_s, token_of)
        self._unsettled.append(flight)
        if decoding is not None:
            self._run = _Run(decoding, flight, self._pool.block_size_tokens)
        return flight

    def _go_on(self, plan: StepPlan, run: _Run, start_s: float) -> _Flight:
        for change in plan.table_changes:
            self._slots.change_table(change)
        run.go_on(plan)
        # An order knows only the tokens of the one before it.
        self._settle(1)
        step = self._native.go_on(run.decoding)
        flight = _Flight(plan, run.rows, step, time.perf_counter() - start_s, run.token_of)
        self._unsettled.append(flight)
        return flight

    def _pending(self, plan: StepPlan, rows: RowSet, last_R: IntArray) -> PendingTokens:
        """Rows whose last query token the step under way has yet to find."""
        coming = self._coming()
        waiting = [
            (row, coming[state])
            for row, state in enumerate(rows.states)
            if state in coming and plan.start_positions[row] + plan.num_query_tokens[row] > state.num_tokens
        ]
        row_N = np.array([row for row, _ in waiting], np.int64)
        return PendingTokens(last_R[row_N].astype(np.int64), np.array([source for _, source in waiting], np.int64))

    def _settle(self, num_left: int) -> None:
        while len(self._unsettled) > num_left:
            self._settle_first()

    def _settle_first(self) -> None:
        """Add what the oldest step has found to its sequences."""
        flight = self._unsettled[0]
        self._native.wait(flight.step)
        flight.step.check()
        samples = likeliest(flight.step.token_S.tolist()) if flight.rows.sampled else None
        if samples is not None:
            append_samples(samples, flight.rows)
        self._unsettled.popleft()
        self._count(flight.plan, flight.rows, flight.prepare_s, flight.step.seconds, 0.0)
        flight.result = step_result(flight.plan, flight.rows, samples, forward_s=flight.step.seconds)


def _goes_ahead(rows: RowSet) -> bool:
    is_plain = rows.sampling is None or rows.sampling.takes_likeliest
    return is_plain and not rows.scored and not rows.pooled
