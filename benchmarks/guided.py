"""What guides cost: a step with and without them, in one engine, in turns; the masks alone; a new schema's first mask.

Guided batches run in two ways: choosing every token, which is what their masks cost, and with the tokens that their guide
leaves no choice about computed together, as is the rule.

    PYTHONPATH=src python benchmarks/guided.py [--model smollm2-135m] [--batch 1 16 64] [--device cuda] [--rounds 5]
    PYTHONPATH=src python benchmarks/guided.py --hostile          # what guides cost that are made to cost much, nothing else

The guide is an array of objects of five nested fields that never ends, so that every request runs its full length. Strings
are short, because models of random weights would not end them.
"""

import argparse
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count, pairwise
from statistics import median, quantiles
from typing import Any, NamedTuple

import numpy as np
import trio

import triode
from triode.engine.cli.opening import settle
from triode.engine.engine import Engine
from triode.ids import TokenId
from triode.models.grammar import GuideCompiler
from triode.models.guide import Guide
from triode.models.progress import NullProgress
from triode.models.runner import RunnerStatistics
from triode.models.tokenizer import Tokenizer
from triode.models.tokenizer_source import open_tokenizer

NUM_SCHEMAS = 200


def person(suffix: str = "") -> dict[str, object]:
    """A schema of five fields, one of them an object; `suffix` makes it another one."""
    home = {"street": {"type": "string", "maxLength": 20}, "number": {"type": "integer", "maximum": 999}}
    fields: dict[str, object] = {
        f"name{suffix}": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "home": {"type": "object", "properties": home, "required": list(home), "additionalProperties": False},
        "score": {"type": "number"},
    }
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def endless() -> Guide:
    return triode.JsonSchema({"type": "array", "items": person(), "minItems": 10_000}, compact=True)


class Times(NamedTuple):
    """Of one batch, between the last request's first token and the first request's last one: no step reads a prompt."""

    step_ms: float
    token_ms: float
    """Wall time a token of each request: less than a step where guides force tokens."""
    run_ms: float
    """The same of the whole run, from submitting to the last token."""
    processor_ms: float
    """Of all threads of this process, a step: what a busy machine changes least."""
    forward_ms: float
    """Decoder and head, a step; on a GPU in its own time."""
    sample_ms: float
    """From there to tokens, which on a GPU is where it waits for masks."""
    steps: float
    """A token of each request."""


class Moment(NamedTuple):
    """How far an engine has come."""

    wall_s: float
    processor_s: float
    runner: RunnerStatistics
    num_tokens: int


async def time_batch(
    engine: Engine, batch: int, num_tokens: int, guide: Guide | None, salt: int, *, forces: bool = True
) -> Times:
    """A batch whose requests take `num_tokens` tokens each."""
    draw = random.Random(salt)
    fields: dict[str, Any] = {"ignore_eos": True} if guide is None else {"guide": guide}
    if not forces:
        # What is biased is chosen, even where the bias is none.
        fields["logit_bias"] = {0: 0.0}
    nums_read = [0] * batch
    moments: list[Moment] = []

    def now() -> Moment:
        return Moment(time.perf_counter(), time.process_time(), engine.statistics().runner, sum(nums_read))

    async def read(row: int, prompt: list[int]) -> None:
        params = triode.SamplingParams(max_tokens=num_tokens, seed=salt * 1000 + row, **fields)
        async with engine.submit(prompt, params) as stream:
            async for delta in stream:
                nums_read[row] += len(delta.token_ids)
                if len(moments) == 1 and all(nums_read):
                    moments.append(now())
                assert delta.finish_reason in (None, "length"), "every request runs its full length"
        if len(moments) == 2:
            moments.append(now())

    moments.append(now())
    async with trio.open_nursery() as nursery:
        for row in range(batch):
            nursery.start_soon(read, row, [draw.randrange(100, 40_000) for _ in range(16)])
    run_s = time.perf_counter() - moments[0].wall_s
    _, begin, end = moments
    num_steps = end.runner.num_steps - begin.runner.num_steps
    num_new = (end.num_tokens - begin.num_tokens) / batch
    return Times(
        step_ms=(end.wall_s - begin.wall_s) * 1e3 / num_steps,
        token_ms=(end.wall_s - begin.wall_s) * 1e3 / num_new,
        run_ms=run_s * 1e3 / num_tokens,
        processor_ms=(end.processor_s - begin.processor_s) * 1e3 / num_steps,
        forward_ms=(end.runner.forward_s - begin.runner.forward_s) * 1e3 / num_steps,
        sample_ms=(end.runner.sample_s - begin.runner.sample_s) * 1e3 / num_steps,
        steps=num_steps / num_new,
    )


