"""The tokenizer: exactly one answer for each submit, and a loop that goes on while long prompts are encoded."""

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import numpy as np
import pytest
import trio
import trio.testing
from msgspec import structs

from trained_tokenizers import byte_level_bpe
from triode.actors.channels import MAX_CHECKING, Inbox
from triode.actors.messages import Cancel, Rejected, Submit, Tokenized, TokenizerInbox
from triode.actors.tokenizer.actor import LONG_PROMPT_BYTES, run_tokenizer
from triode.actors.tokenizer.prepare import Limits, prepare
from triode.ids import RequestId, TokenId
from triode.models.conversation import Conversation
from triode.models.guide import Guide, Refusal, Regex
from triode.models.sampling import SamplingParams
from triode.models.tokenizer import Tokenizer

EOS = TokenId(2)
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    return Tokenizer(byte_level_bpe(), template, {})


def limits(**fields: int) -> Limits:
    sizes = {"max_context_tokens": 100, "pool_tokens": 160, "block_size_tokens": 16, "vocab_size": 5000, **fields}
    return Limits(**sizes, eos_token_ids=(EOS,))


def submit(prompt: str | tuple[int, ...] | Conversation, arrival: int = 0, **fields: Any) -> Submit:
    given = cast("str | tuple[TokenId, ...] | Conversation", prompt)
    return Submit(RequestId(f"r{arrival}"), arrival, given, SamplingParams(**fields), seed=7)


def said(content: str) -> Conversation:
    return Conversation(({"role": "user", "content": content},))


def accepted(answer: Tokenized | Rejected) -> Tokenized:
    assert isinstance(answer, Tokenized), answer
    return answer


def refused(answer: Tokenized | Rejected) -> str:
    assert isinstance(answer, Rejected), answer
    return answer.reason


# What is decided about one request


def test_text_ids_and_messages_become_tokens() -> None:
    own = tokenizer()
    text = accepted(prepare(submit("hello there"), own, limits()))
    assert list(text.token_ids) == own.encode("hello there")
    assert accepted(prepare(submit(text.token_ids), own, limits())).token_ids == text.token_ids
    assert text.packed_ids == np.array(text.token_ids, np.int32).tobytes()
    chat = accepted(prepare(submit(said("hi")), own, limits()))
    assert list(chat.token_ids) == own.encode("user: hi\n")


def test_the_room_is_what_context_and_cache_leave() -> None:
    room = accepted(prepare(submit((1,) * 10), tokenizer(), limits())).params.max_tokens
    assert room == 90
    # The last token's KV entry is never needed.
    assert accepted(prepare(submit((1,) * 10), tokenizer(), limits(pool_tokens=48))).params.max_tokens == 39


@pytest.mark.parametrize(
    ("prompt", "fields", "reason"),
    [
        ((), {}, "prompt must have at least one token, got none"),
        ((5000,), {}, "prompt must hold token ids >= 0 and < 5000, got 5000"),
        ((1, -1), {}, "prompt must hold token ids >= 0 and < 5000, got -1"),
        ((1, 2**32), {}, f"prompt must hold token ids >= 0 and < 5000, got {2**32}"),
        ((1,) * 100, {}, "prompt must have fewer than 100 tokens, to leave room for at least one more in the context"),
        (
            (1,),
            {"max_tokens": 100},
            "max_tokens must be <= 99, the room that the prompt's 1 tokens leave in the context",
        ),
        ((1,) * 99, {"min_tokens": 2}, "min_tokens must be <= max_tokens = 1, got 2"),
        ((1,), {"stop_token_ids": (5000,)}, "stop_token_ids must hold token ids >= 0 and < 5000, got 5000"),
        ((1,), {"logit_bias": {5000: 1}}, "logit_bias must hold token ids >= 0 and < 5000, got 5000"),
        (Conversation(({"role": "user"},)), {}, r"messages[0].content must be text, got None"),
    ],
)
def test_what_cannot_run_is_refused(prompt: tuple[int, ...], fields: dict[str, Any], reason: str) -> None:
    assert refused(prepare(submit(prompt, **fields), tokenizer(), limits())).startswith(reason)


