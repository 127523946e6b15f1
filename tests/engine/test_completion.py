"""From a request's mail to its completions."""

from hypothesis import given
from hypothesis import strategies as st

import triode
from triode.actors.messages import Delta, Embedded, Ended, FinishReason, Opened, PromptScored, Rejected, RequestStatus
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


def unfinished(reply: Reply) -> bool:
    return not reply.is_complete


def test_deltas_add_up_to_a_completion() -> None:
    reply = Reply(MINE)
    assert reply.completions(0) == ()
    assert reply.read([opened(logprobs=0), delta("a", 1, scored=True)]) == [delta("a", 1, scored=True)]
    assert unfinished(reply)
    reply.read([delta("", 2, scored=True), delta("bc", 3, reason="stop", scored=True)])
    assert not unfinished(reply)
    result = reply.result(2)
    completion = result.completion
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("abc", (1, 2, 3), "stop")
    assert [entry.logprob for entry in completion.logprobs or ()] == [-1, -2, -3]
    assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.usage.cached_tokens) == (3, 3, 2)
    assert (result.seed, result.max_tokens, result.reason, result.prompt_logprobs) == (7, 9, None, None)


def test_samples_are_kept_apart_and_all_must_end() -> None:
    reply = Reply(MINE)
    reply.read([opened(n=2), delta("x", 5, index=1, reason="length"), delta("a", 1)])
    assert unfinished(reply)
    reply.read([delta("b", 2, reason="stop")])
    assert not unfinished(reply)
    assert [completion.text for completion in reply.completions(0)] == ["ab", "x"]
    assert reply.usage(0).completion_tokens == 3


def test_what_was_asked_for_decides_what_is_reported() -> None:
    reply = Reply(MINE)
    entry = TokenLogprobs(TokenId(2), -0.5, 1)
    reply.read([opened(prompt_logprobs=0), PromptScored(MINE, (entry,)), PromptScored(MINE, (entry,))])
    reply.read([delta("a", 1, reason="stop")])
    assert reply.result(0).prompt_logprobs == (entry, entry)
    assert reply.result(0).completion.logprobs is None


def test_a_cancelled_request_keeps_what_it_has() -> None:
    reply = Reply(MINE)
    reply.read([opened(n=2), delta("a", 1, reason="stop"), delta("x", 5, index=1)])
    reply.read([Ended(MINE, RequestStatus.CANCELLED, "its deadline has passed")])
    result = reply.result(0)
    assert [completion.finish_reason for completion in result.completions] == ["stop", "cancelled"]
    assert (result.completions[1].text, result.reason) == ("x", "its deadline has passed")


def test_a_failed_request_keeps_what_it_has_and_the_reason() -> None:
    reply = Reply(MINE)
    deltas = reply.read([opened(), delta("a", 1), Ended(MINE, RequestStatus.FAILED, "no token is possible")])
    assert deltas == [delta("a", 1)]
    assert reply.is_complete
    assert isinstance(reply.failure, RequestFailed)
    assert str(reply.failure) == "request mine failed: no token is possible"
    assert (reply.result(0).completion.text, reply.result(0).completion.finish_reason) == ("a", "error")


def test_a_refused_request_keeps_its_reason() -> None:
    reply = Reply(MINE)
    reply.read([Rejected(MINE, 0, "prompt must have fewer tokens")])
    assert reply.is_complete
    assert isinstance(reply.failure, ValueError)
    assert str(reply.failure) == "prompt must have fewer tokens"


def test_an_embedding_completes_a_reply() -> None:
    reply = Reply(MINE)
    reply.read([opened(), Embedded(MINE, (1.0, 2.0))])
    assert reply.is_complete
    assert reply.embedding == (1.0, 2.0)


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
