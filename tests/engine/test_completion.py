"""From a request's mail to its completions."""

from collections.abc import Iterable, Sequence

from hypothesis import given
from hypothesis import strategies as st

import triode
from triode.actors.messages import (
    Delta,
    Embedded,
    Ended,
    FinishReason,
    Mail,
    Opened,
    PromptScored,
    Rejected,
    RequestStatus,
)
from triode.actors.transcript import Transcript
from triode.engine.completion import Reply, coalesce
from triode.errors import RequestFailed
from triode.ids import RequestId, TokenId
from triode.models.step import TokenLogprobs

MINE = RequestId("mine")


def opened(**fields: int) -> Opened:
    params = triode.SamplingParams(**{"max_tokens": 9, **fields})  # type: ignore[arg-type]
    return Opened(MINE, 3, 7, params, (TokenId(1), TokenId(2), TokenId(3)))


def delta(text: str, *tokens: int, index: int = 0, reason: str | None = None, scored: bool = False) -> Delta:
    logprobs = tuple(TokenLogprobs(TokenId(token), -float(token), 1) for token in tokens) if scored else None
    finish = None if reason is None else FinishReason(reason)
    return Delta(MINE, index, text, tuple(map(TokenId, tokens)), logprobs, finish)


class Read:
    """A reply whose mail and deltas come together."""

    def __init__(self, num_samples: int = 1) -> None:
        self.transcripts = [Transcript() for _ in range(num_samples)]
        self.reply = Reply(MINE, self.transcripts)

    def read(self, items: Sequence[Mail | Delta]) -> list[Delta]:
        for item in items:
            if isinstance(item, Delta):
                self.transcripts[item.index].add_delta(item)
            else:
                self.reply.read([item])
        return self.reply.deltas()


def unfinished(reply: Reply) -> bool:
    return not reply.is_complete


def test_deltas_add_up_to_a_completion() -> None:
    read = Read()
    reply = read.reply
    assert reply.completions(0) == ()
    assert read.read([opened(logprobs=0), delta("a", 1, scored=True)]) == [delta("a", 1, scored=True)]
    assert unfinished(reply)
    read.read([delta("", 2, scored=True), delta("bc", 3, reason="stop", scored=True)])
    assert not unfinished(reply)
    result = reply.result(2)
    completion = result.completion
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("abc", (1, 2, 3), "stop")
    assert [entry.logprob for entry in completion.logprobs or ()] == [-1, -2, -3]
    assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.usage.cached_tokens) == (3, 3, 2)
    assert (result.seed, result.max_tokens, result.reason, result.prompt_logprobs) == (7, 9, None, None)


def test_samples_are_kept_apart_and_all_must_end() -> None:
    read = Read(2)
    reply = read.reply
    read.read([opened(n=2), delta("x", 5, index=1, reason="length"), delta("a", 1)])
    assert unfinished(reply)
    read.read([delta("b", 2, reason="stop")])
    assert not unfinished(reply)
    assert [completion.text for completion in reply.completions(0)] == ["ab", "x"]
    assert reply.usage(0).completion_tokens == 3


def test_what_was_asked_for_decides_what_is_reported() -> None:
    read = Read()
    reply = read.reply
    entry = TokenLogprobs(TokenId(2), -0.5, 1)
    read.read([opened(prompt_logprobs=0), PromptScored(MINE, (entry,)), PromptScored(MINE, (entry,))])
    read.read([delta("a", 1, reason="stop")])
    assert reply.result(0).prompt_logprobs == (entry, entry)
    assert reply.result(0).completion.logprobs is None


def test_a_cancelled_request_keeps_what_it_has() -> None:
    read = Read(2)
    reply = read.reply
    read.read([opened(n=2), delta("a", 1, reason="stop"), delta("x", 5, index=1)])
    read.read([Ended(MINE, RequestStatus.CANCELLED, "its deadline has passed")])
    result = reply.result(0)
    assert [completion.finish_reason for completion in result.completions] == ["stop", "cancelled"]
    assert (result.completions[1].text, result.reason) == ("x", "its deadline has passed")


def test_a_failed_request_keeps_what_it_has_and_the_reason() -> None:
    read = Read()
    reply = read.reply
    deltas = read.read([opened(), delta("a", 1), Ended(MINE, RequestStatus.FAILED, "no token is possible")])
    assert deltas == [delta("a", 1)]
    assert reply.is_complete
    assert isinstance(reply.failure, RequestFailed)
    assert str(reply.failure) == "request mine failed: no token is possible"
    assert (reply.result(0).completion.text, reply.result(0).completion.finish_reason) == ("a", "error")


