"""Items of /v1/responses as chat messages."""

from typing import Any

import pytest

from triode.engine.server.errors import RequestError
from triode.engine.server.responses.history import input_items, to_messages

CALL = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "now", "arguments": "{}", "status": "completed"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "noon"}
CALLED = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}


def said(text: str) -> dict[str, Any]:
    return {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": text, "annotations": []}],
    }


def thought(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def test_a_text_is_what_the_user_says() -> None:
    assert to_messages(input_items("Hi"), "Be brief.") == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    )


def test_one_turn_of_the_assistant_is_one_message() -> None:
    items = [{"role": "user", "content": "Time?"}, thought("Ask."), said("I look."), CALL, OUTPUT, said("Noon.")]
    assert to_messages(items, None) == (
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "reasoning_content": "Ask.", "content": "I look.", "tool_calls": [CALLED]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        {"role": "assistant", "content": "Noon."},
    )


def test_calls_alone_have_no_text_and_two_texts_are_two_messages() -> None:
    assert to_messages([CALL], None) == ({"role": "assistant", "content": None, "tool_calls": [CALLED]},)
    assert to_messages([said("a"), said("b")], None) == (
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b"},
    )
    assert to_messages([thought("a")], None) == ({"role": "assistant", "reasoning_content": "a", "content": ""},)


def test_parts_are_text_or_what_the_template_makes_of_them() -> None:
    image = {"type": "input_image", "image_url": "data:"}
    parts = [{"type": "input_text", "text": "What is it?"}, image]
    (message,) = to_messages([{"role": "user", "content": parts}], None)
    assert message["content"] == [{"type": "text", "text": "What is it?"}, image]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "input must be a text or have items"),
        ([{"type": "item_reference", "id": "x"}], r"input[0].type must be one of message, reasoning"),
        ([{"type": "function_call", "name": "f"}], "input[0].arguments must be a string, got None"),
        ([{"type": "function_call_output", "call_id": "c"}], "input[0].output must be text or a list of parts"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "input[0].content[0].type must be one of input_text"),
        ([{"role": "assistant", "content": [7]}], "input[0].content[0].type must be one of"),
    ],
)
def test_what_is_no_item_is_refused_by_its_place(items: list[Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        to_messages(items, None)
    assert str(caught.value).startswith(message)
    assert caught.value.detail.param == "input"
