"""One reply of a chat, in OpenAI's shape: its text becomes deltas, or a message, of content, reasoning and calls."""

import secrets
from collections.abc import Iterable

from msgspec import UNSET

from triode.actors.messages import FinishReason
from triode.engine.server.openai_responses import (
    CalledFunction,
    ChatDelta,
    ChatEnd,
    ChatMessage,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)
from triode.engine.server.replies.pieces import CallArguments, CallBegun, Content, Piece, Reasoning
from triode.engine.server.replies.reader import ReplyReader


class ChatReply:
    """Reads one reply. Without a reader, all of its text is content."""

    def __init__(self, reader: ReplyReader | None) -> None:
        self._reader = reader
        self._num_calls = 0

    def delta(self, text: str, *, is_last: bool) -> ChatDelta:
        """What more text brings."""
        if self._reader is None:
            return ChatDelta(content=text or UNSET)
        pieces = self._reader.push(text)
        return self._delta([*pieces, *self._reader.finish()] if is_last else pieces)

    def end(self, reason: FinishReason) -> ChatEnd:
        """Why it ended, once all of its text has been read."""
        return ChatEnd.TOOL_CALLS if self._num_calls and reason is FinishReason.STOP else ChatEnd(reason.value)

    def message(self, text: str) -> ChatMessage:
        """The whole reply."""
        if self._reader is None:
            return ChatMessage(text)
        pieces = [*self._reader.push(text), *self._reader.finish()]
        calls = called(pieces)
        self._num_calls = len(calls)
        content = texts(pieces, Content)
        reasoning = texts(pieces, Reasoning)
        return ChatMessage(
            content=content or ("" if not calls else None),
            reasoning_content=reasoning or UNSET,
            tool_calls=[ToolCall(id=new_call_id(), function=CalledFunction(*call)) for call in calls] or UNSET,
        )

    def _delta(self, pieces: Iterable[Piece]) -> ChatDelta:
        pieces = list(pieces)
        calls: list[ToolCallDelta] = []
        for piece in pieces:
            if isinstance(piece, CallBegun):
                begun = FunctionDelta(name=piece.name, arguments="")
                calls.append(ToolCallDelta(self._num_calls, id=new_call_id(), type="function", function=begun))
                self._num_calls += 1
            elif isinstance(piece, CallArguments):
                calls.append(ToolCallDelta(self._num_calls - 1, function=FunctionDelta(arguments=piece.text)))
        return ChatDelta(
            content=texts(pieces, Content) or UNSET,
            reasoning_content=texts(pieces, Reasoning) or UNSET,
            tool_calls=calls or UNSET,
        )


def texts(pieces: Iterable[Piece], kind: type[Content] | type[Reasoning]) -> str:
    """The text of all pieces of a kind."""
    return "".join(piece.text for piece in pieces if isinstance(piece, kind))


def called(pieces: Iterable[Piece]) -> list[tuple[str, str]]:
    """Name and arguments of each call."""
    found: list[tuple[str, str]] = []
    for piece in pieces:
        if isinstance(piece, CallBegun):
            found.append((piece.name, ""))
        elif isinstance(piece, CallArguments):
            name, arguments = found[-1]
            found[-1] = (name, arguments + piece.text)
    return found


def new_call_id() -> str:
    """A name for a call, by which the client's answer refers to it."""
    return f"call_{secrets.token_hex(12)}"