async def compare(engine: Engine, batch: int, num_tokens: int, num_rounds: int) -> None:
    """Each kind of guided batch beside the same one without guides, all of them in turns."""
    salts = count()
    guide = endless()
    pairs = {"each token chosen": False, "forced tokens together": True}
    runs: dict[tuple[str, bool], list[Times]] = {(name, guided): [] for name in pairs for guided in (False, True)}
    for number in range(num_rounds + 1):
        for (name, guided), times in runs.items():
            took = await time_batch(
                engine, batch, num_tokens, guide if guided else None, next(salts), forces=pairs[name]
            )
            # The first one warms up.
            times += [took] if number else []
    for name in pairs:
        plain, guided_ones = runs[name, False], runs[name, True]
        told = []
        for field in Times._fields:
            without, with_it = _column(plain, field), _column(guided_ones, field)
            ratios = [mine / its for mine, its in zip(with_it, without, strict=True)]
            each_ratio = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            told.append(
                f"{field} {median(without):.3f}, {median(with_it):.3f}: {median(ratios):.3f} times ({each_ratio})"
            )
        print(f"batch {batch}, {name}, without guides and with them:", *told, sep="\n    ", flush=True)


def _column(runs: list[Times], field: str) -> list[float]:
    return [getattr(times, field) for times in runs]


async def compare_company(engine: Engine, tokenizer: Tokenizer, batch: int, num_rounds: int) -> None:
    """How long a request waits for each of its tokens: among others without guides, and among each kind of hostile ones,
    which come again as soon as they have failed."""
    # Their authors have no wish to end: the special tokens are forbidden.
    bias = dict.fromkeys(sorted(tokenizer.special_ids), -100.0)
    company = {"without guides": triode.SamplingParams(max_tokens=60, ignore_eos=True)}
    company |= {
        name: triode.SamplingParams(max_tokens=60, guide=guide, logit_bias=bias) for name, guide in HOSTILE.items()
    }
    gaps_ms: dict[str, list[float]] = {name: [] for name in company}
    for _ in range(num_rounds):
        for name, params in company.items():
            gaps_ms[name] += await gaps_among(engine, params, batch - 1)
    for name, gaps in gaps_ms.items():
        p50, p99 = median(gaps), quantiles(gaps, n=100)[98]
        print(f"a token among {batch - 1} {name}: median {p50:.1f} ms, p99 {p99:.1f} ms, longest {max(gaps):.1f} ms")


async def gaps_among(engine: Engine, params: triode.SamplingParams, num_others: int) -> list[float]:
    """Milliseconds between the tokens of one request."""

    async def come_again() -> None:
        while True:
            with suppress(triode.RequestFailed):
                async with engine.submit([5, 6, 7], params) as stream:
                    await stream.result()

    async with trio.open_nursery() as nursery:
        for _ in range(num_others):
            nursery.start_soon(come_again)
        alone = triode.SamplingParams(max_tokens=100, ignore_eos=True, seed=1)
        async with engine.submit("Why is the sky blue?", alone) as stream:
            times_s = [time.perf_counter() async for _ in stream]
        nursery.cancel_scope.cancel()
    return [(after - before) * 1e3 for before, after in pairwise(times_s)]


def time_masks(guides: GuideCompiler, tokenizer: Tokenizer, batch: int, num_tokens: int) -> None:
    """Masks of a batch, as one step asks for them, with random tokens in between: of the first requests that have a guide,
    and of others after them, for which the guide has lexers, and these the states that such outputs need."""
    draw = random.Random(batch)
    mask_GW = np.zeros((batch, guides.masks.num_words), np.int32)
    for whose in ("the first", "later"):
        for _ in range(batch):
            guides.check(endless())
        matchers = [guides.matcher(endless(), []) for _ in range(batch)]
        times_us = []
        for _ in range(num_tokens):
            start_s = time.perf_counter()
            guides.masks.fill(matchers, mask_GW)
            times_us.append((time.perf_counter() - start_s) * 1e6)
            for matcher, mask_W in zip(matchers, mask_GW, strict=True):
                bits = np.unpackbits(mask_W.view(np.uint8), bitorder="little")[: tokenizer.vocab_size].nonzero()[0]
                matcher.append(TokenId(int(draw.choice(bits))))
        for _ in range(batch):
            guides.release(endless())
        p50, p99 = median(times_us), quantiles(times_us, n=100)[98]
        print(f"masks of {whose} {batch}: median {p50:.0f} µs, p99 {p99:.0f} µs", flush=True)


HOSTILE: dict[str, Guide] = {
    "an ambiguous grammar": triode.Grammar('start: s\ns: s s | "x"'),
    "an expression of many states": triode.Regex(".*a.{12}b.*c.{9}d.*"),
    "an expression that explodes": triode.Regex("(.*a.{0,20}){20}"),
    "a grammar of single letters": triode.Grammar("start: s\ns: s s | /[a-z ]/"),
}


