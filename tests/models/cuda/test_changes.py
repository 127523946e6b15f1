"""What the host sends to the arena, and how it packs a step. No GPU and no interpreter."""

import msgspec
import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from guides import tiny_guides, tiny_tokenizer
from triode.ids import BlockId, SlotId, StepId, TokenId, pack_tokens
from triode.models.cuda.arena import ALIGNED_WORDS, ArenaLayout, Changes, aligned
from triode.models.cuda.batch import HostBatch, PackedRows, is_decode, packed_starts
from triode.models.cuda.flight import Flight
from triode.models.cuda.gpu import Mark
from triode.models.cuda.programs import bucket_for, prefill_shape, segment_bucket_for
from triode.models.guide import Grammar
from triode.models.sampling import SamplingParams
from triode.models.slots import SlotState
from triode.models.step import Admission, Output, StepPlan, TableChange

FORCING = Grammar('start: /[a-c]/ "bcdefgh" /[xyz]{1,9}/')
LAYOUT = ArenaLayout(num_slots=4, num_rows=4, num_entries=8)


def admission(slot: int, length: int, **fields: object) -> Admission:
    params = SamplingParams(**fields)  # type: ignore[arg-type]
    tokens = tuple(TokenId(100 * slot + index) for index in range(length))
    return Admission(SlotId(slot), 1, pack_tokens(tokens), length, params, 2**64 - 1 - slot, slot, ())


def plan(
    slots: tuple[int, ...],
    starts: tuple[int, ...],
    nums: tuple[int, ...],
    outputs: tuple[Output, ...],
    **fields: object,
) -> StepPlan:
    return StepPlan(
        step_id=StepId(0),
        slots=tuple(map(SlotId, slots)),
        epochs=(1,) * len(slots),
        start_positions=starts,
        num_query_tokens=nums,
        outputs=outputs,
        **fields,  # type: ignore[arg-type]
    )


def applied(changes: Changes) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """The arena after the changes, 7 where nothing was written."""
    words = np.full(LAYOUT.num_words, 7, np.int32)
    pairs = changes.take()
    assert pairs is not None
    index, value = np.split(pairs, 2)
    assert len(set(index.tolist())) == len(index)
    words[index] = value
    return words


def test_columns_lie_side_by_side_and_are_aligned() -> None:
    first = [LAYOUT.seed, LAYOUT.top_p, LAYOUT.min_p, LAYOUT.last_token, LAYOUT.position, LAYOUT.sample_index]
    first += [LAYOUT.temperature, LAYOUT.top_k, LAYOUT.row_slot, LAYOUT.table]
    assert np.diff([*first, LAYOUT.spare, LAYOUT.num_words]).tolist() == [16, 16, 16, 8, 8, 8, 8, 8, 4, 40, 1]
    assert not any(start % ALIGNED_WORDS for start in first)


def test_an_admission_writes_its_slots_columns_and_no_others() -> None:
    changes = Changes(LAYOUT)
    changes.admit(admission(2, 3, temperature=0.5, top_k=9, top_p=0.25, min_p=0.125))
    words = applied(changes)
    assert words[LAYOUT.seed : LAYOUT.top_p].view(np.uint64)[2] == 2**64 - 3
    assert words[LAYOUT.top_p : LAYOUT.min_p].view(np.float64)[2] == 0.25
    assert words[LAYOUT.min_p : LAYOUT.last_token].view(np.float64)[2] == 0.125
    assert words[LAYOUT.temperature : LAYOUT.top_k].view(np.float32)[2] == 0.5
    assert (words[LAYOUT.top_k + 2], words[LAYOUT.sample_index + 2]) == (9, 2)
    assert (words != 7).sum() == 9


def test_of_two_values_for_one_word_the_last_one_holds() -> None:
    changes = Changes(LAYOUT)
    changes.set_table(1, 2, np.array([3, 4], np.int32))
    changes.set_table(1, 3, np.array([5, 6], np.int32))
    words = applied(changes)
    assert words[LAYOUT.table + 8 + 2 :][:3].tolist() == [3, 5, 6]
    assert changes.take() is None


