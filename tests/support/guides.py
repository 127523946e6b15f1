"""Guides over the small tokenizers, for the runner of `runner_world`."""

from functools import cache

import pytest

from trained_tokenizers import byte_level_bpe
from triode.models import grammar, prototypes
from triode.models.grammar import GuideCompiler
from triode.models.guide import Choices, JsonSchema, Regex
from triode.models.tokenizer import Tokenizer

EOS = 2
"""`</s>` of the trained tokenizers."""

PERSON = JsonSchema(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    compact=True,
)
COLOURS = Choices(("red", "green", "blue"))
DIGITS = Regex("[0-9]{2,6}")


@cache
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(byte_level_bpe(), None, {})


@cache
def tiny_guides() -> GuideCompiler:
    """For the model of `runner_world`, whose vocabulary ends before the tokenizer's."""
    return GuideCompiler(tiny_tokenizer(), 499, [EOS])


def grow_up_to(max_lexers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the background, guides get so many prototypes."""
    for module in (grammar, prototypes):
        monkeypatch.setattr(module, "MAX_LEXERS", max_lexers)
