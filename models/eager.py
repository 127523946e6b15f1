"""EagerRunner: one torch operation after the other. `launch` computes the whole step.

The order of a step: admissions, table changes, block copies; pack the batch; decoder; head, on the rows that need
logits; sample. While the same rows decode together, all that depends only on which rows they are is kept (`RowSet`), so
that a step packs token ids, positions and block tables and nothing else.

A plan that contradicts the slots is a bug of ours: AssertionError.

    T packed query tokens    W of them whose hidden states are wanted    R rows    D hidden    V vocabulary
    C blocks in the longest table
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NotRequired, TypedDict, Unpack

import numpy as np
import torch

from triode.cache.memory import return_freed_memory
from triode.cache.pool import KVPool
from triode.ids import SlotId, TokenId
from triode.kernels.threads import cpu_threads
from triode.models.batch import StepBatch, build_batch
from triode.models.grammar import GuideCompiler, check_guide, release_guide
from triode.models.guide import Guide
from triode.models.logprobs import score_positions
from triode.models.pooling import PooledHidden
from triode.models.program import StepProgram
from triode.models.runner import RunnerStatistics
from triode.models.sampler import SampledRows, Samples, likeliest, sample
from triode.models.slots import IntArray, Slots
from triode.models.step import Output, Pooling, RowError, StepPlan, StepResult, TokenLogprobs

_SAMPLING = frozenset({Output.SAMPLE, Output.PROMPT_LOGPROBS_AND_SAMPLE})
_SCORING = frozenset({Output.PROMPT_LOGPROBS, Output.PROMPT_LOGPROBS_AND_SAMPLE})


class RowSet:
    """The rows of a plan, and what follows from which they are."""

    def __init__(
        self, plan: StepPlan, slots: Slots, device: torch.device, overtaken: frozenset[int] = frozenset()
    ) -> None:
        """Rows in `overtaken` do not sample, whatever the plan says."""
        self.key = _row_key(plan)
        self.states = [slots.state(slot, epoch) for slot, epoch in zip(plan.slots, plan.epochs, strict=True)]
        self.slot_R = np.array(plan.slots)
        self.sampled = [row for row, output in enumerate(plan.outputs) if output in _SAMPLING and row not in overtaken]
        self.scored = [row for row, output in enumerate(plan.outputs) if output in _SCORING]
        self.pooled = [row for row, output in enumerate(plan.outputs) if output is Output.HIDDEN]
        self.sampling = SampledRows([self.states[row] for row in self.sampled], device) if self.sampled else None
        self.most_wanted_R = np.zeros(len(plan.slots), np.int64)
        """Of how many of its last query tokens each row needs the hidden states, if it has so many."""
        self.most_wanted_R[self.sampled] = 1
        self.most_wanted_R[self.scored + self.pooled] = np.iinfo(np.int64).max
        self.most_wanted_R[[row for row in self.pooled if self.states[row].pooling is Pooling.LAST]] = 1


def _row_key(plan: StepPlan) -> tuple[tuple[SlotId, ...], tuple[int, ...], tuple[Output, ...]]:
    return plan.slots, plan.epochs, plan.outputs


class RunnerSettings(TypedDict):
    """What a runner is told besides its decoder and pool."""

    max_running: int
    num_threads: NotRequired[int | None]
    """Torch's, while it computes; None leaves the number alone."""
    sampling_threads: NotRequired[int | None]
    guides: NotRequired[GuideCompiler | None]


