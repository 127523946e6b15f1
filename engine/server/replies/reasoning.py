"""Splits `<think>reasoning</think>answer`, text by text. How the text was cut makes no difference.

Reasoning comes first or not at all: a tag within the answer is part of the answer. White space around the tags belongs
to neither side. A reply that ends before the closing tag is all reasoning.
"""

from collections.abc import Sequence
from enum import Enum, auto

from triode.engine.server.replies.pieces import Content, Piece, Reasoning, held_length

OPENING = "<think>"
CLOSING = "</think>"


class _Place(Enum):
    BEFORE = auto()
    PROMPTED = auto()
    """The prompt has opened; the model may do so again."""
    OPENED = auto()
    INSIDE = auto()
    CLOSED = auto()
    ANSWER = auto()


class ReasoningSplitter:
    """Reads one reply.

    Args:
        starts_inside: whether the prompt has ended with the opening tag.
    """

    def __init__(self, *, starts_inside: bool) -> None:
        self._place = _Place.PROMPTED if starts_inside else _Place.BEFORE
        self._held = ""

    def push(self, text: str) -> Sequence[Piece]:
        """Add text; returns what is certain."""
        self._held += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def finish(self) -> Sequence[Piece]:
        """What was held back: no tag can end in it any more."""
        held, self._held = self._held, ""
        if self._place in (_Place.PROMPTED, _Place.OPENED, _Place.INSIDE):
            return (Reasoning(held.strip()),)
        return (Content("" if self._place is _Place.CLOSED else held),)

    def _step(self, pieces: list[Piece]) -> bool:
        """Do what can be done at this place; whether the next one is reached."""
        place, start = self._place, self._held.lstrip()
        if place is _Place.ANSWER:
            pieces.append(Content(self._held))
            self._held = ""
        elif place is _Place.INSIDE:
            self._reason(pieces)
        elif place in (_Place.BEFORE, _Place.PROMPTED):
            self._begin(start)
        elif start:
            self._go(_Place.INSIDE if place is _Place.OPENED else _Place.ANSWER, start)
        return self._place is not place

    def _begin(self, start: str) -> None:
        if start.startswith(OPENING):
            self._go(_Place.OPENED, start[len(OPENING) :])
        elif OPENING.startswith(start):
            return
        elif self._place is _Place.PROMPTED:
            self._go(_Place.INSIDE, start)
        else:
            self._go(_Place.ANSWER, self._held)

    def _reason(self, pieces: list[Piece]) -> None:
        reasoning, closing, answer = self._held.partition(CLOSING)
        if closing:
            pieces.append(Reasoning(reasoning.rstrip()))
            self._go(_Place.CLOSED, answer)
            return
        sure = len(self._held) - held_length(self._held, CLOSING)
        sure = len(self._held[:sure].rstrip())
        pieces.append(Reasoning(self._held[:sure]))
        self._held = self._held[sure:]

    def _go(self, place: _Place, held: str) -> None:
        self._place, self._held = place, held
