"""What is sent, kept and sent again, against a list of everything."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triode.engine.server.bridge_messages import SampleDelta, StreamDelta
from triode.engine.server.outbox import Outbox


def word(text: str) -> StreamDelta:
    return StreamDelta("a", [SampleDelta(0, text, ())])


def texts(outbox: Outbox) -> list[str]:
    found = []
    while sent := outbox.next():
        assert isinstance(sent, StreamDelta)
        found.append(sent.samples[0].text)
    return found


def test_without_a_window_everything_goes_out_unnumbered_and_nothing_is_kept() -> None:
    outbox = Outbox(None)
    for text in "abc":
        outbox.put(word(text))
    first = outbox.next()
    assert first is not None
    assert first.seq == 0
    assert texts(outbox) == ["b", "c"]
    assert outbox.is_empty


def test_opening_wide_lets_the_rest_out() -> None:
    outbox = Outbox(1)
    for text in "abc":
        outbox.put(word(text))
    assert texts(outbox) == ["a"]
    outbox.open_wide()
    assert texts(outbox) == ["b", "c"]


@given(st.integers(1, 5), st.lists(st.tuples(st.sampled_from(["put", "next", "ack", "rewind"]), st.integers(0, 30))))
def test_every_word_arrives_once_and_in_order_whatever_is_lost(window: int, steps: list[tuple[str, int]]) -> None:
    outbox = Outbox(window)
    num_put = num_received = num_acknowledged = 0
    for step, number in steps:
        if step == "put":
            num_put += 1
            outbox.put(word(str(num_put)))
        elif step == "next" and (sent := outbox.next()):
            num_received += 1
            assert isinstance(sent, StreamDelta)
            assert (sent.seq, sent.samples[0].text) == (num_received, str(num_received))
        elif step == "ack" and number <= num_received:
            outbox.acknowledge(number)
            num_acknowledged = max(num_acknowledged, number)
        elif step == "rewind":
            # The client lost what came after `number`.
            if num_acknowledged <= number <= num_received:
                outbox.rewind(number)
                num_received = num_acknowledged = number
            else:
                with pytest.raises(ValueError, match="seq must be >="):
                    outbox.rewind(number)
        assert num_received - num_acknowledged <= window
        assert outbox.is_empty == (num_acknowledged == num_put)
        assert outbox.is_full == (num_received - num_acknowledged == window)


def test_what_was_not_sent_cannot_be_acknowledged() -> None:
    outbox = Outbox(2)
    outbox.put(word("a"))
    with pytest.raises(ValueError, match="seq must be >= 0 and <= 0, the last that was sent, got 1"):
        outbox.acknowledge(1)
