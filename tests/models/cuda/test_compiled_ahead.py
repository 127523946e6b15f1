"""What a start compiles and captures before anything is launched is what is launched then."""

from collections.abc import Iterator
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
from step_storms import Storm
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


@pytest.mark.parametrize(
    ("model", "max_running", "max_step_tokens", "max_context_tokens"),
    [
        ("qwen2.5-7b", 256, LONG_TOKENS, 8192),
        ("llama-3.1-8b", 16, LONG_TOKENS, 131_072),
        ("llama-3.1-8b", 8, 600, 8192),
        ("tiny-qwen2", 64, 512, 8192),
        ("qwen2.5-0.5b", 64, 512, 8192),
        ("qwen2.5-0.5b", 1, 100, 8192),
    ],
)
def test_nothing_is_left_to_compile_or_to_capture_for_steps_of_any_kind(
    model: str, max_running: int, max_step_tokens: int, max_context_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = random_config(model)
    config = msgspec.structs.replace(config, max_context_tokens=min(config.max_context_tokens, max_context_tokens))
    with asked_for(monkeypatch) as ahead:
        captured = compile_ahead(
            config,
            torch.bfloat16,
            HOPPER,
            block_size_tokens=16,
            max_running=max_running,
            max_step_tokens=max_step_tokens,
            max_tokens=LONG_TOKENS,
            max_rows=MAX_RUNNING,
        )
    with asked_for(monkeypatch) as later, every_launch_asks(monkeypatch):
        world = AbsentWorld(
            model, torch.bfloat16, HOPPER, max_running=max_running, max_context_tokens=config.max_context_tokens
        )
        storm = Storm(max_running, max_step_tokens, config.max_context_tokens)
        for rows in storm.steps(Random(max_running), NUM_STEPS):
            world.runner.launch(storm.plan(world, rows, [SamplingParams()]))
    assert len(later) > 15
    assert later - ahead == set()
    assert missing(world.cuda_runner.kinds(), captured) == []


def missing(asked: Kinds, captured: Kinds) -> list[set[tuple[int, ...]]]:
    """The kinds of work that steps have asked for and that were not captured."""
    return [set(one) - set(other) for one, other in zip(asked, captured, strict=True) if set(one) - set(other)]
