"""Reads one call, `{"name": ..., "arguments": {...}}`, character by character, as a model writes it.

The keys may come in any order; `parameters` is another name of `arguments`. The arguments are passed on as they are
written, once the name is known. A text that turns out to be another object than a call is *broken*, and nothing of it
has been passed on by then: a call has begun only when its name is known and its arguments have begun, or are left out.
"""

import json
from collections.abc import Collection
from enum import Enum, auto

_SPACE = " \t\r\n"
_ARGUMENTS = frozenset({"arguments", "parameters"})
_OTHERS = frozenset({"type", "id"})
"""Keys that some models add; their values are left out."""


class _Place(Enum):
    START = auto()
    KEY_OR_END = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    COMMA_OR_END = auto()
    DONE = auto()
    BROKEN = auto()


class CallScanner:
    """One call.

    Args:
        names: the functions that exist; another name breaks the call. None lets any name pass.
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        self.name: str | None = None
        self.has_begun = False
        self._names = names
        self._place = _Place.START
        self._key = ""
        self._value: _Value | None = None
        self._arguments: list[str] = []
        """Not passed on yet."""
        self._has_arguments = False

    @property
    def is_done(self) -> bool:
        """Whether the object is closed."""
        return self._place is _Place.DONE

    @property
    def is_broken(self) -> bool:
        """Whether this is not, or no longer, a call."""
        return self._place is _Place.BROKEN

    def feed(self, text: str) -> int:
        """Read on; returns how many characters belong to the call: all of them, unless it is done or broken."""
        for index, character in enumerate(text):
            if self._place is _Place.DONE:
                return index
            self._read(character)
            if self._place is _Place.BROKEN:
                return index
        return len(text)

    def take_arguments(self) -> str:
        """What of the arguments has come since the last call."""
        if not self.has_begun:
            return ""
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def _read(self, character: str) -> None:
        if self._value is not None:
            self._read_value(self._value, character)
        elif character in _SPACE:
            return
        elif self._place is _Place.VALUE:
            self._value = _Value(character)
            self._after_character(self._value, character)
        elif self._place in (_Place.KEY_OR_END, _Place.KEY) and character == '"':
            self._value = _Value(character)
            self._place = _Place.KEY
        else:
            self._place = self._after_mark(character)
            if self._place is _Place.DONE:
                self._close()

    def _after_mark(self, mark: str) -> _Place:
        match self._place, mark:
            case _Place.START, "{":
                return _Place.KEY_OR_END
            case _Place.COLON, ":":
                return _Place.VALUE
            case _Place.COMMA_OR_END, ",":
                return _Place.KEY
            case ((_Place.COMMA_OR_END | _Place.KEY_OR_END), "}"):
                return _Place.DONE
        return _Place.BROKEN

    def _read_value(self, value: "_Value", character: str) -> None:
        if value.is_scalar and character in ",}" + _SPACE:
            # The end of a number or a word is known by what follows it.
            self._end_value(value)
            self._read(character)
            return
        value.add(character)
        self._after_character(value, character)

    def _after_character(self, value: "_Value", character: str) -> None:
        if self._place is _Place.VALUE and self._key in _ARGUMENTS and value.text[0] == "{":
            self._has_arguments = True
            self._arguments.append(character)
            self._begin()
        if value.is_closed:
            self._end_value(value)

    def _end_value(self, value: "_Value") -> None:
        self._value = None
        decoded = value.decoded()
        if self._place is _Place.KEY:
            self._key = decoded if isinstance(decoded, str) else ""
            known = self._key == "name" or self._key in _ARGUMENTS or self._key in _OTHERS
            self._place = _Place.COLON if known else _Place.BROKEN
            return
        self._place = _Place.COMMA_OR_END
        if self._key == "name":
            self._set_name(decoded)
        elif self._key in _ARGUMENTS and value.text[0] != "{":
            self._set_text(decoded)

    def _set_name(self, name: object) -> None:
        if not isinstance(name, str) or self.name is not None or (self._names is not None and name not in self._names):
            self._place = _Place.BROKEN
            return
        self.name = name
        self._begin()

    def _set_text(self, arguments: object) -> None:
        """Some models write the arguments as the JSON text of an object; or null, for none."""
        if arguments is None:
            return
        if not isinstance(arguments, str) or not arguments.lstrip().startswith("{"):
            self._place = _Place.BROKEN
            return
        self._has_arguments = True
        self._arguments.append(arguments)
        self._begin()

    def _begin(self) -> None:
        self.has_begun = self.name is not None and self._has_arguments

    def _close(self) -> None:
        if self.name is None:
            self._place = _Place.BROKEN
        elif not self._has_arguments:
            self._arguments.append("{}")
            self.has_begun = True


class _Value:
    """One JSON value while it is written. Only where it ends is looked for; whether it is valid JSON shows at the end."""

    def __init__(self, first: str) -> None:
        self._characters: list[str] = []
        self.is_scalar = first not in '{["'
        self.is_closed = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self.add(first)

    @property
    def text(self) -> list[str]:
        return self._characters

    def add(self, character: str) -> None:
        self._characters.append(character)
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._in_string = False
                self.is_closed = self._depth == 0
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.is_closed = self._depth == 0

    def decoded(self) -> object:
        """The value; of a container or of what is no JSON, nothing that a caller looks for."""
        if self._characters[0] in "{[":
            return ()
        try:
            return json.loads("".join(self._characters), strict=False)
        except ValueError:
            return ()