@pytest.mark.parametrize(("prompt", "fields"), [("hello there", {}), ((1,), {"bad_words": ("hello there",)})])
def test_text_whose_tokens_the_model_lacks_is_refused(prompt: str, fields: dict[str, Any]) -> None:
    """A tokenizer may know more tokens than the model has embeddings for."""
    reason = refused(prepare(submit(prompt, **fields), tokenizer(), limits(vocab_size=10)))
    assert reason.startswith(f"{next(iter(fields), 'prompt')} must hold token ids >= 0 and < 10, got")


def test_messages_need_a_template() -> None:
    answer = prepare(submit(said("hi")), tokenizer(None), limits())
    assert refused(answer).startswith("this model has no chat template")


@pytest.mark.parametrize(("n", "fits"), [(4, True), (5, False)])
def test_samples_must_fit_together(n: int, fits: bool) -> None:
    """Each sample of 20 + 13 tokens shares one full block and has two of its own, as its last token is not computed."""
    answer = prepare(submit((1,) * 20, n=n, max_tokens=29), tokenizer(), limits(pool_tokens=(1 + 4 * 2) * 16))
    assert isinstance(answer, Tokenized) is fits
    if not fits:
        assert "times n = 5, must fit the KV cache of 144 tokens, got 20 + 29 tokens, which take 176" in refused(answer)


def test_stop_tokens_are_the_models_and_the_requests_once_each() -> None:
    both = accepted(prepare(submit((1,), stop_token_ids=(5, EOS, 5)), tokenizer(), limits()))
    assert both.stop_token_ids == (EOS, 5)
    own = accepted(prepare(submit((1,), stop_token_ids=(5,), ignore_eos=True), tokenizer(), limits()))
    assert own.stop_token_ids == (5,)


def test_bad_words_are_encoded_bare_and_after_a_space() -> None:
    words = accepted(prepare(submit((1,), bad_words=("the",)), tokenizer(), limits())).bad_word_ids
    encode = tokenizer().encode
    assert words == (tuple(encode("the")), tuple(encode(" the")))


# How answers travel


async def check_guide(guide: Guide) -> Refusal | None:
    await trio.lowlevel.checkpoint()
    return Refusal("it is refused") if guide == Regex("(") else None


@asynccontextmanager
async def running(
    answer: Callable[[Submit], Tokenized | Rejected],
) -> AsyncIterator[tuple[Inbox[TokenizerInbox], list[Tokenized | Rejected]]]:
    inbox: Inbox[TokenizerInbox] = Inbox()
    answers: list[Tokenized | Rejected] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_tokenizer, answer, check_guide, inbox, answers.append)
        yield inbox, answers
        nursery.cancel_scope.cancel()


async def test_every_submit_is_answered_once() -> None:
    threads: set[int] = set()

    def answer(submitted: Submit) -> Rejected:
        threads.add(threading.get_ident())
        return Rejected(submitted.request_id, submitted.arrival, "")

    async with running(answer) as (inbox, answers):
        for arrival in range(100):
            long = arrival % 10 == 0
            inbox.put(submit("x" * (LONG_PROMPT_BYTES + 1) if long else "x", arrival))
        with trio.fail_after(10):
            while len(answers) < 100:
                await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
    assert sorted(answer.arrival for answer in answers) == list(range(100))
    short = [answer.arrival for answer in answers if answer.arrival % 10]
    assert short == sorted(short)
    assert len(threads) > 1


@pytest.mark.parametrize("prompt", ["x" * (LONG_PROMPT_BYTES + 1), said("x" * (LONG_PROMPT_BYTES + 1))])
async def test_a_long_prompt_does_not_hold_up_the_short_ones(prompt: str | Conversation) -> None:
    may_go_on = threading.Event()

    def answer(submitted: Submit) -> Rejected:
        if submitted.arrival == 0:
            may_go_on.wait(10)
        return Rejected(submitted.request_id, submitted.arrival, "")

    async with running(answer) as (inbox, answers):
        inbox.put(submit(prompt, 0))
        inbox.put(submit("x", 1))
        with trio.fail_after(10):
            while not answers:
                await trio.lowlevel.checkpoint()
        assert [answer.arrival for answer in answers] == [1]
        may_go_on.set()
        with trio.fail_after(10):
            while len(answers) < 2:
                await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("length", [1, LONG_PROMPT_BYTES + 1])
