"""Calls as Llama 3.x writes them: a reply of `{"name": ..., "parameters": {...}}`, several with `;` between.

`<|python_tag|>` may come first. A reply that begins otherwise has no calls, and an object that names no function of the
request is an answer in JSON.
"""

from collections.abc import Collection, Sequence

from triode.engine.server.replies.pieces import Piece
from triode.engine.server.tools.parser import SPACE, OpenCall, Prose

PYTHON_TAG = "<|python_tag|>"
_SEPARATORS = SPACE + ";,"


class Llama3Parser:
    """Reads one answer."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._prose = Prose()
        self._held = ""
        self._call: OpenCall | None = None
        self._is_prose = False
        """Whether the rest is content."""
        self._has_called = False

    def push(self, text: str) -> Sequence[Piece]:
        """Add text; returns what is certain."""
        self._held += text
        pieces: list[Piece] = []
        while not self._is_prose:
            if not (self._look_for_call() if self._call is None else self._read(self._call, pieces)):
                return pieces
        pieces.append(self._prose.add(self._held))
        self._held = ""
        return pieces

    def finish(self) -> Sequence[Piece]:
        """What was held back."""
        if self._call is not None and not self._call.is_certain:
            self._held = self._call.raw + self._held
        held = self._held.lstrip(_SEPARATORS) if self._has_called else self._held
        self._held, self._call = "", None
        return [self._prose.add(held), self._prose.finish()]

    def _look_for_call(self) -> bool:
        """Whether it is known how the text goes on."""
        start = self._held.lstrip(_SEPARATORS if self._has_called else SPACE)
        if PYTHON_TAG.startswith(start):
            return False
        body = start.removeprefix(PYTHON_TAG).lstrip(SPACE)
        if not body:
            return False
        if body[0] == "{":
            self._call = OpenCall(self._names, self._held[: len(self._held) - len(body)])
            self._held = body
        else:
            self._is_prose = True
        return True

    def _read(self, call: OpenCall, pieces: list[Piece]) -> bool:
        found, self._held = call.read(self._held, self._prose)
        pieces += found
        if call.is_none:
            self._held = call.raw + self._held
            self._call, self._is_prose = None, True
        elif call.is_over:
            self._call = None
            self._has_called = True
        return self._call is None
