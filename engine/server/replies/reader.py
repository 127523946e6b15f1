"""ReplyReader: the text of one reply, as it comes, to reasoning, content and calls."""

from collections.abc import Sequence

from triode.engine.server.replies.pieces import Content, Piece, merged
from triode.engine.server.replies.reasoning import ReasoningSplitter
from triode.engine.server.tools.parser import ToolParser


class ReplyReader:
    """One reply. How its text was cut makes no difference to what all pieces say together.

    Args:
        splitter: finds the reasoning; None if there is none to be found.
        tools: finds the calls; None if there are none to be found.
    """

    def __init__(self, splitter: ReasoningSplitter | None, tools: ToolParser | None) -> None:
        self._splitter = splitter
        self._tools = tools

    def push(self, text: str) -> list[Piece]:
        """Add text; returns what is certain."""
        pieces = [Content(text)] if self._splitter is None else self._splitter.push(text)
        return merged(self._with_calls(pieces))

    def finish(self) -> list[Piece]:
        """What was held back; the reply has ended."""
        pieces = [] if self._splitter is None else self._with_calls(self._splitter.finish())
        return merged([*pieces, *(() if self._tools is None else self._tools.finish())])

    def _with_calls(self, pieces: Sequence[Piece]) -> list[Piece]:
        if self._tools is None:
            return list(pieces)
        found: list[Piece] = []
        for piece in pieces:
            found += self._tools.push(piece.text) if isinstance(piece, Content) else (piece,)
        return found