def started() -> tuple[HostBatch, Changes]:
    """Slot 0 has 5 tokens, slot 1 has 9; both have been read, slot 0 up to its end."""
    host, changes = HostBatch(LAYOUT, 32, 4), Changes(LAYOUT)
    first = plan(
        (0, 1),
        (0, 0),
        (5, 6),
        (Output.SAMPLE, Output.NONE),
        admissions=(admission(0, 5), admission(1, 9)),
        table_changes=(
            TableChange(SlotId(0), 0, (BlockId(3), BlockId(9))),
            TableChange(SlotId(1), 0, (BlockId(4), BlockId(2), BlockId(7))),
        ),
    )
    host.apply(first, changes)
    host.pack(first, *host.check(first, every_row_samples=False))
    changes.take()
    return host, changes


def arrays(packed: PackedRows, sizes: list[int]) -> list[list[int]]:
    """The arrays of a packed step, of these sizes."""
    starts = np.cumsum([0, *map(aligned, sizes)])
    assert starts[-1] == len(packed.words)
    assert not (starts % ALIGNED_WORDS).any()
    return [packed.words[start : start + size].tolist() for start, size in zip(starts, sizes, strict=False)]


def test_a_token_that_only_the_device_has_is_named_by_its_slot() -> None:
    host, _ = started()
    mixed = plan((0, 1), (5, 6), (1, 3), (Output.SAMPLE, Output.SAMPLE))
    packed = host.pack(mixed, *host.check(mixed, every_row_samples=False))
    parts = arrays(packed, [3, 2, 2, 2, 2, 2, 2, 4, 4, 4])
    query_start, start, end, slot, sample_token, sample_end, sample_slot, token, position, kv_slot = parts
    assert packed.order.tolist() == [1, 0]
    assert (query_start, start, end, slot) == ([0, 3, 4], [6, 5], [9, 6], [1, 0])
    assert (sample_token, sample_end, sample_slot) == ([2, 3], [9, 6], [1, 0])
    assert (token, position) == ([106, 107, 108, -1], [6, 7, 8, 5])
    assert kv_slot == [2 * 4 + 2, 2 * 4 + 3, 7 * 4, 9 * 4 + 1]


def test_padding_belongs_to_nobody() -> None:
    host, _ = started()
    mixed = plan((0, 1), (5, 6), (1, 2), (Output.SAMPLE, Output.NONE))
    packed = host.pack(mixed, *host.check(mixed, every_row_samples=False), (16, 4))
    parts = arrays(packed, [5, 4, 4, 4, 4, 4, 4, 16, 16, 16])
    assert parts[0] == [0, 2, 3, 3, 3]
    assert parts[3] == [1, 0, LAYOUT.nobody, LAYOUT.nobody]
    assert parts[6] == [0] + [LAYOUT.nobody] * 3
    assert parts[9][3:] == [0] * 13


def test_a_decode_step_sends_rows_once_and_newest_tokens_only_where_the_host_alone_has_them() -> None:
    host, changes = started()
    step = plan((0,), (5,), (1,), (Output.SAMPLE,))
    slots, starts, _ = host.check(step, every_row_samples=True)
    host.decode(step, slots, starts, changes)
    words = applied(changes)
    assert words[LAYOUT.row_slot : LAYOUT.table].tolist() == [0] + [LAYOUT.nobody] * 3
    assert (words != 7).sum() == 4
    again = plan((0,), (6,), (1,), (Output.SAMPLE,))
    host.decode(again, *host.check(again, every_row_samples=True)[:2], changes)
    assert changes.take() is None
    hit = plan((1,), (8,), (1,), (Output.SAMPLE,))
    host.decode(hit, *host.check(hit, every_row_samples=True)[:2], changes)
    words = applied(changes)
    assert (words[LAYOUT.last_token + 1], words[LAYOUT.position + 1]) == (108, 8)


def test_a_plan_that_needs_a_token_nobody_keeps_is_a_bug() -> None:
    host, changes = started()
    skipped = plan((0,), (5,), (1,), (Output.SAMPLE,))
    host.decode(skipped, *host.check(skipped, every_row_samples=True)[:2], changes)
    with pytest.raises(AssertionError, match="neither host nor device keeps"):
        host.decode(skipped, np.array([0], np.int32), np.array([5], np.int32), changes)


