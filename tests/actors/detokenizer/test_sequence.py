"""Tokens to text with stop strings: where it ends, and after how many tokens."""

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from trained_tokenizers import byte_fallback_bpe, byte_level_bpe, id_of, metaspace_unigram
from triode.actors.detokenizer.incremental import DecoderFactory
from triode.actors.detokenizer.sequence import SequenceText, StoppedBy

FACTORIES = {make: DecoderFactory(make()) for make in (byte_level_bpe, byte_fallback_bpe, metaspace_unigram)}
IM_END = id_of(byte_level_bpe(), "<|im_end|>")


def ids_of(text: str, tokenizer: Tokenizer | None = None) -> list[int]:
    return (tokenizer or byte_level_bpe()).encode(text).ids


def sequence(*stops: str, include_stop: bool = False, min_tokens: int = 0, skip_special: bool = True) -> SequenceText:
    decoder = FACTORIES[byte_level_bpe].start(skip_special_tokens=skip_special)
    return SequenceText(decoder, stops, include_stop=include_stop, min_tokens=min_tokens)


def fed(text: SequenceText, token_ids: list[int]) -> str:
    return "".join(text.feed(token_id) for token_id in token_ids)


@given(
    make=st.sampled_from(list(FACTORIES)),
    text=st.text("ab\n 你👍", max_size=20),
    stops=st.lists(st.text("ab\n 你👍", min_size=1, max_size=3), min_size=1, max_size=3),
    min_tokens=st.integers(0, 12),
)
def test_a_stop_is_found_with_the_token_that_completes_it(
    make: object, text: str, stops: list[str], min_tokens: int
) -> None:
    tokenizer, factory = make(), FACTORIES[make]  # type: ignore[operator,index]  # the sampled function
    token_ids = ids_of(text, tokenizer)
    watched = SequenceText(factory.start(), stops, min_tokens=min_tokens)
    shown = fed(watched, token_ids) + watched.finish()

    decoder, plain, lengths = factory.start(), "", []
    for token_id in token_ids:
        plain += decoder.feed(token_id)
        lengths.append(len(plain))
    plain += decoder.finish()
    first_end = lengths[min_tokens - 1] if 0 < min_tokens <= len(lengths) else (0 if min_tokens == 0 else len(plain))
    ends = [end for end in range(first_end + 1, len(plain) + 1) if plain[:end].endswith(tuple(stops))]
    if not ends:
        assert (shown, watched.stopped, watched.num_tokens) == (plain, None, len(token_ids))
        return
    stop = max((stop for stop in stops if plain[: ends[0]].endswith(stop)), key=len)
    num_tokens = next((n for n, length in enumerate(lengths, start=1) if length >= ends[0]), len(token_ids))
    assert shown == plain[: ends[0] - len(stop)]
    assert watched.stopped == StoppedBy(stop, num_tokens)
    assert watched.num_tokens == num_tokens


def test_text_without_stops_is_released_at_once() -> None:
    text = sequence()
    assert [text.feed(token_id) for token_id in ids_of("ab")] == [byte_level_bpe().decode([i]) for i in ids_of("ab")]
    assert text.finish() == ""


def test_tokens_after_a_stop_string_are_neither_shown_nor_counted() -> None:
    text = sequence("\n")
    before, after = ids_of("lazy dog\n"), ids_of("The fox")
    assert fed(text, before + after) + text.finish() == "lazy dog"
    assert text.stopped == StoppedBy("\n", len(before))


def test_min_tokens_lets_an_earlier_stop_string_pass() -> None:
    line_break = ids_of("\n")
    text = sequence("\n", min_tokens=2)
    assert fed(text, line_break * 5) == "\n\n"
    assert text.stopped == StoppedBy("\n", 3)


def test_a_stop_token_counts_but_its_text_is_dropped() -> None:
    text = sequence(skip_special=False)
    assert fed(text, ids_of("dog")) + text.feed(IM_END, is_stop_token=True) + text.finish() == "dog"
    assert text.num_tokens == len(ids_of("dog")) + 1


def test_include_stop_keeps_the_text_of_a_stop_token_and_of_a_stop_string() -> None:
    text = sequence(include_stop=True, skip_special=False)
    assert fed(text, ids_of("dog")) + text.feed(IM_END, is_stop_token=True) + text.finish() == "dog<|im_end|>"
    text = sequence("og", include_stop=True)
    assert fed(text, ids_of("dog, and")) + text.finish() == "dog"


def test_a_special_stop_token_has_no_text_when_special_tokens_are_skipped() -> None:
    text = sequence(include_stop=True)
    assert fed(text, ids_of("dog")) + text.feed(IM_END, is_stop_token=True) + text.finish() == "dog"


def test_text_held_for_a_stop_string_is_shown_at_the_end() -> None:
    text = sequence("dog house")
    assert fed(text, ids_of("lazy dog")) == "lazy "
    assert text.finish() == "dog"
    assert text.stopped is None


def test_a_stop_string_may_complete_at_the_end() -> None:
    text = sequence("\N{REPLACEMENT CHARACTER}")
    unfinished = ids_of("\N{SNAKE}")[:-1]
    assert fed(text, unfinished) + text.finish() == ""
    assert text.stopped == StoppedBy("\N{REPLACEMENT CHARACTER}", len(unfinished))