def time_hostile(guides: GuideCompiler, name: str, batch: int, num_tokens: int) -> None:
    """Masks of a batch that is hostile but for one row: what that one waits for. Processor time is that of all threads."""
    draw = random.Random(batch)
    neighbour = guides.matcher(endless(), [])
    guides.check(HOSTILE[name])
    matchers = [*(guides.matcher(HOSTILE[name], []) for _ in range(batch - 1)), neighbour]
    mask_GW = np.zeros((batch, guides.masks.num_words), np.int32)
    masks: list[tuple[float, float]] = []
    forced: list[tuple[float, float]] = []
    while len(masks) < num_tokens and len(matchers) > 1:
        with timed(masks):
            guides.masks.fill(matchers, mask_GW)
        assert neighbour.error is None, neighbour.error
        going = [row for row, matcher in enumerate(matchers) if matcher.error is None]
        mask_GW[: len(going)] = mask_GW[going]
        matchers = [matchers[row] for row in going]
        for matcher, mask_W in zip(matchers, mask_GW, strict=False):
            bits = np.unpackbits(mask_W.view(np.uint8), bitorder="little").nonzero()[0]
            # An author of such guides has no wish to end.
            matcher.append(TokenId(int(draw.choice(bits[bits != guides.masks.eos_token_id]))))
        with timed(forced):
            for matcher in matchers[:-1]:
                matcher.force(1000)
    told = [
        f"{what} {max(wall):.1f} ms, {max(cpu):.1f} of the processor"
        for what, wall, cpu in (("masks", *zip(*masks, strict=True)), ("forced tokens", *zip(*forced, strict=True)))
    ]
    print(
        f"{name}, {batch - 1} of {batch}, the longest of {len(masks)} steps: {', '.join(told)}; {len(matchers) - 1} are left",
        flush=True,
    )


@contextmanager
def timed(times_ms: list[tuple[float, float]]) -> Iterator[None]:
    """Adds what a block takes: by the clock, and of the processor."""
    start_s, start_processor_s = time.perf_counter(), time.process_time()
    yield
    times_ms.append(((time.perf_counter() - start_s) * 1e3, (time.process_time() - start_processor_s) * 1e3))


def time_new_schemas(guides: GuideCompiler) -> None:
    """From a schema that nobody has seen to the mask of its first token."""
    mask_GW = np.zeros((1, guides.masks.num_words), np.int32)
    times_ms = []
    for number in range(NUM_SCHEMAS):
        guide = triode.JsonSchema(person(str(number)))
        start_s = time.perf_counter()
        guides.check(guide)
        guides.masks.fill([guides.matcher(guide, [])], mask_GW)
        times_ms.append((time.perf_counter() - start_s) * 1e3)
    p50, p99 = median(times_ms), quantiles(times_ms, n=100)[98]
    print(f"first mask of a new schema: median {p50:.2f} ms, p99 {p99:.2f} ms", flush=True)


async def run(arguments: argparse.Namespace) -> None:
    tokenizer = open_tokenizer(arguments.model, NullProgress())
    vocab_size = arguments.vocab_size or tokenizer.vocab_size
    start_s = time.perf_counter()
    guides = GuideCompiler(tokenizer, vocab_size, sorted(tokenizer.special_ids)[:1])
    guides.check(endless())
    print(f"first guide of a tokenizer of {tokenizer.vocab_size}: {time.perf_counter() - start_s:.2f} s", flush=True)
    if arguments.hostile:
        for name in HOSTILE:
            for batch in arguments.batch:
                time_hostile(guides, name, batch, 300)
    else:
        time_new_schemas(guides)
        for batch in arguments.batch:
            time_masks(guides, tokenizer, batch, 100)
    settings = {
        "device": arguments.device,
        "executor": arguments.executor,
        "max_running": max(arguments.batch),
        "max_step_tokens": max(512, 17 * max(arguments.batch)),
        "max_context_tokens": 2048,
    }
    async with triode.open_engine(arguments.model, **settings) as engine:
        print(engine.report, flush=True)
        # As `triode serve` does: a pass of the collector over torch takes longer than any guide.
        settle()
        for batch in arguments.batch:
            if arguments.hostile:
                await compare_company(engine, tokenizer, batch, arguments.rounds)
            else:
                await compare(engine, batch, arguments.tokens, arguments.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--executor", default="thread")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--hostile", action="store_true")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, help="of masks made apart from the engine [the tokenizer's]")
    trio.run(run, parser.parse_args())


if __name__ == "__main__":
    main()
