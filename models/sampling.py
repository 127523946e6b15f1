"""SamplingParams: everything a request may say about how its tokens are chosen, and the limits of each parameter.

Nothing here is ever changed silently: a value outside its limits, or a pair of values that contradict each other,
raises `ValueError` naming the parameter, the constraint and the value. `pack` turns the parameters of a batch into one
column per parameter, leaving out the parameters that no row uses.

The order in which the sampler applies them: guide, logit_bias, bad_words, no_repeat_ngram_size, min_tokens, repetition,
presence and frequency penalty, temperature, top_k, top_p, min_p, draw.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar, get_args

import msgspec
from msgspec.structs import force_setattr

from triode.ids import TokenId
from triode.models.guide import Guide

MAX_LOGPROBS = 64
"""The most alternatives that `logprobs` and `prompt_logprobs` may ask for."""
MAX_N = 256
"""The most samples one request may ask for."""
MAX_STOPS = 64
"""The most stop strings, stop tokens or bad words of one request."""
MIN_TEMPERATURE = 1e-6
"""The lowest temperature of a random draw: logits divided by it are still finite in float32."""
MAX_LOGIT_BIAS = 100.0
"""The largest finite logit bias, up or down: it outweighs every other token, and stays exact beside the logits."""
MAX_SEED = 2**64 - 1
MAX_COUNT = 2**31 - 1
"""The largest `top_k` and `no_repeat_ngram_size`: columns hold what fits a machine word."""

Value = TypeVar("Value")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one request chooses its tokens and when it stops.

    A list may be given where a tuple is declared; it is kept as the equal tuple. Which token ids exist is only known
    with the model: `check_token_ids`.

    Raises:
        ValueError: at construction, for a value outside its limits or for parameters that contradict each other.
    """

    max_tokens: int | None = None
    """The most tokens to generate; None takes all the room the context leaves, which the completion reports."""
    min_tokens: int = 0
    """No end-of-sequence or stop token is sampled, and no stop string honoured, before this many tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token (greedy), the lowest id among equals."""
    top_k: int = 0
    """Keep the k most probable tokens, the lowest ids among equals; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose probabilities, after top_k, reach p; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as probable as the most probable one; 0 keeps all."""
    seed: int | None = None
    """Makes the draws repeatable; None draws a seed at submit, which the completion reports."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or output (CTRL, arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the output already contains."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for every time the output already contains it."""
    no_repeat_ngram_size: int = 0
    """No n-gram of this size occurs twice in prompt and output; 0 allows all."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids; -inf forbids a token."""
    bad_words: tuple[str, ...] = ()
    """Strings whose token sequences are never completed, not even one that begins in the prompt."""
    stop: tuple[str, ...] = ()
    """Strings that end the output where they first appear."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output, besides the model's own."""
    include_stop: bool = False
    """Whether the text keeps the stop string or stop token that ended it."""
    ignore_eos: bool = False
    """Go on past the model's own end-of-sequence tokens."""
    logprobs: int | None = None
    """Report each token's logprob and this many alternatives; None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    n: int = 1
    """How many independent samples to draw from the prompt."""
    guide: Guide | None = None
    """What the output may look like: a JSON schema, a JSON object, a regular expression, choices or a grammar. It ends with
    finish_reason `stop` where the guide is satisfied; an output cut by `max_tokens`, `stop` or `stop_token_ids` need not
    satisfy it."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_words("stop", self.stop)
        _check_words("bad_words", self.bad_words)
        _check_stop_token_ids(self.stop_token_ids)
        _check_logit_bias(self.logit_bias)
        _check_combinations(self)
        for name in ("stop", "bad_words", "stop_token_ids"):
            force_setattr(self, name, tuple(getattr(self, name)))
        if self.logit_bias is not None:
            # A copy, so that the caller's later changes to the mapping do not reach a running request.
            force_setattr(self, "logit_bias", dict(self.logit_bias))

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always taken, so that no random number is drawn."""
        return self.temperature == 0

    @property
    def uses_penalties(self) -> bool:
        """Whether the logits depend on which tokens came before, by count or by presence."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


