"""CudaRunner: the batch lives on the device, and the host runs ahead of it.

A decode step is two pieces of captured work: *forward to logits*, and *sample and advance*. Both read the batch from the
arena, so a steady decode step sends nothing but new block-table entries, and its successor can be launched before
anyone has seen its tokens. Prefill and mixed steps run the same kernels on arrays that the host packs: captured up to
some 1,000 tokens, one by one beyond.

Where the host waits. `launch` does so in two cases only. Rows with guides have masks that follow from the host's copy of
their tokens: it waits for those of the step before, while the forward of this one runs, and lets that step's result go
before it makes the masks. And rows that want prompt logprobs or embeddings read their step's hidden states. Everything
else is read in `collect`, which waits for its own step alone; what else changes logits with the tokens so far (penalties,
bad_words, no_repeat_ngram_size, min_tokens) is computed on the device, from histories that are kept there.

`launch` belongs to one thread and `collect` to one thread; they may differ.

    T packed query tokens        R rows        Q rows that sample        D hidden        V vocabulary
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch

from triode.cache.pool import KVPool
from triode.ids import TokenId
from triode.kernels.guide_mask.gpu import forbid
from triode.models.cuda.arena import Arena, Changes, Words, layout_for
from triode.models.cuda.batch import HostBatch, PackedRows, is_decode
from triode.models.cuda.decoder import CudaDecoder
from triode.models.cuda.flight import Flight
from triode.models.cuda.gpu import Gpu, Mark
from triode.models.cuda.hidden import READING_HIDDEN, Embeddings, PromptScores, RowEmbeddings, score_prompts
from triode.models.cuda.histories import Histories
from triode.models.cuda.past import Ends
from triode.models.cuda.programs import Kinds, prefill_shape
from triode.models.cuda.sampling import SampledSet
from triode.models.cuda.steps import DeviceSteps
from triode.models.cuda.tally import Tally
from triode.models.cuda.waking import Waking
from triode.models.grammar import GuideCompiler, check_guide, release_guide
from triode.models.guide import Guide
from triode.models.guided import GuidedRows
from triode.models.runner import RunnerStatistics, nobody_waits
from triode.models.step import StepPlan, StepResult


class CudaRunner:
    """Runs plans over one decoder and one pool on one GPU. `resources`, the GPU's own among them, go when it is closed."""

    def __init__(
        self,
        decoder: CudaDecoder,
        pool: KVPool,
        gpu: Gpu,
        *,
        max_running: int,
        guides: GuideCompiler | None = None,
        resources: ExitStack | None = None,
    ) -> None:
        self._gpu = gpu
        self._guides = guides
        self._resources = resources or ExitStack()
        block_size, max_context = pool.block_size_tokens, decoder.config.max_context_tokens
        layout = layout_for(max_running, max_context, block_size)
        self._host = HostBatch(layout, max_context, block_size, guides)
        self._changes = Changes(layout)
        with gpu.active():
            self._steps: DeviceSteps | None = DeviceSteps(decoder, pool, Arena(layout, gpu), gpu)
            self._waking: Waking | None = Waking(block_size, gpu)
        self._embeddings = Embeddings()
        self._set_key: object = None
        self._set: SampledSet | None = None
        self._flights: deque[Flight] = deque()
        self._histories = Histories(self._host)
        self._tally = Tally()
        self.hand_over: Callable[[], None] = nobody_waits

    def check_guide(self, guide: Guide, num_requests: int = 1) -> None:
        """Compile a guide, and keep it for so many requests."""
        check_guide(self._guides, guide, num_requests)

    def release_guide(self, guide: Guide, num_requests: int = 1) -> None:
        """So many requests that had the guide have ended."""
        release_guide(self._guides, guide, num_requests)

    def kinds(self) -> Kinds:
        """The kinds of captured work that steps have asked for."""
        assert self._steps is not None, "not asked behind close"
        return self._steps.kinds()

    def capture(self, kinds: Kinds) -> None:
        """Capture work of these kinds before a step asks for it."""
        assert self._steps is not None, "nothing is captured behind close"
        with self._gpu.active():
            self._steps.capture(kinds)

    def wake(self, has_come: Callable[[], bool]) -> None:
        """Go the way of a launch, without a step."""
        assert self._waking is not None, "no wake follows close"
        with self._gpu.active():
            self._waking.wake(has_come)

    def launch(self, plan: StepPlan) -> None:
        """Send the step on its way."""
        start_s = time.perf_counter()
        steps = self._steps
        assert steps is not None, "no launch follows close"
        with self._gpu.active():
            decodes = is_decode(plan)
            with self._host.lock:
                self._host.apply(plan, self._changes)
                slot_R, start_R, end_R = self._host.check(plan, every_row_samples=decodes)
            for admission in plan.admissions:
                self._embeddings.forget(admission.slot)
            launch = self._launch_decode if decodes else self._launch_mixed
            self._flights.append(launch(steps, plan, slot_R, start_R, end_R))
        self._tally.launched(plan, time.perf_counter() - start_s)

    def is_ready(self) -> bool:
        """Whether the device is done with the oldest step not collected yet."""
        return bool(self._flights) and self._flights[0].ended.is_passed()

    def collect(self) -> StepResult:
        """The result of the oldest step not collected yet; waits for the device."""
        flight = self._flights.popleft()
        if flight.may_force:
            flight.ended.wait()
            self._histories.learn_until(flight)
        result = flight.result()
        self._tally.collected(result)
        return result

    def statistics(self) -> RunnerStatistics:
        """A snapshot. Forward and sampling are device time, preparing is host time."""
        return self._tally.statistics()

    def close(self) -> None:
        """Wait for what runs, then give back all memory of the device."""
        if self._steps is None:
            return
        self.forget()
        if self._guides is not None:
            self._guides.close()
        self._resources.close()

    def forget(self) -> None:
        """Wait for what runs, then drop decoder, pool and all that was captured, but leave the device in use."""
        self._gpu.wait()
        if self._steps is not None:
            self._steps.close()
        self._steps = self._set = self._waking = None
        self._embeddings = Embeddings()
        self._flights.clear()
        self._histories.forget()

    def _launch_decode(self, steps: DeviceSteps, plan: StepPlan, slot_R: Words, start_R: Words, end_R: Words) -> Flight:
        num_rows = len(slot_R)
        with self._host.lock:
            self._host.decode(plan, slot_R, start_R, self._changes)
        steps.prepare(self._changes, plan.copies)
        begun = self._gpu.mark()
        logits_RV = steps.decode(num_rows, int(end_R.max()))
        return self._finish(
            steps,
            plan,
            begun,
            range(num_rows),
            logits_RV,
            lambda: Ends(end_R, steps.ends_decode(num_rows)),
            lambda: steps.sample_decode(num_rows),
        )

    def _launch_mixed(self, steps: DeviceSteps, plan: StepPlan, slot_R: Words, start_R: Words, end_R: Words) -> Flight:
        reads_hidden = not READING_HIDDEN.isdisjoint(plan.outputs)
        num_tokens = sum(plan.num_query_tokens)
        shape = None if reads_hidden else prefill_shape(num_tokens, len(plan.slots), steps.max_rows)
        with self._host.lock:
            packed = self._host.pack(plan, slot_R, start_R, end_R, shape)
        steps.copy_blocks(plan.copies)
        begun = self._gpu.mark()
        if shape is not None:
            logits_QV = steps.prefill(packed, self._changes)
            return self._finish(
                steps,
                plan,
                begun,
                packed.sampled.tolist(),
                logits_QV,
                lambda: Ends(end_R[packed.sampled], steps.ends_prefill(packed)),
                lambda: steps.sample_prefill(packed),
            )
        arrays = steps.upload(packed, self._changes)
        prompt_logprobs, embeddings = None, None
        if reads_hidden:
            hidden_TD = steps.compute(packed, arrays)
            prompt_logprobs, embeddings = self._read_hidden(steps, plan, packed, hidden_TD)
            logits_QV = steps.logits(hidden_TD, arrays) if len(packed.sampled) else hidden_TD[:0]
        else:
            logits_QV = steps.compute_logits(packed, arrays)
        flight = self._finish(
            steps,
            plan,
            begun,
            packed.sampled.tolist(),
            logits_QV,
            lambda: Ends(end_R[packed.sampled], arrays.sample_end_Q),
            lambda: steps.sample(logits_QV, arrays),
        )
        flight.prompt_logprobs, flight.embeddings = prompt_logprobs, embeddings
        return flight

    def _read_hidden(
        self, steps: DeviceSteps, plan: StepPlan, packed: PackedRows, hidden_TD: torch.Tensor
    ) -> tuple[PromptScores | None, RowEmbeddings | None]:
        """What is made of hidden states. Waits; the head's buffer is theirs until the sampling rows take it."""
        states = self._host.states(plan)
        prompt_logprobs = score_prompts(steps.decoder, hidden_TD, packed, plan, states)
        return prompt_logprobs, self._embeddings.add(hidden_TD, packed, plan, states)

    def _finish(
        self,
        steps: DeviceSteps,
        plan: StepPlan,
        begun: Mark,
        sampled: Sequence[int],
        logits_QV: torch.Tensor,
        find_ends: Callable[[], Ends],
        choose: Callable[[], torch.Tensor],
    ) -> Flight:
        """From logits to tokens, and tokens and logprobs on their way home."""
        computed = self._gpu.mark()
        token_Q, scores = None, None
        rows, known = None, {}
        if sampled:
            rows = self._sampled_set(steps, plan, sampled)
            scores = rows.score(logits_QV, self._gpu)
            if rows.guided is not None:
                self._histories.learn()
                # The next plan follows from the result that is there now, and is made while this step's masks are.
                self.hand_over()
                known = self._known(plan, sampled, rows)
                self._guide(rows.guided, known, logits_QV)
            if rows.passes:
                ends = find_ends()
                rows.passes.change(logits_QV, ends)
                device_token_Q = choose()
                rows.passes.record(device_token_Q, ends)
            else:
                device_token_Q = choose()
            if scores is not None:
                scores.finish(device_token_Q)
            token_Q = self._gpu.download(device_token_Q)
        flight = Flight(plan, begun, computed, self._gpu.end_step(), sampled, token_Q, scores, overtaken=known.keys())
        if rows is not None and rows.guided is not None:
            flight.refusals = rows.guided.errors()
            flight.learners = [
                (index, plan.slots[row], rows.states[index])
                for index, row in enumerate(sampled)
                if rows.states[index].matcher is not None and index not in known
            ]
            self._histories.add(flight)
        return flight

    def _known(self, plan: StepPlan, sampled: Sequence[int], rows: SampledSet) -> dict[int, TokenId]:
        """The tokens of overtaken rows, by index in `sampled`: what the device must go on from."""
        ends = [plan.start_positions[row] + plan.num_query_tokens[row] for row in sampled]
        return {
            index: TokenId(int(state.tokens[end]))
            for index, (state, end) in enumerate(zip(rows.states, ends, strict=True))
            if state.matcher is not None and end < state.num_tokens
        }

    def _guide(self, guided: GuidedRows, known: Mapping[int, TokenId], logits_QV: torch.Tensor) -> None:
        """Masks are made and sent while the forward runs, and applied behind it."""
        guided.fill(known)
        words = self._gpu.upload_ahead(guided.words)
        num_guided = len(guided.row_G)
        mask_GW = words[num_guided:].view(guided.mask_GW.shape)
        forbid(logits_QV, mask_GW, words[:num_guided], self._gpu.traits)

    def _sampled_set(self, steps: DeviceSteps, plan: StepPlan, sampled: Sequence[int]) -> SampledSet:
        key = (plan.slots, plan.epochs, sampled)
        if self._set is None or self._set_key != key:
            states = self._host.states(plan)
            slots = [plan.slots[row] for row in sampled]
            vocab_size = steps.decoder.config.vocab_size
            self._set = SampledSet([states[row] for row in sampled], slots, vocab_size, steps.arena, self._gpu)
            self._set_key = key
        return self._set
