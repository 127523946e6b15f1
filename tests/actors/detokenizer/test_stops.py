"""The stop matcher against a brute-force search of the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triode.actors.detokenizer.stops import StopMatcher

Chunks = list[tuple[str, bool]]

# Few letters and short strings, so that stops overlap, nest and begin in one another.
stop_sets = st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=4)
chunk_lists = st.lists(st.tuples(st.text("abé", max_size=5), st.booleans()), max_size=8)


def expected(stops: list[str], chunks: Chunks, *, include_stop: bool) -> tuple[str, str | None]:
    """Of the matches that end in armed text the first to end, and of those the first to start."""
    text = "".join(chunk for chunk, _ in chunks)
    armed = [is_armed for chunk, is_armed in chunks for _ in chunk]
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if armed[end - 1] and text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


def released(matcher: StopMatcher, chunks: Chunks) -> str:
    return "".join([matcher.feed(text, armed=armed) for text, armed in chunks]) + matcher.finish()


@given(stops=stop_sets, chunks=chunk_lists, include_stop=st.booleans())
def test_text_ends_where_a_search_of_the_whole_finds_the_stop(
    stops: list[str], chunks: Chunks, include_stop: bool
) -> None:
    matcher = StopMatcher(stops, include_stop=include_stop)
    assert (released(matcher, chunks), matcher.matched) == expected(stops, chunks, include_stop=include_stop)


@given(stops=stop_sets, chunks=chunk_lists)
def test_every_split_gives_the_same_text(stops: list[str], chunks: Chunks) -> None:
    text = "".join(chunk for chunk, _ in chunks)
    whole, by_chunk, by_character = (StopMatcher(stops, include_stop=False) for _ in range(3))
    in_one = released(whole, [(text, True)])
    assert released(by_chunk, [(chunk, True) for chunk, _ in chunks]) == in_one
    assert released(by_character, [(character, True) for character in text]) == in_one
    assert whole.matched == by_chunk.matched == by_character.matched


@given(stops=stop_sets, text=st.text("abé", max_size=12))
def test_released_text_could_not_belong_to_a_stop_and_no_more_is_held(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops, include_stop=False)
    shown = ""
    for n, character in enumerate(text, start=1):
        shown += matcher.feed(character)
        if matcher.matched is not None:
            return
        held = text[len(shown) : n]
        assert not held or any(len(held) < len(stop) and stop.startswith(held) for stop in stops)
        assert not any(
            stop.startswith(text[start:n]) for stop in stops for start in range(len(shown)) if n - start < len(stop)
        )


@pytest.mark.parametrize(
    ("stops", "text", "expected_text", "stop"),
    [
        (["aab"], "aaab", "a", "aab"),
        (["abcd", "bc"], "abcd", "a", "bc"),
        (["bc", "abc"], "abc", "", "abc"),
        (["</s>", "<"], "x</s>", "x", "<"),
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo", "\n\n"),
        (["👍🏽"], "good 👍👍🏽", "good 👍", "👍🏽"),
    ],
)
def test_the_match_that_ends_first_wins(stops: list[str], text: str, expected_text: str, stop: str) -> None:
    matcher = StopMatcher(stops, include_stop=False)
    assert released(matcher, [(character, True) for character in text]) == expected_text
    assert matcher.matched == stop


def test_a_stop_that_ended_before_the_matcher_was_armed_is_text() -> None:
    matcher = StopMatcher(["xaby", "ab"], include_stop=False)
    assert matcher.feed("xab", armed=False) == ""
    assert matcher.feed("!") == "xab!"
    assert matcher.matched is None


def test_a_stop_may_begin_before_the_matcher_is_armed() -> None:
    matcher = StopMatcher(["END"], include_stop=False)
    assert matcher.feed("the EN", armed=False) + matcher.feed("D, or not") == "the "
    assert matcher.matched == "END"
