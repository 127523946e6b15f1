"""Guided requests through a whole engine: they validate, end where they should, and disturb nobody."""

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import pytest
import trio

import triode
from engines import SMALL, check_nothing_is_left, complete, drawn, open_gated, open_tiny, rested
from guides import grow_up_to
from triode.engine.completion import Completion, Result
from triode.engine.engine import Engine
from triode.errors import EngineFault
from triode.models import grammar
from triode.models.prototypes import FEW_SHARERS
from triode.models.vocabulary import vocabulary_for

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["é", "b"]}, "maxItems": 2},
        "home": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{3}$"}},
            "required": ["zip"],
            "additionalProperties": False,
        },
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "home", "ok"],
    "additionalProperties": False,
}
GUIDE = triode.JsonSchema(SCHEMA, compact=True)
PROMPT = list(range(500, 543))
NEIGHBOUR = list(range(900, 920))


@pytest.fixture(scope="module", autouse=True)
def _vocabularies_are_made_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar, "vocabulary_for", cache(vocabulary_for))
        yield


def guided(**fields: Any) -> triode.SamplingParams:
    return triode.SamplingParams(**{"guide": GUIDE, "seed": 3, "max_tokens": 150, **fields})


def check(completion: Completion) -> None:
    assert completion.finish_reason == "stop"
    jsonschema.validate(json.loads(completion.text), SCHEMA)


def content(result: Result) -> list[tuple[object, ...]]:
    """Everything that must not depend on circumstances."""
    return [(one.text, one.token_ids, one.logprobs, one.finish_reason) for one in result.completions]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 1.3, "n": 3},
        {"top_k": 5},
        {"top_p": 0.3, "min_p": 0.01},
        {"logprobs": 2, "prompt_logprobs": 1},
        {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.3},
        {"logit_bias": {260: 5.0, 300: -100.0}},
        {"bad_words": ("true",)},
        {"no_repeat_ngram_size": 8},
    ],
    ids=lambda fields: "+".join(fields),
)
async def test_outputs_validate_whatever_else_is_asked_for(fields: dict[str, Any]) -> None:
    async with open_tiny(executor="inline") as engine:
        result = await complete(engine, PROMPT, guided(**fields))
        for completion in result.completions:
            check(completion)
            assert (completion.logprobs is not None) == ("logprobs" in fields)
        await check_nothing_is_left(engine)


@pytest.mark.parametrize("executor", ["thread", pytest.param("process", marks=pytest.mark.slow)])
async def test_every_executor_says_the_same(executor: str) -> None:
    async with open_tiny(executor="inline") as engine:
        expected = content(await complete(engine, PROMPT, guided(n=2, logprobs=1)))
    async with open_tiny(executor=executor) as engine:
        assert content(await complete(engine, PROMPT, guided(n=2, logprobs=1))) == expected
        with pytest.raises(ValueError, match="guide cannot be compiled"):
            await engine.submit(PROMPT, guided(guide=triode.Regex("(")))


# Its keys and punctuation are forced.
FORCING = triode.Grammar(
    'start: "{\\"the name\\": \\"" /[a-z]{1,6}/ "\\", \\"the colour\\": \\"" ("red" | "blue") "\\"}"'
)


def forcing(seed: int) -> triode.SamplingParams:
    return guided(guide=FORCING, seed=seed, n=1 + seed % 2, max_tokens=40)


async def run_forcing(**settings: Any) -> tuple[list[list[tuple[object, ...]]], int]:
    """The outputs of six requests at once, and how many steps they took."""
    outputs: list[list[tuple[object, ...]]] = [[]] * 6

    async def run(engine: Engine, seed: int) -> None:
        outputs[seed] = content(await complete(engine, PROMPT, forcing(seed)))

    async with open_tiny(**settings) as engine:
        async with trio.open_nursery() as nursery:
            for seed in range(6):
                nursery.start_soon(run, engine, seed)
        num_steps = engine.statistics().runner.num_steps
        await check_nothing_is_left(engine)
    return outputs, num_steps


