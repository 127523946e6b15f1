"""Steps that matter for their sizes alone: to find what the largest of them take, and to compile what they launch.

Sequences are zeros, and all of them are in block 1.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from triode.cache.messages import BlockCopy
from triode.cache.pool import KVPool
from triode.ids import TOKEN_BYTES, BlockId, SlotId, StepId, TokenId
from triode.kernels.compile_ahead import launches_only_compile
from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.guide_mask.gpu import forbid
from triode.kernels.paged_attention.tiles import SEGMENT_TOKENS
from triode.models.config import ModelConfig
from triode.models.cuda.batch import PackedRows
from triode.models.cuda.decoder import CudaDecoder
from triode.models.cuda.gpu import Mark
from triode.models.cuda.programs import PREFILL_TOKENS, SEGMENT_BUCKETS, Kinds, decode_sizes, prefill_sizes
from triode.models.cuda.runner import CudaRunner
from triode.models.cuda.steps import DeviceSteps
from triode.models.logprobs import SCORED_POSITIONS
from triode.models.sampling import SamplingParams
from triode.models.step import Admission, Output, Pooling, StepPlan, TableChange
from triode.models.weights import allocate

_META = torch.device("meta")
_BLOCK = BlockId(1)
# Each sequence samples once.
_NUM_SAMPLES = 1
_PLAIN = SamplingParams(temperature=1.0)
_ALL_WAYS = {
    "params": SamplingParams(
        logprobs=1,
        prompt_logprobs=1,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        no_repeat_ngram_size=2,
        logit_bias={0: 1.0},
        min_tokens=1,
    ),
    "stop_token_ids": (TokenId(0),),
    "bad_word_ids": ((TokenId(0),), (TokenId(0), TokenId(1))),
    "pooling": Pooling.MEAN,
}
_EPOCH = 1


class Rehearsal:
    """Makes plans. Of each the rows are new sequences, of which some tokens have been computed."""

    def __init__(self, block_size_tokens: int, max_context_tokens: int) -> None:
        self._block_size = block_size_tokens
        self.longest_tokens = max(2, max_context_tokens - _NUM_SAMPLES)
        """Of any sequence."""
        self._num_steps = 0

    def longest(self, max_step_tokens: int) -> int:
        """Of the prompts that a step can read."""
        return max(2, min(max_step_tokens, self.longest_tokens))

    def read(
        self, num_tokens: int, *, num_before: int = 0, num_rows: int = 1, output: Output = Output.SAMPLE
    ) -> StepPlan:
        """So many tokens of a prompt, behind others, beside rows of one token; as many tokens and rows in all."""
        return self._plan([(num_before, num_tokens - num_rows + 1)] + [(0, 1)] * (num_rows - 1), output)

    def read_together(self, num_tokens: int, num_rows: int, *, is_far: bool) -> StepPlan:
        """So many tokens of prompts, the same number of each if that is possible; the first behind as many as there can be."""
        nums = [num_tokens // num_rows + (row < num_tokens % num_rows) for row in range(num_rows)]
        num_before = self.longest_tokens - nums[0] if is_far else 0
        return self._plan([(num_before, nums[0]), *((0, num) for num in nums[1:])], Output.SAMPLE)

    def decode(self, num_rows: int, *, num_before: int = 0) -> StepPlan:
        """Rows of one token, the first of them behind others."""
        return self._plan([(num_before, 1)] + [(0, 1)] * (num_rows - 1), Output.SAMPLE)

    def sample_in_all_ways(self, num_rows: int) -> Iterator[StepPlan]:
        """Short prompts whose rows ask for everything that changes logits or tells of them, and are copied. Whoever reads
        hidden states does so row by row, so one is enough."""
        outputs = (Output.PROMPT_LOGPROBS_AND_SAMPLE, Output.HIDDEN) if num_rows == 1 else (Output.SAMPLE,)
        for output in outputs:
            plan = self._plan([(0, 2)] * num_rows, output)
            admissions = tuple(msgspec.structs.replace(admission, **_ALL_WAYS) for admission in plan.admissions)
            yield msgspec.structs.replace(plan, admissions=admissions, copies=(BlockCopy(_BLOCK, _BLOCK),))

    def _plan(self, rows: list[tuple[int, int]], output: Output) -> StepPlan:
        """Of each row the tokens that have been computed, and those that are."""
        slots = tuple(map(SlotId, range(len(rows))))
        ends = [start + num for start, num in rows]
        self._num_steps += 1
        return StepPlan(
            step_id=StepId(self._num_steps),
            slots=slots,
            epochs=(_EPOCH,) * len(rows),
            start_positions=tuple(start for start, _ in rows),
            num_query_tokens=tuple(num for _, num in rows),
            outputs=(output,) * len(rows),
            admissions=tuple(
                Admission(slot, _EPOCH, bytes(TOKEN_BYTES * end), end, _PLAIN, 0, 0, ())
                for slot, end in zip(slots, ends, strict=True)
            ),
            table_changes=tuple(
                TableChange(slot, 0, (_BLOCK,) * -(-(end + _NUM_SAMPLES) // self._block_size))
                for slot, end in zip(slots, ends, strict=True)
            ),
        )


class _AbsentMark:
    """Nothing happens, so everything has."""

    def is_passed(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def seconds_since(self, earlier: Mark) -> float:
        return 0.0

    def release(self) -> None:
        return


class AbsentGpu:
    """A `Gpu` of shapes without memory. Belongs where launches only compile."""

    device = _META

    def __init__(self, traits: GpuTraits) -> None:
        self.traits = traits

    @contextmanager
    def active(self) -> Iterator[None]:
        """Records no gradients."""
        with torch.inference_mode():
            yield

    def upload(self, array: npt.NDArray[np.int32], out: torch.Tensor | None = None) -> torch.Tensor:
        """Of the same shape."""
        return torch.empty(array.shape, dtype=torch.int32, device=_META) if out is None else out

    def upload_ahead(self, array: npt.NDArray[np.int32]) -> torch.Tensor:
        """Of the same shape."""
        return self.upload(array)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of the same shape."""
        return tensor

    def mark(self) -> Mark:
        """Passed."""
        return _AbsentMark()

    def end_step(self) -> Mark:
        """Passed."""
        return _AbsentMark()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """As it is."""
        return work

    def wait(self) -> None:
        """For nothing."""
        return


