"""Every message of the engine, in pipeline order, and the inbox of each actor.

    caller ─Submit→ tokenizer ─Tokenized→ scheduler ⇄ cache      (Match/Matched at admission, Reserve/Reserved each step)
    scheduler ─StepPlan→ executor ─StepResult→ scheduler ─Sampled→ detokenizer ─→ the request's mailbox
    detokenizer ─Stopped→ scheduler                              (a stop string is visible only in text)

Messages are frozen, hold ids, numbers, text and tuples only, and travel by reference inside a process. Anything that
happens once a step is one struct of parallel tuples, never one message per token. StepPlan and StepResult are the
runner's own vocabulary and are defined in `triode.models.step`; Match to Clear are the cache's, in
`triode.cache.messages`.
"""

import enum
from typing import TypeAlias

import msgspec

from triode.cache.messages import Clear, Launched, Match, Matched, Pin, Pinned, Release, Reserve, Reserved, Unpin
from triode.ids import RequestId, SequenceId, StepId, TokenId
from triode.models.conversation import Conversation
from triode.models.guide import Guide
from triode.models.sampling import SamplingParams
from triode.models.step import Pooling, StepPlan, StepResult, TokenLogprobs


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of every message: immutable, self-describing, made of plain values."""


class FinishReason(enum.StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class RequestStatus(enum.StrEnum):
    """Where a request is. With several samples, the least advanced unfinished one decides."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen to the request."""
        return self in _FINAL_STATUSES


_FINAL_STATUSES = frozenset({RequestStatus.FINISHED, RequestStatus.CANCELLED, RequestStatus.FAILED})


# ─ caller → tokenizer


class Submit(Message, frozen=True):
    """A new request, unchecked but for its SamplingParams."""

    request_id: RequestId
    arrival: int
    """Counts the engine's submits: requests of equal priority are admitted in this order."""
    prompt: str | tuple[TokenId, ...] | Conversation
    params: SamplingParams
    seed: int
    """`params.seed`, or the one drawn at submit."""
    priority: int = 0
    """Lower goes first."""
    cache_salt: str | None = None
    deadline_at_s: float | None = None
    """On the engine's clock; the request is cancelled when it passes."""
    pooling: Pooling | None = None
    """Of an embedding request: it returns the pooled hidden state of the prompt and generates nothing."""


# ─ tokenizer → scheduler: every Submit is answered exactly once, by one of these (Rejected goes on to the detokenizer)


class Tokenized(Message, frozen=True):
    """A request ready to be queued. `params.max_tokens` is resolved: never None."""

    request_id: RequestId
    arrival: int
    token_ids: tuple[TokenId, ...]
    packed_ids: bytes
    """The same (`pack_tokens`): packed once, for the cache and the runner."""
    params: SamplingParams
    seed: int
    stop_token_ids: tuple[TokenId, ...]
    """Without the model's end-of-sequence tokens when `ignore_eos`; what ends the output, not what is masked."""
    bad_word_ids: tuple[tuple[TokenId, ...], ...] = ()
    priority: int = 0
    cache_salt: str | None = None
    deadline_at_s: float | None = None
    pooling: Pooling | None = None


class Rejected(Message, frozen=True):
    """A request that cannot run as asked; `submit` raises ValueError(reason)."""

    request_id: RequestId
    arrival: int
    reason: str
    is_busy: bool = False
    """Not as it stands, but now: `submit` raises EngineBusy(reason)."""


# ─ caller → scheduler, and tokenizer


class Cancel(Message, frozen=True):
    """Synchronous and idempotent at the caller; a request that has ended is left alone."""

    request_id: RequestId
    arrival: int
    """Tells a request that is still being tokenized (it leaves a tombstone) from one that has ended."""


class SetPriority(Message, frozen=True):
    """Lower goes first; takes effect at the next plan."""

    request_id: RequestId
    arrival: int
    """As in Cancel: a request that is still being tokenized is told from one that has ended."""
    priority: int


# ─ scheduler → detokenizer


class Opened(Message, frozen=True):
    """The request is valid and queued: `submit` returns."""

    request_id: RequestId
    num_prompt_tokens: int
    seed: int
    params: SamplingParams
    prompt_token_ids: tuple[TokenId, ...]
    """The prompt, for `prompt_logprobs` and the incremental decoder's context."""