class EagerRunner:
    """Runs plans over one decoder and one pool."""

    def __init__(
        self,
        decoder: StepProgram,
        pool: KVPool,
        **settings: Unpack[RunnerSettings],
    ) -> None:
        self._decoder = decoder
        self._pool = pool
        self._slots = Slots(
            settings["max_running"],
            decoder.config.max_context_tokens,
            pool.block_size_tokens,
            settings.get("guides"),
        )
        self._num_threads = settings.get("num_threads")
        self._sampling_threads = settings.get("sampling_threads")
        self._pooled: dict[SlotId, PooledHidden] = {}
        self._rows: RowSet | None = None
        self._results: deque[StepResult] = deque()
        self._statistics = RunnerStatistics()

    def check_guide(self, guide: Guide, num_requests: int = 1) -> None:
        """Compile a guide, and keep it for so many requests."""
        check_guide(self._slots.guides, guide, num_requests)

    def release_guide(self, guide: Guide, num_requests: int = 1) -> None:
        """So many requests that had the guide have ended."""
        release_guide(self._slots.guides, guide, num_requests)

    def launch(self, plan: StepPlan) -> None:
        """Begin the step."""
        self._begin(plan, time.perf_counter())

    def is_ready(self) -> bool:
        """Always, once a step is launched."""
        return bool(self._results)

    def collect(self) -> StepResult:
        """The oldest result; it is there."""
        return self._results.popleft()

    def statistics(self) -> RunnerStatistics:
        """A snapshot."""
        return self._statistics

    def close(self) -> None:
        """Drop decoder and pool, and with them their memory."""
        if self._slots.guides is not None:
            self._slots.guides.close()
        for part in ("_decoder", "_pool"):
            self.__dict__.pop(part, None)
        return_freed_memory()

    def _begin(self, plan: StepPlan, start_s: float) -> None:
        with torch.inference_mode(), cpu_threads(self._num_threads):
            self._results.append(self._compute(plan, self._apply(plan), start_s))

    def _compute(self, plan: StepPlan, rows: RowSet, start_s: float) -> StepResult:
        if overtaken := _overtaken(plan, rows):
            rows = RowSet(plan, self._slots, self._decoder.device, overtaken)
        batch = self._pack(plan, rows)
        if rows.sampling is not None:
            rows.sampling.begin()
        prepared_s = time.perf_counter()
        hidden_WD = self._decoder.forward(batch, self._pool.keys, self._pool.values)
        samples, logits_RV = self._head(hidden_WD, batch, rows)
        computed_s = time.perf_counter()
        if logits_RV is not None:
            assert rows.sampling is not None, "logits are computed of rows that sample"
            with cpu_threads(self._sampling_threads):
                samples = sample(logits_RV, rows.sampling)
        prompt_logprobs = self._score_prompts(hidden_WD, batch, rows, plan)
        embeddings = self._pool_hidden(hidden_WD, batch, rows, plan)
        forced = {} if samples is None else append_samples(samples, rows)
        end_s = time.perf_counter()
        self._count(plan, rows, prepared_s - start_s, computed_s - prepared_s, end_s - computed_s)
        return step_result(
            plan,
            rows,
            samples,
            forced=forced,
            prompt_logprobs=prompt_logprobs,
            embeddings=embeddings,
            forward_s=computed_s - start_s,
            sample_s=end_s - computed_s,
        )

    def _apply(self, plan: StepPlan) -> RowSet:
        """What a plan changes in slots and pool, and its rows."""
        for admission in plan.admissions:
            self._slots.admit(admission)
            self._pooled.pop(admission.slot, None)
        for change in plan.table_changes:
            self._slots.change_table(change)
        self._pool.copy(plan.copies)
        rows = self._rows
        if rows is None or rows.key != _row_key(plan):
            rows = self._rows = RowSet(plan, self._slots, self._decoder.device)
        return rows

    def _num_columns(self, num_blocks: int) -> int:
        """How many columns block tables are packed with, of which a step reads so many."""
        return num_blocks

    def _known_tokens(self, rows: RowSet) -> IntArray:
        """How many tokens each row's sequence has, as far as steps are concerned that come now."""
        return np.array([state.num_tokens for state in rows.states])

    def _pack(self, plan: StepPlan, rows: RowSet) -> StepBatch:
        start_R = np.array(plan.start_positions)
        num_query_R = np.array(plan.num_query_tokens)
        end_R = start_R + num_query_R
        known_R = self._known_tokens(rows)
        assert (end_R <= known_R).all(), f"step {plan.step_id} computes tokens that its slots do not have"
        assert (end_R == known_R)[rows.sampled].all(), f"step {plan.step_id} samples before the end of a sequence"
        num_blocks_R = (end_R - 1) // self._pool.block_size_tokens + 1
        table_RC = self._slots.table_SX[rows.slot_R, : self._num_columns(num_blocks_R.max())]
        assert table_RC[np.arange(len(table_RC)), num_blocks_R - 1].all(), f"step {plan.step_id} lacks a block"
        return build_batch(
            self._token_ids(rows.slot_R, start_R, end_R),
            start_R,
            num_query_R,
            table_RC,
            block_size_tokens=self._pool.block_size_tokens,
            row_multiple=self._decoder.kernels.row_multiple,
            device=self._decoder.device,
            num_wanted_R=np.minimum(num_query_R, rows.most_wanted_R),
        )

    def _token_ids(self, slot_R: IntArray, start_R: IntArray, end_R: IntArray) -> IntArray:
        tokens_SC = self._slots.tokens_SC
        if int((end_R - start_R).max()) == 1:
            return tokens_SC[slot_R, start_R]
        rows = zip(slot_R.tolist(), start_R.tolist(), end_R.tolist(), strict=True)
        return np.concatenate([tokens_SC[slot, start:end] for slot, start, end in rows])

    def _head(
        self, hidden_WD: torch.Tensor, batch: StepBatch, rows: RowSet
    ) -> tuple[Samples | None, torch.Tensor | None]:
        """What the rows get that sample, if their likeliest tokens are all they want, and otherwise their logits."""
        if rows.sampling is None:
            return None, None
        hidden_RD = hidden_WD
        if len(rows.sampled) < len(hidden_WD):
            last_R = torch.from_numpy(batch.wanted_start_R1[1:] - 1)
            hidden_RD = hidden_WD[last_R[rows.sampled].to(hidden_WD.device)]
        if rows.sampling.takes_likeliest:
            return likeliest(self._decoder.likeliest(hidden_RD).tolist()), None
        return None, self._decoder.logits(hidden_RD)

    def _score_prompts(
        self, hidden_WD: torch.Tensor, batch: StepBatch, rows: RowSet, plan: StepPlan
    ) -> tuple[tuple[TokenLogprobs, ...], ...] | None:
        if not rows.scored:
            return None
        scores: list[tuple[TokenLogprobs, ...]] = [()] * len(rows.states)
        for row in rows.scored:
            start, num_query = plan.start_positions[row], plan.num_query_tokens[row]
            next_ids = rows.states[row].tokens[start + 1 : start + num_query + 1].tolist()
            first = int(batch.wanted_start_R1[row])
            num_alternatives = rows.states[row].params.prompt_logprobs
            assert num_alternatives is not None, "a row is scored that asked for no prompt_logprobs"
            scores[row] = score_positions(hidden_WD[first:], next_ids, num_alternatives, self._decoder.logits)
        return tuple(scores)

    def _pool_hidden(
        self, hidden_WD: torch.Tensor, batch: StepBatch, rows: RowSet, plan: StepPlan
    ) -> tuple[tuple[float, ...], ...] | None:
        if not rows.pooled:
            return None
        embeddings: list[tuple[float, ...]] = [()] * len(rows.states)
        for row in rows.pooled:
            pooled = self._pooled.setdefault(plan.slots[row], PooledHidden(rows.states[row].pooling))
            assert pooled.num_positions == plan.start_positions[row], "pooled positions are consecutive"
            first, end = batch.wanted_start_R1[row : row + 2].tolist()
            pooled.add(hidden_WD[first:end], plan.num_query_tokens[row])
            if pooled.num_positions == rows.states[row].num_tokens:
                embeddings[row] = pooled.result()
        return tuple(embeddings)

    def _count(self, plan: StepPlan, rows: RowSet, prepare_s: float, forward_s: float, sample_s: float) -> None:
        before = self._statistics
        self._statistics = RunnerStatistics(
            num_steps=before.num_steps + 1,
            num_rows=before.num_rows + len(plan.slots),
            num_query_tokens=before.num_query_tokens + sum(plan.num_query_tokens),
            num_sampled_tokens=before.num_sampled_tokens + len(rows.sampled),
            prepare_s=before.prepare_s + prepare_s,
            forward_s=before.forward_s + forward_s,
            sample_s=before.sample_s + sample_s,
        )


