"""Token ids to text as they arrive, never half a character.

The text of a whole output is `tokenizers.Tokenizer.decode(ids)`. Its decoders look at a token's neighbours in three
ways only: bytes of one character may be spread over tokens, the start of the text may lose a space, and special tokens
may be left out. So each token has a fixed *piece* (bytes or text), looked up in a table that fills itself as tokens
occur, and a decoder keeps just the bytes of an unfinished character. That is exact and costs a look-up a token, where
`tokenizers.decoders.DecodeStream` decodes a window again for each token, never releases an invalid byte and fails when
one follows released text.

Three families of decoders cover the supported models; another is refused by name:

    ByteLevel                       GPT-2, Llama 3, Qwen, SmolLM2: every token is a string of bytes
    Replace, ByteFallback, Fuse...  Llama 2, Mistral, Gemma: tokens are text, or one byte each (<0x0A>)
    Metaspace                       SentencePiece without byte tokens

There is one deliberate difference from `decode`. Where a run of byte tokens is not valid UTF-8, ByteFallback turns every
byte of the run into U+FFFD, also the complete characters before the fault. They have been released by then, and stay
(or were stripped, if a space begins the text): to hold every line break of a Llama 2 until the next token would delay
all text for the sake of text that is broken.
"""

import codecs
from collections.abc import Callable
from functools import partial
from typing import Generic, Protocol, TypeVar

import msgspec
from tokenizers import Tokenizer

from triode.errors import UnsupportedModel
from triode.models.byte_alphabet import BYTE_OF_CHARACTER

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
Piece = TypeVar("Piece")


class IncrementalDecoder(Protocol):
    """The text of one sequence of tokens. What `feed` and `finish` return, joined, is the decoded whole."""

    def feed(self, token_id: int) -> str:
        """The text that this token completes. An id that the tokenizer does not know stands for no text."""

    def finish(self) -> str:
        """The rest: U+FFFD for a character whose bytes never all came. Nothing may be fed after it."""


class DecoderFactory:
    """Makes the decoders of one tokenizer. All of them share its table of pieces.

    Raises:
        UnsupportedModel: the tokenizer's decoder is none of those above.
    """

    def __init__(self, backend: Tokenizer) -> None:
        special = frozenset(token.content for token in backend.get_added_tokens_decoder().values() if token.special)
        start = _family(_steps(backend))
        self._start_without_special = start(partial(_token_text, backend, special))
        self._start_with_special = start(partial(_token_text, backend, frozenset()))

    def start(self, *, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """A decoder for a new sequence."""
        return self._start_without_special() if skip_special_tokens else self._start_with_special()


def _token_text(backend: Tokenizer, left_out: frozenset[str], token_id: int) -> str | None:
    text = backend.id_to_token(token_id)
    return None if text in left_out else text


# How a tokenizer spells a token, or None for a token that is left out of the text.
_TokenText = Callable[[int], str | None]
_Start = Callable[[], IncrementalDecoder]


class _Step(msgspec.Struct, frozen=True):
    """One decoder of `tokenizers`, as its JSON describes it; each type uses some of the fields."""

    type: str
    decoders: tuple["_Step", ...] = ()
    pattern: dict[str, str] = {}
    content: str = ""
    start: int = 0
    stop: int = 0
    replacement: str = ""
    prepend_scheme: str = "always"


def _steps(backend: Tokenizer) -> tuple[_Step, ...]:
    if backend.decoder is None:
        raise UnsupportedModel("the tokenizer must have a decoder, got none")
    step = msgspec.json.decode(backend.decoder.__getstate__(), type=_Step)
    return step.decoders if step.type == "Sequence" else (step,)


def _family(steps: tuple[_Step, ...]) -> Callable[[_TokenText], _Start]:
    match [step.type for step in steps]:
        case ["ByteLevel"]:
            return _start_byte_level
        case ["Metaspace"]:
            return partial(_start_metaspace, steps[0])
        case _:
            return partial(_start_byte_fallback, _ByteFallback.read(steps))


class _Pieces(dict[int, Piece], Generic[Piece]):
    """What each token stands for, computed when a token first occurs: nothing to build at start."""

    def __init__(self, compute: Callable[[int], Piece]) -> None:
        self._compute = compute

    def __missing__(self, token_id: int) -> Piece:
        piece = self[token_id] = self._compute(token_id)
        return piece


# ByteLevel


def _start_byte_level(token_text: _TokenText) -> _Start:
    return partial(_ByteLevelDecoder, _Pieces(lambda token_id: _byte_level_piece(token_text(token_id))))


def _byte_level_piece(text: str | None) -> str | bytes:
    """Whole characters, as nearly every token has them; or bytes, where one begins or ends in another token."""
    data = _byte_level_bytes(text)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _byte_level_bytes(text: str | None) -> bytes:
    if text is None:
        return b""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in text])
    except KeyError:  # an added token is spelled as it is
        return text.encode()


