"""ToolParser: what finds the calls in an answer. Here is what the parsers of all formats share.

White space beside calls belongs to nobody. What looked like a call and is none becomes content again. A call that has
begun is not taken back: text that breaks it off is left out.
"""

from collections.abc import Collection, Sequence
from typing import Protocol

from triode.engine.server.replies.pieces import CallArguments, CallBegun, Content, Piece
from triode.engine.server.tools.scanner import CallScanner

SPACE = " \t\r\n"


class ToolParser(Protocol):
    """Reads the answer of one reply. How its text was cut makes no difference."""

    def push(self, text: str) -> Sequence[Piece]:
        """Add text; returns what is certain."""

    def finish(self) -> Sequence[Piece]:
        """What was held back, as content: nothing more comes."""


class Prose:
    """The text beside the calls."""

    def __init__(self) -> None:
        self._space = ""
        self._follows_call = False

    def add(self, text: str) -> Content:
        """Add text; what is certain of it. White space at its end waits, because a call may follow."""
        text = self._space + text
        if self._follows_call:
            text = text.lstrip(SPACE)
            self._follows_call = not text
        body = text.rstrip(SPACE)
        self._space = text[len(body) :]
        return Content(body)

    def interrupt(self) -> None:
        """A call begins."""
        self._space = ""
        self._follows_call = True

    def finish(self) -> Content:
        """No call follows."""
        space, self._space = self._space, ""
        return Content(space)


class OpenCall:
    """A call that is being read.

    Args:
        names: the functions that exist, or None to let any name pass.
        raw: the text that opened it.
    """

    def __init__(self, names: Collection[str] | None, raw: str) -> None:
        self.raw = raw
        """The text so far, until it is certain that this is a call."""
        self._scanner = CallScanner(names)
        self._is_told = False

    @property
    def is_none(self) -> bool:
        """Whether this is no call."""
        return self._scanner.is_broken and not self._is_told

    @property
    def is_over(self) -> bool:
        """Whether nothing more of it comes."""
        return self._is_told and (self._scanner.is_done or self._scanner.is_broken)

    @property
    def is_certain(self) -> bool:
        """Whether this is a call."""
        return self._is_told

    def read(self, text: str, prose: Prose) -> tuple[list[Piece], str]:
        """Read on; returns what is certain, and the text that is not of the call."""
        num_read = self._scanner.feed(text)
        rest = text[num_read:]
        if not self._scanner.has_begun or (name := self._scanner.name) is None:
            self.raw += text[:num_read]
            return [], rest
        pieces: list[Piece] = []
        if not self._is_told:
            self._is_told = True
            prose.interrupt()
            pieces.append(CallBegun(name))
        pieces.append(CallArguments(self._scanner.take_arguments()))
        return pieces, rest
