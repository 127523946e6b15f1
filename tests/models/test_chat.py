from collections.abc import Sequence
from typing import Any

import pytest

from triode.models.chat import ChatTemplate, Message, normalize

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = {"role": "user", "content": "hi"}


def render(source: str, messages: Sequence[Message] = (USER,), **special_tokens: str) -> str:
    return ChatTemplate(source, special_tokens).render(messages, add_generation_prompt=True)


def test_a_template_renders_roles_and_contents() -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, messages) == text


def test_the_generation_prompt_is_optional() -> None:
    text = ChatTemplate(CHATML, {}).render([USER], add_generation_prompt=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert normalize([{"role": "user", "content": parts}]) == [{"role": "user", "content": "ab"}]


def test_special_tokens_have_their_names_in_templates() -> None:
    assert render("{{ bos_token }}{{ messages[0].content }}", bos_token="<s>") == "<s>hi"


def test_blocks_leave_no_blank_lines_and_loops_can_be_left() -> None:
    source = "{% for message in messages %}\n    {% if loop.index > 1 %}\n{% break %}\n    {% endif %}\nx\n{% endfor %}"
    assert render(source, [USER, USER]) == "x\n"


def test_tojson_escapes_no_html_and_no_unicode() -> None:
    assert render("{{ {'a': '<b>', 'c': 'é'} | tojson }}") == '{"a": "<b>", "c": "é"}'
    assert render("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"


def test_a_generation_block_renders_what_is_inside() -> None:
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "hi!"


def test_the_date_is_available() -> None:
    assert render("{{ strftime_now('%Y') | length }}") == "4"


def test_optional_inputs_are_none() -> None:
    assert render("{{ tools is none and documents is none }}") == "True"


def test_a_template_that_refuses_says_why() -> None:
    with pytest.raises(ValueError, match="refuses these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source", ["{{ messages[7].content }}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ nothing.more }}"]
)
def test_a_template_that_fails_is_a_value_error(source: str) -> None:
    with pytest.raises(ValueError, match="chat template refuses these messages"):
        render(source)


def test_a_template_with_wrong_syntax_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="chat template is not valid"):
        ChatTemplate("{% for x in %}", {})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ strftime_now.__globals__['os'] }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(ValueError, match="chat template refuses these messages"):
        render(source)


def test_an_assistant_message_may_have_tool_calls_instead_of_text() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert normalize([message]) == [message]


def test_arguments_of_calls_become_objects_which_templates_write_as_json() -> None:
    source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    for arguments in ('{"a": 1}', {"a": 1}):
        call = {"function": {"name": "add", "arguments": arguments}}
        assert render(source, [{"role": "assistant", "tool_calls": [call]}]) == '{"a": 1}'
    assert render(source, [{"role": "assistant", "tool_calls": [{"function": {"name": "now"}}]}]) == "{}"


def test_a_template_gets_the_tools_and_its_own_options() -> None:
    template = ChatTemplate("{{ tools[0].function.name }} {{ enable_thinking }} {{ bos_token }}", {"bos_token": "<s>"})
    tools = [{"type": "function", "function": {"name": "add"}}]
    options = {"enable_thinking": False}
    assert template.render([USER], add_generation_prompt=True, tools=tools, options=options) == "add False <s>"
    with pytest.raises(
        ValueError, match="options must not name bos_token, tools, which the template has from elsewhere"
    ):
        template.render([USER], add_generation_prompt=True, options={"tools": [], "bos_token": ""})


def called(calls: object) -> dict[str, object]:
    return {"role": "assistant", "tool_calls": calls}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"messages must be a non-empty list of messages, got \[\]"),
        ("hi", "messages must be a non-empty list of messages, got 'hi'"),
        (USER, "messages must be a non-empty list of messages"),
        (["hi"], r"messages\[0\] must be a mapping with role and content, got 'hi'"),
        ([{"content": "x"}], r"messages\[0\].role must be one of system, .*, got None"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\].role must be one of .*, got 'robot'"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\].role must be one of"),
        ([USER, {"role": "user"}], r"messages\[1\].content must be text, got None"),
        ([{"role": "user", "content": 7}], r"messages\[0\].content must be text or a list of parts, got 7"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\] must be a part with a type, got 'x'"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            r"messages\[0\].content\[0\].type must be text, got 'image_url': other parts are not supported yet",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"content\[0\].text must be a string, got 1"),
        ([called(7)], r"messages\[0\].tool_calls must be a list of calls, got 7"),
        ([called([{}])], r"tool_calls\[0\] must be a call with function.name, got {}"),
        ([called([{"function": {"name": "f", "arguments": "{"}}])], r"tool_calls\[0\].function.arguments must be JSON"),
        ([called([{"function": {"name": "f", "arguments": "1"}}])], r"arguments must be a JSON object, got 1"),
    ],
)
def test_a_malformed_message_is_refused_by_its_place(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize(messages)
