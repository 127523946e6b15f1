"""Reasoning and calls are found in a reply, and how its text was cut makes no difference."""

import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triode.engine.server.replies.pieces import CallArguments, CallBegun, Content, Piece, Reasoning, held_length, merged
from triode.engine.server.replies.reader import ReplyReader
from triode.engine.server.replies.reasoning import ReasoningSplitter
from triode.engine.server.tools.formats import FORMATS, format_of
from triode.engine.server.tools.hermes import HermesParser
from triode.engine.server.tools.llama3 import Llama3Parser

NAMES = ("add", "get_weather")
PARSERS = [HermesParser, Llama3Parser]
Make = Callable[[], ReplyReader]

READERS: dict[str, Make] = {
    "think": lambda: ReplyReader(ReasoningSplitter(starts_inside=False), None),
    "inside": lambda: ReplyReader(ReasoningSplitter(starts_inside=True), None),
    "hermes": lambda: ReplyReader(None, HermesParser(NAMES)),
    "llama3": lambda: ReplyReader(None, Llama3Parser(NAMES)),
    "think+hermes": lambda: ReplyReader(ReasoningSplitter(starts_inside=False), HermesParser(NAMES)),
    "inside+llama3": lambda: ReplyReader(ReasoningSplitter(starts_inside=True), Llama3Parser(NAMES)),
}
# What such texts are made of, and halves of it.
FRAGMENTS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", "<", "<th", "</", "tool_call>"),
    *('{"name": "add", "arguments": {"a": 1}}', '{"name":"get_weather","parameters":{"city":"Köln \\"x\\" {"}}'),
    *(
        '{"arguments": {"a": [1, {"b": null}]}, "name": "add"}',
        '{"name": "add"}',
        '{"name": "other", "parameters": {}}',
    ),
    *('{"name": "add", "arguments": "{\\"a\\": 1}"}', '{"type": "function", "name": "add", "parameters": null}'),
    *(
        '{"name": 7}',
        '{"age": 3}',
        "{",
        "}",
        '"',
        "\\",
        ":",
        ",",
        ";",
        " ",
        "\n",
        "a",
        "é",
        "some words",
        "1.5",
        "true",
    ),
]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


def read(make: Make, parts: Sequence[str]) -> list[Piece]:
    reader = make()
    found = [piece for part in parts for piece in reader.push(part)]
    return merged([*found, *reader.finish()])


def whole(name: str, text: str) -> list[Piece]:
    return read(READERS[name], [text])


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=50)
@given(text=texts, data=st.data())
def test_how_a_text_is_cut_makes_no_difference(name: str, text: str, data: st.DataObject) -> None:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    assert read(READERS[name], parts) == read(READERS[name], list(text)) == whole(name, text)


@pytest.mark.parametrize("name", READERS)
@given(text=st.text(alphabet="ab {\n", max_size=20))
def test_a_text_without_tags_and_calls_is_content_as_it_is(name: str, text: str) -> None:
    if name.startswith("inside"):
        assert whole(name, text) in ([Reasoning(text.strip())], [])
    else:
        assert whole(name, text) == ([Content(text)] if text else [])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=6,
)
calls = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=4), json_values, max_size=3)), min_size=1
)


def expected(made: list[tuple[str, dict[str, object]]], **options: object) -> list[Piece]:
    written = ((name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in made)
    return [piece for name, arguments in written for piece in (CallBegun(name), CallArguments(arguments))]


@settings(max_examples=30)
@given(made=calls, before=st.sampled_from(["", "I call.", " "]), after=st.sampled_from(["", "\n", "Done."]))
def test_calls_in_tags_are_read_as_they_were_written(
    made: list[tuple[str, dict[str, object]]], before: str, after: str
) -> None:
    tagged = [
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
        for name, arguments in made
    ]
    pieces = whole("hermes", f"{before}\n" + "\n".join(tagged) + after)
    said = [Content(text) for text in (before.strip(), after.strip()) if text]
    assert sorted(map(repr, pieces)) == sorted(map(repr, [*said, *expected(made)]))
    assert [piece for piece in pieces if not isinstance(piece, Content)] == expected(made)


@settings(max_examples=30)
@given(made=calls, tag=st.sampled_from(["", "<|python_tag|>"]))
def test_replies_of_calls_are_read_as_they_were_written(made: list[tuple[str, dict[str, object]]], tag: str) -> None:
    objects = [json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False) for name, arguments in made]
    assert whole("llama3", tag + "; ".join(objects)) == expected(made)


