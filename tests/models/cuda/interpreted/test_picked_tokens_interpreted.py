"""Steps whose last layer computes the rows that sample alone say what the CPU's runner says.

Products of different numbers of tokens have the same bits on a GPU (`test_on_the_gpu.py`), and not in the interpreter.
"""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from cuda_world import CudaWorld
from runner_world import RunnerWorld, Running, tiny_config
from triode.kernels.step.gpu import pick
from triode.models.config import ModelConfig
from triode.models.sampling import SamplingParams
from triode.models.step import Output

SCORED = SamplingParams(temperature=0, logprobs=3)
DRAWN = SamplingParams(temperature=0.9, top_k=40, logprobs=3)
LLAMA = tiny_config()
CONFIGS = {
    "bias": msgspec.structs.replace(LLAMA, qkv_bias=True),
    "norms": msgspec.structs.replace(LLAMA, qk_norm=True),
    "window": msgspec.structs.replace(LLAMA, sliding_window_tokens=40, sliding_layers=(False, True)),
    "one layer": msgspec.structs.replace(LLAMA, num_layers=1),
}


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(seed * 37 + index * 101 + 7) % 499 for index in range(length)]


def play_alone(world: RunnerWorld) -> list[Running]:
    """A chunk that samples nothing, one that samples, and what is decoded from the keys and values of both."""
    running = world.admit(2, prompt(150), SCORED)
    world.prefill(running, chunk=80)
    world.decode(running, num_tokens=2)
    return [running]


def play_together(world: RunnerWorld) -> list[Running]:
    """Rows that decode, one that reads its prompt to the end and one that does not: four, of which three sample."""
    first, second = world.admit(1, prompt(5, 1), DRAWN, seed=5), world.admit(3, prompt(9, 2), SCORED)
    world.step((first, 5, Output.SAMPLE), (second, 9, Output.SAMPLE))
    third, fourth = world.admit(0, prompt(30, 3), DRAWN, seed=6), world.admit(4, prompt(60, 4), SCORED)
    world.step(
        (first, 1, Output.SAMPLE), (third, 30, Output.SAMPLE), (fourth, 50, Output.NONE), (second, 1, Output.SAMPLE)
    )
    world.step(*[(row, 1, Output.SAMPLE) for row in (first, second, third)], (fourth, 10, Output.SAMPLE))
    world.decode(fourth, first, num_tokens=1)
    return [first, second, third, fourth]


@pytest.mark.parametrize(
    ("config", "play", "num_rows"),
    [
        (LLAMA, play_alone, 1),
        (LLAMA, play_together, 4),
        *[pytest.param(config, play_alone, 1, id=name) for name, config in CONFIGS.items()],
    ],
)
def test_tokens_and_logprobs_are_those_of_the_eager_runner(
    config: ModelConfig,
    play: Callable[[RunnerWorld], list[Running]],
    num_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_picked: list[int] = []

    def watched(token_Q: torch.Tensor, *rest: Any) -> None:
        num_picked.append(len(token_Q))
        pick(token_Q, *rest)

    monkeypatch.setattr("triode.models.cuda.decoder.pick", watched)
    got, want = play(CudaWorld(config)), play(RunnerWorld(config))
    assert num_picked == [num_rows]
    for one, other in zip(got, want, strict=True):
        assert one.output == other.output
        assert [entry.token_id for entry in one.logprobs] == [entry.token_id for entry in other.logprobs]
        assert [entry.top_ids for entry in one.logprobs] == [entry.top_ids for entry in other.logprobs]
        logprobs = [entry.logprob for entry in other.logprobs]
        assert [entry.logprob for entry in one.logprobs] == pytest.approx(logprobs, abs=1e-4)


def test_a_row_that_scores_its_prompt_keeps_the_hidden_states_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("triode.models.cuda.decoder.pick")
    scored = []
    for world in (CudaWorld(), RunnerWorld()):
        running = world.admit(1, prompt(70), SamplingParams(temperature=0, prompt_logprobs=0))
        world.step((running, 70, Output.PROMPT_LOGPROBS_AND_SAMPLE))
        scored.append([entry.logprob for entry in running.prompt_logprobs])
        assert len(running.output) == 1
    assert scored[0] == pytest.approx(scored[1], abs=1e-4)
