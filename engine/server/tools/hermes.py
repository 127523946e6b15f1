"""Calls as Hermes and Qwen write them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, anywhere."""

from collections.abc import Collection, Sequence

from triode.engine.server.replies.pieces import Piece, held_length
from triode.engine.server.tools.parser import OpenCall, Prose

OPENING = "<tool_call>"
CLOSING = "</tool_call>"


class HermesParser:
    """Reads one answer. The tags mark calls clearly enough to let functions pass that do not exist."""

    def __init__(self, names: Collection[str]) -> None:
        self._prose = Prose()
        self._held = ""
        self._call: OpenCall | None = None
        self._is_closing = False
        """Whether a call is over and its closing tag has not come."""

    def push(self, text: str) -> Sequence[Piece]:
        """Add text; returns what is certain."""
        self._held += text
        pieces: list[Piece] = []
        goes_on = True
        while goes_on:
            if self._call is not None:
                goes_on = self._read(self._call, pieces)
            elif self._is_closing:
                goes_on = self._close()
            else:
                goes_on = self._look_for_call(pieces)
        return pieces

    def finish(self) -> Sequence[Piece]:
        """What was held back."""
        if self._call is not None and not self._call.is_certain:
            self._held = self._call.raw + self._held
        elif self._call is not None or self._is_closing:
            self._held = ""
        held, self._held, self._call = self._held, "", None
        return [self._prose.add(held), self._prose.finish()]

    def _look_for_call(self, pieces: list[Piece]) -> bool:
        before, opening, after = self._held.partition(OPENING)
        if not opening:
            sure = len(before) - held_length(before, OPENING)
            before, after = before[:sure], before[sure:]
        pieces.append(self._prose.add(before))
        self._held = after
        if opening:
            self._call = OpenCall(None, OPENING)
        return bool(opening)

    def _read(self, call: OpenCall, pieces: list[Piece]) -> bool:
        found, self._held = call.read(self._held, self._prose)
        pieces += found
        if call.is_none:
            # The tag is content, and what follows it is looked at again.
            pieces.append(self._prose.add(OPENING))
            self._held = call.raw.removeprefix(OPENING) + self._held
            self._call = None
        elif call.is_over:
            self._call, self._is_closing = None, True
        return self._call is None

    def _close(self) -> bool:
        _, closing, after = self._held.partition(CLOSING)
        self._is_closing = not closing
        num_held = held_length(self._held, CLOSING)
        self._held = after if closing else self._held[len(self._held) - num_held :]
        return bool(closing)
