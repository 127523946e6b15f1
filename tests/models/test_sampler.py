"""The sampler: each parameter against a plain loop in Python, the passes that run, and independence of neighbours."""

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from sampled_rows import rows_of, sequence
from triode.ids import TokenId
from triode.kernels.philox.reference import uniform
from triode.models.draws import uniform_draws
from triode.models.logits import passes_for
from triode.models.sampler import ALL_FORBIDDEN, NOT_FINITE, SampledRows, sample
from triode.models.sampling import SamplingParams, pack
from triode.models.slots import SlotState

VOCAB_SIZE = 50


def logits_of(num_rows: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def random_tokens(count: int, seed: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def processed(logits_RV: torch.Tensor, *states: SlotState) -> list[list[float]]:
    """The logits after every pass."""
    changed = logits_RV.clone()
    for change in rows_of(*states).passes:
        change(changed)
    rows: list[list[float]] = changed.tolist()
    return rows


def oracle(logits: Sequence[float], state: SlotState) -> list[float]:
    """The definition of each parameter, a token at a time, in float64."""
    params, tokens = state.params, state.tokens.tolist()
    output = Counter(tokens[state.num_prompt_tokens :])
    changed = []
    for token, logit in enumerate(logits):
        value = logit + (params.logit_bias or {}).get(token, 0.0)
        after = [*tokens, token]
        if any(tuple(after[-len(word) :]) == word for word in state.bad_word_ids):
            value = -math.inf
        size = params.no_repeat_ngram_size
        ngrams = [tuple(after[i : i + size]) for i in range(len(after) - size + 1)] if size else []
        if ngrams and ngrams[-1] in ngrams[:-1]:
            value = -math.inf
        if token in state.stop_token_ids and len(tokens) - state.num_prompt_tokens < params.min_tokens:
            value = -math.inf
        if token in tokens:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        if output[token]:
            value -= params.presence_penalty
            value -= params.frequency_penalty * output[token]
        changed.append(value)
    return changed


CASES: list[SamplingParams] = [
    SamplingParams(logit_bias={0: 5.0, 7: -2.5, 49: -math.inf}),
    SamplingParams(no_repeat_ngram_size=1),
    SamplingParams(no_repeat_ngram_size=2),
    SamplingParams(no_repeat_ngram_size=3),
    SamplingParams(no_repeat_ngram_size=10_000),
    SamplingParams(min_tokens=20),
    SamplingParams(min_tokens=21),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(repetition_penalty=0.7),
    SamplingParams(presence_penalty=0.9),
    SamplingParams(frequency_penalty=-0.4),
    SamplingParams(repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.25, temperature=0),
    SamplingParams(
        logit_bias={3: -math.inf, 4: 1.0}, no_repeat_ngram_size=2, min_tokens=30, repetition_penalty=2.0, top_p=0.5
    ),
]


def cases() -> list[SlotState]:
    """Each case after a prompt of 40 tokens and an output of 20, all with the same stop tokens and bad words."""
    states = []
    for seed, params in enumerate(CASES):
        tokens = random_tokens(60, seed, vocab_size=12)
        words = [[*tokens[-2:], 5], [6], [tokens[-1], 7], [tokens[-1] + 1, 8], [9] * 100]
        states.append(sequence(params, tokens, num_prompt_tokens=40, stop_token_ids=(2, 11), bad_word_ids=words))
    return states


def test_every_pass_agrees_with_the_loop_alone_and_together() -> None:
    states = cases()
    logits_RV = logits_of(len(states))
    together = processed(logits_RV, *states)
    for row, state in enumerate(states):
        assert together[row] == pytest.approx(oracle(logits_RV[row].tolist(), state), rel=1e-5, abs=1e-5)
        assert processed(logits_RV[row : row + 1], state) == [together[row]]


def test_counts_follow_the_tokens_that_are_appended() -> None:
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25)
    appended = random_tokens(200, 1)
    growing = sequence(params, [1, 2, 3])
    processed(logits_of(1), growing)
    for token in appended:
        growing.append(TokenId(token))
    whole = sequence(params, [1, 2, 3, *appended], num_prompt_tokens=3)
    assert processed(logits_of(1), growing) == processed(logits_of(1), whole)


def test_bad_words_are_found_across_the_border_of_prompt_and_output() -> None:
    state = sequence(SamplingParams(), [4, 5], num_prompt_tokens=1, bad_word_ids=[(4, 5, 6), (5, 7), (8, 5, 9)])
    (logits,) = processed(torch.zeros(1, 10), state)
    assert [token for token, logit in enumerate(logits) if logit == -math.inf] == [6, 7]


def test_a_bad_word_longer_than_the_sequence_forbids_nothing() -> None:
    state = sequence(SamplingParams(), [5], bad_word_ids=[(4, 5, 6)])
    assert processed(torch.zeros(1, 10), state) == [[0.0] * 10]


def test_stop_tokens_are_possible_once_min_tokens_are_there() -> None:
    state = sequence(SamplingParams(min_tokens=2, temperature=0), [3, 4], num_prompt_tokens=2, stop_token_ids=[1])
    rows = rows_of(state)
    chosen = []
    for _ in range(4):
        token_id = sample(torch.tensor([[0.0, 9.0, 1.0]]), rows).token_ids[0]
        assert token_id is not None
        chosen.append(token_id)
        state.append(token_id)
    assert chosen == [2, 2, 1, 1]


def names(*params: SamplingParams) -> list[str]:
    states = [sequence(each) for each in params]
    return [type(change).__name__ for change in passes_for(pack([state.params for state in states]), states)]


def test_parameters_that_no_row_uses_cost_no_pass() -> None:
    assert names(SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_k=3, top_p=0.5, min_p=0.1)) == []
    assert names(SamplingParams(), SamplingParams(logit_bias={1: 1.0})) == ["LogitBias"]
    assert names(SamplingParams(no_repeat_ngram_size=2)) == ["NoRepeatNgram"]
    assert names(SamplingParams(min_tokens=1)) == ["MinTokens"]
    assert names(SamplingParams(frequency_penalty=1)) == names(SamplingParams(repetition_penalty=2)) == ["Penalties"]