class _AbsentRunner(CudaRunner):
    """A runner whose hidden states hold nothing."""

    def _read_hidden(
        self, steps: DeviceSteps, plan: StepPlan, packed: PackedRows, hidden_TD: torch.Tensor
    ) -> tuple[None, None]:
        """Positions are scored some at a time."""
        for num_positions in decode_sizes(min(SCORED_POSITIONS, len(hidden_TD))):
            steps.decoder.logits(hidden_TD[:num_positions])
        return None, None


def compile_ahead(
    config: ModelConfig,
    dtype: torch.dtype,
    traits: GpuTraits,
    *,
    block_size_tokens: int,
    max_running: int,
    max_step_tokens: int,
    max_tokens: int,
    max_rows: int,
    device: torch.device | None = None,
) -> Kinds:
    """Compile what the steps of a model launch for the current device, many kernels at a time. Nothing runs.

    Args:
        max_step_tokens: of the largest step.
        max_tokens: what the decoder has buffers for.
        device: where all that is compiled is loaded, too; None loads nothing.

    Returns:
        The kinds of steps that can be captured.
    """
    gpu = AbsentGpu(traits)
    with launches_only_compile(device), gpu.active():
        config = _first_layers(config)
        decoder = CudaDecoder(config, allocate(config, dtype, _META), traits, max_tokens=max_tokens, max_rows=max_rows)
        pool = KVPool(
            2,
            block_size_tokens=block_size_tokens,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            device=_META,
        )
        runner = _AbsentRunner(decoder, pool, gpu, max_running=max_running)
        for plan in every_kind(Rehearsal(block_size_tokens, config.max_context_tokens), max_running, max_step_tokens):
            runner.launch(plan)
        num_words = -(-config.vocab_size // 32)
        row_G, mask_GW = torch.empty(1, dtype=torch.int32), torch.empty(1, num_words, dtype=torch.int32)
        forbid(decoder.buffers.logits_RV, mask_GW.to(_META), row_G.to(_META), traits)
        kinds = runner.kinds()
        runner.forget()
    return kinds


def every_kind(rehearsal: Rehearsal, max_running: int, max_step_tokens: int) -> Iterator[StepPlan]:
    """Steps of each size that is captured, and of those that are not: with and without a long context, with and without
    samples, with hidden states that are read."""
    longest, farthest = rehearsal.longest(max_step_tokens), rehearsal.longest_tokens
    for num_before in (0, farthest - longest):
        yield rehearsal.read(longest, num_before=num_before)
        yield rehearsal.read(longest, num_before=num_before, output=Output.NONE)
        if max_running > 1:
            yield rehearsal.read(longest, num_before=num_before, num_rows=2)
    for num_tokens, num_rows in prefill_sizes(max_step_tokens, max_running, farthest):
        for is_far in (False, True):
            yield rehearsal.read_together(num_tokens, num_rows, is_far=is_far)
    for num_tokens in decode_sizes(min(longest, PREFILL_TOKENS[-1])):
        yield rehearsal.read(num_tokens, output=Output.PROMPT_LOGPROBS_AND_SAMPLE)
    for num_rows in decode_sizes(max_running):
        for num_segments in SEGMENT_BUCKETS:
            yield rehearsal.decode(num_rows, num_before=min(num_segments * SEGMENT_TOKENS, farthest) - 1)
            if num_segments * SEGMENT_TOKENS >= farthest:
                break


def _first_layers(config: ModelConfig) -> ModelConfig:
    """One layer of each kind, and the last one: how a layer is compiled depends on its window, and on whether it is last."""
    windows = {config.window_tokens(index) for index in range(config.num_layers - 1)}
    slides = (*(window is not None for window in windows), *config.sliding_layers[-1:]) if config.sliding_layers else ()
    return msgspec.structs.replace(config, num_layers=len(windows) + 1, sliding_layers=slides)