CASES: list[tuple[str, str, list[Piece]]] = [
    ("think", "<think>\nSo.\n</think>\n\nYes.", [Reasoning("So."), Content("Yes.")]),
    ("think", "\n<think></think>Yes.", [Content("Yes.")]),
    ("think", "<think>never closed ", [Reasoning("never closed")]),
    ("think", "Yes <think>no</think>", [Content("Yes <think>no</think>")]),
    ("think", "<thin", [Content("<thin")]),
    ("inside", "So.</think>Yes.", [Reasoning("So."), Content("Yes.")]),
    ("inside", "<think>So.</think> Yes.", [Reasoning("So."), Content("Yes.")]),
    ("hermes", "<tool_call>none</tool_call>", [Content("<tool_call>none</tool_call>")]),
    ("hermes", "<tool_call>{'a': 1}", [Content("<tool_call>{'a': 1}")]),
    ("hermes", "a <tool_call", [Content("a <tool_call")]),
    (
        "hermes",
        '<tool_call><tool_call>{"name": "add"}',
        [Content("<tool_call>"), CallBegun("add"), CallArguments("{}")],
    ),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>x',
        [CallBegun("add"), CallArguments('{"a": 1}'), Content("x")],
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "cu', [CallBegun("f"), CallArguments('{"a": "cu')]),
    ("hermes", '<tool_call>{"arguments": "{\\"a\\": 1}", "name": "f"}', [CallBegun("f"), CallArguments('{"a": 1}')]),
    ("llama3", '{"name": "Bob", "age": 3}', [Content('{"name": "Bob", "age": 3}')]),
    ("llama3", '{"name": "unknown", "parameters": {}}', [Content('{"name": "unknown", "parameters": {}}')]),
    ("llama3", "<|python_tag|>print(1)", [Content("<|python_tag|>print(1)")]),
    ("llama3", 'Well: {"name": "add"}', [Content('Well: {"name": "add"}')]),
    ("llama3", '{"name": "add"} Done.', [CallBegun("add"), CallArguments("{}"), Content("Done.")]),
    (
        "think+hermes",
        '<think>I <tool_call></think><tool_call>{"name": "add"}</tool_call>',
        [Reasoning("I <tool_call>"), CallBegun("add"), CallArguments("{}")],
    ),
]


@pytest.mark.parametrize(("name", "text", "pieces"), CASES)
def test_a_text_is_read_like_this(name: str, text: str, pieces: list[Piece]) -> None:
    assert whole(name, text) == pieces


def test_arguments_come_while_they_are_written() -> None:
    reader = READERS["hermes"]()
    assert reader.push('<tool_call>\n{"name": "add", "argu') == []
    assert reader.push('ments": {"a": ') == [CallBegun("add"), CallArguments('{"a": ')]
    assert reader.push("12") == [CallArguments("12")]


@given(text=st.text(alphabet="<a/b>", max_size=9))
def test_what_is_held_is_the_longest_beginning_of_the_tag(text: str) -> None:
    tag = "<a/a>"
    ends = [length for length in range(1, len(tag)) if text.endswith(tag[:length])]
    assert held_length(text, tag) == max(ends, default=0)


TEMPLATES = [
    ("{% if tools %}# Tools ... within <tool_call></tool_call> XML tags{% endif %}", "hermes"),
    (
        '{% if tools %}{"name": function name, "parameters": dictionary of argument name and its value}{% endif %}',
        "llama3",
    ),
    ("{% if tools %}<|python_tag|>{% endif %}", "llama3"),
    # Qwen3-Coder and GLM write something else between Hermes' tags.
    ("{% if tools %}<tool_call>\n<function=name>{% endif %}", None),
    ("{% if tools %}<tool_call>name\n<arg_key>{% endif %}", None),
    ("<tool_call>", None),
    (None, None),
]


@pytest.mark.parametrize(("template", "name"), TEMPLATES)
def test_the_format_is_read_off_the_template(template: str | None, name: str | None) -> None:
    assert format_of("auto", template) == (None if name is None else FORMATS[name])
    assert format_of("none", template) is None
    assert format_of("llama3", template) == FORMATS["llama3"]
