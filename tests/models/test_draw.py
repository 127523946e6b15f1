"""The draw against a float64 oracle that sorts and loops, for every combination of truncations."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from explained_draws import is_explained
from triode.kernels.philox.reference import uniform
from triode.kernels.sample.reference import IMPOSSIBLE, draw, greedy


def distribution(
    logits: Sequence[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[float]:
    """Each token's probability in float64, by the definition of each parameter."""
    peak = max(logits)
    weights = [math.exp((logit - peak) / temperature) for logit in logits]
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    kept = order[:top_k] if top_k else order
    total = math.fsum(weights[token] for token in kept)
    running = list(itertools.accumulate(weights[token] / total for token in kept))
    if top_p < 1:
        kept = kept[: next((n for n, reached in enumerate(running, 1) if reached >= top_p), len(kept))]
    kept = [token for token in kept if weights[token] >= min_p * weights[order[0]]]
    total = math.fsum(weights[token] for token in kept)
    return [weights[token] / total if token in set(kept) else 0.0 for token in range(len(weights))]


def draw_one(
    logits_RV: torch.Tensor,
    uniform_R: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> torch.Tensor:
    num_rows = len(logits_RV)
    return draw(
        logits_RV,
        uniform_R,
        torch.full((num_rows,), temperature),
        torch.full((num_rows,), top_k),
        torch.full((num_rows,), top_p, dtype=torch.float64),
        torch.full((num_rows,), min_p, dtype=torch.float64),
    )


COMBINATIONS = list(itertools.product([0.6, 1.0, 1.7], [0, 1, 7], [1.0, 0.35, 0.9, 1e-9], [0.0, 0.08]))


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), COMBINATIONS)
def test_each_uniform_number_finds_the_oracles_token(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    generator = torch.Generator().manual_seed(hash((temperature, top_k, top_p, min_p)) % 2**31)
    logits_V = torch.randn(40, generator=generator) * 2
    edges = list(itertools.accumulate(distribution(logits_V.tolist(), temperature, top_k, top_p, min_p)))
    points = [(i + 0.5) / 512 for i in range(512)]
    clear = [u for u in points if min(abs(u - edge) for edge in edges) > 1e-6]
    expected = [next(token for token, edge in enumerate(edges) if u < edge) for u in clear]
    drawn = draw_one(
        logits_V.expand(len(clear), -1), torch.tensor(clear, dtype=torch.float64), temperature, top_k, top_p, min_p
    )
    assert len(clear) > 500
    assert drawn.tolist() == expected


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.1), (0.9, 8, 0.9, 0.05)],
)
def test_draws_over_positions_follow_the_oracles_distribution(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    num_draws = 20_000
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(3))
    position = torch.arange(num_draws)
    uniform_R = uniform(torch.full_like(position, 99), torch.zeros_like(position), position)
    drawn = draw_one(logits_V.expand(num_draws, -1), uniform_R, temperature, top_k, top_p, min_p)
    expected = torch.tensor(distribution(logits_V.tolist(), temperature, top_k, top_p, min_p)) * num_draws
    counts = torch.bincount(drawn, minlength=12)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum().item()
    # At most 11 degrees of freedom: beyond 38 once in 10,000 seeds.
    assert chi_square < 38


def support(logits_V: torch.Tensor, **parameters: float) -> list[int]:
    points = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    return sorted(set(draw_one(logits_V.expand(4096, -1), points, **parameters).tolist()))  # type: ignore[arg-type]


def test_a_nucleus_that_is_reached_exactly_ends_there() -> None:
    even = torch.zeros(8)
    assert support(even, top_p=0.5) == [0, 1, 2, 3]
    assert support(even, top_p=0.5 + 1e-9) == [0, 1, 2, 3, 4]
    assert support(even, top_p=0.5 - 1e-9) == [0, 1, 2, 3]


def test_among_equals_the_lowest_ids_are_kept() -> None:
    logits_V = torch.tensor([1.0, 3.0, 1.0, 1.0, 3.0, 1.0])
    assert support(logits_V, top_k=4) == [0, 1, 2, 4]
    assert support(logits_V, top_k=1) == [1]


def test_top_p_is_of_what_top_k_leaves() -> None:
    even = torch.zeros(8)
    assert support(even, top_k=4, top_p=0.5) == [0, 1]


def test_min_p_keeps_a_token_exactly_at_its_bound() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0])
    probs_V = torch.softmax(logits_V, -1).double()
    bound = float(probs_V[1] / probs_V[0])
    assert support(logits_V, min_p=bound * (1 - 1e-9)) == [0, 1]
    assert support(logits_V, min_p=bound * (1 + 1e-9)) == [0]
    assert support(logits_V, min_p=1.0) == [0]