@pytest.mark.parametrize(("num_rows", "bucket"), [(1, 1), (3, 4), (17, 24), (256, 256), (257, 320), (1000, 1024)])
def test_a_bucket_holds_its_rows(num_rows: int, bucket: int) -> None:
    assert bucket_for(num_rows) == bucket


def test_short_steps_have_a_shape_and_long_ones_none() -> None:
    assert prefill_shape(100, 3, 8) == (128, 4)
    assert prefill_shape(512, 8, 8) == (512, 8)
    assert prefill_shape(1025, 1, 8) is None
    assert (segment_bucket_for(1), segment_bucket_for(5), segment_bucket_for(2000)) == (4, 16, 2000)


def test_only_steps_of_single_sampled_tokens_decode() -> None:
    assert is_decode(plan((0, 1), (3, 4), (1, 1), (Output.SAMPLE, Output.SAMPLE)))
    assert not is_decode(plan((0, 1), (3, 4), (1, 1), (Output.SAMPLE, Output.NONE)))
    assert not is_decode(plan((0,), (3,), (2,), (Output.SAMPLE,)))


def forced_world() -> tuple[HostBatch, Changes, SlotState]:
    """Slot 0 has read a prompt of 5 tokens, and its first sample is on its way; a guide forces what follows 'a'."""
    guides = tiny_guides()
    guides.check(FORCING)
    host, changes = HostBatch(LAYOUT, 32, 4, guides), Changes(LAYOUT)
    first = plan(
        (0,),
        (0,),
        (5,),
        (Output.SAMPLE,),
        admissions=(admission(0, 5, guide=FORCING, max_tokens=20),),
        table_changes=(TableChange(SlotId(0), 0, tuple(map(BlockId, range(3, 9)))),),
    )
    host.apply(first, changes)
    host.pack(first, *host.check(first, every_row_samples=False))
    changes.take()
    (state,) = host.states(first)
    return host, changes, state


def test_a_row_that_forced_tokens_have_overtaken_goes_on_from_the_next_of_them() -> None:
    host, changes, state = forced_world()
    ahead = plan((0,), (5,), (1,), (Output.SAMPLE,))
    host.decode(ahead, *host.check(ahead, every_row_samples=True)[:2], changes)
    (sampled,) = tiny_tokenizer().encode("a", add_special_tokens=False)
    forced = host.learn(state, 0, sampled)
    assert tiny_tokenizer().decode([sampled, *forced]) == "abcdefgh"
    assert state.tokens[5:].tolist() == [sampled, *forced]
    # All of them at once, though the device has sampled the first of them by itself.
    together = plan((0,), (6,), (len(forced),), (Output.SAMPLE,))
    packed = host.pack(together, *host.check(together, every_row_samples=False))
    assert packed.words[packed_starts(len(forced), 1, 1)[0][7] :][: len(forced)].tolist() == forced
    with pytest.raises(AssertionError, match="computes tokens that its slots do not have"):
        host.check(plan((0,), (6 + len(forced),), (2,), (Output.SAMPLE,)), every_row_samples=False)


def test_what_a_slots_former_sequence_got_is_not_learned() -> None:
    host, changes, state = forced_world()
    host.apply(plan((), (), (), (), admissions=(msgspec.structs.replace(admission(0, 3), epoch=2),)), changes)
    assert host.learn(state, 0, tiny_tokenizer().encode("a", add_special_tokens=False)[0]) == []
    assert state.num_tokens == 5


class Passed:
    """A mark behind which everything is done."""

    def is_passed(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def seconds_since(self, earlier: Mark) -> float:
        return 0.0

    def release(self) -> None:
        return


def test_a_result_has_forced_tokens_behind_their_own_and_none_of_overtaken_rows() -> None:
    step = plan((0, 1, 2), (5, 6, 7), (1, 1, 1), (Output.SAMPLE,) * 3)
    mark = Passed()
    flight = Flight(step, mark, mark, mark, (1, 0, 2), torch.tensor([11, -1, 33], dtype=torch.int32), overtaken={1})
    flight.forced[0] = [TokenId(12), TokenId(13)]
    result = flight.result()
    assert (result.num_accepted, result.token_ids, result.errors) == ((0, 3, 1), (11, 12, 13, 33), None)
