"""SamplingParams: every limit has a message, nothing is changed in value, and neutral parameters cost no column."""

import math

import msgspec
import pytest

from triode.models.sampling import (
    MAX_COUNT,
    MAX_LOGPROBS,
    MAX_N,
    MAX_SEED,
    MAX_STOPS,
    SamplingParams,
    check_token_ids,
    pack,
)


def make(name: str, value: object) -> SamplingParams:
    return SamplingParams(**{name: value})  # type: ignore[arg-type]


REFUSED: list[tuple[str, object, str]] = [
    ("max_tokens", 0, "max_tokens must be an integer >= 1, got 0"),
    ("max_tokens", -3, "max_tokens must be an integer >= 1, got -3"),
    ("max_tokens", 1.5, "max_tokens must be an integer >= 1, got 1.5"),
    ("max_tokens", True, "max_tokens must be an integer >= 1, got True"),
    ("min_tokens", -1, "min_tokens must be an integer >= 0, got -1"),
    ("min_tokens", None, "min_tokens must be an integer >= 0, got None"),
    ("top_k", -1, f"top_k must be an integer >= 0 and <= {MAX_COUNT}, got -1"),
    ("top_k", 10**30, f"top_k must be an integer >= 0 and <= {MAX_COUNT}, got {10**30}"),
    ("seed", -1, f"seed must be an integer >= 0 and <= {MAX_SEED}, got -1"),
    ("seed", MAX_SEED + 1, f"seed must be an integer >= 0 and <= {MAX_SEED}, got {MAX_SEED + 1}"),
    ("no_repeat_ngram_size", -1, f"no_repeat_ngram_size must be an integer >= 0 and <= {MAX_COUNT}, got -1"),
    ("no_repeat_ngram_size", 2**31, f"no_repeat_ngram_size must be an integer >= 0 and <= {MAX_COUNT}, got {2**31}"),
    ("logprobs", -1, f"logprobs must be an integer >= 0 and <= {MAX_LOGPROBS}, got -1"),
    ("logprobs", MAX_LOGPROBS + 1, f"logprobs must be an integer >= 0 and <= {MAX_LOGPROBS}, got {MAX_LOGPROBS + 1}"),
    ("prompt_logprobs", "5", f"prompt_logprobs must be an integer >= 0 and <= {MAX_LOGPROBS}, got '5'"),
    ("n", 0, f"n must be an integer >= 1 and <= {MAX_N}, got 0"),
    ("n", MAX_N + 1, f"n must be an integer >= 1 and <= {MAX_N}, got {MAX_N + 1}"),
    ("temperature", -0.1, "temperature must be 0, or a number >= 1e-06 and <= 100, got -0.1"),
    ("temperature", math.nan, "temperature must be 0, or a number >= 1e-06 and <= 100, got nan"),
    ("temperature", math.inf, "temperature must be 0, or a number >= 1e-06 and <= 100, got inf"),
    ("temperature", 1e-7, "temperature must be 0, or a number >= 1e-06 and <= 100, got 1e-07"),
    ("temperature", True, "temperature must be 0, or a number >= 1e-06 and <= 100, got True"),
    ("top_p", 0, "top_p must be a number > 0 and <= 1, got 0"),
    ("top_p", 1.01, "top_p must be a number > 0 and <= 1, got 1.01"),
    ("top_p", math.nan, "top_p must be a number > 0 and <= 1, got nan"),
    ("min_p", -0.1, "min_p must be a number >= 0 and <= 1, got -0.1"),
    ("min_p", 1.1, "min_p must be a number >= 0 and <= 1, got 1.1"),
    ("repetition_penalty", 0, "repetition_penalty must be a number >= 0.01 and <= 100, got 0"),
    ("repetition_penalty", 101, "repetition_penalty must be a number >= 0.01 and <= 100, got 101"),
    ("presence_penalty", "1", "presence_penalty must be a number >= -100 and <= 100, got '1'"),
    ("presence_penalty", math.inf, "presence_penalty must be a number >= -100 and <= 100, got inf"),
    ("frequency_penalty", -101, "frequency_penalty must be a number >= -100 and <= 100, got -101"),
    ("include_stop", 1, "include_stop must be True or False, got 1"),
    ("ignore_eos", None, "ignore_eos must be True or False, got None"),
    ("skip_special_tokens", "no", "skip_special_tokens must be True or False, got 'no'"),
    ("stop", "end", "stop must be a tuple of strings, got 'end'"),
    ("stop", ("",), "stop must hold non-empty strings, got ''"),
    ("stop", (3,), "stop must hold non-empty strings, got 3"),
    ("stop", ("x",) * (MAX_STOPS + 1), f"stop must have at most {MAX_STOPS} entries, got {MAX_STOPS + 1}"),
    ("bad_words", "x", "bad_words must be a tuple of strings, got 'x'"),
    ("bad_words", ["ok", ""], "bad_words must hold non-empty strings, got ''"),
    ("stop_token_ids", "12", "stop_token_ids must be a tuple of token ids, got '12'"),
    ("stop_token_ids", {1}, "stop_token_ids must be a tuple of token ids, got {1}"),
    ("stop_token_ids", (-1,), "stop_token_ids must hold integers >= 0, got -1"),
    ("stop_token_ids", (True,), "stop_token_ids must hold integers >= 0, got True"),
    ("stop_token_ids", (1,) * 65, "stop_token_ids must have at most 64 entries, got 65"),
    ("logit_bias", [(1, 2.0)], "logit_bias must map token ids to numbers, got [(1, 2.0)]"),
    ("logit_bias", {"50": 1.0}, "logit_bias must have integers >= 0 as keys, got '50'"),
    ("logit_bias", {-1: 1.0}, "logit_bias must have integers >= 0 as keys, got -1"),
    (
        "logit_bias",
        {1: math.nan},
        "logit_bias must have numbers >= -100 and <= 100, or -inf as values, got nan for token 1",
    ),
    (
        "logit_bias",
        {1: math.inf},
        "logit_bias must have numbers >= -100 and <= 100, or -inf as values, got inf for token 1",
    ),
    (
        "logit_bias",
        {7: 100.5},
        "logit_bias must have numbers >= -100 and <= 100, or -inf as values, got 100.5 for token 7",
    ),
    (
        "guide",
        {"regex": "a"},
        "guide must be one of JsonSchema, JsonObject, Regex, Choices, Grammar, got {'regex': 'a'}",
    ),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED, ids=[f"{n}={v!r}"[:40] for n, v, _ in REFUSED])
