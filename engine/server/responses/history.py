"""From the items of /v1/responses to the chat messages of a template.

What an assistant said in one turn (reasoning, text, calls) is several items and one message.
"""

from collections.abc import Mapping, Sequence
from typing import TypeGuard

from triode.engine.server.errors import RequestError

ItemDict = Mapping[str, object]
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal")


def input_items(given: str | Sequence[ItemDict] | None) -> tuple[dict[str, object], ...]:
    """The input as items."""
    if isinstance(given, str):
        return ({"type": "message", "role": "user", "content": given},)
    return tuple(map(dict, given or ()))


def shown_items(items: Sequence[ItemDict]) -> tuple[dict[str, object], ...]:
    """The same as OpenAI shows them: with ids, types and parts."""
    return tuple({"id": f"item_{index}", "type": "message", **_in_parts(item)} for index, item in enumerate(items))


def _in_parts(item: ItemDict) -> dict[str, object]:
    content = item.get("content")
    if not isinstance(content, str):
        return dict(item)
    kind = "output_text" if item.get("role") == "assistant" else "input_text"
    return {**item, "content": [{"type": kind, "text": content}]}


def to_messages(items: Sequence[ItemDict], instructions: str | None) -> tuple[dict[str, object], ...]:
    """The conversation.

    Raises:
        RequestError: 400 if there is none, or an item cannot be a part of it.
    """
    messages: list[dict[str, object]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    turn = _Turn(messages)
    for index, item in enumerate(items):
        _add(turn, f"input[{index}]", item)
    turn.end()
    if not messages:
        raise _refused("input must be a text or have items, without previous_response_id and instructions")
    return tuple(messages)


class _Turn:
    """What the assistant says, until somebody else speaks."""

    def __init__(self, messages: list[dict[str, object]]) -> None:
        self._messages = messages
        self._said: dict[str, object] = {}
        self._calls: list[dict[str, object]] = []

    def say(self, key: str, text: str) -> None:
        # A second text, or reasoning after the text, belongs to another turn.
        if key in self._said or self._calls or "content" in self._said:
            self.end()
        self._said[key] = text

    def call(self, call: dict[str, object]) -> None:
        self._calls.append(call)

    def end(self) -> None:
        if self._said or self._calls:
            content = self._said.get("content", None if self._calls else "")
            message = {"role": "assistant", **self._said, "content": content}
            self._messages.append(message | ({"tool_calls": self._calls} if self._calls else {}))
        self._said, self._calls = {}, []

    def other(self, message: dict[str, object]) -> None:
        self.end()
        self._messages.append(message)


def _add(turn: _Turn, name: str, item: ItemDict) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if role == "assistant":
            turn.say("content", _text(f"{name}.content", item.get("content")))
        else:
            # The template's rules about roles and contents hold.
            turn.other({"role": role, "content": _plain_parts(item.get("content"))})
    elif kind == "reasoning":
        turn.say("reasoning_content", _text(f"{name}.content", item.get("content") or item.get("summary") or ""))
    elif kind == "function_call":
        function = {key: _string(f"{name}.{key}", item.get(key)) for key in ("name", "arguments")}
        turn.call({"id": _string(f"{name}.call_id", item.get("call_id")), "type": "function", "function": function})
    elif kind == "function_call_output":
        call_id, output = _string(f"{name}.call_id", item.get("call_id")), _text(f"{name}.output", item.get("output"))
        turn.other({"role": "tool", "tool_call_id": call_id, "content": output})
    else:
        kinds = "message, reasoning, function_call, function_call_output"
        raise _refused(f"{name}.type must be one of {kinds}, got {kind!r}")


def _plain_parts(content: object) -> object:
    """Parts as chat messages have them, where all text is of the type "text"."""
    if not _is_list(content):
        return content
    return [
        {**part, "type": "text"} if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS else part
        for part in content
    ]


def _text(name: str, content: object) -> str:
    if isinstance(content, str):
        return content
    if not _is_list(content):
        raise _refused(f"{name} must be text or a list of parts, got {content!r:.100}")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or kind not in _TEXT_PARTS:
            raise _refused(f"{name}[{index}].type must be one of {', '.join(_TEXT_PARTS)}, got {kind!r:.100}")
        key = "refusal" if kind == "refusal" else "text"
        texts.append(_string(f"{name}[{index}].{key}", part.get(key)))
    return "".join(texts)


def _string(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _refused(f"{name} must be a string, got {value!r:.100}")
    return value


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, (list, tuple))


def _refused(message: str) -> RequestError:
    return RequestError(400, message, param="input")
