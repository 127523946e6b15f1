"""What the text of a reply is made of. Pieces come in order; equal neighbours are one piece cut in two."""

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from triode.engine.server.openai_responses import ChatLogprob


class Reasoning(NamedTuple):
    """What the model thinks before it answers."""

    text: str


class Content(NamedTuple):
    """What it answers."""

    text: str
    logprobs: tuple[ChatLogprob, ...] = ()
    """Of its tokens, where they are wanted."""


class CallBegun(NamedTuple):
    """A tool is called; its arguments follow."""

    name: str


class CallArguments(NamedTuple):
    """A part of the latest call's arguments, as the model wrote them: JSON, if the model did not err."""

    text: str


Piece: TypeAlias = Reasoning | Content | CallBegun | CallArguments


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """The same with neighbours joined and empty texts left out."""
    found: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, CallBegun):
            found.append(piece)
        elif piece.text and found and type(found[-1]) is type(piece):
            found[-1] = type(piece)(found[-1].text + piece.text)
        elif piece.text:
            found.append(piece)
    return found


def held_length(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `tag`."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
