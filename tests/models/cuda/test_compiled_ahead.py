"""What a start compiles and captures before anything is launched is what is launched then."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import msgspec
import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime.jit import JITFunction

from absent_world import LONG_TOKENS, MAX_RUNNING, AbsentWorld
from cross_compile import HOPPER, AbsentDriver
from step_storms import Storm, StormRow
from triode.models.cuda.decoder import CudaDecoder
from triode.models.cuda.programs import Kinds
from triode.models.cuda.rehearsal import compile_ahead
from triode.models.logprobs import SCORED_POSITIONS
from triode.models.random_model import random_config
from triode.models.sampling import SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


NEW_DEVICE = 1000
"""Other tests have compiled nothing for it."""
NUM_STEPS = 60


@contextmanager
def asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The kernels that would be compiled for an absent GPU, with their constants and types; none is."""
    kernels: set[str] = set()

    def note(**told: Any) -> bool:
        kernels.add(f"{told['repr']} {told['compile']['key']}")
        return True

    with monkeypatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", AbsentDriver(90, device=NEW_DEVICE))
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
        yield kernels


@contextmanager
def every_launch_asks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, a launch asks for its kernel, whatever was asked for before, and launches nothing."""
    run = JITFunction.run

    def ask(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(kernel, *arguments, grid=grid, warmup=True, **options)

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", ask)
        patch.setattr("triode.models.cuda.runner.score_prompts", score)
        patch.setattr("triode.models.cuda.hidden.Embeddings.add", lambda *_: None)
        yield


def score(decoder: CudaDecoder, hidden_TD: torch.Tensor, *_: object) -> None:
    """As much of it as is launched: nothing can be read."""
    for first in range(0, len(hidden_TD), SCORED_POSITIONS):
        decoder.logits(hidden_TD[first : first + SCORED_POSITIONS])


def behind_a_start(
    model: str, storm: Storm, steps: Iterable[Sequence[StormRow]], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, set[str], list[set[tuple[int, ...]]]]:
    """How many kernels the steps launch; those of them, and the kinds of captured work, for which they would wait."""
    config = msgspec.structs.replace(random_config(model), max_context_tokens=storm.max_context_tokens)
    with asked_for(monkeypatch) as ahead:
        captured = compile_ahead(
            config,
            torch.bfloat16,
            HOPPER,
            block_size_tokens=16,
            max_running=storm.max_rows,
            max_step_tokens=storm.max_step_tokens,
            max_tokens=LONG_TOKENS,
            max_rows=MAX_RUNNING,
        )
    with asked_for(monkeypatch) as later, every_launch_asks(monkeypatch):
        world = AbsentWorld(
            model, torch.bfloat16, HOPPER, max_running=storm.max_rows, max_context_tokens=storm.max_context_tokens
        )
        for rows in steps:
            world.runner.launch(storm.plan(world, rows, [SamplingParams()]))
    return len(later), later - ahead, missing(world.cuda_runner.kinds(), captured)


@pytest.mark.parametrize(
    ("model", "max_running", "max_step_tokens", "max_context_tokens"),
    [
        ("qwen2.5-7b", 256, LONG_TOKENS, 8192),
        ("llama-3.1-8b", 16, LONG_TOKENS, 131_072),
        ("llama-3.1-8b", 8, 600, 8192),
        ("tiny-qwen2", 64, 512, 8192),
        ("qwen2.5-0.5b", 64, 512, 8192),
        ("qwen2.5-0.5b", 1, 100, 8192),
        # No prompt is as long as a step; and a context that ends just behind a segment.
        ("qwen2.5-0.5b", 48, 1024, 300),
        ("qwen2.5-0.5b", 5, LONG_TOKENS, 520),
    ],
)
def test_nothing_is_left_to_compile_or_to_capture_for_steps_of_any_kind(
    model: str, max_running: int, max_step_tokens: int, max_context_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    storm = Storm(max_running, max_step_tokens, max_context_tokens)
    steps = storm.steps(Random(max_running), NUM_STEPS)
    num_kernels, kernels, kinds = behind_a_start(model, storm, steps, monkeypatch)
    assert num_kernels > 15
    assert kernels == set()
    assert kinds == []


def test_prompts_together_are_as_short_as_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program needs help with the longest of them, as it would with one prompt of as many tokens."""
    for num_tokens, num_rows in ((1024, 2), (896, 4), (768, 8)):
        steps = [[StormRow(0, num_tokens // num_rows)] * num_rows]
        _, kernels, kinds = behind_a_start("tiny-mistral", Storm(8, 1024, 2048), steps, monkeypatch)
        assert kernels == set()
        assert kinds == []


def missing(asked: Kinds, captured: Kinds) -> list[set[tuple[int, ...]]]:
    """The kinds of work that steps have asked for and that were not captured."""
    return [set(one) - set(other) for one, other in zip(asked, captured, strict=True) if set(one) - set(other)]
