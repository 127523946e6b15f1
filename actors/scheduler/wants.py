"""Sharing a step's token budget, and the question to the cache manager that follows from it."""

from bisect import bisect_right
from typing import NamedTuple

from triode.actors.scheduler.request import Sequence
from triode.cache.messages import Reserve, ReserveRow
from triode.ids import SequenceId, StepId
from triode.models.step import Output


class Want(NamedTuple):
    """A row that the next step could compute."""

    sequence: Sequence
    num_computed: int
    num_tokens: int
    output: Output


def share_budget(running: list[Sequence], candidates: list[tuple[Sequence, int]], budget_tokens: int) -> list[Want]:
    """Rows in order of service. Single tokens of running sequences come out of the budget first, then prompts.

    `running` is in order of service; `candidates` are (sequence, cached tokens).
    """
    left = budget_tokens - sum(sequence.num_ready == 1 for sequence in running)
    wants: list[Want] = []
    for sequence in running:
        ready = sequence.num_ready
        if ready == 1:
            wants.append(_want(sequence, sequence.num_computed, 1))
        elif ready and left > 0:
            want = _want(sequence, sequence.num_computed, min(ready, left))
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
    ends = start + num_tokens == sequence.num_total
    if request.tokenized.pool_hidden:
        return Want(sequence, start, num_tokens, Output.HIDDEN)
    if request.wants_prompt_logprobs and sequence.sample_index == 0 and start < request.num_prompt_tokens:
        if start < request.num_scored:
            # Recomputed after a preemption: these positions have been delivered.
            return Want(sequence, start, min(num_tokens, request.num_scored - start), Output.NONE)
        return Want(sequence, start, num_tokens, Output.PROMPT_LOGPROBS_AND_SAMPLE if ends else Output.PROMPT_LOGPROBS)
    return Want(sequence, start, num_tokens, Output.SAMPLE if ends else Output.NONE)


def build_reserve(step_id: StepId, wants: list[Want], running: list[Sequence], now_s: float) -> Reserve:
    """The wants as a message, with the running sequences as victims, the last in order of service first.

    A sequence whose every token is on its way is no victim: it leaves by itself when its steps retire.
    """
    victims: list[SequenceId] = []
    num_behind: dict[SequenceId, int] = {}
    for sequence in reversed(running):
        num_behind[sequence.sequence_id] = len(victims)
        if sequence.num_ready:
            victims.append(sequence.sequence_id)
    priorities = [sequence.request.priority for sequence in running if sequence.num_ready]
    rows = tuple(
        ReserveRow(
            sequence_id=sequence.sequence_id,
            num_computed_tokens=start,
            num_tokens=start + num_tokens,
            num_table_tokens=start + num_tokens if sequence.slot is not None else len(sequence.token_ids),
            max_victims=(
                num_behind[sequence.sequence_id]
                if sequence.slot is not None
                else len(priorities) - bisect_right(priorities, sequence.request.priority)
            ),
        )
        for sequence, start, num_tokens, _ in wants
    )
    return Reserve(step_id, rows, tuple(victims), now_s)
