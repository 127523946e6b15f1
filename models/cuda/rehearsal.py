"""Steps that matter for their sizes alone: to find what the largest of them take, and to compile what they launch.

Sequences are zeros, and all of them are in block 1.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from triode.cache.pool import KVPool
from triode.ids import BlockId, SlotId, StepId, pack_tokens
from triode.kernels.compile_ahead import launches_only_compile
from triode.kernels.gpu_traits import GpuTraits
from triode.models.config import ModelConfig
from triode.models.cuda.decoder import CudaDecoder
from triode.models.cuda.gpu import Mark
from triode.models.cuda.runner import CudaRunner
from triode.models.sampling import SamplingParams
from triode.models.step import Admission, Output, StepPlan, TableChange
from triode.models.weights import allocate

_META = torch.device("meta")
_BLOCK = BlockId(1)
# Each sequence has room for so many more tokens.
_MOST_SAMPLES = 8
_PARAMS = SamplingParams(temperature=1.0)
# One token may have a kernel of its own, and the others have tiles for up to so many; beyond, sizes make no difference to
# how they are compiled.
_SIZES = (1, 2, 16, 32, 64)
_SHORT_TOKENS = (64, 256)


class Rehearsal:
    """Makes plans. A slot that is named for the first time is admitted, any other one decodes."""

    def __init__(self, block_size_tokens: int, max_context_tokens: int) -> None:
        self._block_size = block_size_tokens
        self._max_context = max_context_tokens
        self._known: dict[int, int] = {}
        self._num_steps = 0

    def longest(self, max_step_tokens: int) -> int:
        """Of the prompts that a step can read."""
        return max(2, min(max_step_tokens, self._max_context - _MOST_SAMPLES))

    def read(self, slot: int, num_tokens: int, num_cached: int = 0) -> StepPlan:
        """A prompt of so many tokens, of which the first ones need not be computed."""
        self._known[slot] = num_tokens
        return self._plan([slot], [num_cached], [num_tokens - num_cached], [slot])

    def decode(self, num_rows: int) -> StepPlan:
        """The first slots compute a token each."""
        slots = range(num_rows)
        new = [slot for slot in slots if slot not in self._known]
        self._known.update(dict.fromkeys(new, 1))
        starts = [0 if slot in new else self._known[slot] for slot in slots]
        return self._plan(slots, starts, [1] * num_rows, new)

    def read_beside(self, slot: int, num_tokens: int) -> StepPlan:
        """A prompt, and a token of the first slot."""
        self._known[slot] = num_tokens
        return self._plan([0, slot], [self._known[0], 0], [1, num_tokens], [slot])

    def _plan(self, slots: Sequence[int], starts: Sequence[int], nums: Sequence[int], new: Sequence[int]) -> StepPlan:
        plan = StepPlan(
            step_id=StepId(self._num_steps),
            slots=tuple(map(SlotId, slots)),
            epochs=(1,) * len(slots),
            start_positions=tuple(starts),
            num_query_tokens=tuple(nums),
            outputs=(Output.SAMPLE,) * len(slots),
            admissions=tuple(self._admission(slot) for slot in new),
            table_changes=tuple(
                TableChange(SlotId(slot), 0, (_BLOCK,) * -(-(self._known[slot] + _MOST_SAMPLES) // self._block_size))
                for slot in new
            ),
        )
        self._num_steps += 1
        for slot, start, num in zip(slots, starts, nums, strict=True):
            self._known[slot] = start + num
        return plan

    def _admission(self, slot: int) -> Admission:
        length = self._known[slot]
        return Admission(SlotId(slot), 1, pack_tokens([0] * length), length, _PARAMS, 0, 0, ())


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


def compile_ahead(
    config: ModelConfig,
    dtype: torch.dtype,
    traits: GpuTraits,
    *,
    block_size_tokens: int,
    max_running: int,
    max_tokens: int,
    max_rows: int,
) -> None:
    """Compile what the steps of a model launch for the current device, all kernels at a time. Nothing runs."""
    gpu = AbsentGpu(traits)
    with launches_only_compile(), gpu.active():
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
        runner = CudaRunner(decoder, pool, gpu, max_running=max_running)
        for plan in _every_kind(Rehearsal(block_size_tokens, config.max_context_tokens), max_running, max_tokens):
            runner.launch(plan)
        runner.forget()


def _every_kind(rehearsal: Rehearsal, max_running: int, max_tokens: int) -> Iterator[StepPlan]:
    """Prompts long and short, alone and beside others, with and without a long context, and batches of every size."""
    longest = rehearsal.longest(max_tokens)
    yield rehearsal.read(0, longest)
    for num_tokens in _SHORT_TOKENS:
        yield rehearsal.read(0, longest, max(0, longest - num_tokens))
    if max_running > 1:
        yield rehearsal.read_beside(1, longest - 1)
    for num_rows in sorted({min(num_rows, max_running) for num_rows in (*_SIZES, max_running)}):
        yield rehearsal.decode(num_rows)


def _first_layers(config: ModelConfig) -> ModelConfig:
    """One layer of each kind, and the last one: how a layer is compiled depends on its window, and on whether it is last."""
    windows = {config.window_tokens(index) for index in range(config.num_layers - 1)}
    slides = (*(window is not None for window in windows), *config.sliding_layers[-1:]) if config.sliding_layers else ()
    return msgspec.structs.replace(config, num_layers=len(windows) + 1, sliding_layers=slides)
