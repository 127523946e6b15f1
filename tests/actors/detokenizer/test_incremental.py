"""The incremental decoder against `Tokenizer.decode` of the whole, over every kind of split."""

import re
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from trained_tokenizers import byte_fallback_bpe, byte_fallback_from_gguf, byte_level_bpe, id_of, metaspace_unigram
from triode.actors.detokenizer.incremental import REPLACEMENT, DecoderFactory, IncrementalDecoder
from triode.errors import UnsupportedModel
from triode.models.gguf import GGUFFile
from triode.models.gguf_tokenizer import read_tokenizer
from triode.models.progress import NullProgress
from triode.models.source import locate


@cache
def smollm2() -> Tokenizer:
    return read_tokenizer(GGUFFile(locate("smollm2-135m", NullProgress()))).backend


TOKENIZERS = (smollm2, byte_level_bpe, byte_fallback_bpe, byte_fallback_from_gguf, metaspace_unigram)
MAX_ID = 700  # past the end of the trained vocabularies, and every byte in all of them

every_tokenizer = pytest.mark.parametrize("make_tokenizer", TOKENIZERS, ids=lambda make: make.__name__)
texts = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from(
            [
                *"ab \n\t",
                "  ",
                "👩‍👩‍👧‍👦",
                "🏳️‍🌈",
                "👍🏽",
                "你好，世界",
                "e\u0301",
                "ไทย",
                "हिन्दी",
                "<s>",
                "</s>",
                "<|im_end|>",
                "<é>",
                "▁",
                "<0x0A>",
            ]
        ),
        max_size=20,
    ).map("".join),
)
splits = st.lists(st.integers(0, 5), max_size=60)


