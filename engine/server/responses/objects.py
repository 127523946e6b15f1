"""What clients of /v1/responses read: the response and the items of its output."""

from typing import Literal

import msgspec

from triode.engine.server.errors import ErrorDetail
from triode.engine.server.openai_responses import ChatLogprob

Json = dict[str, object]
Status = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, frozen=True, tag_field="type", tag="output_text"):
    """Text of a message."""

    text: str
    annotations: tuple[str, ...] = ()
    logprobs: tuple[ChatLogprob, ...] = ()
    """If they were asked for by `include`."""


class ReasoningText(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    """Text of the reasoning."""

    text: str


class MessageItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """What the model answers."""

    id: str
    status: ItemStatus = "in_progress"
    role: Literal["assistant"] = "assistant"
    content: tuple[OutputText, ...] = ()


class ReasoningItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    """What it thinks before."""

    id: str
    status: ItemStatus = "in_progress"
    summary: tuple[str, ...] = ()
    content: tuple[ReasoningText, ...] = ()


class CallItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    """What it calls; the answer is an item `function_call_output` with the same `call_id`."""

    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: ItemStatus = "in_progress"


Item = MessageItem | ReasoningItem | CallItem
Part = OutputText | ReasoningText


class InputDetails(msgspec.Struct, frozen=True):
    """Of the input's tokens, those that came from the prefix cache, and the others, which went into it."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(msgspec.Struct, frozen=True):
    """Of the output's tokens, those of the reasoning: as many as the tokenizer makes of its text."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True):
    """Tokens of one response."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why a response is cut."""

    reason: Literal["max_output_tokens"]


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """A response, while it is made and after. Fields that OpenAI has and Triode does not are null."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status = "in_progress"
    error: ErrorDetail | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    instructions: str | None
    previous_response_id: str | None
    output: tuple[Item, ...] = ()
    tools: tuple[Json, ...]
    tool_choice: str | dict[str, str]
    parallel_tool_calls: bool
    text: dict[str, Json]
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    max_output_tokens: int | None
    metadata: dict[str, str]
    store: bool
    usage: ResponseUsage | None = None
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    top_logprobs: int = 0
    service_tier: Literal["default"] = "default"
    reasoning: None = None
    max_tool_calls: None = None
    user: None = None
    safety_identifier: None = None
    prompt_cache_key: None = None


class DeletedResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a DELETE."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputItems(msgspec.Struct, frozen=True, kw_only=True):
    """What a response was an answer to, the items of the responses before it included."""

    object: Literal["list"] = "list"
    data: tuple[Json, ...]
    first_id: str | None
    last_id: str | None
    has_more: Literal[False] = False
