"""What the host knows of the batch on the device, and how a plan becomes changes and packed arrays.

The host never learns a token before it needs to: it counts. `known_S` counts a slot's tokens, the samples of launched
steps included, whose values only the device has; `newest_S` is the position of the token that the device will compute
next by itself. A row whose token the device has needs nothing; any other token is among the first `held_S`: those of its
admission, or all up to the last one that a guide has forced.

Logits that depend on a sequence's tokens are changed on the device, which therefore knows the tokens of such sequences:
those of the admission and those that a guide forces are sent, and it adds what it samples.

A row that was planned before anyone knew of forced tokens ends before the last of them. It is computed as planned, and
what it samples, which counts for nobody, is the next of these tokens (`overtaken`).

`lock` is for what the thread that launches shares with the one that collects.

    R rows    Q rows that sample    T packed query tokens    S slots    C tokens of the longest sequence
    X blocks of the longest table    B block size
"""

import threading
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from triode.ids import TokenId
from triode.models.cuda.arena import ArenaLayout, Changes, Words, aligned
from triode.models.cuda.past import looks_back
from triode.models.grammar import GuideCompiler
from triode.models.slots import Slots, SlotState
from triode.models.step import Output, StepPlan

SAMPLING = frozenset({Output.SAMPLE, Output.PROMPT_LOGPROBS_AND_SAMPLE})
"""Outputs that add a token to the sequence."""

# The device knows nothing of a slot that was just admitted.
_UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A prefill or mixed step as one array of words, rows with several query tokens before those with one.

    Padding rows have no tokens and belong to nobody; padding tokens go to block 0, and no row sees them.
    """

    words: Words
    """query_start_R1, start_R, end_R, slot_R, then sample_token_Q, sample_end_Q, sample_slot_Q, then token_T, position_T,
    kv_slot_T: one after the other, each at a multiple of `ALIGNED_WORDS`. For a step of fixed shape Q is R, if anybody
    samples."""
    order: Words
    """The plan's row at each packed row."""
    num_tokens: int
    """T, padding included, like the next two."""
    num_rows: int
    num_sampled: int
    num_long: int
    """Rows with several query tokens."""
    num_long_tokens: int
    max_query_tokens: int
    longest: int
    """No row ends beyond this position."""
    sampled: Words
    """The plan's rows that sample, in packed order."""
    query_start_R1: Words
    """On the host, for what reads single rows' hidden states."""


