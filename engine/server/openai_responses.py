"""What OpenAI's clients read. Where OpenAI has no field, the names are vLLM's; `seed` is Triode's own."""

import enum
from collections.abc import Mapping

import msgspec
from msgspec import UNSET, UnsetType

from triode.actors.messages import FinishReason
from triode.ids import TokenId


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens, those whose KV entries came from the prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request, all its choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct, frozen=True):
    """One token at one position. `bytes` are its own: half a character has no text."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob, frozen=True, kw_only=True):
    """The token that was taken, beside the most probable ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Token by token."""

    content: list[ChatLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct, frozen=True):
    """The same for text completions, in parallel lists."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    """None for the first token of an echoed prompt."""
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(msgspec.Struct, frozen=True):
    """One token at one position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[Mapping[TokenId, PromptLogprob] | None]
"""By position; the first token has nothing to be predicted from."""


class CalledFunction(msgspec.Struct, frozen=True):
    """What is called with what: arguments are JSON text, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """One call."""

    id: str
    type: str = "function"
    function: CalledFunction


class ChatMessage(msgspec.Struct, frozen=True):
    """The reply."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    """What came before the answer, if the model reasons."""
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatEnd(enum.StrEnum):
    """Why a reply ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    """A stop after calls."""
    CANCELLED = "cancelled"
    ERROR = "error"


class ChatChoice(msgspec.Struct, frozen=True):
    """One sample."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnd | None
    stop_reason: str | int | None
    seed: int
    """Asked for again, with everything else equal, it draws the same reply."""


class TextChoice(msgspec.Struct, frozen=True):
    """One sample, whole or the part of it that one chunk brings."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    seed: int | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class FunctionDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one chunk adds to a call: its name comes first and whole."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one chunk adds to the calls; the first of a call has its id."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one chunk adds to the reply."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """What one chunk adds to one sample."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatEnd | None = None
    stop_reason: str | int | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What all answers and chunks begin with."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(Answer, frozen=True, kw_only=True):
    """A whole answer."""

    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatChunk(Answer, frozen=True, kw_only=True):
    """A part of a streamed answer; the last one has the usage and no choices."""

    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class TextCompletion(Answer, frozen=True, kw_only=True):
    """A whole answer to one or several prompts."""

    choices: list[TextChoice]
    usage: Usage


class TextChunk(Answer, frozen=True, kw_only=True):
    """A part of a streamed answer."""

    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """One vector: its numbers, or base64 of them as little-endian float32."""

    object: str = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct, frozen=True):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to /v1/embeddings."""

    object: str = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """What is served."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "triode"
    root: str
    """What was loaded."""
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/models."""

    object: str = "list"
    data: list[Model]


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(msgspec.Struct, frozen=True):
    """The answer to /detokenize."""

    prompt: str
