"""Chat messages to a prompt, by the template that the model's files carry.

A template is a program from a stranger: it runs in jinja2's immutable sandbox, with the settings, filters and globals of
transformers' `apply_chat_template`, for which templates are written.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn, TypeGuard

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

if TYPE_CHECKING:
    from jinja2.parser import Parser

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = Mapping[str, object]


class ChatTemplate:
    """A compiled template and the special tokens it may name.

    Raises:
        ValueError: the template's syntax is wrong.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template is not valid: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Message] = (),
        options: Mapping[str, object] = MappingProxyType({}),
    ) -> str:
        """The prompt for `messages`, in OpenAI's shape, as `tools` are; `options` are the template's own variables.

        Raises:
            ValueError: a message is malformed, an option has a name of ours, or the template refuses the conversation.
        """
        values: dict[str, object] = {
            "messages": normalize(messages),
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
        }
        if taken := sorted(values.keys() & options.keys()):
            raise ValueError(f"options must not name {', '.join(taken)}, which the template has from elsewhere")
        values |= options
        try:
            return self._template.render(values)
        # A template's program can fail in any way, and then these messages do not suit it.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error


def normalize(messages: Sequence[Message]) -> list[dict[str, object]]:
    """Checked copies of the messages, with the text parts of each content joined.

    Raises:
        ValueError: a message has no known role, or a content that is not text.
    """
    if not _is_list(messages) or not messages:
        raise ValueError(f"messages must be a non-empty list of messages, got {messages!r}")
    return [_normalize_message(index, message) for index, message in enumerate(messages)]


def _normalize_message(index: int, message: Message) -> dict[str, object]:
    name = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} must be a mapping with role and content, got {message!r}")
    if message.get("role") not in ROLES:
        raise ValueError(f"{name}.role must be one of {', '.join(ROLES)}, got {message.get('role')!r}")
    checked = dict(message)
    if calls := message.get("tool_calls"):
        checked["tool_calls"] = _calls(f"{name}.tool_calls", calls)
    if (content := message.get("content")) is None:
        if message["role"] == "assistant" and calls:
            return checked
        raise ValueError(f"{name}.content must be text, got None")
    return {**checked, "content": _text(f"{name}.content", content)}


def _calls(name: str, calls: object) -> list[dict[str, object]]:
    """Calls with their arguments as templates want them: an object, where OpenAI's shape has its JSON text."""
    if not _is_list(calls):
        raise ValueError(f"{name} must be a list of calls, got {calls!r}")
    return [_call(f"{name}[{index}]", call) for index, call in enumerate(calls)]


def _call(name: str, call: object) -> dict[str, object]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{name} must be a call with function.name, got {call!r}")
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise ValueError(f"{name}.function.arguments must be JSON, got {arguments!r}") from None
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{name}.function.arguments must be a JSON object, got {arguments!r}")
    return {**call, "function": {**function, "arguments": arguments}}


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _text(name: str, content: object) -> str:
    if isinstance(content, str):
        return content
    if not _is_list(content):
        raise ValueError(f"{name} must be text or a list of parts, got {content!r}")
    return "".join(_part(f"{name}[{index}]", part) for index, part in enumerate(content))


def _part(name: str, part: object) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        raise ValueError(f"{name} must be a part with a type, got {part!r}")
    if kind != "text":
        raise ValueError(f"{name}.type must be text, got {kind!r}: other parts are not supported yet")
    if not isinstance(text := part.get("text"), str):
        raise ValueError(f"{name}.text must be a string, got {text!r}")
    return text


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's tokens for training; rendering only needs what is inside."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it without ClassVar

    def parse(self, parser: "Parser") -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which prompts are not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