class _ByteLevelDecoder:
    def __init__(self, pieces: _Pieces[str | bytes]) -> None:
        self._pieces = pieces
        self._unfinished = b""

    def feed(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if isinstance(piece, str):
            if not self._unfinished:
                return piece
            piece = piece.encode()
        data = self._unfinished + piece
        text, num_decoded = codecs.utf_8_decode(data, "replace", False)
        self._unfinished = data[num_decoded:]
        return text

    def finish(self) -> str:
        return self._unfinished.decode(errors="replace")


# Metaspace


def _start_metaspace(step: _Step, token_text: _TokenText) -> _Start:
    def piece(token_id: int) -> str | None:
        text = token_text(token_id)
        return None if text is None else text.replace(step.replacement, " ")

    def first_piece(token_id: int) -> str | None:
        text = token_text(token_id)
        return None if text is None else text.replace(step.replacement, "")

    pieces = _Pieces(piece)
    return partial(_MetaspaceDecoder, pieces, piece if step.prepend_scheme == "never" else first_piece)


class _MetaspaceDecoder:
    """The first token that is not left out has no spaces for its marks."""

    def __init__(self, pieces: _Pieces[str | None], first_piece: Callable[[int], str | None]) -> None:
        self._pieces = pieces
        self._first_piece = first_piece
        self._at_start = True

    def feed(self, token_id: int) -> str:
        text = self._first_piece(token_id) if self._at_start else self._pieces[token_id]
        if text is None:
            return ""
        self._at_start = False
        return text

    def finish(self) -> str:
        return ""


# Replace, ByteFallback, Fuse, Strip


class _ByteFallback(msgspec.Struct, frozen=True):
    """A chain such as Replace("▁", " "), ByteFallback, Fuse, Strip(" ", start=1), in terms of tokens and of text."""

    token_replacements: tuple[tuple[str, str], ...] = ()
    has_byte_tokens: bool = False
    text_replacements: tuple[tuple[str, str], ...] = ()
    """Applied to text already joined, wherever it is cut: each pattern is one character."""
    strip: str = ""
    max_stripped: int = 0
    """At most so many `strip` characters are removed from the start."""

    @staticmethod
    def read(steps: tuple[_Step, ...]) -> "_ByteFallback":
        chain = _ByteFallback()
        num_fuses = 0
        for step in steps:
            pattern = step.pattern.get("String", "")
            match step.type:
                case "Replace" if pattern and not (num_fuses or chain.has_byte_tokens or chain.strip):
                    replacements = (*chain.token_replacements, (pattern, step.content))
                    chain = msgspec.structs.replace(chain, token_replacements=replacements)
                case "Replace" if len(pattern) == 1 and not chain.strip:
                    replacements = (*chain.text_replacements, (pattern, step.content))
                    chain = msgspec.structs.replace(chain, text_replacements=replacements)
                case "ByteFallback" if not (num_fuses or chain.has_byte_tokens or chain.strip):
                    chain = msgspec.structs.replace(chain, has_byte_tokens=True)
                case "Fuse":
                    num_fuses += 1
                case "Strip" if num_fuses and step.stop == 0 and not chain.strip:
                    chain = msgspec.structs.replace(chain, strip=step.content, max_stripped=step.start)
                case _:
                    names = ", ".join(step.type for step in steps)
                    raise UnsupportedModel(f"the tokenizer's decoder [{names}] is not supported at {step.type}")
        return chain


def _start_byte_fallback(chain: _ByteFallback, token_text: _TokenText) -> _Start:
    return partial(_ByteFallbackDecoder, chain, _Pieces(lambda token_id: _byte_or_text(chain, token_text(token_id))))


def _byte_or_text(chain: _ByteFallback, text: str | None) -> int | str | None:
    """A byte, a text, or None for a token that is left out (which, unlike an empty text, ends no run of bytes)."""
    if text is None:
        return None
    for pattern, content in chain.token_replacements:
        text = text.replace(pattern, content)
    if chain.has_byte_tokens and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            return text
    return text


class _ByteFallbackDecoder:
    def __init__(self, chain: _ByteFallback, pieces: _Pieces[int | str | None]) -> None:
        self._pieces = pieces
        self._replacements = chain.text_replacements
        self._strip = chain.strip
        self._num_strippable = chain.max_stripped
        self._run = _ByteRun()

    def feed(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if piece is None:
            return ""
        if not isinstance(piece, str):
            return self._finished_text(self._run.add(piece))
        return self._finished_text(self._run.end() + piece if self._run.is_open else piece)

    def finish(self) -> str:
        return self._finished_text(self._run.end())

    def _finished_text(self, text: str) -> str:
        for pattern, content in self._replacements:
            text = text.replace(pattern, content)
        while text and self._num_strippable:
            if text.startswith(self._strip):
                text = text[1:]
                self._num_strippable -= 1
            else:
                self._num_strippable = 0
        return text


class _ByteRun:
    """Consecutive byte tokens: characters as they complete; from the first fault on, U+FFFD for each byte."""

    def __init__(self) -> None:
        self.is_open = False
        self._is_broken = False
        self._unfinished = b""

    def add(self, byte: int) -> str:
        self.is_open = True
        if self._is_broken:
            return REPLACEMENT
        self._unfinished += bytes([byte])
        try:
            text, num_decoded = codecs.utf_8_decode(self._unfinished, "strict", False)
        except UnicodeDecodeError:
            text, num_decoded = REPLACEMENT * len(self._unfinished), len(self._unfinished)
            self._is_broken = True
        self._unfinished = self._unfinished[num_decoded:]
        return text

    def end(self) -> str:
        text = REPLACEMENT * len(self._unfinished)
        self.is_open = self._is_broken = False
        self._unfinished = b""
        return text