class HostBatch:
    """The slots as the host sees them."""

    def __init__(
        self,
        layout: ArenaLayout,
        max_context_tokens: int,
        block_size_tokens: int,
        guides: GuideCompiler | None = None,
    ) -> None:
        self.lock = threading.Lock()
        self._layout = layout
        self._block_size = block_size_tokens
        self._slots = Slots(layout.num_slots, max_context_tokens, block_size_tokens, guides)
        self._epoch_S = np.zeros(layout.num_slots, np.int64)
        self._held_S = np.zeros(layout.num_slots, np.int64)
        self._known_S = np.zeros(layout.num_slots, np.int64)
        self._newest_S = np.full(layout.num_slots, _UNKNOWN, np.int64)
        self._position_C = np.arange(max(max_context_tokens, block_size_tokens), dtype=np.int32)
        self._row_slots: tuple[int, ...] = ()
        self._unsent: list[tuple[int, int, Words]] = []
        """Slot, position and tokens that belong in histories on the device."""

    def apply(self, plan: StepPlan, changes: Changes) -> None:
        """Take in admissions and table changes."""
        for admission in plan.admissions:
            self._slots.admit(admission)
            self._send_history(self._slots.state(admission.slot, admission.epoch), admission.slot, 0)
            self._epoch_S[admission.slot] = admission.epoch
            self._held_S[admission.slot] = self._known_S[admission.slot] = admission.num_tokens
            self._newest_S[admission.slot] = _UNKNOWN
            changes.admit(admission)
        for change in plan.table_changes:
            changes.set_table(change.slot, change.first_block, self._slots.change_table(change))
        for slot, position, tokens in self._unsent:
            changes.set_history(slot, position, tokens)
        self._unsent.clear()

    def states(self, plan: StepPlan) -> list[SlotState]:
        """The sequence of each row."""
        return [self._slots.state(slot, epoch) for slot, epoch in zip(plan.slots, plan.epochs, strict=True)]

    def learn(self, state: SlotState, slot: int, token_id: int) -> list[TokenId]:
        """A token that the device chose for a row with a guide becomes part of the host's copy. Returns those that the
        guide forces behind it.

        A row that failed goes on from token 0.
        """
        # A slot's history is overwritten by its next sequence.
        if self._epoch_S[slot] != state.epoch:
            return []
        state.append(TokenId(max(token_id, 0)))
        forced = state.force() if token_id >= 0 else []
        if forced:
            self._known_S[slot] = self._held_S[slot] = state.num_tokens
            self._send_history(state, slot, state.num_tokens - len(forced))
        return forced

    def check(self, plan: StepPlan, *, every_row_samples: bool) -> tuple[Words, Words, Words]:
        """Slot, start and end of each row. A plan that contradicts the slots is a bug of ours: AssertionError."""
        slot_R = np.array(plan.slots, np.int32)
        start_R = np.array(plan.start_positions, np.int32)
        end_R = start_R + np.array(plan.num_query_tokens, np.int32)
        known_R = self._known_S[slot_R]
        ends_R = end_R == known_R
        if not ends_R.all():
            assert (end_R <= known_R).all(), f"step {plan.step_id} computes tokens that its slots do not have"
            ends_R |= self._is_overtaken(plan, slot_R, end_R)
            if not every_row_samples:
                ends_R |= np.fromiter((output not in SAMPLING for output in plan.outputs), bool, len(slot_R))
            assert ends_R.all(), f"step {plan.step_id} samples before the end of a sequence"
        last_block_R = self._slots.table_SX[slot_R, (end_R - 1) // self._block_size]
        assert last_block_R.all(), f"step {plan.step_id} lacks a block"
        return slot_R, start_R, end_R

    def decode(self, plan: StepPlan, slot_R: Words, start_R: Words, changes: Changes) -> None:
        """Make the device ready for a step in which every row computes and samples one token."""
        if self._row_slots != plan.slots:
            rows = np.full(self._layout.num_rows, self._layout.nobody, np.int32)
            rows[: len(slot_R)] = slot_R
            changes.set_rows(rows)
            self._row_slots = plan.slots
        stale = (self._newest_S[slot_R] != start_R).nonzero()[0]
        if len(stale):
            slots, starts = slot_R[stale], start_R[stale]
            self._check_host_has((starts < self._held_S[slots]).all(), plan)
            changes.set_newest(slots, self._slots.tokens_SC[slots, starts], starts)
        self._count_samples(slot_R, start_R + 1)

    def pack(
        self, plan: StepPlan, slot_R: Words, start_R: Words, end_R: Words, shape: tuple[int, int] | None = None
    ) -> PackedRows:
        """The arrays of any other step; `shape` is the number of tokens and of rows to pad to."""
        nums, outputs = plan.num_query_tokens, plan.outputs
        long = [row for row, num in enumerate(nums) if num > 1]
        short = [row for row, num in enumerate(nums) if num == 1]
        order = long + short
        first_R1 = [0, *accumulate([nums[row] for row in order])]
        sampling = [place for place, row in enumerate(order) if outputs[row] in SAMPLING]
        num_tokens, num_long = first_R1[-1], len(long)
        T, R = shape or (num_tokens, len(order))
        Q = R if shape and sampling else len(sampling)
        words, parts = packed_parts(T, R, Q)
        query_start_R1, packed_start_R, packed_end_R, packed_slot_R = parts[:4]
        sample_token_Q, sample_end_Q, sample_slot_Q = parts[4:7]
        query_start_R1[:] = num_tokens
        query_start_R1[: len(first_R1)] = first_R1
        packed_slot_R[:] = sample_slot_Q[:] = self._layout.nobody
        order_R = np.array(order, np.int32)
        num_rows, num_sampled = len(order), len(sampling)
        packed_start_R[:num_rows] = start_R[order_R]
        packed_end_R[:num_rows] = end_R[order_R]
        packed_slot_R[:num_rows] = slot_R[order_R]
        sampled = order_R[sampling]
        sample_token_Q[:num_sampled] = query_start_R1[1:][sampling] - 1
        sample_end_Q[:num_sampled] = end_R[sampled]
        sample_slot_Q[:num_sampled] = slot_R[sampled]
        # A prompt is a slice of its slot: no token is looked at by itself.
        for row, first in zip(long, first_R1, strict=False):
            self._pack_long(plan, row, [part[first : first + nums[row]] for part in parts[7:]])
        if short:
            places = slice(first_R1[num_long], num_tokens)
            self._pack_short(plan, slot_R[short], start_R[short], [part[places] for part in parts[7:]])
        self._count_samples(slot_R[sampled], end_R[sampled])
        return PackedRows(
            words=words,
            order=order_R,
            num_tokens=T,
            num_rows=R,
            num_sampled=Q,
            num_long=num_long,
            num_long_tokens=first_R1[num_long],
            max_query_tokens=max(nums),
            longest=int(end_R.max()),
            sampled=sampled,
            query_start_R1=query_start_R1[: num_rows + 1],
        )

    def _pack_long(self, plan: StepPlan, row: int, parts: list[Words]) -> None:
        """A row with several query tokens: its tokens, their positions and their places in the cache."""
        slot, start, size = plan.slots[row], plan.start_positions[row], self._block_size
        end = start + plan.num_query_tokens[row]
        self._check_host_has(end <= self._held_S[slot], plan)
        token_T, position_T, kv_slot_T = parts
        token_T[:] = self._slots.tokens_SC[slot, start:end]
        position_T[:] = self._position_C[start:end]
        first_block = start // size
        block_X = self._slots.table_SX[slot, first_block : -(-end // size)]
        kv_slot_XB = block_X[:, None] * size + self._position_C[:size]
        kv_slot_T[:] = kv_slot_XB.ravel()[start - first_block * size :][: len(kv_slot_T)]

    def _pack_short(self, plan: StepPlan, slot_R: Words, start_R: Words, parts: list[Words]) -> None:
        """The rows with one query token; -1 - s stands for it where only the device knows the one of slot s."""
        on_device_R = self._newest_S[slot_R] == start_R
        self._check_host_has(((start_R < self._held_S[slot_R]) | on_device_R).all(), plan)
        token_T, position_T, kv_slot_T = parts
        token_T[:] = np.where(on_device_R, -1 - slot_R, self._slots.tokens_SC[slot_R, start_R])
        position_T[:] = start_R
        block_R = self._slots.table_SX[slot_R, start_R // self._block_size]
        kv_slot_T[:] = block_R * self._block_size + start_R % self._block_size

    def _send_history(self, state: SlotState, slot: int, position: int) -> None:
        if looks_back(state):
            self._unsent.append((slot, position, state.tokens[position:].astype(np.int32)))

    @staticmethod
    def _check_host_has(has: bool | np.bool_, plan: StepPlan) -> None:
        assert has, f"step {plan.step_id} needs tokens that neither host nor device keeps"

    def _count_samples(self, slots: Words, ends: Words) -> None:
        # An overtaken row's sample is among the known ones.
        self._known_S[slots] = np.maximum(self._known_S[slots], ends + 1)
        self._newest_S[slots] = ends

    def _is_overtaken(self, plan: StepPlan, slot_R: Words, end_R: Words) -> npt.NDArray[np.bool_]:
        is_overtaken_R = end_R < self._held_S[slot_R]
        for row in is_overtaken_R.nonzero()[0].tolist():
            state = self._slots.state(plan.slots[row], plan.epochs[row])
            is_overtaken_R[row] = state.matcher is not None and end_R[row] > state.num_prompt_tokens
        return is_overtaken_R


def packed_starts(num_tokens: int, num_rows: int, num_sampled: int) -> tuple[list[int], list[int]]:
    """Where each array of `PackedRows.words` begins, and where the last one ends; and how long each is."""
    sizes = [num_rows + 1, *[num_rows] * 3, *[num_sampled] * 3, *[num_tokens] * 3]
    return [0, *accumulate(map(aligned, sizes))], sizes


def packed_parts(num_tokens: int, num_rows: int, num_sampled: int) -> tuple[Words, list[Words]]:
    """`PackedRows.words`, all zeros, and its arrays."""
    starts, sizes = packed_starts(num_tokens, num_rows, num_sampled)
    words = np.zeros(starts[-1], np.int32)
    return words, [words[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def is_decode(plan: StepPlan) -> bool:
    """Whether every row computes one token and samples the next."""
    num_rows = len(plan.slots)
    return plan.num_query_tokens == (1,) * num_rows and plan.outputs == (Output.SAMPLE,) * num_rows
