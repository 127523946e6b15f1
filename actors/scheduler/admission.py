"""Who may be admitted, and what is remembered of requests that have not arrived yet."""

import struct
from collections.abc import Sequence as SequenceOf

from triode.actors.scheduler.request import Sequence
from triode.cache.messages import MatchRow

_MATCH_AHEAD = 8
"""Candidates are matched until their prompts fill the budget this many times: cached prefixes may leave most of it."""


class ArrivalLog:
    """Which submits the tokenizer has answered, and which were cancelled before.

    The tokenizer answers every arrival exactly once, long prompts later than short ones behind them. A cancel that
    overtakes the answer leaves a tombstone, which the answer removes. All arrivals below a watermark are answered, so
    the log stays as small as the disorder.
    """

    def __init__(self) -> None:
        self._watermark = 0
        self._answered: set[int] = set()
        self._tombstones: set[int] = set()

    def answer(self, arrival: int) -> bool:
        """Note the tokenizer's answer. Returns whether the request had been cancelled before."""
        self._answered.add(arrival)
        while self._watermark in self._answered:
            self._answered.remove(self._watermark)
            self._watermark += 1
        was_cancelled = arrival in self._tombstones
        self._tombstones.discard(arrival)
        return was_cancelled

    def is_answered(self, arrival: int) -> bool:
        """Whether the tokenizer has answered."""
        return arrival < self._watermark or arrival in self._answered

    def bury(self, arrival: int) -> bool:
        """Note a cancel. Returns False if the arrival has been answered, or cancelled, before."""
        if self.is_answered(arrival) or arrival in self._tombstones:
            return False
        self._tombstones.add(arrival)
        return True

    def __len__(self) -> int:
        return len(self._answered) + len(self._tombstones)


def namespace_of(cache_salt: str | None) -> bytes:
    """The cache namespace of a request; adapter and image digests join it with their features."""
    if cache_salt is None:
        return b""
    salt = cache_salt.encode()
    return struct.pack("<I", len(salt)) + salt


def pick_candidates(waiting: SequenceOf[Sequence], num_slots: int, budget_tokens: int) -> list[Sequence]:
    """The head of the queue, as far as slots reach and the step's budget could."""
    candidates: list[Sequence] = []
    if budget_tokens <= 0:
        return candidates
    num_tokens = 0
    for sequence in waiting[:num_slots]:
        candidates.append(sequence)
        num_tokens += len(sequence.token_ids)
        if num_tokens >= _MATCH_AHEAD * budget_tokens:
            break
    return candidates


def match_row(sequence: Sequence) -> MatchRow:
    """What the cache manager must know to find the sequence's cached prefix."""
    request = sequence.request
    first = request.sequences[0]
    is_fresh_sample = sequence is not first and len(sequence.token_ids) == request.num_prompt_tokens
    return MatchRow(
        sequence_id=sequence.sequence_id,
        packed_ids=sequence.pack(),
        num_prompt_tokens=request.num_prompt_tokens,
        namespace=request.namespace,
        use_cached=sequence is not first or not request.computes_every_position,
        fork_of=first.sequence_id if is_fresh_sample and first.slot is not None else None,
    )
