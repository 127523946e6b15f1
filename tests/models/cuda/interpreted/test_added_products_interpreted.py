"""Where products add to the residual stream, layers take two buffers by turns, with the bits of additions in place."""

from collections.abc import Callable
from itertools import cycle

import pytest
import torch

from cuda_world import CudaWorld
from runner_world import RunnerWorld, Running, tiny_config
from triode.models.cuda.linears import GpuLinear
from triode.models.sampling import SamplingParams
from triode.models.step import Output

SCORED = SamplingParams(temperature=0, logprobs=3, prompt_logprobs=3)
CONFIG = tiny_config()
OUT, DOWN = (CONFIG.hidden_size, CONFIG.q_size), (CONFIG.hidden_size, CONFIG.intermediate_size)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(seed * 37 + index * 101 + 7) % 499 for index in range(length)]


def play(world: RunnerWorld) -> list[Running]:
    """A prompt of which one token is picked, one whose hidden states are read beside a row that decodes, and both."""
    first = world.admit(2, prompt(9), SCORED)
    world.prefill(first)
    second = world.admit(1, prompt(3, 1), SCORED)
    world.step((second, 3, Output.PROMPT_LOGPROBS_AND_SAMPLE), (first, 1, Output.SAMPLE))
    world.decode(second, first, num_tokens=1)
    return [first, second]


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, int]]]:
    """Has products of these shapes add as the kernel for them does; returns the shapes that were added."""

    def begin(*shapes: tuple[int, int], turns: tuple[bool, ...] = (True,)) -> list[tuple[int, int]]:
        added: list[tuple[int, int]] = []
        turn = cycle(turns)

        def adds(product: GpuLinear, _num_tokens: int) -> bool:
            return tuple(product.weight_ED.shape) in shapes and next(turn)

        def add(product: GpuLinear, x_TD: torch.Tensor, residual_TE: torch.Tensor, out_TE: torch.Tensor) -> None:
            added.append((product.weight_ED.shape[0], product.weight_ED.shape[1]))
            product(x_TD, out_TE)
            out_TE += residual_TE
            # Whoever reads on in the buffer that the residual was in must notice.
            residual_TE.fill_(torch.nan)

        monkeypatch.setattr(GpuLinear, "adds", adds)
        monkeypatch.setattr(GpuLinear, "add", add)
        return added

    return begin


@pytest.mark.parametrize(
    ("shapes", "turns"),
    [((OUT,), (True,)), ((OUT, DOWN), (True,)), ((OUT, DOWN), (True, False, False))],
    ids=["out", "both", "by turns"],
)
def test_added_products_change_no_bit(
    shapes: tuple[tuple[int, int], ...],
    turns: tuple[bool, ...],
    add: Callable[..., list[tuple[int, int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # However few tokens there are, some of them are picked.
    monkeypatch.setattr("triode.models.cuda.decoder._FEW_TOKENS", 0)
    want = play(CudaWorld())
    added = add(*shapes, turns=turns)
    got = play(CudaWorld())
    assert set(added) == set(shapes)
    for one, other in zip(got, want, strict=True):
        assert one.output == other.output
        assert one.logprobs == other.logprobs
        assert one.prompt_logprobs == other.prompt_logprobs
