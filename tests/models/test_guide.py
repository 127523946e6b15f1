"""What a guide accepts without a model, and how it travels."""

import math
from typing import Any

import msgspec
import pytest

from triode.models.guide import MAX_GUIDE_BYTES, MAX_OPTIONAL, Choices, Grammar, Guide, JsonObject, JsonSchema, Regex
from triode.models.sampling import SamplingParams

GUIDES: list[Guide] = [
    JsonSchema({"type": "integer"}),
    JsonSchema('{"type": "integer"}', compact=True),
    JsonObject(),
    Regex("a+"),
    Choices(("yes", "no")),
    Grammar('start: "a"'),
    Grammar('start: "a"', of_schemas=True),
]


@pytest.mark.parametrize("guide", GUIDES, ids=repr)
def test_a_guide_survives_the_way_to_a_worker_process(guide: Guide) -> None:
    sent = SamplingParams(guide=guide)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=SamplingParams) == sent
    assert hash(guide) == hash(msgspec.msgpack.decode(msgspec.msgpack.encode(guide), type=Guide))


def test_a_schema_is_kept_as_it_was_written_and_does_not_change_with_the_callers_mapping() -> None:
    schema: dict[str, object] = {"type": "object", "properties": {"b": {}, "a": {}}}
    guide = JsonSchema(schema)
    schema["type"] = "array"
    assert guide == JsonSchema('{"type": "object", "properties": {"b": {}, "a": {}}}')


def test_choices_may_be_a_list() -> None:
    assert Choices(["a", "b"]) == Choices(("a", "b"))  # type: ignore[arg-type]


def optional(number: int, **fields: Any) -> dict[str, Any]:
    """An object whose properties may all be left out."""
    properties = {f"p{index}": {"type": "boolean"} for index in range(number)}
    return {"type": "object", "properties": properties, "additionalProperties": False, **fields}


def test_optional_properties_are_counted_between_required_ones_and_not_in_data() -> None:
    JsonSchema(optional(MAX_OPTIONAL))
    JsonSchema(optional(2 * MAX_OPTIONAL, required=[f"p{MAX_OPTIONAL}"]))
    JsonSchema({"const": optional(2 * MAX_OPTIONAL)})
    with pytest.raises(ValueError, match="got 241"):
        JsonSchema({"properties": {"const": optional(MAX_OPTIONAL + 1)}})


cyclic: dict[str, object] = {}
cyclic["self"] = cyclic

REFUSED: list[tuple[type[Any], tuple[Any, ...], str]] = [
    (JsonSchema, ([1],), r"schema must be a mapping or JSON text, got \[1\]"),
    (JsonSchema, ("[1]",), r"schema must be a JSON object, got '\[1\]'"),
    (JsonSchema, ("{",), "schema must be valid JSON, got '{'"),
    (JsonSchema, ("[" * 100_000,), "schema must be valid JSON, got .*recursion"),
    (JsonSchema, ({"a": math.nan},), "schema must hold JSON values only"),
    (JsonSchema, ({"a": {1, 2}},), "schema must hold JSON values only"),
    (JsonSchema, (cyclic,), "schema must hold JSON values only"),
    (JsonSchema, ({"a": "\ud83d"},), "schema must be valid Unicode"),
    (JsonSchema, ({"a": "x" * MAX_GUIDE_BYTES},), f"schema must have at most {MAX_GUIDE_BYTES} bytes, got 131081"),
    (JsonSchema, ({}, 1), "compact must be True or False, got 1"),
    (
        JsonSchema,
        ({"type": "array", "items": optional(MAX_OPTIONAL + 1)},),
        f"schema must have <= {MAX_OPTIONAL} optional properties of an object one after the other, got 241",
    ),
    (JsonObject, ("yes",), "compact must be True or False, got 'yes'"),
    (Regex, ("",), "pattern must be a non-empty text, got ''"),
    (Regex, (b"a",), "pattern must be a non-empty text, got b'a'"),
    (Choices, ((),), r"options must be a tuple of 1 to 10000 texts, got \(\)"),
    (Choices, ("ab",), "options must be a tuple of 1 to 10000 texts, got 'ab'"),
    (Choices, (("a", ""),), "options must hold non-empty texts, got ''"),
    (Choices, (("a", 1),), "options must hold non-empty texts, got 1"),
    (Choices, (("\ud83d",),), "options must be valid Unicode"),
    (Choices, (("x" * 1000,) * 200,), "options must have at most 131072 bytes together, got 200000"),
    (Grammar, (None,), "lark must be a non-empty text, got None"),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_what_is_no_guide_is_refused_by_name_constraint_and_value(
    kind: type[Any], arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        kind(*arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_tokens": 1}, "min_tokens must be 0 with guide, which says where the output ends, got 1"),
        ({"ignore_eos": True}, "ignore_eos must be False with guide, whose end the end-of-sequence token marks"),
        ({"guide": "a+"}, "guide must be one of JsonSchema, JsonObject, Regex, Choices, Grammar, got 'a.'"),
    ],
)
def test_what_contradicts_a_guide_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        SamplingParams(**{"guide": Regex("a"), **fields})
