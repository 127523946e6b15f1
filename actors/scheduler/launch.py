"""From granted rows to the step plan, and the record by which its result is read."""

from typing import NamedTuple

from triode.actors.scheduler.request import Sequence
from triode.actors.scheduler.wants import Want
from triode.cache.messages import Reserved, SequenceTable
from triode.ids import SlotId, StepId
from triode.models.step import Admission, Output, StepPlan, TableChange

SAMPLING = frozenset({Output.SAMPLE, Output.PROMPT_LOGPROBS_AND_SAMPLE})
"""Outputs that add a token to the sequence."""


class Launch(NamedTuple):
    """A step on its way, its rows in the plan's order."""

    step_id: StepId
    rows: list[Want]
    epochs: tuple[int, ...]
    """The rows' epochs when they were launched."""


def build_plan(reserved: Reserved, wants: list[Want], admitted: list[Sequence]) -> tuple[Launch, StepPlan]:
    """The plan of one step. Counts the launched tokens into its sequences."""
    slots: list[SlotId] = []
    for want in wants:
        sequence, slot = want.sequence, want.sequence.slot
        assert slot is not None, "a launched row holds a slot"
        slots.append(slot)
        sequence.num_computed = end = want.num_computed + want.num_tokens
        sequence.num_in_flight += 1
        # A row asked for before forced tokens were read ends before the last of them, and brings no other.
        if want.output in SAMPLING and end == len(sequence.token_ids) + sequence.num_pending:
            sequence.num_pending += 1
    # Of lists, which are made faster than what a generator yields.
    epochs = tuple([want.sequence.epoch for want in wants])
    plan = StepPlan(
        step_id=reserved.step_id,
        slots=tuple(slots),
        epochs=epochs,
        start_positions=tuple([want.num_computed for want in wants]),
        num_query_tokens=tuple([want.num_tokens for want in wants]),
        outputs=tuple([want.output for want in wants]),
        admissions=tuple(_admission(sequence) for sequence in admitted),
        table_changes=_table_changes(reserved.tables, wants, slots) if reserved.tables else (),
        copies=reserved.copies,
    )
    return Launch(reserved.step_id, wants, epochs), plan


def _table_changes(
    tables: tuple[SequenceTable, ...], wants: list[Want], slots: list[SlotId]
) -> tuple[TableChange, ...]:
    slot_of = {want.sequence.sequence_id: slot for want, slot in zip(wants, slots, strict=True)}
    return tuple(
        [
            TableChange(slot_of[table.sequence_id], table.first_block, table.block_ids)
            for table in tables
            if table.sequence_id in slot_of
        ]
    )


def _admission(sequence: Sequence) -> Admission:
    tokenized = sequence.request.tokenized
    assert sequence.slot is not None, "an admitted sequence holds a slot"
    return Admission(
        slot=sequence.slot,
        epoch=sequence.epoch,
        packed_ids=sequence.pack(),
        num_prompt_tokens=sequence.num_prompt_tokens,
        params=tokenized.params,
        seed=tokenized.seed,
        sample_index=sequence.sample_index,
        stop_token_ids=tokenized.stop_token_ids,
        bad_word_ids=tokenized.bad_word_ids,
        pooling=tokenized.pooling,
    )
