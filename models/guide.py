"""Guides: what an output may look like, said by the caller. A guide is text; `triode.models.grammar` compiles it.

    JsonSchema   a JSON value that validates against a schema
    JsonObject   any JSON object
    Regex        a text that matches a regular expression from its first to its last character
    Choices      one of several texts
    Grammar      a text that a context-free grammar in Lark's notation derives

What can be checked without a model is checked when a guide is made: types and sizes. Whether the schema, the expression
or the grammar can be compiled is known at `submit`, which refuses with the compiler's reason.
"""

import json
from collections.abc import Mapping
from itertools import groupby
from typing import TypeAlias

import msgspec
from msgspec.structs import force_setattr

MAX_GUIDE_BYTES = 2**17
"""The longest schema, expression or grammar, and the most that all choices may have together."""
MAX_CHOICES = 10_000
"""The most choices of one request."""
MAX_OPTIONAL = 240
"""The most properties of an object that may be left out one after the other: the parser looks at all of them at once."""
_DATA = frozenset({"const", "default", "enum", "examples"})
"""Keywords whose values are no schemas."""
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose values are schemas by name, whatever the names are."""


class _Guide(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of every guide: immutable, hashable text."""


class JsonSchema(_Guide, frozen=True):
    """The output is a JSON value that validates against a schema (JSON Schema 2020-12 and before).

    Properties come in the schema's order. A keyword that cannot be enforced is refused, not ignored.

    Raises:
        ValueError: if the schema is no JSON object, too long, or of an object with too many optional properties.
    """

    schema: str | Mapping[str, object]
    """A mapping, or the schema as JSON text, which is how it is kept."""
    compact: bool = False
    """Without white space: `{"a":1}`. Otherwise the model may put up to 40 characters of it between tokens of JSON."""

    def __post_init__(self) -> None:
        force_setattr(self, "schema", _schema_text(self.schema))
        _check_flag("compact", self.compact)


class JsonObject(_Guide, frozen=True):
    """The output is a JSON object, whatever it holds."""

    compact: bool = False
    """As of JsonSchema."""

    def __post_init__(self) -> None:
        _check_flag("compact", self.compact)


class Regex(_Guide, frozen=True):
    """The whole output matches a regular expression (Rust's syntax; no look-around, no back-references).

    Raises:
        ValueError: if the pattern is no text, or too long.
    """

    pattern: str

    def __post_init__(self) -> None:
        _check_text("pattern", self.pattern)


class Choices(_Guide, frozen=True):
    """The output is one of these texts.

    Raises:
        ValueError: if they are no texts, or too many or too long.
    """

    options: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_options(self.options)
        force_setattr(self, "options", tuple(self.options))


class Grammar(_Guide, frozen=True):
    """The output is derived from `start` of a context-free grammar in llguidance's dialect of Lark.

    Raises:
        ValueError: if the grammar is no text, or too long.
    """

    lark: str
    of_schemas: bool = False
    """Whether nothing but JSON schemas in it leaves a choice of parses, as in a grammar of tool calls. It may then take as
    much work as a schema; a grammar of anybody's making takes less."""

    def __post_init__(self) -> None:
        _check_text("lark", self.lark)
        _check_flag("of_schemas", self.of_schemas)


class Refusal(msgspec.Struct, frozen=True):
    """Why a guide cannot be followed."""

    reason: str
    is_busy: bool = False
    """Not now: the guides of other requests leave no room for it."""


Guide: TypeAlias = JsonSchema | JsonObject | Regex | Choices | Grammar


def _schema_text(schema: object) -> str:
    if isinstance(schema, Mapping):
        text = _encoded(schema)
    elif isinstance(schema, str):
        text = schema
    else:
        raise ValueError(f"schema must be a mapping or JSON text, got {_shown(schema)}")
    _check_text("schema", text)
    try:
        decoded: object = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"schema must be valid JSON, got {_shown(text)}: {error}") from error
    if not isinstance(decoded, dict):
        raise ValueError(f"schema must be a JSON object, got {_shown(text)}")
    check_optional(decoded)
    return text


def check_optional(schema: Mapping[str, object]) -> None:
    """Whether the objects that a schema speaks of can be followed.

    Raises:
        ValueError: if one has too many optional properties.
    """
    found: list[object] = [schema]
    while found:
        value = found.pop()
        if isinstance(value, list):
            found += value
        elif isinstance(value, Mapping):
            if (num_optional := _longest_optional(value)) > MAX_OPTIONAL:
                raise ValueError(
                    f"schema must have <= {MAX_OPTIONAL} optional properties of an object one after the other, got "
                    f"{num_optional}; make some of them required"
                )
            for key, part in value.items():
                if key in _NAMED and isinstance(part, Mapping):
                    found += part.values()
                elif key not in _DATA:
                    found.append(part)


def _longest_optional(schema: Mapping[str, object]) -> int:
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        return 0
    needed = {name for name in required if isinstance(name, str)}
    return max(
        (len([*names]) for is_needed, names in groupby(properties, needed.__contains__) if not is_needed), default=0
    )


def _encoded(schema: Mapping[str, object]) -> str:
    try:
        return json.dumps(dict(schema), allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"schema must hold JSON values only: {error}") from error


def _check_options(options: object) -> None:
    if not isinstance(options, (tuple, list)) or not 1 <= len(options) <= MAX_CHOICES:
        raise ValueError(f"options must be a tuple of 1 to {MAX_CHOICES} texts, got {_shown(options)}")
    num_bytes = 0
    for option in options:
        if not isinstance(option, str) or not option:
            raise ValueError(f"options must hold non-empty texts, got {_shown(option)}")
        num_bytes += _num_bytes("options", option)
    if num_bytes > MAX_GUIDE_BYTES:
        raise ValueError(f"options must have at most {MAX_GUIDE_BYTES} bytes together, got {num_bytes}")


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str) or not text:
        raise ValueError(f"{name} must be a non-empty text, got {_shown(text)}")
    if (num_bytes := _num_bytes(name, text)) > MAX_GUIDE_BYTES:
        raise ValueError(f"{name} must have at most {MAX_GUIDE_BYTES} bytes, got {num_bytes}")


def _num_bytes(name: str, text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be valid Unicode, got {_shown(text)}") from None


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {_shown(value)}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
