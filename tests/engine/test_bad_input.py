"""What is wrong is refused where it is given, alone, with a message that says what to change."""

import math
from collections import UserList, deque
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

import pytest

import triode
from engines import LONG_TEXT, check_nothing_is_left, complete, greedy, open_tiny
from triode.engine.engine import Engine
from triode.engine.request import freeze_prompt
from triode.errors import InsufficientMemory
from triode.models.progress import NullProgress

PROMPT = "The quick brown fox."
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}


async def refused(message: str, *, prompt: Any = PROMPT, params: Any = None, **options: Any) -> None:
    """The submit raises, the engine goes on, and nothing of the request is left."""
    settings = {name: options.pop(name) for name in ("max_context_tokens", "kv_cache_bytes") if name in options}
    async with open_tiny(executor="inline", **settings) as engine:
        with pytest.raises(ValueError, match=message):
            await engine.submit(prompt, params, **options)
        assert len((await complete(engine, [1], greedy(2))).completion.token_ids) == 2
        await check_nothing_is_left(engine)


# Prompts


@pytest.mark.parametrize("prompt", ["", []])
async def test_an_empty_prompt_is_refused(prompt: Any) -> None:
    await refused("^prompt must have at least one token, got none$", prompt=prompt)


async def test_a_prompt_longer_than_the_context_is_refused() -> None:
    await refused(
        "^prompt must have fewer than 64 tokens, to leave room for at least one more in the context of 64 tokens, got 64$",
        prompt=[1] * 64,
        max_context_tokens=64,
    )


async def test_a_prompt_longer_than_the_cache_is_refused() -> None:
    await refused(
        "prompt must have fewer than 49 tokens, to leave room for at least one more in the KV cache of 48 tokens, got 60",
        prompt=[1] * 60,
        kv_cache_bytes=4 * 2**13,
    )


async def test_a_text_too_long_to_fit_is_refused_before_it_is_encoded() -> None:
    await refused("prompt must have fewer than 64 tokens", prompt=LONG_TEXT * 100, max_context_tokens=64)


@pytest.mark.parametrize("token", [-1, 49_152])
async def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    await refused(f"^prompt must hold token ids >= 0 and < 49152, got {token}$", prompt=[1, token])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "prompt must be text, token ids or chat messages, got NoneType"),
        (b"bytes", "prompt must be text, token ids or chat messages, got bytes"),
        (7, "prompt must be text, token ids or chat messages, got int"),
        ([1, "two"], r"prompt must hold either token ids \(int\) or chat messages \(dict\), got int, str"),
        ([True], r"prompt must hold either token ids \(int\) or chat messages \(dict\), got bool"),
        ([1.5], r"prompt must hold either token ids \(int\) or chat messages \(dict\), got float"),
    ],
)
async def test_what_is_no_prompt_is_refused(prompt: Any, message: str) -> None:
    await refused(f"^{message}$", prompt=prompt)


@pytest.mark.parametrize("kind", [list, tuple, deque, UserList])
async def test_only_plain_integers_are_token_ids_in_whatever_sequence(
    kind: Callable[[list[int]], Sequence[int]],
) -> None:
    complaint = r"^prompt must hold either token ids \(int\) or chat messages \(dict\), got "
    await refused(complaint + "HTTPStatus, int$", prompt=kind([1, HTTPStatus.OK]))
    await refused(complaint + "bool, int$", prompt=kind([1, True]))
    assert freeze_prompt(kind([1, 2])) == (1, 2)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "wizard", "content": "Hi."}, r"messages\[0\]\.role must be one of .*, got 'wizard'"),
        ({"content": "Hi."}, r"messages\[0\]\.role must be one of .*, got None"),
        ({"role": "user"}, r"messages\[0\]\.content must be text, got None"),
        ({"role": "user", "content": 7}, r"messages\[0\]\.content must be text or a list of parts, got 7"),
        (
            {"role": "user", "content": [IMAGE]},
            r"type must be text, got 'image_url': other parts are not supported yet",
        ),
    ],
)
async def test_a_malformed_message_is_refused(message: dict[str, object], complaint: str) -> None:
    await refused(complaint, prompt=[message])


class Hostile:
    """Code of the caller's that would run in the engine if it came there."""

    def __repr__(self) -> str:
        raise ZeroDivisionError("in the engine")


def nested(depth: int) -> list[Any]:
    content: list[Any] = []
    for _ in range(depth):
        content = [content]
    return content


@pytest.mark.parametrize("content", [Hostile(), [Hostile()], nested(100_000)], ids=["object", "part", "nested"])
async def test_a_message_that_is_not_plain_data_is_refused(content: Any) -> None:
    message = {"role": "user", "content": content}
    await refused("^prompt must hold messages of text, numbers, lists and dicts: ", prompt=[message])