def test_passes_run_in_the_documented_order() -> None:
    params = SamplingParams(logit_bias={1: 1.0}, no_repeat_ngram_size=2, min_tokens=1, presence_penalty=1.0)
    state = sequence(params, bad_word_ids=[(1,)])
    passes = passes_for(pack([params]), [state])
    order = ["LogitBias", "BadWords", "NoRepeatNgram", "MinTokens", "Penalties"]
    assert [type(change).__name__ for change in passes] == order


def test_truncations_that_no_drawn_row_uses_are_not_handed_to_the_draw() -> None:
    rows = rows_of(sequence(SamplingParams()), sequence(SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.5)))
    assert (rows.temperature_Q, rows.top_k_Q, rows.top_p_Q, rows.min_p_Q) == (None, None, None, None)


def varied(num_rows: int) -> list[SlotState]:
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=20),
        SamplingParams(temperature=1.4, top_p=0.8, logprobs=3),
        SamplingParams(min_p=0.02, presence_penalty=0.3),
        SamplingParams(temperature=0, repetition_penalty=1.2, logprobs=0),
        SamplingParams(logit_bias={5: 3.0}, no_repeat_ngram_size=2),
    ]
    return [
        sequence(
            kinds[row % len(kinds)], random_tokens(10 + row, row), num_prompt_tokens=5, seed=row // 2, sample_index=row
        )
        for row in range(num_rows)
    ]


def test_tokens_and_logprobs_depend_neither_on_neighbours_nor_on_place() -> None:
    states = varied(29)
    logits_RV = logits_of(29, vocab_size=1003)
    together = sample(logits_RV.clone(), rows_of(*states))
    order = torch.randperm(29, generator=torch.Generator().manual_seed(4)).tolist()
    shuffled = sample(logits_RV[order], rows_of(*[states[row] for row in order]))
    assert together.logprobs is not None
    assert shuffled.logprobs is not None
    assert shuffled.token_ids == tuple(together.token_ids[row] for row in order)
    assert shuffled.logprobs == tuple(together.logprobs[row] for row in order)
    for row, state in enumerate(states):
        alone = sample(logits_RV[row : row + 1].clone(), rows_of(state))
        assert alone.token_ids == (together.token_ids[row],)
        assert (alone.logprobs or (None,)) == (together.logprobs[row],)


def continuation(state: SlotState, num_tokens: int) -> list[int | None]:
    """What a model would say whose logits never change."""
    rows = rows_of(state)
    drawn: list[int | None] = []
    for _ in range(num_tokens):
        token_id = sample(torch.zeros(1, 1000), rows).token_ids[0]
        assert token_id is not None
        state.append(token_id)
        drawn.append(token_id)
    return drawn


def test_seed_and_sample_index_decide_the_draws_and_positions_differ() -> None:
    first = continuation(sequence(SamplingParams(), seed=2**64 - 1), 200)
    assert continuation(sequence(SamplingParams(), seed=2**64 - 1), 200) == first
    assert len(set(first)) > 150
    others = [
        continuation(sequence(SamplingParams(), seed=2**63 - 1), 200),
        continuation(sequence(SamplingParams(), seed=2**64 - 1, sample_index=1), 200),
    ]
    for other in others:
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 10


