"""The messages of `/v1/stream`, one to a frame: JSON texts or msgpack bytes, by the subprotocol the client asks for.

    client ─submit→ server ─accepted, delta, delta, ..., finished→ client         or, at any point: ─failed→
    client ─ack, cancel, priority, status, ping, goodbye→ server
    client ─resume→ server ─resumed, delta, ..., finished→ client                on another socket, after the first dropped

`id` is the client's own name of a request, unique among the unfinished ones of its socket. Every submit is answered by
exactly one `finished` or `failed`, after which its id is free again.

A request with a `window` numbers its deltas and its last word, and sends no more than so many beyond the last `ack`: so a
client that reads one request slowly holds no other one up. What waits meanwhile comes in fewer, larger deltas. Such a
request may outlive its socket by `resume_grace_s`; its id is then free when its last word is acknowledged, too.
"""

from typing import Annotated, TypeAlias

import msgspec

from triode.actors.messages import FinishReason, RequestStatus
from triode.engine.completion import Usage
from triode.engine.server.errors import ErrorDetail
from triode.ids import TokenId
from triode.models.conversation import Conversation
from triode.models.sampling import SamplingParams
from triode.models.step import TokenLogprobs

Id: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Window: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=256)]
BridgePrompt: TypeAlias = str | list[int | dict[str, object]] | Conversation
Seq: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]


class ClientMessage(msgspec.Struct, frozen=True, tag_field="type", tag=str.lower, forbid_unknown_fields=True):
    """Base of what clients send."""


class Submit(ClientMessage, frozen=True):
    """Begin a request. The fields are the arguments of `Engine.submit`."""

    id: Id
    prompt: BridgePrompt
    """Text, token ids, or chat messages: by themselves, or with the tools and options of their template. Calls come as the
    model writes them, in the text."""
    params: SamplingParams = SamplingParams()
    priority: int = 0
    cache_salt: str | None = None
    deadline_s: float | None = None
    window: Window | None = None
    """Deltas that may be sent and not acknowledged; None sends whatever the socket takes."""
    resume_grace_s: float = 0.0
    """How long the request goes on without a socket, waiting for `resume`; needs a window."""


class Ack(ClientMessage, frozen=True):
    """All deltas up to this one have been read. Ignored for a request that has ended."""

    id: Id
    seq: Seq


class Resume(ClientMessage, frozen=True):
    """Go on with a request whose socket was lost. The key must be the one of its submit."""

    id: Id
    """Its name on this socket."""
    token: str
    seq: Seq
    """The last delta that was read, 0 if none."""


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


class Goodbye(ClientMessage, frozen=True):
    """The client will not come back: when the socket closes, nothing waits to be resumed."""


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
    resume_token: str | None = None
    """Whoever has it and the key may resume the request."""


class Resumed(ServerMessage, frozen=True):
    """The request goes on here, after the delta that the client named."""

    id: str
    request_id: str


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
    seq: int = 0
    """Its number, if the request has a window."""


class Finished(ServerMessage, frozen=True):
    """The request has ended: by itself, at its deadline or by `cancel`, which the finish reasons tell."""

    id: str
    finish_reasons: list[FinishReason | None]
    usage: Usage
    seed: int
    max_tokens: int
    reason: str | None = None
    """Why it was cancelled, if it was."""
    seq: int = 0


class Failed(ServerMessage, frozen=True):
    """The request was refused or failed; or, without an id, a frame was no message that could have begun one."""

    id: str | None
    status: int
    """As HTTP would say it."""
    error: ErrorDetail
    seq: int = 0


class StatusReply(ServerMessage, frozen=True, tag="status"):
    """Where a request is."""

    id: str
    status: RequestStatus | None
    """None if no unfinished request of this socket has the id."""


class Pong(ServerMessage, frozen=True):
    """The answer to `ping`."""


FromClient: TypeAlias = Submit | Resume | Ack | Cancel | Priority | Status | Goodbye | Ping
FromServer: TypeAlias = Accepted | Resumed | StreamDelta | Finished | Failed | StatusReply | Pong