# name, lowest, highest, may it be None
_INTEGERS: tuple[tuple[str, int, float, bool], ...] = (
    ("max_tokens", 1, math.inf, True),
    ("min_tokens", 0, math.inf, False),
    ("top_k", 0, MAX_COUNT, False),
    ("seed", 0, MAX_SEED, True),
    ("no_repeat_ngram_size", 0, MAX_COUNT, False),
    ("logprobs", 0, MAX_LOGPROBS, True),
    ("prompt_logprobs", 0, MAX_LOGPROBS, True),
    ("n", 1, MAX_N, False),
)
# name, lowest, highest, how the message says it
_FLOATS: tuple[tuple[str, float, float, str], ...] = (
    ("top_p", math.ulp(0.0), 1.0, "> 0 and <= 1"),
    ("min_p", 0.0, 1.0, ">= 0 and <= 1"),
    ("repetition_penalty", 0.01, 100.0, ">= 0.01 and <= 100"),
    ("presence_penalty", -100.0, 100.0, ">= -100 and <= 100"),
    ("frequency_penalty", -100.0, 100.0, ">= -100 and <= 100"),
)
_FLAGS = ("include_stop", "ignore_eos", "skip_special_tokens")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_numbers(params: SamplingParams) -> None:
    for name, lowest, highest, optional in _INTEGERS:
        value = getattr(params, name)
        if value is None and optional:
            continue
        if type(value) is not int or not lowest <= value <= highest:
            limit = f">= {lowest}" if highest == math.inf else f">= {lowest} and <= {highest}"
            raise ValueError(f"{name} must be an integer {limit}, got {value!r}")
    temperature = params.temperature
    if not _is_number(temperature) or not (temperature == 0 or MIN_TEMPERATURE <= temperature <= 100):
        raise ValueError(f"temperature must be 0, or a number >= {MIN_TEMPERATURE} and <= 100, got {temperature!r}")
    for name, low, high, limit in _FLOATS:
        value = getattr(params, name)
        if not _is_number(value) or not low <= value <= high:
            raise ValueError(f"{name} must be a number {limit}, got {value!r}")
    for name in _FLAGS:
        value = getattr(params, name)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def _check_words(name: str, words: object) -> None:
    if not isinstance(words, (tuple, list)):
        raise ValueError(f"{name} must be a tuple of strings, got {words!r}")
    if len(words) > MAX_STOPS:
        raise ValueError(f"{name} must have at most {MAX_STOPS} entries, got {len(words)}")
    for word in words:
        if not isinstance(word, str) or not word:
            raise ValueError(f"{name} must hold non-empty strings, got {word!r}")
        if not is_unicode(word):
            raise ValueError(f"{name} must hold valid Unicode, got {word!r}")