@pytest.mark.parametrize("depth", [100, 900])
async def test_nested_messages_never_reach_the_actors_stack(depth: int) -> None:
    await refused("must", prompt=[{"role": "user", "content": nested(depth)}])


@pytest.mark.parametrize("prompt", ["half a pair: \ud83d", [{"role": "user", "content": "half a pair: \ud83d"}]])
async def test_text_that_is_not_unicode_is_refused(prompt: Any) -> None:
    await refused("^prompt must be valid Unicode, got text without a UTF-8 form$", prompt=prompt)


# Parameters that only the model, or the memory, can judge


async def test_more_tokens_than_the_room_are_refused() -> None:
    await refused(
        "^max_tokens must be <= 59, the room that the prompt's 5 tokens leave in the context of 64 tokens, got 60$",
        prompt=[1] * 5,
        params=greedy(60),
        max_context_tokens=64,
    )


async def test_more_samples_than_fit_together_are_refused() -> None:
    await refused(
        r"^prompt and max_tokens, times n = 4, must fit the KV cache of 112 tokens, got 5 \+ 28 tokens, which take 128$",
        prompt=[1] * 5,
        params=triode.SamplingParams(n=4, max_tokens=28),
        kv_cache_bytes=8 * 2**13,
    )


async def test_min_tokens_beyond_the_room_are_refused() -> None:
    await refused(
        "min_tokens must be <= max_tokens = 4, got 5",
        prompt=[1] * 60,
        params=triode.SamplingParams(min_tokens=5),
        max_context_tokens=64,
    )


@pytest.mark.parametrize("fields", [{"stop_token_ids": (49_152,)}, {"logit_bias": {49_152: 1.0}}])
async def test_a_parameter_that_names_an_unknown_token_is_refused(fields: dict[str, Any]) -> None:
    await refused(f"{next(iter(fields))} must hold token ids >= 0 and < 49152, got 49152", params=greedy(1, **fields))


async def test_parameters_of_another_kind_are_refused() -> None:
    await refused("params must be SamplingParams, got {'max_tokens': 3}", params={"max_tokens": 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer >= 1, got 0"),
        ({"max_tokens": -1}, "max_tokens must be an integer >= 1, got -1"),
        ({"temperature": -0.5}, "temperature must be 0, or a number >= 1e-06 and <= 100, got -0.5"),
        ({"temperature": math.nan}, "temperature must be 0, or a number >= 1e-06 and <= 100, got nan"),
        ({"top_p": 0.0}, "top_p must be a number > 0 and <= 1, got 0.0"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be <= max_tokens = 4, got 5"),
        ({"temperature": 0, "n": 2}, "n must be 1 when temperature is 0, because all samples would be equal, got 2"),
        (
            {"guide": {"regex": "a"}},
            "guide must be one of JsonSchema, JsonObject, Regex, Choices, Grammar, got {'regex': 'a'}",
        ),
        ({"stop": "word"}, "stop must be a tuple of strings, got 'word'"),
        ({"stop": ("\ud83d",)}, "stop must hold valid Unicode, got '.ud83d'"),
        ({"bad_words": ("\ud83d",)}, "bad_words must hold valid Unicode, got '.ud83d'"),
    ],
)
def test_parameters_outside_their_limits_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        triode.SamplingParams(**fields)


# Other arguments of submit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "mine"}, "adapter must be None: adapters are not supported yet, got 'mine'"),
        ({"priority": "high"}, "priority must be an integer, lower first, got 'high'"),
        ({"priority": True}, "priority must be an integer, lower first, got True"),
        ({"cache_salt": ""}, "cache_salt must be a non-empty string, got ''"),
        ({"cache_salt": 7}, "cache_salt must be a non-empty string, got 7"),
        ({"cache_salt": "\ud83d"}, "cache_salt must be valid Unicode, got '.ud83d'"),
        ({"deadline_s": 0}, "deadline_s must be > 0 and finite, got 0"),
        ({"deadline_s": math.nan}, "deadline_s must be > 0 and finite, got nan"),
        ({"deadline_s": "soon"}, "deadline_s must be > 0 and finite, got 'soon'"),
        ({"deadline_s": math.inf}, "deadline_s must be > 0 and finite, got inf"),
        ({"deadline_s": 10**400}, f"deadline_s must be > 0 and finite, got {10**400}"),
        ({"request_id": ""}, "request_id must be a non-empty string, got ''"),
        ({"request_id": 7}, "request_id must be a non-empty string, got 7"),
    ],
)
async def test_a_wrong_argument_is_refused(options: dict[str, Any], message: str) -> None:
    await refused(f"^{message}$", **options)


