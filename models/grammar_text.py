"""How a guide is said to llguidance."""

import json
from typing import TYPE_CHECKING

from llguidance import LLMatcher

from triode.models.guide import Choices, Grammar, Guide, JsonObject, JsonSchema, Regex

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,40}"
"""Between tokens of JSON; without a bound, a model at a loss for words would fill its output with it."""


def grammar_text(guide: Guide) -> str:
    """In llguidance's own JSON form.

    Raises:
        ValueError: if llguidance cannot express it.
    """
    match guide:
        case JsonSchema(schema, compact):
            return _json_grammar(str(schema), compact=compact)
        case JsonObject(compact):
            return _json_grammar('{"type": "object"}', compact=compact)
        case Regex(pattern):
            return LLMatcher.grammar_from_regex(pattern)
        case Choices(options):
            # One automaton serves them all, where alternatives of a grammar would each be followed on their own.
            return LLMatcher.grammar_from_regex("|".join(map(_literal, options)))
        case Grammar(lark=lark):
            return json.dumps({"grammars": [{"lark_grammar": lark}]})


def _json_grammar(schema: str, *, compact: bool) -> str:
    # These outweigh what a schema may say for itself under "x-guidance".
    overrides: JsonCompileOptions = {"lenient": False, "coerce_one_of": False}
    if compact:
        overrides["whitespace_flexible"] = False
    else:
        overrides["whitespace_pattern"] = _WHITE_SPACE
    return LLMatcher.grammar_from_json_schema(schema, overrides=overrides)


def _literal(text: str) -> str:
    """A regular expression of this text alone."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)
