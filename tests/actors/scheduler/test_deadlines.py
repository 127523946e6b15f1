"""Deadlines: each is due once, in time, and those of ended requests take no memory."""

from hypothesis import given
from hypothesis import strategies as st

from triode.actors.messages import Tokenized
from triode.actors.scheduler.deadlines import Deadlines
from triode.actors.scheduler.request import Request
from triode.ids import RequestId, TokenId, pack_tokens
from triode.models.sampling import SamplingParams

TOKENIZED = Tokenized(RequestId("r"), 0, (TokenId(1),), pack_tokens([1]), SamplingParams(max_tokens=1), 0, ())


def request(arrival: int) -> Request:
    return Request(RequestId("r"), arrival, 0, TOKENIZED, frozenset(), b"")


@given(
    times=st.lists(st.integers(0, 20), max_size=30),
    ended=st.sets(st.integers(0, 29)),
    now_s=st.integers(0, 20),
)
def test_what_is_due_is_unfinished_and_late(times: list[int], ended: set[int], now_s: int) -> None:
    deadlines, requests = Deadlines(), [request(arrival) for arrival in range(len(times))]
    for time, late in zip(times, requests, strict=True):
        deadlines.add(time, late)
    for index in ended & set(range(len(times))):
        deadlines.discard(requests[index])
    expected = [index for index in range(len(times)) if index not in ended and times[index] <= now_s]
    assert sorted(late.arrival for late in deadlines.due(now_s)) == expected
    assert deadlines.due(now_s) == []
    assert deadlines.next_s > now_s


def test_without_deadlines_there_is_nothing_to_wait_for() -> None:
    assert Deadlines().next_s == float("inf")


def test_a_request_without_a_deadline_may_end() -> None:
    Deadlines().discard(request(0))


def test_requests_that_end_in_time_leave_no_memory() -> None:
    deadlines = Deadlines()
    deadlines.add(1e9, request(0))
    for arrival in range(1, 1000):
        deadlines.add(1e9 + arrival, ending := request(arrival))
        deadlines.discard(ending)
    assert len(deadlines) < 100
    assert deadlines.next_s == 1e9