async def test_a_bug_ends_the_actor(length: int) -> None:
    def answer(_: Submit) -> Rejected:
        raise ZeroDivisionError("a bug")

    inbox: Inbox[TokenizerInbox] = Inbox()
    inbox.put(submit("x" * length))
    answers: list[Tokenized | Rejected] = []
    with pytest.RaisesGroup(ZeroDivisionError):
        await run_tokenizer(answer, check_guide, inbox, answers.append)


class Compiler:
    """Compiles until it is told that a guide is done."""

    def __init__(self) -> None:
        self.begun: list[Guide] = []
        self.may_end = trio.Event()

    async def check(self, guide: Guide) -> Refusal | None:
        self.begun.append(guide)
        await self.may_end.wait()
        return Refusal("no room", is_busy=True) if guide == Regex("big") else None


def guided(arrival: int, pattern: str, prompt: str = "x") -> Submit:
    return submit(prompt, arrival, guide=Regex(pattern))


def as_asked(submitted: Submit) -> Tokenized:
    return accepted(prepare(structs.replace(submitted, prompt="x"), tokenizer(), limits()))


@asynccontextmanager
async def compiling() -> AsyncIterator[tuple[Compiler, Inbox[TokenizerInbox], list[Tokenized | Rejected]]]:
    compiler, inbox, answers = Compiler(), Inbox[TokenizerInbox](), list[Tokenized | Rejected]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_tokenizer, as_asked, compiler.check, inbox, answers.append)
        yield compiler, inbox, answers
        nursery.cancel_scope.cancel()


async def test_so_many_guides_are_checked_at_a_time_and_those_of_cancelled_requests_never() -> None:
    async with compiling() as (compiler, inbox, answers):
        for arrival in range(14):
            inbox.put(guided(arrival, f"{arrival}"))
        await trio.testing.wait_all_tasks_blocked()
        begun = [arrival for arrival in range(14) if Regex(f"{arrival}") in compiler.begun]
        assert len(begun) == MAX_CHECKING
        cancelled = [arrival for arrival in range(14) if arrival not in begun][:3]
        for arrival in (begun[0], *cancelled):
            inbox.put(Cancel(RequestId(f"r{arrival}"), arrival))
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(answer.arrival for answer in answers) == cancelled
        assert all(isinstance(answer, Rejected) for answer in answers)
        compiler.may_end.set()
        await trio.testing.wait_all_tasks_blocked()
    # What is being compiled when its request is cancelled is the scheduler's to release.
    compiled = sorted(answer.arrival for answer in answers if isinstance(answer, Tokenized))
    assert compiled == [arrival for arrival in range(14) if arrival not in cancelled]
    assert set(compiler.begun) == {Regex(f"{arrival}") for arrival in compiled}


async def test_no_room_for_a_guide_is_told_from_a_guide_that_is_wrong() -> None:
    async with compiling() as (compiler, inbox, answers):
        compiler.may_end.set()
        inbox.put(guided(0, "big"))
        await trio.testing.wait_all_tasks_blocked()
    assert answers == [Rejected(RequestId("r0"), 0, "no room", is_busy=True)]


async def test_a_cancelled_request_leaves_the_queue_of_long_prompts() -> None:
    may_go_on, encoded = threading.Event(), list[int]()

    def answer(submitted: Submit) -> Rejected:
        encoded.append(submitted.arrival)
        may_go_on.wait(10)
        return Rejected(submitted.request_id, submitted.arrival, "")

    async with running(answer) as (inbox, answers):
        inbox.put(submit("x" * (LONG_PROMPT_BYTES + 1), 0))
        with trio.fail_after(10):
            while not encoded:
                await trio.lowlevel.checkpoint()
        for arrival in (1, 2):
            inbox.put(submit("x" * (LONG_PROMPT_BYTES + 1), arrival))
        inbox.put(Cancel(RequestId("r1"), 1))
        with trio.fail_after(10):
            while not answers:
                await trio.lowlevel.checkpoint()
        assert [answer.arrival for answer in answers] == [1]
        may_go_on.set()
        with trio.fail_after(10):
            while len(answers) < 3:
                await trio.lowlevel.checkpoint()
    assert encoded == [0, 2]
