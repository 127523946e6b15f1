"""What clients of /v1/responses send. As everywhere, a field that is not listed is refused by name."""

from typing import Annotated, Literal

import msgspec

from triode.engine.server.openai_requests import Count, SampledRequest, SchemaFormat, StreamOptions, Unused
from triode.engine.server.tools.requests import Name


class ResponseTool(msgspec.Struct, forbid_unknown_fields=True):
    """A function that the model may call; OpenAI's own tools do not exist here."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None
    """Whether the arguments of every call must validate; null does not ask for it."""


class NamedChoice(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """Call this function."""

    name: str


class AllowedChoice(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"):
    """Call one of these functions, or with mode "auto" answer; the model is shown no others."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], msgspec.Meta(min_length=1)]


class TextFormat(SchemaFormat, kw_only=True):
    """What the answer is: plain text, a JSON object, or JSON that validates against a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = "answer"


class TextConfig(msgspec.Struct, forbid_unknown_fields=True):
    """How the answer is written."""

    format: TextFormat | None = None
    verbosity: Unused = None


class ResponseRequest(SampledRequest, kw_only=True):
    """POST /v1/responses, and `response.create` on its WebSocket."""

    input: str | list[dict[str, object]] | None = None
    """A user's text, or items: messages, function calls, their outputs, reasoning."""
    instructions: str | None = None
    """A system message before everything else; not carried over by `previous_response_id`."""
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    store: bool | None = None
    """Whether the response can be fetched and continued later; true by default."""
    metadata: Annotated[dict[str, str], msgspec.Meta(max_length=16)] | None = None
    """Comes back with the response."""
    stream_options: StreamOptions | None = None
    chat_template_kwargs: dict[str, object] | None = None
    background: bool | None = None
    """Only false: a response is made while its client waits."""
    truncation: Literal["disabled"] | None = None
    """Nothing is left out of an input that is too long: it is refused."""
    top_logprobs: Count | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    """Logprobs of the answer's tokens, where neither reasoning nor tools share the output with it. Encrypted content is
    accepted, because clients ask for it unasked; reasoning comes as text."""
    reasoning: Unused = None
    """Accepted; changes nothing. `chat_template_kwargs` may, as {"enable_thinking": false}."""
    max_tool_calls: int | None = None
    """Accepted; it limits tools that do not exist here."""


class Create(ResponseRequest, kw_only=True, tag_field="type", tag="response.create"):
    """A client's message on the WebSocket: begin a response."""

    stream_id: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] | None = None
    """Responses of different streams run side by side, those of one stream in turn."""
    generate: bool = True
    """False only keeps the input, to be continued by `previous_response_id`."""


class Cancel(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="response.cancel"):
    """A client's message on the WebSocket: end a response, or without an id all that run. Triode's own."""

    response_id: str | None = None


FromClient = Create | Cancel