class Sampled(Message, frozen=True):
    """The new tokens of one step. The row fields are parallel; a request has one row per sample in the step."""

    step_id: StepId
    request_ids: tuple[RequestId, ...]
    sample_indices: tuple[int, ...]
    token_ids: tuple[TokenId, ...]
    finish_reasons: tuple[FinishReason | None, ...]
    """Set on a sequence's last token: STOP for a stop token, LENGTH at max_tokens."""
    logprobs: tuple[TokenLogprobs | None, ...] | None = None


class PromptScored(Message, frozen=True):
    """prompt_logprobs of consecutive prompt positions of one request."""

    request_id: RequestId
    logprobs: tuple[TokenLogprobs, ...]


class Embedded(Message, frozen=True):
    """The pooled hidden state of one embedding request, which ends with it."""

    request_id: RequestId
    embedding: tuple[float, ...]


class StatusChanged(Message, frozen=True):
    """Requests whose status changed, in parallel tuples; `num_cached_tokens` is what their prefix match found."""

    request_ids: tuple[RequestId, ...]
    statuses: tuple[RequestStatus, ...]
    num_cached_tokens: tuple[int, ...]


class Ended(Message, frozen=True):
    """A request ended other than by its own tokens: cancelled, past its deadline or failed."""

    request_id: RequestId
    status: RequestStatus
    reason: str
    is_unsatisfiable: bool = False
    """Whether it failed because it asks for what cannot be had."""


# ─ the request's transcripts (`actors/transcript.py`) → caller


class Delta(Message, frozen=True, gc=False):
    """What has been added to one sample: text that is safe to show, and the tokens it was read from.

    How the output is cut into deltas is not defined, only their concatenation. Text may lag behind the tokens: half a
    character, or what might become a stop string, is held back.
    """

    request_id: RequestId
    index: int
    """Which of the request's `n` samples."""
    text: str
    token_ids: tuple[TokenId, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """Parallel to `token_ids` when the request asked for logprobs."""
    finish_reason: FinishReason | None = None
    """Set on the sample's last delta."""
    stop_reason: str | int | None = None
    """The stop string or stop token that ended the sample."""


# ─ scheduler → executor, beside StepPlan


class ReleaseGuide(Message, frozen=True):
    """A request whose guide was checked has ended, and every step with it: no plan will admit it again."""

    guide: Guide


# ─ detokenizer → scheduler


class Stopped(Message, frozen=True):
    """The text of a sequence that has stop strings is settled: it ends with its `num_tokens`-th generated token.

    Sent when a stop string is found, and otherwise when the sequence's last token has been read, so that the scheduler
    knows that no token beyond a stop is among those it gives to the prefix cache.
    """

    request_id: RequestId
    sample_index: int
    num_tokens: int


# ─ inboxes: one per actor

TokenizerInbox: TypeAlias = Submit | Cancel
SchedulerInbox: TypeAlias = Tokenized | Rejected | Cancel | SetPriority | Matched | Reserved | StepResult | Stopped
CacheInbox: TypeAlias = Match | Reserve | Launched | Release | Pin | Unpin | Clear
ExecutorInbox: TypeAlias = StepPlan | ReleaseGuide
DetokenizerInbox: TypeAlias = Opened | Rejected | Sampled | PromptScored | Embedded | StatusChanged | Ended

Mail: TypeAlias = Opened | Rejected | PromptScored | Embedded | Ended
"""What a request's mailbox receives, beside what its samples say."""

__all__ = [
    "CacheInbox",
    "Cancel",
    "Clear",
    "Delta",
    "DetokenizerInbox",
    "Embedded",
    "Ended",
    "ExecutorInbox",
    "FinishReason",
    "Launched",
    "Mail",
    "Match",
    "Matched",
    "Message",
    "Opened",
    "Pin",
    "Pinned",
    "PromptScored",
    "Rejected",
    "Release",
    "ReleaseGuide",
    "RequestId",
    "RequestStatus",
    "Reserve",
    "Reserved",
    "Sampled",
    "SchedulerInbox",
    "SequenceId",
    "SetPriority",
    "StatusChanged",
    "StepPlan",
    "StepResult",
    "Stopped",
    "Submit",
    "Tokenized",
    "TokenizerInbox",
    "Unpin",
]