def pieces_of(token_ids: list[int], sizes: list[int]) -> list[list[int]]:
    """The ids cut into pieces of the given sizes, the rest one by one."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(token_ids[start : start + size])
        start += size
    return pieces + [[token_id] for token_id in token_ids[start:]]


def fed(decoder: IncrementalDecoder, token_ids: list[int]) -> str:
    return "".join([decoder.feed(token_id) for token_id in token_ids])


def streamed(tokenizer: Tokenizer, token_ids: list[int], sizes: list[int], *, skip_special_tokens: bool) -> list[str]:
    decoder = factory_of(tokenizer).start(skip_special_tokens=skip_special_tokens)
    return [*(fed(decoder, piece) for piece in pieces_of(token_ids, sizes)), decoder.finish()]


@cache
def factory_of(tokenizer: Tokenizer) -> DecoderFactory:
    return DecoderFactory(tokenizer)


@every_tokenizer
@given(text=texts, sizes=splits, skip=st.booleans())
def test_text_is_the_same_however_its_tokens_arrive(
    make_tokenizer: Callable[[], Tokenizer], text: str, sizes: list[int], skip: bool
) -> None:
    tokenizer = make_tokenizer()
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    parts = streamed(tokenizer, token_ids, sizes, skip_special_tokens=skip)
    whole = tokenizer.decode(token_ids, skip_special_tokens=skip)
    assert "".join(parts) == whole
    if REPLACEMENT not in whole:
        assert not any(REPLACEMENT in part for part in parts)


@pytest.mark.parametrize("make_tokenizer", [smollm2, byte_level_bpe, metaspace_unigram], ids=lambda make: make.__name__)
@given(token_ids=st.lists(st.integers(0, MAX_ID), max_size=40), sizes=splits, skip=st.booleans())
def test_any_tokens_decode_as_the_tokenizer_decodes_them(
    make_tokenizer: Callable[[], Tokenizer], token_ids: list[int], sizes: list[int], skip: bool
) -> None:
    tokenizer = make_tokenizer()
    parts = streamed(tokenizer, token_ids, sizes, skip_special_tokens=skip)
    assert "".join(parts) == tokenizer.decode(token_ids, skip_special_tokens=skip)


@given(data=st.binary(max_size=12), sizes=splits)
def test_any_bytes_decode_as_the_byte_level_tokenizer_decodes_them(data: bytes, sizes: list[int]) -> None:
    tokenizer = byte_level_bpe()
    assert tokenizer.pre_tokenizer is not None
    alphabet = tokenizer.pre_tokenizer.pre_tokenize_str
    letters = {byte: alphabet(bytes([byte]).decode("latin-1"))[0][0][-1] for byte in range(256)}
    token_ids = [id_of(tokenizer, letters[byte]) for byte in data]
    assert "".join(streamed(tokenizer, token_ids, sizes, skip_special_tokens=True)) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("make_tokenizer", [byte_fallback_bpe, byte_fallback_from_gguf], ids=lambda make: make.__name__)
@given(token_ids=st.lists(st.integers(0, MAX_ID), max_size=40), sizes=splits, skip=st.booleans())
def test_only_characters_before_an_invalid_byte_differ_from_byte_fallback(
    make_tokenizer: Callable[[], Tokenizer], token_ids: list[int], sizes: list[int], skip: bool
) -> None:
    tokenizer = make_tokenizer()
    streamed_text = "".join(streamed(tokenizer, token_ids, sizes, skip_special_tokens=skip))
    whole = tokenizer.decode(token_ids, skip_special_tokens=skip)
    if REPLACEMENT not in whole:
        assert streamed_text == whole
    # A space byte that begins a broken run is kept as a space, and then stripped as one.
    assert any(keeps_or_replaces(start + streamed_text, whole) for start in ("", " "))


def keeps_or_replaces(text: str, whole: str) -> bool:
    """Whether each character of n bytes stands in `whole` too, or stands where that has n times U+FFFD."""
    position = 0
    for character in text:
        num_bytes = len(character.encode())
        if character != REPLACEMENT and whole.startswith(REPLACEMENT * num_bytes, position):
            position += num_bytes
        elif whole[position : position + 1] == character:
            position += 1
        else:
            return False
    return position == len(whole)


@pytest.mark.parametrize("make_tokenizer", [byte_fallback_bpe, byte_fallback_from_gguf], ids=lambda make: make.__name__)
def test_a_space_byte_at_the_start_is_stripped_also_before_an_invalid_byte(
    make_tokenizer: Callable[[], Tokenizer],
) -> None:
    tokenizer = make_tokenizer()
    token_ids = [id_of(tokenizer, f"<0x{byte:02X}>") for byte in b" \xff"]
    assert tokenizer.decode(token_ids) == REPLACEMENT * 2
    assert "".join(streamed(tokenizer, token_ids, [1], skip_special_tokens=True)) == REPLACEMENT


def byte_ids(data: bytes) -> list[int]:
    return [id_of(byte_fallback_bpe(), f"<0x{byte:02X}>") for byte in data]


@pytest.mark.parametrize("character", ["é", "你", "👍", "🏳️‍🌈"])
@pytest.mark.parametrize("make_tokenizer", [smollm2, byte_level_bpe, byte_fallback_bpe], ids=lambda make: make.__name__)
def test_a_character_appears_with_its_last_token(make_tokenizer: Callable[[], Tokenizer], character: str) -> None:
    tokenizer = make_tokenizer()
    decoder = factory_of(tokenizer).start()
    parts = [decoder.feed(token_id) for token_id in tokenizer.encode(character).ids]
    assert parts[-1].endswith(character[-1])
    assert "".join(parts).strip() == character
    assert decoder.finish() == ""


def test_a_line_break_in_a_byte_token_is_not_held_back() -> None:
    decoder = factory_of(byte_fallback_bpe()).start()
    assert fed(decoder, byte_ids(b"\n")) == "\n"


def test_an_unfinished_character_is_shown_at_the_end_as_decode_shows_it() -> None:
    for tokenizer in (byte_level_bpe(), byte_fallback_bpe()):
        token_ids = tokenizer.encode("\N{SNAKE}").ids[:-1]
        decoder = factory_of(tokenizer).start()
        shown = fed(decoder, token_ids)
        assert REPLACEMENT not in shown
        assert shown + decoder.finish() == tokenizer.decode(token_ids)


def test_a_complete_character_survives_an_invalid_byte_after_it() -> None:
    token_ids = byte_ids(b"\n\xffA\xe4")
    parts = streamed(byte_fallback_bpe(), token_ids, [], skip_special_tokens=True)
    assert parts == ["\n", REPLACEMENT, REPLACEMENT, REPLACEMENT, ""]
    assert byte_fallback_bpe().decode(token_ids) == REPLACEMENT * 4


def test_a_skipped_token_does_not_cut_a_character() -> None:
    special = id_of(byte_fallback_bpe(), "<s>")
    first, *rest = byte_ids("你".encode())
    assert "".join(streamed(byte_fallback_bpe(), [first, special, *rest], [], skip_special_tokens=True)) == "你"


def test_one_leading_space_is_lost_and_no_other() -> None:
    tokenizer = byte_fallback_bpe()
    space = id_of(tokenizer, "▁")
    decoder = factory_of(tokenizer).start()
    assert [decoder.feed(space), decoder.feed(space), decoder.feed(space)] == ["", " ", " "]


def test_an_id_beyond_the_vocabulary_stands_for_no_text() -> None:
    for make_tokenizer in TOKENIZERS:
        assert streamed(make_tokenizer(), [10**6], [], skip_special_tokens=False) == ["", ""]


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (None, "must have a decoder, got none"),
        (decoders.WordPiece(), "[WordPiece] is not supported at WordPiece"),
        (decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]), "is not supported at Metaspace"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]), "is not supported at Replace"),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]), "is not supported at Strip"),
        (decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]), "is not supported at Strip"),
    ],
)
def test_another_decoder_is_refused_by_name(decoder: decoders.Decoder | None, named: str) -> None:
    tokenizer = Tokenizer(models.BPE())
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(UnsupportedModel, match=re.escape(named)):
        DecoderFactory(tokenizer)