async def test_forced_tokens_take_one_step_together() -> None:
    outputs, num_steps = await run_forcing(executor="inline")
    for samples in outputs:
        for text, token_ids, _, finish_reason in samples:
            assert re.fullmatch('{"the name": "[a-z]{1,6}", "the colour": "(red|blue)"}', str(text))
            assert finish_reason == "stop"
            assert isinstance(token_ids, tuple)
            assert num_steps < len(token_ids)


@pytest.mark.parametrize(
    "settings",
    [
        {"executor": "thread"},
        {"executor": "thread", "max_step_tokens": 18},
        pytest.param({"executor": "process"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
async def test_forced_tokens_are_the_same_ahead_and_in_chunks(settings: dict[str, Any]) -> None:
    expected, _ = await run_forcing(executor="inline")
    assert (await run_forcing(**settings))[0] == expected


async def test_forced_tokens_are_the_same_after_preemption() -> None:
    expected, _ = await run_forcing(executor="inline")
    # 11 blocks for nine samples that take up to six each.
    memory = SMALL["kv_cache_bytes"] * 12 // 256
    async with open_gated(kv_cache_bytes=memory, prefix_cache=False) as (engine, gate):
        streams = [await engine.submit(PROMPT, forcing(seed)) for seed in range(6)]
        gate.open()
        assert [content(await stream.result()) for stream in streams] == expected
        assert engine.statistics().scheduler.num_preemptions > 0


@pytest.mark.parametrize("max_tokens", range(1, 24, 2))
async def test_forced_tokens_end_at_the_limit(max_tokens: int) -> None:
    async with open_tiny(executor="inline") as engine:
        whole = (await complete(engine, PROMPT, guided(guide=FORCING))).completion
        cut = (await complete(engine, PROMPT, guided(guide=FORCING, max_tokens=max_tokens))).completion
        assert cut.token_ids == whole.token_ids[:max_tokens]
        assert cut.finish_reason == ("length" if max_tokens < len(whole.token_ids) else "stop")


async def test_a_stop_string_among_forced_tokens_ends_the_output() -> None:
    async with open_tiny(executor="thread") as engine:
        completion = (await complete(engine, PROMPT, guided(guide=FORCING, stop=("colour",)))).completion
        assert (completion.finish_reason, completion.stop_reason) == ("stop", "colour")
        assert completion.text.endswith(', "the ')
        await check_nothing_is_left(engine)


async def test_an_output_that_is_cut_is_no_success() -> None:
    async with open_tiny(executor="inline") as engine:
        completion = (await complete(engine, PROMPT, guided(max_tokens=7))).completion
        assert (completion.finish_reason, len(completion.token_ids)) == ("length", 7)


async def test_a_stop_string_ends_a_guided_output() -> None:
    async with open_tiny(executor="inline") as engine:
        completion = (await complete(engine, PROMPT, guided(stop=('"age":',)))).completion
        assert (completion.finish_reason, completion.stop_reason) == ("stop", '"age":')
        assert completion.text.startswith('{"name":')


async def test_guided_outputs_do_not_depend_on_neighbours_chunks_or_cached_prefixes() -> None:
    async with open_tiny(executor="inline") as engine:
        alone = await complete(engine, PROMPT, guided(logprobs=2))
        again = await complete(engine, PROMPT, guided(logprobs=2))
        assert again.usage.cached_tokens > 0
        assert content(again) == content(alone)
    async with open_tiny(executor="thread", max_step_tokens=18) as engine, trio.open_nursery() as nursery:
        for seed in range(4):
            nursery.start_soon(complete, engine, NEIGHBOUR[seed:], drawn(40, seed=seed))
            nursery.start_soon(complete, engine, NEIGHBOUR[seed:], guided(seed=seed, guide=triode.Regex("[a-z]{9}")))
        assert content(await complete(engine, PROMPT, guided(logprobs=2))) == content(alone)


async def test_unguided_neighbours_are_what_they_are_alone() -> None:
    async with open_tiny(executor="inline") as engine:
        alone = content(await complete(engine, NEIGHBOUR, drawn(30)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(complete, engine, PROMPT, guided())
            assert content(await complete(engine, NEIGHBOUR, drawn(30))) == alone


async def test_a_preempted_output_goes_on_where_it_was() -> None:
    each = [guided(seed=seed, max_tokens=100) for seed in range(6)]
    async with open_tiny(executor="inline") as engine:
        expected = [content(await complete(engine, PROMPT, params)) for params in each]
    # 20 blocks for six requests that take up to nine each.
    memory = SMALL["kv_cache_bytes"] * 21 // 256
    async with open_gated(kv_cache_bytes=memory, prefix_cache=False) as (engine, gate):
        streams = [await engine.submit(PROMPT, params) for params in each]
        gate.open()
        assert [content(await stream.result()) for stream in streams] == expected
        assert engine.statistics().scheduler.num_preemptions > 0


async def test_a_warm_engine_is_ready_for_its_first_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(*arguments: Any) -> Any:
        made.append(1)
        return vocabulary_for(*arguments)

    monkeypatch.setattr(grammar, "vocabulary_for", counted)
    async with open_tiny(executor="thread", warm_guides=True) as engine:
        assert len(made) == 1
        check((await complete(engine, PROMPT, guided())).completion)
        assert len(made) == 1


BAD = [
    (triode.JsonSchema({"not": {}}), r"guide cannot be compiled: Unimplemented keys: \[\"not\"\]"),
    (triode.Regex("a("), r"guide cannot be compiled: .*unclosed group"),
    (triode.Grammar("start: x"), r"guide cannot be compiled: .*unknown name"),
]


@pytest.mark.parametrize(("guide", "message"), BAD, ids=lambda value: type(value).__name__)
async def test_a_bad_guide_is_refused_with_the_reason_before_any_step(guide: Any, message: str) -> None:
    async with open_tiny(executor="inline") as engine:
        with pytest.raises(ValueError, match=f"(?s)^{message}"):
            await engine.submit(PROMPT, guided(guide=guide))
        assert engine.statistics().runner.num_steps == 0
        await check_nothing_is_left(engine)


async def test_a_guide_that_fails_on_its_way_takes_nobody_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_tiny(executor="inline") as engine:
        alone = content(await complete(engine, NEIGHBOUR, drawn(30)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(complete, engine, NEIGHBOUR, drawn(30))
            with pytest.raises(triode.RequestFailed, match=r"the guide cannot be followed any further: .*too many"):
                await complete(engine, PROMPT, guided(guide=triode.Regex("(.*a.{0,20}){20}")))
        assert content(await complete(engine, NEIGHBOUR, drawn(30))) == alone
        await check_nothing_is_left(engine)


async def test_a_guide_and_a_bias_that_leave_no_token_fail_the_request() -> None:
    async with open_tiny(executor="inline") as engine:
        with pytest.raises(triode.RequestFailed, match="no token is possible: guide, logit_bias"):
            await complete(engine, PROMPT, guided(guide=triode.Choices(("é",)), bad_words=("é",)))


async def test_guided_requests_can_be_cancelled_while_their_guide_compiles() -> None:
    async with open_tiny(executor="thread") as engine:
        for seed in range(5):
            with trio.move_on_after(0):
                await engine.submit(PROMPT, guided(guide=triode.Regex(f"[a-z]{{{seed + 1}}}")))
        check((await complete(engine, PROMPT, guided())).completion)
        await check_nothing_is_left(engine)


def guides_of(engine: Engine) -> grammar.GuideCompiler:
    guides: grammar.GuideCompiler = engine._hub.parts.executor._runner._slots.guides  # type: ignore[attr-defined]
    return guides


def held_bytes(engine: Engine) -> int:
    """Of the guides that requests have."""
    return guides_of(engine)._held_bytes


async def test_a_bug_in_growing_a_guide_in_the_background_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    grow_up_to(2, monkeypatch)

    def broken(guide: object, vocabulary: object) -> None:
        raise ZeroDivisionError("a bug")

    params = guided(guide=triode.Regex("[0-9]{20}"))
    with pytest.raises(EngineFault) as raised:
        async with open_tiny(executor="inline", max_running=8) as engine:
            await complete(engine, PROMPT, params)
            monkeypatch.setattr(grammar, "compile_prototype", broken)
            await engine.generate([PROMPT] * (FEW_SHARERS + 1), params)
            guides_of(engine)._growing.submit(int).result()
            await complete(engine, PROMPT, params)
    error: BaseException | None = raised.value
    while error is not None and not isinstance(error, ZeroDivisionError):
        error = error.__cause__
    assert error is not None, "the fault says what has caused it"


async def test_a_batch_waits_while_guides_of_others_leave_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MAX_KEPT_BYTES", 400)
    big = [guided(guide=triode.Regex(letter * 100), max_tokens=200) for letter in "abcd"]
    async with open_gated() as (engine, gate):
        others = [await engine.submit(PROMPT, params) for params in big[:2]]
        texts: list[str] = []

        async def generate() -> None:
            results = await engine.generate([PROMPT] * 3, [big[2], big[3], big[0]])
            texts.extend(result.completion.text for result in results)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate)
            await trio.testing.wait_all_tasks_blocked()
            assert texts == []
            gate.open()
        assert texts == ["c" * 100, "d" * 100, "a" * 100]
        assert [(await other.result()).completion.text for other in others] == ["a" * 100, "b" * 100]
        await check_nothing_is_left(engine)


async def test_closing_the_engine_ends_the_wait_for_room_for_a_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MAX_KEPT_BYTES", 250)
    is_refused = False

    async def generate(engine: Engine) -> None:
        nonlocal is_refused
        with pytest.raises(triode.EngineClosed):
            await engine.generate([PROMPT], guided(guide=triode.Regex("b" * 100)))
        is_refused = True

    async with trio.open_nursery() as nursery:
        guide = triode.Regex("a" * 100)
        async with open_gated() as (engine, _), engine.submit(PROMPT, guided(guide=guide)):
            nursery.start_soon(generate, engine)
            await trio.testing.wait_all_tasks_blocked()
    assert is_refused


async def test_however_a_request_ends_its_guide_is_let_go() -> None:
    async with open_tiny(executor="thread") as engine:
        async with engine.submit(PROMPT, guided(n=3)) as stream:
            await stream.batch()
            assert held_bytes(engine) > 0
        await complete(engine, PROMPT, guided(stop=('"age":',), n=2))
        await complete(engine, PROMPT, guided(), deadline_s=0.001)
        with pytest.raises(ValueError, match="guide cannot be compiled"):
            await engine.submit(PROMPT, guided(guide=triode.Regex("(")))
        with pytest.raises(triode.RequestFailed):
            await complete(engine, PROMPT, guided(guide=triode.Choices(("é",)), bad_words=("é",)))
        for number in range(5):
            with trio.move_on_after(0):
                await engine.submit(PROMPT, guided(guide=triode.Regex(f"{number}")))
        await complete(engine, PROMPT, guided())
        await rested(engine)
        assert held_bytes(engine) == 0


@pytest.mark.parametrize(
    ("guide", "pattern"),
    [
        (triode.Choices(("red", "green", "été")), "red|green|été"),
        (triode.Regex("[0-9]{3}-[a-f]{2}"), "[0-9]{3}-[a-f]{2}"),
        (triode.Grammar('start: "<" /[a-z]{1,4}/ ">"'), "<[a-z]{1,4}>"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_each_kind_of_guide_holds(guide: Any, pattern: str) -> None:
    async with open_tiny(executor="inline") as engine:
        result = await complete(engine, "Say: ", guided(guide=guide, n=4))
        assert all(re.fullmatch(pattern, completion.text) for completion in result.completions)