def is_unicode(text: str) -> bool:
    """Whether a text has a UTF-8 form: half of a surrogate pair has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_stop_token_ids(token_ids: object) -> None:
    if not isinstance(token_ids, (tuple, list)):
        raise ValueError(f"stop_token_ids must be a tuple of token ids, got {token_ids!r}")
    if len(token_ids) > MAX_STOPS:
        raise ValueError(f"stop_token_ids must have at most {MAX_STOPS} entries, got {len(token_ids)}")
    for token_id in token_ids:
        if type(token_id) is not int or token_id < 0:
            raise ValueError(f"stop_token_ids must hold integers >= 0, got {token_id!r}")


def _check_logit_bias(logit_bias: object) -> None:
    if logit_bias is None:
        return
    if not isinstance(logit_bias, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers, got {logit_bias!r}")
    for token_id, bias in logit_bias.items():
        if type(token_id) is not int or token_id < 0:
            raise ValueError(f"logit_bias must have integers >= 0 as keys, got {token_id!r}")
        if not _is_number(bias) or not (bias == -math.inf or abs(bias) <= MAX_LOGIT_BIAS):
            limit = f">= {-MAX_LOGIT_BIAS:g} and <= {MAX_LOGIT_BIAS:g}, or -inf"
            raise ValueError(f"logit_bias must have numbers {limit} as values, got {bias!r} for token {token_id}")


def _check_combinations(params: SamplingParams) -> None:
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise ValueError(f"min_tokens must be <= max_tokens = {params.max_tokens}, got {params.min_tokens}")
    if params.is_greedy and params.n > 1:
        raise ValueError(f"n must be 1 when temperature is 0, because all samples would be equal, got {params.n}")
    if params.guide is not None:
        _check_guide(params, params.guide)


def _check_guide(params: SamplingParams, guide: object) -> None:
    if not isinstance(guide, Guide):
        names = ", ".join(kind.__name__ for kind in get_args(Guide))
        raise ValueError(f"guide must be one of {names}, got {guide!r:.100}")
    if params.min_tokens:
        raise ValueError(f"min_tokens must be 0 with guide, which says where the output ends, got {params.min_tokens}")
    if params.ignore_eos:
        raise ValueError("ignore_eos must be False with guide, whose end the end-of-sequence token marks")


def check_token_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Refuse what is not a token of the model; `name` is the parameter that holds the ids.

    Raises:
        ValueError: naming the parameter and the id.
    """
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise ValueError(f"{name} must hold token ids >= 0 and < {vocab_size}, got {token_id!r}")


class SamplingColumns(msgspec.Struct, frozen=True):
    """The parameters of a batch of R rows, one column per parameter; None where no row uses the parameter."""

    greedy: tuple[bool, ...]
    temperature: tuple[float, ...] | None = None
    top_k: tuple[int, ...] | None = None
    top_p: tuple[float, ...] | None = None
    min_p: tuple[float, ...] | None = None
    repetition_penalty: tuple[float, ...] | None = None
    presence_penalty: tuple[float, ...] | None = None
    frequency_penalty: tuple[float, ...] | None = None
    no_repeat_ngram_size: tuple[int, ...] | None = None
    logit_bias: tuple[tuple[tuple[TokenId, float], ...], ...] | None = None
    min_tokens: tuple[int, ...] | None = None
    logprobs: tuple[int | None, ...] | None = None


# Truncation cannot change which token is the most probable one.
_NO_EFFECT_WHEN_GREEDY = frozenset({"temperature", "top_k", "top_p", "min_p"})


def pack(rows: Sequence[SamplingParams]) -> SamplingColumns:
    """Columns for a batch; a column that would change no row is None, so that its pass is skipped.

    A greedy row's temperature and truncations are packed as neutral: they cannot change its token.
    """

    def column(name: str, neutral: Value) -> tuple[Value, ...] | None:
        without_effect = name in _NO_EFFECT_WHEN_GREEDY
        values = tuple(neutral if without_effect and row.is_greedy else getattr(row, name) for row in rows)
        return values if any(value != neutral for value in values) else None

    return SamplingColumns(
        greedy=tuple(row.is_greedy for row in rows),
        temperature=column("temperature", 1.0),
        top_k=column("top_k", 0),
        top_p=column("top_p", 1.0),
        min_p=column("min_p", 0.0),
        repetition_penalty=column("repetition_penalty", 1.0),
        presence_penalty=column("presence_penalty", 0.0),
        frequency_penalty=column("frequency_penalty", 0.0),
        no_repeat_ngram_size=column("no_repeat_ngram_size", 0),
        logit_bias=_bias_column(rows),
        min_tokens=column("min_tokens", 0),
        logprobs=column("logprobs", None),
    )


def _bias_column(rows: Sequence[SamplingParams]) -> tuple[tuple[tuple[TokenId, float], ...], ...] | None:
    if not any(row.logit_bias for row in rows):
        return None
    return tuple(tuple((TokenId(i), bias) for i, bias in (row.logit_bias or {}).items()) for row in rows)
