"""Requests and their sequences: where each one is, and which ways lead on.

A request has `n` sequences, one per sample. A sequence counts its tokens in three ways:

    token_ids       |prompt............|generated, read by the host|
    num_pending                                                    |sampled by launched steps, not yet read|
    num_computed    |..KV entries written by launched steps........................................|

`num_total - num_computed` tokens are ready to compute: the rest of the prompt, or the token sampled last and those that a
guide has forced behind it. Preempting drops the unread tokens: sampling is a pure function of the position, so
recomputing gives the same ones again.
"""

from dataclasses import dataclass, field

from triode.actors.messages import FinishReason, RequestStatus, Tokenized
from triode.ids import TOKEN_BYTES, RequestId, SequenceId, SlotId, TokenId, pack_tokens

TRANSITIONS: dict[RequestStatus, frozenset[RequestStatus]] = {
    RequestStatus.QUEUED: frozenset({RequestStatus.PREFILL, RequestStatus.CANCELLED, RequestStatus.FAILED}),
    RequestStatus.PREFILL: frozenset(
        {
            RequestStatus.DECODE,
            RequestStatus.PREEMPTED,
            RequestStatus.FINISHED,
            RequestStatus.CANCELLED,
            RequestStatus.FAILED,
        }
    ),
    RequestStatus.DECODE: frozenset(
        {RequestStatus.PREEMPTED, RequestStatus.FINISHED, RequestStatus.CANCELLED, RequestStatus.FAILED}
    ),
    RequestStatus.PREEMPTED: frozenset(
        {RequestStatus.PREFILL, RequestStatus.FINISHED, RequestStatus.CANCELLED, RequestStatus.FAILED}
    ),
    RequestStatus.FINISHED: frozenset(),
    RequestStatus.CANCELLED: frozenset(),
    RequestStatus.FAILED: frozenset(),
}
"""Which status may follow which. A preempted sequence may finish: its stop string was found after it lost its place."""

_PROGRESS = (RequestStatus.QUEUED, RequestStatus.PREEMPTED, RequestStatus.PREFILL, RequestStatus.DECODE)
_ADVANCE = {status: rank for rank, status in enumerate(_PROGRESS)}

RankKey = tuple[int, int, int]
"""(priority, arrival, sample index): the order in which sequences are served, lowest first."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request."""

    sequence_id: SequenceId
    request: "Request"
    sample_index: int
    token_ids: list[TokenId]
    status: RequestStatus = RequestStatus.QUEUED
    num_computed: int = 0
    num_pending: int = 0
    num_in_flight: int = 0
    """Launched steps that include this sequence and have not retired, under whatever epoch."""
    slot: SlotId | None = None
    epoch: int = 0
    finish_reason: FinishReason | None = None
    num_valid_tokens: int | None = None
    """Set when the text is settled: tokens beyond belong to nobody."""

    @property
    def rank(self) -> RankKey:
        """Where the sequence stands in the order of service."""
        return (self.request.priority, self.request.arrival, self.sample_index)

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the request's prompt."""
        return self.request.num_prompt_tokens

    @property
    def num_total(self) -> int:
        """Known tokens and those sampled by launched steps."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_ready(self) -> int:
        """Tokens that the next step could compute; 0 once all tokens the request may have are on their way."""
        num_total = len(self.token_ids) + self.num_pending
        return num_total - self.num_computed if num_total < self.request.max_total_tokens else 0

    @property
    def is_active(self) -> bool:
        """Whether it still wants to compute."""
        return not self.status.is_final

    def advance(self, status: RequestStatus) -> None:
        """Move to `status`.

        Raises:
            AssertionError: if TRANSITIONS has no such way; nothing is changed then.
        """
        assert status in TRANSITIONS[self.status], f"{self.status} may not become {status}"
        self.status = status

    def settle(self, num_generated: int) -> None:
        """The sequence's text ends with its `num_generated`-th generated token."""
        self.num_valid_tokens = self.num_prompt_tokens + num_generated

    def pack(self) -> bytes:
        """All known tokens."""
        return self.request.tokenized.packed_ids + pack_tokens(self.token_ids[self.num_prompt_tokens :])

    def pack_cacheable(self) -> bytes:
        """The tokens whose KV entries are computed and valid."""
        valid = len(self.token_ids) if self.num_valid_tokens is None else self.num_valid_tokens
        end, prompt = min(valid, self.num_computed), self.request.tokenized.packed_ids
        return prompt[: end * TOKEN_BYTES] + pack_tokens(self.token_ids[self.num_prompt_tokens : end])


@dataclass(slots=True, eq=False)
class Request:
    """What the scheduler knows of one request."""

    request_id: RequestId
    arrival: int
    priority: int
    tokenized: Tokenized
    stop_token_ids: frozenset[TokenId]
    namespace: bytes
    sequences: list[Sequence] = field(default_factory=list)
    num_scored: int = 0
    """Prompt tokens whose logprobs have been delivered."""
    num_cached_tokens: int = 0
    """What the first admission found in the prefix cache."""
    reported: RequestStatus = RequestStatus.QUEUED
    """The status last told to the caller."""
    is_forked: bool = False
    """Whether samples 1 to n-1 have joined the queue."""
    num_prompt_tokens: int = field(init=False)
    max_total_tokens: int = field(init=False)
    """Prompt and output at their longest; an embedding request computes its prompt and samples nothing."""

    def __post_init__(self) -> None:
        max_tokens = self.tokenized.params.max_tokens if self.tokenized.pooling is None else 1
        assert max_tokens is not None, "the tokenizer resolves max_tokens"
        self.num_prompt_tokens = len(self.tokenized.token_ids)
        self.max_total_tokens = self.num_prompt_tokens + max_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt positions still have to be scored."""
        return self.tokenized.params.prompt_logprobs is not None and self.num_scored < self.num_prompt_tokens - 1

    @property
    def computes_every_position(self) -> bool:
        """Whether a cached prefix would skip positions whose output is wanted."""
        return self.tokenized.pooling is not None or self.wants_prompt_logprobs

    @property
    def has_stop_strings(self) -> bool:
        """Whether only the detokenizer knows where the output ends."""
        return bool(self.tokenized.params.stop)

    @property
    def status(self) -> RequestStatus:
        """The least advanced unfinished sequence decides; when all have ended, the first one does."""
        active = [sequence.status for sequence in self.sequences if sequence.is_active]
        if active:
            return min(active, key=_ADVANCE.__getitem__)
        return self.sequences[0].status