def test_a_nucleus_wider_than_the_first_candidates_is_complete() -> None:
    even = torch.zeros(3, 4096)
    uniform_R = torch.tensor([0.0, 0.5, 1 - 2.0**-52], dtype=torch.float64)
    # 0.75 of 4,096 equal tokens are the ids below 3,072.
    assert draw_one(even, uniform_R, top_p=0.75).tolist() == [0, 1536, 3071]


def test_truncation_that_removes_nothing_changes_no_draw() -> None:
    generator = torch.Generator().manual_seed(1)
    logits_RV = torch.randn(50, 2000, generator=generator)
    uniform_R = torch.rand(50, dtype=torch.float64, generator=generator)
    plain = draw(logits_RV, uniform_R)
    assert torch.equal(draw_one(logits_RV, uniform_R, top_k=2000, min_p=1e-12), plain)
    assert torch.equal(draw_one(logits_RV, uniform_R, top_k=10_000), plain)


@given(st.integers(1, 2000), st.integers(0, 2**32))
def test_the_extreme_numbers_stay_inside_the_vocabulary(vocab_size: int, seed: int) -> None:
    logits_RV = torch.randn(2, vocab_size, generator=torch.Generator().manual_seed(seed))
    logits_RV[:, 0] = logits_RV[:, -1] = 0
    drawn = draw(logits_RV, torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64))
    assert drawn.tolist() == [0, vocab_size - 1]


def test_a_rows_token_depends_neither_on_neighbours_nor_on_place() -> None:
    num_rows, vocab_size = 37, 49153
    generator = torch.Generator().manual_seed(5)
    logits_RV = torch.randn(num_rows, vocab_size, generator=generator) * 2
    columns = (
        torch.rand(num_rows, dtype=torch.float64, generator=generator),
        torch.rand(num_rows, generator=generator) + 0.5,
        torch.randint(0, 60, (num_rows,), generator=generator) * torch.randint(0, 2, (num_rows,), generator=generator),
        torch.rand(num_rows, dtype=torch.float64, generator=generator).clamp(0.05, 1),
        torch.rand(num_rows, dtype=torch.float64, generator=generator) * 0.01,
    )
    together = draw(logits_RV, *columns)
    order = torch.randperm(num_rows, generator=generator)
    assert torch.equal(draw(logits_RV[order], *(column[order] for column in columns)), together[order])
    for row in range(0, num_rows, 6):
        alone = draw(logits_RV[row : row + 1].clone(), *(column[row : row + 1] for column in columns))
        assert alone.tolist() == [together[row].item()]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_without_a_possible_token_is_told_and_spoils_no_other(poison: float) -> None:
    generator = torch.Generator().manual_seed(2)
    logits_RV = torch.randn(4, 700, generator=generator)
    uniform_R = torch.rand(4, dtype=torch.float64, generator=generator)
    expected = draw_one(logits_RV, uniform_R, top_k=20, top_p=0.9, min_p=0.01).tolist()
    logits_RV[1] = -math.inf
    logits_RV[2, 650] = poison
    drawn = draw_one(logits_RV, uniform_R, top_k=20, top_p=0.9, min_p=0.01).tolist()
    assert drawn == [expected[0], IMPOSSIBLE, IMPOSSIBLE, expected[3]]
    assert draw(logits_RV, uniform_R).tolist()[1:3] == [IMPOSSIBLE, IMPOSSIBLE]
    assert greedy(logits_RV).tolist() == [int(logits_RV[0].argmax()), -1, -1, int(logits_RV[3].argmax())]


def test_a_row_with_one_possible_token_always_draws_it() -> None:
    logits_RV = torch.full((3, 600), -math.inf)
    logits_RV[:, 599] = -50.0
    uniform_R = torch.tensor([0.0, 0.5, 1 - 2.0**-52], dtype=torch.float64)
    assert draw_one(logits_RV, uniform_R, top_k=5, top_p=0.1, min_p=0.5).tolist() == [599, 599, 599]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    assert greedy(torch.tensor([[0.0, 2.0, 2.0], [5.0, 5.0, 5.0]])).tolist() == [1, 0]


@pytest.mark.parametrize(
    "options", [(1.0, 0, 1.0, 0.0), (0.6, 50, 1.0, 0.0), (0.8, 0, 0.9, 0.0), (1.3, 100, 0.95, 0.01)]
)
def test_float64_explains_every_draw_and_no_neighbour_of_it(options: tuple[float, int, float, float]) -> None:
    temperature, top_k, top_p, min_p = options
    rows, vocab = 16, 5_000
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)) * 2.5
    uniform = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    tokens = draw(
        logits.clone(),
        uniform,
        torch.full((rows,), temperature),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p, dtype=torch.float64),
        torch.full((rows,), min_p, dtype=torch.float64),
    ).tolist()
    explained = [is_explained(logits[row], tokens[row], float(uniform[row]), *options) for row in range(rows)]
    assert all(explained)
    elsewhere = [(token + vocab // 2) % vocab for token in tokens]
    assert not any(is_explained(logits[row], elsewhere[row], float(uniform[row]), *options) for row in range(rows))