def test_a_draw_is_keyed_by_the_index_of_the_token_it_draws() -> None:
    fresh, long = sequence(SamplingParams(), [1] * 3, seed=11), sequence(SamplingParams(), [1] * 90, seed=2**64 - 2)
    for _ in range(200):
        seed, index = torch.tensor([11, -2]), torch.tensor([0, 0])
        expected = uniform(seed, index, torch.tensor([fresh.num_tokens, long.num_tokens]))
        assert uniform_draws([fresh, long]).tolist() == expected.tolist()
        fresh.append(TokenId(0))
        long.append(TokenId(0))


def test_a_sequence_admitted_again_with_its_output_goes_on_with_the_same_draws() -> None:
    whole = continuation(sequence(SamplingParams(), [1, 2, 3], seed=5), 100)
    resumed = sequence(
        SamplingParams(), [1, 2, 3, *[t for t in whole[:37] if t is not None]], num_prompt_tokens=3, seed=5
    )
    assert continuation(resumed, 63) == whole[37:]


def test_a_row_whose_tokens_are_all_forbidden_fails_alone() -> None:
    forbidden = SamplingParams(logit_bias=dict.fromkeys(range(VOCAB_SIZE), -math.inf), logprobs=1)
    for params in (forbidden, SamplingParams(temperature=0, logit_bias=forbidden.logit_bias)):
        states = [sequence(SamplingParams(logprobs=1)), sequence(params), sequence(SamplingParams(top_p=0.9))]
        logits_RV = logits_of(3)
        alone = [sample(logits_RV[row : row + 1].clone(), rows_of(states[row])).token_ids[0] for row in (0, 2)]
        samples = sample(logits_RV, rows_of(*states))
        assert samples.token_ids == (alone[0], None, alone[1])
        assert samples.errors == (None, ALL_FORBIDDEN, None)
        assert samples.logprobs is not None
        assert samples.logprobs[1] is None


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logits_that_are_not_finite_fail_their_row_alone(poison: float) -> None:
    logits_RV = logits_of(2)
    expected = sample(logits_RV.clone(), rows_of(sequence(SamplingParams()), sequence(SamplingParams())))
    logits_RV[1, 7] = poison
    samples = sample(logits_RV, rows_of(sequence(SamplingParams()), sequence(SamplingParams())))
    assert samples.errors == (None, NOT_FINITE)
    assert samples.token_ids == (expected.token_ids[0], None)


def test_without_errors_and_without_logprobs_nothing_is_reported() -> None:
    samples = sample(logits_of(2), rows_of(sequence(SamplingParams()), sequence(SamplingParams())))
    assert (samples.errors, samples.logprobs) == (None, None)


def test_logprobs_are_of_the_raw_distribution_with_rank_and_alternatives() -> None:
    params = SamplingParams(temperature=0, logit_bias={17: 100.0}, logprobs=4)
    logits_RV = logits_of(2)
    reference = torch.log_softmax(logits_RV[1].double(), -1)
    samples = sample(logits_RV, rows_of(sequence(SamplingParams()), sequence(params)))
    assert samples.logprobs is not None
    assert samples.logprobs[0] is None
    entry = samples.logprobs[1]
    assert entry is not None
    assert entry.token_id == samples.token_ids[1] == 17
    assert entry.logprob == pytest.approx(float(reference[17]), abs=1e-5)
    assert entry.rank == 1 + int((reference > reference[17]).sum())
    assert list(entry.top_ids) == reference.topk(4).indices.tolist()
    assert entry.top_logprobs == pytest.approx(reference.topk(4).values.tolist(), abs=1e-5)


def test_equal_alternatives_are_the_lowest_ids_whatever_the_neighbours_ask_for() -> None:
    for neighbour in (0, 1, 3, 20, 64):
        states = [sequence(SamplingParams(logprobs=2)), sequence(SamplingParams(logprobs=neighbour))]
        samples = sample(torch.zeros(2, 300), rows_of(*states))
        assert samples.logprobs is not None
        entries = [entry for entry in samples.logprobs if entry is not None]
        assert [entry.top_ids for entry in entries] == [(0, 1), tuple(range(neighbour))]
        assert [entry.rank for entry in entries] == [1, 1]


def test_more_alternatives_than_tokens_report_them_all() -> None:
    samples = sample(logits_of(1, vocab_size=3), rows_of(sequence(SamplingParams(logprobs=5))))
    assert samples.logprobs is not None
    assert samples.logprobs[0] is not None
    assert sorted(samples.logprobs[0].top_ids) == [0, 1, 2]


def test_rows_are_prepared_once_for_many_steps() -> None:
    state = sequence(SamplingParams(temperature=0.5, top_k=3, logit_bias={1: 2.0}))
    rows = SampledRows([state], torch.device("cpu"))
    before = (rows.passes, rows.temperature_Q, rows.top_k_Q)
    sample(logits_of(1), rows)
    assert all(a is b for a, b in zip((rows.passes, rows.temperature_Q, rows.top_k_Q), before, strict=True))
