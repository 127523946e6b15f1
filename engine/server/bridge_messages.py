"""The messages of `/v1/stream`, one to a frame: JSON texts or msgpack bytes, by the subprotocol the client asks for.

    client ─submit→ server ─accepted, delta, delta, ..., finished→ client         or, at any point: ─failed→
    client ─cancel, priority, status, ping→ server

`id` is the client's own name of a request, unique among the unfinished ones of its socket. Every submit is answered by
exactly one `finished` or `failed`, after which its id is free again.
"""

from typing import Annotated, TypeAlias

import msgspec

from triode.actors.messages import FinishReason, RequestStatus
from triode.engine.completion import Usage
from triode.engine.server.errors import ErrorDetail
from triode.ids import TokenId
from triode.models.sampling import SamplingParams
from triode.models.step import TokenLogprobs

Id: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class ClientMessage(msgspec.Struct, frozen=True, tag_field="type", tag=str.lower, forbid_unknown_fields=True):
    """Base of what clients send."""


class Submit(ClientMessage, frozen=True):
    """Begin a request. The fields are the arguments of `Engine.submit`."""

    id: Id
    prompt: str | list[int | dict[str, object]]
    """Text, token ids, or chat messages."""
    params: SamplingParams = SamplingParams()
    priority: int = 0
    cache_salt: str | None = None
    deadline_s: float | None = None


class Cancel(ClientMessage, frozen=True):
    """End a request; it answers with `finished`. One that has ended is left alone."""

    id: Id


class Priority(ClientMessage, frozen=True):
    """Move a request in the order of service; lower goes first. Answered by `status`."""

    id: Id
    priority: int


class Status(ClientMessage, frozen=True):
    """Ask where a request is."""

    id: Id


class Ping(ClientMessage, frozen=True):
    """Ask for a `pong`."""


class ServerMessage(msgspec.Struct, frozen=True, tag_field="type", tag=str.lower, omit_defaults=True):
    """Base of what the server sends."""


class Accepted(ServerMessage, frozen=True):
    """The request is valid and queued."""

    id: str
    request_id: str
    """The engine's name of it."""
    prompt_tokens: int
    seed: int


class SampleDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was added to one sample."""

    index: int
    text: str
    token_ids: tuple[TokenId, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class StreamDelta(ServerMessage, frozen=True, tag="delta"):
    """What was added since the last delta: by one step, or by several if the socket is slow."""

    id: str
    samples: list[SampleDelta]


class Finished(ServerMessage, frozen=True):
    """The request has ended: by itself, at its deadline or by `cancel`, which the finish reasons tell."""

    id: str
    finish_reasons: list[FinishReason | None]
    usage: Usage
    seed: int
    max_tokens: int
    reason: str | None = None
    """Why it was cancelled, if it was."""


class Failed(ServerMessage, frozen=True):
    """The request was refused or failed; or, without an id, a frame was no message."""

    id: str | None
    status: int
    """As HTTP would say it."""
    error: ErrorDetail


class StatusReply(ServerMessage, frozen=True, tag="status"):
    """Where a request is."""

    id: str
    status: RequestStatus | None
    """None if no unfinished request of this socket has the id."""


class Pong(ServerMessage, frozen=True):
    """The answer to `ping`."""


FromClient: TypeAlias = Submit | Cancel | Priority | Status | Ping
FromServer: TypeAlias = Accepted | StreamDelta | Finished | Failed | StatusReply | Pong
