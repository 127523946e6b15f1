"""What a start has compiled, loaded and captured is all that steps of any kind need. `pytest -m gpu`."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import msgspec
import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime.jit import JITFunction

from device_world import DeviceWorld
from guides import COLOURS, DIGITS, PERSON, tiny_guides
from runner_world import tiny_config
from step_storms import Storm
from triode.models.cuda.gpu import CudaGpu
from triode.models.random_model import random_config
from triode.models.sampling import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

KINDS = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7, logprobs=5),
    SamplingParams(temperature=1.2, top_k=20, min_tokens=3),
    SamplingParams(temperature=0.9, top_p=0.8, min_p=0.01, logit_bias={5: 1.0}),
    SamplingParams(temperature=0.5, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.1),
    SamplingParams(no_repeat_ngram_size=3),
)
NUM_STEPS = 60
MOST_GUIDED_TOKENS = 16


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names what is compiled, loaded or captured inside."""
    made: list[str] = []

    def compiled(**told: Any) -> None:
        made.append(f"compiled {told['repr']}")

    def loaded(_module: object, _function: object, name: str, *_: object) -> None:
        made.append(f"loaded {name}")

    capture = CudaGpu.capture

    def captured(gpu: CudaGpu, work: Callable[[], None]) -> Callable[[], None]:
        made.append(f"captured {work}")
        return capture(gpu, work)

    runtime = triton.knobs.runtime
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "jit_cache_hook", compiled)
        patch.setattr(CudaGpu, "capture", captured)
        runtime.kernel_load_start_hook.add(loaded)
        try:
            yield made
        finally:
            runtime.kernel_load_start_hook.remove(loaded)


def forget_kernels() -> None:
    """Of other tests: none is compiled or loaded."""
    for each in gc.get_objects():
        if isinstance(each, JITFunction):
            each.device_caches.clear()


def serve(world: DeviceWorld, storm: Storm, kinds: tuple[SamplingParams, ...]) -> None:
    for rows in storm.steps(Random(7), NUM_STEPS):
        world.runner.launch(storm.plan(world, rows, kinds))
        world.runner.collect()


@pytest.mark.parametrize(("max_running", "max_step_tokens"), [(1, 512), (8, 2048), (256, 2048)])
def test_a_started_runner_compiles_loads_and_captures_nothing_more(
    max_running: int, max_step_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = msgspec.structs.replace(random_config("qwen2.5-0.5b"), max_context_tokens=4096)
    storm = Storm(max_running, max_step_tokens, config.max_context_tokens)
    forget_kernels()
    with watched(monkeypatch) as started:
        world = DeviceWorld(config, torch.bfloat16, max_running=max_running, max_step_tokens=max_step_tokens)
    with world, watched(monkeypatch) as made:
        serve(world, storm, KINDS)
    assert {each.split()[0] for each in started} == {"compiled", "loaded", "captured"}
    assert made == []


def test_guided_rows_need_nothing_more_either(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_kernels()
    guided = tuple(SamplingParams(guide=guide, max_tokens=MOST_GUIDED_TOKENS) for guide in (PERSON, COLOURS, DIGITS))
    # What a guide leaves no choice about is written behind a prompt as soon as it has been read.
    storm = Storm(8, 128, tiny_config().max_context_tokens - MOST_GUIDED_TOKENS)
    with (
        DeviceWorld(tiny_config(), torch.float32, max_running=8, max_step_tokens=128, guides=tiny_guides()) as world,
        watched(monkeypatch) as made,
    ):
        serve(world, storm, (*guided, *KINDS))
    assert made == []
