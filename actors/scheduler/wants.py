"""Sharing a step's token budget, and the question to the cache manager that follows from it."""

from bisect import bisect_right

import msgspec

from triode.actors.scheduler.request import Sequence
from triode.cache.messages import Reserve, ReserveRow
from triode.ids import SequenceId, StepId
from triode.models.step import Output


class Want(msgspec.Struct, frozen=True, gc=False):
    """A row that the next step could compute."""

    sequence: Sequence
    num_computed: int
    num_tokens: int
    output: Output


class Ready(msgspec.Struct, frozen=True, gc=False):
    """A running sequence and how many tokens it could compute: looked at several times a step, counted once."""

    sequence: Sequence
    num_tokens: int


def count_ready(running: list[Sequence]) -> list[Ready]:
    """Each running sequence's ready tokens, in order of service."""
    return [Ready(sequence, sequence.num_ready) for sequence in running]


def prompt_budget(running: list[Ready], budget_tokens: int) -> int:
    """What single tokens of running sequences leave of the budget."""
    return budget_tokens - sum(ready.num_tokens == 1 for ready in running)


def share_budget(running: list[Ready], candidates: list[tuple[Sequence, int]], budget_tokens: int) -> list[Want]:
    """Rows in order of service. Single tokens of running sequences come out of the budget first, then prompts.

    `running` is in order of service; `candidates` are (sequence, cached tokens).
    """
    left = prompt_budget(running, budget_tokens)
    wants: list[Want] = []
    for ready in running:
        if ready.num_tokens == 1:
            wants.append(_want(ready.sequence, ready.sequence.num_computed, 1))
        elif ready.num_tokens and left > 0:
            want = _want(ready.sequence, ready.sequence.num_computed, min(ready.num_tokens, left))
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


def build_reserve(step_id: StepId, wants: list[Want], running: list[Ready], now_s: float) -> Reserve:
    """The wants as a message, with the running sequences as victims, the last in order of service first.

    A sequence whose every token is on its way is no victim: it leaves by itself when its steps retire.
    """
    victims: list[SequenceId] = []
    num_behind: dict[SequenceId, int] = {}
    for ready in reversed(running):
        sequence_id = ready.sequence.sequence_id
        num_behind[sequence_id] = len(victims)
        if ready.num_tokens:
            victims.append(sequence_id)
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
                priorities = [ready.sequence.request.priority for ready in running if ready.num_tokens]
            max_victims = len(priorities) - bisect_right(priorities, sequence.request.priority)
        rows.append(ReserveRow(sequence.sequence_id, want.num_computed, end, num_table_tokens, max_victims))
    return Reserve(step_id, tuple(rows), tuple(victims), now_s)