def _overtaken(plan: StepPlan, rows: RowSet) -> frozenset[int]:
    """Rows that were planned before anyone knew of the tokens that a guide has forced: the last of them is no query."""
    if rows.sampling is None or rows.sampling.guided is None:
        return frozenset()
    guided = [rows.sampled[index] for index in rows.sampling.guided.row_G.tolist()]
    return frozenset(
        row for row in guided if plan.start_positions[row] + plan.num_query_tokens[row] < rows.states[row].num_tokens
    )


def append_samples(samples: Samples, rows: RowSet) -> dict[int, list[TokenId]]:
    """Sampled tokens become part of their sequences. Returns what guides force after them, by row."""
    forced: dict[int, list[TokenId]] = {}
    for row, token_id in zip(rows.sampled, samples.token_ids, strict=True):
        # A row without a token has failed. Any token takes its place, because a step that was planned before the
        # scheduler knew goes on from there.
        state = rows.states[row]
        state.append(TokenId(0) if token_id is None else token_id)
        if token_id is not None and state.matcher is not None:
            forced[row] = state.force()
    return forced


def step_result(
    plan: StepPlan,
    rows: RowSet,
    samples: Samples | None,
    *,
    forced: Mapping[int, Sequence[TokenId]] = MappingProxyType({}),
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...], ...] | None = None,
    embeddings: tuple[tuple[float, ...], ...] | None = None,
    forward_s: float = 0.0,
    sample_s: float = 0.0,
) -> StepResult:
    """What is told of a plan's step."""
    num_accepted = [0] * len(plan.slots)
    token_ids: list[TokenId] = []
    logprobs: list[TokenLogprobs | None] = []
    errors: list[RowError | None] = [None] * len(plan.slots)
    if samples is not None:
        for index, (row, token_id) in enumerate(zip(rows.sampled, samples.token_ids, strict=True)):
            if token_id is not None:
                following = forced.get(row, ())
                num_accepted[row] = 1 + len(following)
                token_ids += [token_id, *following]
                if samples.logprobs is not None:
                    logprobs += [samples.logprobs[index], *[None] * len(following)]
            elif samples.errors is not None:
                errors[row] = samples.errors[index]
    return StepResult(
        step_id=plan.step_id,
        slots=plan.slots,
        epochs=plan.epochs,
        num_accepted=tuple(num_accepted),
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs) if samples is not None and samples.logprobs is not None else None,
        errors=tuple(errors) if samples is not None and samples.errors is not None else None,
        prompt_logprobs=prompt_logprobs,
        embeddings=embeddings,
        forward_s=forward_s,
        sample_s=sample_s,
    )