def test_a_refused_request_keeps_its_reason() -> None:
    read = Read()
    reply = read.reply
    read.read([Rejected(MINE, 0, "prompt must have fewer tokens")])
    assert reply.is_complete
    assert isinstance(reply.failure, ValueError)
    assert str(reply.failure) == "prompt must have fewer tokens"


def test_an_embedding_completes_a_reply() -> None:
    read = Read()
    reply = read.reply
    read.read([opened(), Embedded(MINE, (1.0, 2.0))])
    assert reply.is_complete
    assert reply.embedding == (1.0, 2.0)


def test_a_delta_holds_all_that_was_said_since_the_last_one() -> None:
    read = Read(2)
    assert read.reply.next_delta() is None
    for part in (delta("a", 1, scored=True), delta("", 2, scored=True), delta("bc", 3, reason="stop", scored=True)):
        read.transcripts[0].add_delta(part)
    read.transcripts[1].add("x", TokenId(9), None)
    whole = delta("abc", 1, 2, 3, reason="stop", scored=True)
    assert read.reply.next_delta() == whole
    assert read.reply.next_delta() == delta("x", 9, index=1)
    assert read.reply.next_delta() is None
    assert unfinished(read.reply)
    read.transcripts[1].add_delta(delta("", index=1, reason="length"))
    assert read.reply.deltas() == [delta("", index=1, reason="length")]
    assert read.reply.deltas() == []
    assert read.reply.is_complete


def test_samples_take_turns_however_much_one_has_to_say() -> None:
    read = Read(3)
    heard = []
    for _ in range(6):
        for transcript in read.transcripts:
            transcript.add("x", TokenId(1), None)
        said = read.reply.next_delta()
        assert said is not None
        heard.append(said.index)
    assert heard == [0, 1, 2, 0, 1, 2]


def test_what_has_not_been_read_is_in_no_completion_unless_all_counts() -> None:
    read = Read()
    read.read([opened(), delta("a", 1)])
    read.transcripts[0].add_delta(delta("b", 2, reason="length"))
    (completion,) = read.reply.completions(0)
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("a", (1,), None)
    assert (completion.usage.completion_tokens, read.reply.is_written, unfinished(read.reply)) == (1, True, True)
    read.reply.counts_all = True
    (completion,) = read.reply.completions(0)
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("ab", (1, 2), "length")
    assert completion.usage.completion_tokens == 2
    # And it is still there for who wants deltas.
    assert read.reply.deltas() == [delta("b", 2, reason="length")]


def test_an_end_is_read_with_the_last_token_and_not_before() -> None:
    transcript = Transcript()
    reply = Reply(MINE, [transcript])
    seen: list[Delta | None] = []

    class Looking(list[TokenId]):
        """Another thread looks whenever tokens come in."""

        def extend(self, tokens: Iterable[TokenId]) -> None:
            seen.append(reply.next_delta())
            super().extend(tokens)
            seen.append(reply.next_delta())

    transcript.token_ids = Looking()
    transcript.add_delta(delta("a", 1))
    transcript.add_delta(delta("b", 2, reason="stop"))
    assert seen == [None, delta("a", 1), None, delta("b", 2, reason="stop")]


@given(st.lists(st.tuples(st.integers(0, 2), st.text("ab", max_size=2), st.lists(st.integers(0, 9), max_size=2))))
def test_coalescing_keeps_every_concatenation(parts: list[tuple[int, str, list[int]]]) -> None:
    deltas = [delta(text, *tokens, index=index, scored=True) for index, text, tokens in parts]
    merged = coalesce(deltas)
    assert len({part.index for part in merged}) == len(merged)
    for index in range(3):
        mine = [part for part in deltas if part.index == index]
        own = [part for part in merged if part.index == index]
        assert len(own) == bool(mine)
        for after in own:
            assert after.text == "".join(part.text for part in mine)
            assert after.token_ids == tuple(token for part in mine for token in part.token_ids)
            assert after.logprobs == tuple(entry for part in mine for entry in part.logprobs or ())


def test_the_last_delta_says_why_it_ended() -> None:
    (merged,) = coalesce([delta("a", 1), delta("b", 2, reason="length")])
    assert merged.finish_reason == "length"
