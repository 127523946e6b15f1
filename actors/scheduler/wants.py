"""Sharing a step's token budget, and the question to the cache manager that follows from it."""

from bisect import bisect_right
from typing import NamedTuple

import msgspec

from triode.actors.scheduler.request import Sequence
from triode.cache.messages import Reserve, ReserveRow
from triode.ids import StepId
from triode.models.step import Output


class Want(msgspec.Struct, frozen=True, gc=False):
    """A row that the next step could compute."""

    sequence: Sequence
    num_computed: int
    num_tokens: int
    output: Output


class Ready(NamedTuple):
    """The running sequences in order of service: looked at several times a step, counted once."""

    sequences: list[Sequence]
    nums_tokens: list[int]
    """How many tokens each of them could compute."""


def count_ready(running: list[Sequence]) -> Ready:
    """Each running sequence's ready tokens."""
    return Ready(running, [sequence.num_ready for sequence in running])


def prompt_budget(running: Ready, budget_tokens: int) -> int:
    """What single tokens of running sequences leave of the budget."""
    return budget_tokens - running.nums_tokens.count(1)


def share_budget(running: Ready, candidates: list[tuple[Sequence, int]], budget_tokens: int) -> list[Want]:
    """Rows in order of service. Single tokens of running sequences come out of the budget first, then prompts.

    `candidates` are (sequence, cached tokens).
    """
    left = prompt_budget(running, budget_tokens)
    wants: list[Want] = []
    sample = Output.SAMPLE
    for sequence, num_tokens in zip(running.sequences, running.nums_tokens, strict=True):
        start = sequence.num_computed
        if num_tokens == 1:
            # Nearly every row of nearly every step: the token sampled last.
            is_decoding = start >= sequence.request.num_prompt_tokens
            wants.append(Want(sequence, start, 1, sample) if is_decoding else _want(sequence, start, 1))
        elif num_tokens and left > 0:
            want = _want(sequence, start, min(num_tokens, left))
            left -= want.num_tokens
            wants.append(want)
    for sequence, num_cached in candidates:
        if left <= 0:
            break
        want = _want(sequence, num_cached, min(len(sequence.token_ids) - num_cached, left))
        left -= want.num_tokens
        wants.append(want)
    if candidates:
        wants.sort(key=lambda want: want.sequence.rank)
    return wants


def _want(sequence: Sequence, start: int, num_tokens: int) -> Want:
    request = sequence.request
    ends = start + num_tokens == len(sequence.token_ids) + sequence.num_pending
    if start >= request.num_prompt_tokens:
        return Want(sequence, start, num_tokens, Output.SAMPLE if ends else Output.NONE)
    if request.tokenized.pooling is not None:
        return Want(sequence, start, num_tokens, Output.HIDDEN)
    if request.wants_prompt_logprobs and sequence.sample_index == 0:
        if start < request.num_scored:
            # Recomputed after a preemption: these positions have been delivered.
            return Want(sequence, start, min(num_tokens, request.num_scored - start), Output.NONE)
        return Want(sequence, start, num_tokens, Output.PROMPT_LOGPROBS_AND_SAMPLE if ends else Output.PROMPT_LOGPROBS)
    return Want(sequence, start, num_tokens, Output.SAMPLE if ends else Output.NONE)


def build_reserve(step_id: StepId, wants: list[Want], running: Ready, now_s: float) -> Reserve:
    """The wants as a message, with the running sequences as victims, the last in order of service first.

    A sequence whose every token is on its way is no victim: it leaves by itself when its steps retire.
    """
    able = [sequence for sequence, num_tokens in zip(running.sequences, running.nums_tokens, strict=True) if num_tokens]
    victims = [sequence.sequence_id for sequence in reversed(able)]
    num_behind = dict(zip(victims, range(len(victims)), strict=True))
    priorities: list[int] | None = None
    rows = []
    for want in wants:
        sequence, end = want.sequence, want.num_computed + want.num_tokens
        if sequence.slot is not None:
            num_table_tokens = end
            max_victims = num_behind[sequence.sequence_id]
        else:
            num_table_tokens = len(sequence.token_ids)
            if priorities is None:
                priorities = [each.request.priority for each in able]
            max_victims = len(priorities) - bisect_right(priorities, sequence.request.priority)
        rows.append(ReserveRow(sequence.sequence_id, want.num_computed, end, num_table_tokens, max_victims))
    return Reserve(step_id, tuple(rows), tuple(victims), now_s)