def test_a_value_outside_its_limits_is_refused_with_parameter_constraint_and_value(
    name: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        make(name, value)
    assert str(caught.value) == message


ACCEPTED: list[tuple[str, object]] = [
    ("max_tokens", 1),
    ("top_k", 10**9),
    ("seed", 0),
    ("seed", MAX_SEED),
    ("temperature", 0),
    ("temperature", 1e-6),
    ("temperature", 100),
    ("top_p", math.ulp(0.0)),
    ("top_p", 1),
    ("min_p", 1.0),
    ("repetition_penalty", 0.01),
    ("presence_penalty", -100),
    ("n", MAX_N),
    ("logprobs", 0),
    ("logit_bias", {0: -math.inf, 1: -100, 2: 100.0}),
    ("stop", ("a",) * MAX_STOPS),
]


@pytest.mark.parametrize(("name", "value"), ACCEPTED)
def test_the_ends_of_each_range_are_accepted_and_kept_as_given(name: str, value: object) -> None:
    assert getattr(make(name, value), name) == value


def test_contradictory_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="min_tokens must be <= max_tokens = 3, got 4"):
        SamplingParams(max_tokens=3, min_tokens=4)
    with pytest.raises(
        ValueError, match="n must be 1 when temperature is 0, because all samples would be equal, got 2"
    ):
        SamplingParams(temperature=0, n=2)


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(TypeError, match="top_q"):
        make("top_q", 1)
    with pytest.raises(msgspec.ValidationError, match="top_q"):
        msgspec.json.decode(b'{"top_q": 1}', type=SamplingParams)


def test_a_list_is_kept_as_the_equal_tuple() -> None:
    params = SamplingParams(stop=["a"], bad_words=["b", "c"], stop_token_ids=[1, 2])  # type: ignore[arg-type]
    assert (params.stop, params.bad_words, params.stop_token_ids) == (("a",), ("b", "c"), (1, 2))


def test_changing_the_callers_mapping_changes_no_params() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 3.0
    assert params.logit_bias == {1: 2.0}


def test_params_survive_both_encodings() -> None:
    params = SamplingParams(temperature=0.5, stop=("x",), stop_token_ids=(3,), logit_bias={5: -1.5}, seed=MAX_SEED)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    assert msgspec.json.decode(msgspec.json.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize("token_id", [-1, 10, True, "3", 2.0])
def test_what_is_no_token_of_the_vocabulary_is_refused(token_id: int) -> None:
    check_token_ids("prompt", (0, 9), vocab_size=10)
    with pytest.raises(ValueError) as caught:
        check_token_ids("prompt", (0, token_id), vocab_size=10)
    assert str(caught.value) == f"prompt must hold token ids >= 0 and < 10, got {token_id!r}"


def test_default_params_pack_to_no_columns() -> None:
    columns = msgspec.structs.asdict(pack([SamplingParams(), SamplingParams(temperature=0)]))
    assert columns.pop("greedy") == (False, True)
    assert set(columns.values()) == {None}


USED: list[tuple[str, object, object]] = [
    ("temperature", 0.5, 1.0),
    ("top_k", 5, 0),
    ("top_p", 0.5, 1.0),
    ("min_p", 0.5, 0.0),
    ("repetition_penalty", 2.0, 1.0),
    ("presence_penalty", 2.0, 0.0),
    ("frequency_penalty", 2.0, 0.0),
    ("no_repeat_ngram_size", 2, 0),
    ("min_tokens", 2, 0),
    ("logprobs", 0, None),
]


@pytest.mark.parametrize(("name", "value", "neutral"), USED)
def test_a_parameter_that_one_row_uses_gets_a_column_and_no_other_does(
    name: str, value: object, neutral: object
) -> None:
    columns = msgspec.structs.asdict(pack([SamplingParams(), make(name, value)]))
    assert columns.pop("greedy") == (False, False)
    assert columns.pop(name) == (neutral, value)
    assert set(columns.values()) == {None}


def test_logit_bias_packs_as_pairs() -> None:
    columns = pack([SamplingParams(), SamplingParams(logit_bias={4: 1.0, 2: -math.inf})])
    assert columns.logit_bias == ((), ((4, 1.0), (2, -math.inf)))


def test_truncation_of_a_greedy_row_packs_to_nothing() -> None:
    columns = pack([SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.1)])
    assert (columns.temperature, columns.top_k, columns.top_p, columns.min_p) == (None, None, None, None)
