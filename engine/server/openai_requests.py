"""What OpenAI's clients send. A field that is not listed here is refused by name; null is the same as leaving it out.

Fields named like those of `SamplingParams` mean what they mean there. The others are OpenAI's, or vLLM's where OpenAI
has none.
"""

from typing import Annotated, Literal

import msgspec

from triode.engine.server.tools.requests import Tool, ToolChoice

TokenIds = list[int]
Count = Annotated[int, msgspec.Meta(ge=0)]


Unused = Annotated[object, msgspec.Meta(description="Accepted; changes nothing.")]


class Ignored(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that are accepted and change nothing: they are about accounts, billing and storage elsewhere."""

    user: Unused = None
    metadata: Unused = None
    store: Unused = None
    service_tier: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    """Prompts are cached by their tokens; `cache_salt` keeps callers apart."""
    prompt_cache_retention: Unused = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """How a stream ends."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted; no padding is sent."""


class SchemaFormat(msgspec.Struct, forbid_unknown_fields=True):
    """A JSON schema, in OpenAI's wrapping."""

    name: str
    schema: dict[str, object] = {}
    """Every reply validates, whatever `strict` says."""
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """What the reply is: plain text, a JSON object, or JSON that validates against a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's wider form of `response_format`. Exactly one field must be given."""

    json: dict[str, object] | str | None = None
    """A JSON schema, or its text."""
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    """In Lark's notation."""
    json_object: bool | None = None


class SampledRequest(Ignored, kw_only=True):
    """What all requests have in common that generate."""

    model: str | None = None
    stream: bool | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    """-1 is vLLM's way to say 0: keep all."""
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = None
    """Lower goes first."""
    cache_salt: str | None = None
    deadline_s: float | None = None
    """Cancels the request when so many seconds have passed."""
    structured_outputs: StructuredOutputs | None = None


class GenerationRequest(SampledRequest, kw_only=True):
    """What chat and text completions have in common."""

    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    prompt_logprobs: int | None = None
    n: int | None = None
    response_format: ResponseFormat | None = None


class ChatRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, object]], msgspec.Meta(min_length=1)]
    max_completion_tokens: int | None = None
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    modalities: list[Literal["text"]] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    """False holds the model to one call a reply."""
    chat_template_kwargs: dict[str, object] | None = None
    """Variables of the model's chat template, as `{"enable_thinking": false}`."""


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | TokenIds]
    logprobs: Count | None = None
    best_of: int | None = None
    """Only the value of `n`: the best of more is not chosen here."""
    echo: bool | None = None
    """Repeat the prompt before the output; then `max_tokens` may be 0."""
    suffix: str | None = None


class EmbeddingRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/embeddings."""

    input: str | list[str | int | TokenIds]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    """base64 is of little-endian float32 numbers."""
    dimensions: int | None = None
    """Only the model's own number: a part of its vectors means nothing by itself."""
    pooling: Literal["mean", "last"] | None = None
    """Of the final hidden states: their mean by default, or the last one."""
    normalize: bool = True
    """As OpenAI's, vectors have length 1; false leaves them as the model gives them."""
    user: Unused = None


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, object]] | None = None
    add_special_tokens: bool | None = None
    """By default as the engine encodes them: with a prompt yes, with messages no, whose template has its own."""
    tools: list[Tool] | None = None
    """As in a chat, of whose prompt they are a part."""
    chat_template_kwargs: dict[str, object] | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]