async def test_a_wrong_priority_is_refused_later_too() -> None:
    async with open_tiny(executor="inline") as engine, engine.submit(PROMPT, greedy(3), request_id="mine") as stream:
        with pytest.raises(ValueError, match="priority must be an integer, lower first, got 'high'"):
            engine.set_priority("mine", "high")  # type: ignore[arg-type]
        await stream.result()


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (PROMPT, None, "prompts must be a list of prompts, got one text: 'The quick"),
        ([PROMPT], [greedy(1)] * 2, "params must be one, or one for each of the 1 prompts, got 2"),
        ([PROMPT, [49_152]], None, "prompt must hold token ids >= 0 and < 49152, got 49152"),
    ],
)
async def test_a_wrong_batch_is_refused(prompts: Any, params: Any, message: str) -> None:
    async with open_tiny(executor="inline") as engine:
        with pytest.raises(ValueError, match=message):
            await engine.generate(prompts, params)
        await check_nothing_is_left(engine)


async def test_one_text_is_no_list_of_prompts_to_embed() -> None:
    async with open_tiny(executor="inline") as engine:
        with pytest.raises(ValueError, match="prompts must be a list of prompts, got one text: 'The quick"):
            await engine.embed(PROMPT)
        with pytest.raises(ValueError, match="pooling must be one of mean, last, got 'max'"):
            await engine.embed([PROMPT], pooling="max")


@pytest.mark.parametrize("prompt", ["", [-1], [IMAGE]])
async def test_the_cache_refuses_what_submit_refuses(prompt: Any) -> None:
    async with open_tiny(executor="inline") as engine:
        for call in (engine.cache.pin, engine.cache.unpin):
            with pytest.raises(ValueError, match="must"):
                await call(prompt)
        with pytest.raises(ValueError, match="must"):
            await engine.embed([prompt])


async def test_the_cache_refuses_a_wrong_salt() -> None:
    async with open_tiny(executor="inline") as engine:
        for salt in ("", 7, "\ud83d"):
            with pytest.raises(ValueError, match="cache_salt must be"):
                await engine.cache.pin(PROMPT, cache_salt=salt)  # type: ignore[arg-type]


# Settings of the engine


async def opening_fails(error: type[Exception], message: str, **settings: Any) -> None:
    with pytest.raises(error, match=message):
        async with open_tiny(**settings):
            pass


async def test_no_space_for_a_single_block_is_refused() -> None:
    await opening_fails(
        InsufficientMemory,
        r"gets .* \(kv_cache_bytes\), but needs .* for a block of 16 tokens and one for padding: lower block_size_tokens",
        kv_cache_bytes=2**13,
    )


async def test_more_cache_than_memory_is_refused() -> None:
    await opening_fails(
        InsufficientMemory,
        r"the KV cache wants .* \(kv_cache_bytes\), but .* are free: lower kv_cache_bytes, or close what else holds",
        kv_cache_bytes=2**50,
    )


async def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(triode.ModelNotFound, match="there is no random model 'nothing'"):
        async with triode.open_engine("random:nothing"):
            pass


async def test_a_context_beyond_the_model_is_refused() -> None:
    await opening_fails(
        ValueError, "max_context_tokens must be <= 8192 for this model, got 8193", max_context_tokens=8193
    )


class _Stages(NullProgress):
    """Remembers what an engine has done until it was refused."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def stage(self, name: str, total: int | None, unit: str) -> None:
        self.names.append(name)


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("quantization must be none with kernels='reference', got 'a16w8'", {"quantization": "a16w8"}),
        ("kv_dtype must be auto here, got 'int8': the torch kernels were asked for", {"kv_dtype": "int8"}),
    ],
)
async def test_what_the_kernels_lack_is_refused_before_weights_are_loaded(
    message: str, settings: dict[str, Any]
) -> None:
    stages = _Stages()
    await opening_fails(ValueError, message, kernels="reference", progress=stages, **settings)
    assert stages.names
    assert "Loading weights" not in stages.names


async def test_two_engines_cannot_have_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused, and the first goes on."""
    from triode.models import build

    def engine_answers(engine: Engine) -> Any:
        return complete(engine, PROMPT, greedy(2))

    async with open_tiny(executor="inline") as first:
        monkeypatch.setattr(build, "free_memory_bytes", lambda _: 2**20)
        await opening_fails(
            InsufficientMemory, r"close what else holds memory \(another engine\?\)", kv_cache_bytes=2**21
        )
        assert len((await engine_answers(first)).completion.token_ids) == 2
