import pytest
import torch

from triode.kernels.gpu_traits import INTERPRETER
from triode.kernels.step.gpu import begin_decode, embed, gather_tables, pick, place_last, scatter

NUM_SLOTS, WIDTH, HIDDEN = 5, 1100, 96
UNTOUCHED = -7


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def filled(*size: int) -> torch.Tensor:
    return torch.full(size, UNTOUCHED, dtype=torch.int32)


def tables() -> torch.Tensor:
    """Wider than what one turn of the copying loop takes."""
    return torch.randint(1, 9999, (NUM_SLOTS, WIDTH), dtype=torch.int32)


@pytest.mark.parametrize("num_pairs", [1, 700, 2500])
def test_scatter_writes_every_pair_and_nothing_else(num_pairs: int) -> None:
    state = torch.arange(4000, dtype=torch.int32)
    want = state.clone()
    index, value = torch.randperm(4000)[:num_pairs].int(), torch.randint(0, 9999, (num_pairs,), dtype=torch.int32)
    want[index.long()] = value
    scatter(state, torch.cat([index, value]), INTERPRETER)
    assert torch.equal(state, want)


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_decode_row_begins_where_its_slot_stands(dtype: torch.dtype, block_size: int) -> None:
    slot, last_token = int32(3, 0, 4), int32(5, 6, 7, 8, 9)
    position, table_SX = int32(0, 1, 2, 17, WIDTH * block_size - 1), tables()
    embed_VD, residual_RD = torch.randn(20, HIDDEN).to(dtype), torch.full((3, HIDDEN), torch.nan, dtype=dtype)
    position_R, kv_slot_R, end_R, row_table_RX = filled(3), filled(3), filled(3), filled(3, WIDTH)
    begin_decode(
        *(slot, last_token, position, table_SX, embed_VD, residual_RD),
        *(position_R, kv_slot_R, end_R, row_table_RX, block_size, INTERPRETER),
    )
    assert torch.equal(residual_RD, embed_VD[last_token[slot]])
    assert torch.equal(position_R, position[slot])
    assert torch.equal(end_R, position_R + 1)
    for row, (its_slot, at) in enumerate(zip(slot.tolist(), position_R.tolist(), strict=True)):
        num_entries = at // block_size + 1
        assert kv_slot_R[row] == table_SX[its_slot, at // block_size] * block_size + at % block_size
        assert torch.equal(row_table_RX[row, :num_entries], table_SX[its_slot, :num_entries])
        assert (row_table_RX[row, num_entries:] == UNTOUCHED).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_token_is_given_or_the_last_of_a_slot(dtype: torch.dtype) -> None:
    embed_VD, residual_TD = torch.randn(20, HIDDEN).to(dtype), torch.full((4, HIDDEN), torch.nan, dtype=dtype)
    embed(int32(3, -1, 0, -1 - 4), int32(11, 12, 13, 14, 15), embed_VD, residual_TD, INTERPRETER)
    assert torch.equal(residual_TD, embed_VD[[3, 11, 0, 15]])


def test_tables_are_gathered_as_far_as_each_rows_end() -> None:
    table_SX, row_table_RX = tables(), filled(3, WIDTH)
    gather_tables(int32(2, 0, 4), int32(1, 16 * WIDTH, 33), table_SX, row_table_RX, 16, INTERPRETER)
    for row, (slot, num_entries) in enumerate(((2, 1), (0, WIDTH), (4, 3))):
        assert torch.equal(row_table_RX[row, :num_entries], table_SX[slot, :num_entries])
        assert (row_table_RX[row, num_entries:] == UNTOUCHED).all()


@pytest.mark.parametrize("block_size", [16, 128])
def test_a_last_token_is_placed_before_its_rows_end_and_that_of_a_row_without_tokens_at_0(block_size: int) -> None:
    slots, ends, table_SX = (3, 0, 4), (33, WIDTH * block_size, 0), tables()
    position_Q, kv_slot_Q, row_table_QX = filled(4), filled(4), filled(4, WIDTH)
    places = table_SX, position_Q, kv_slot_Q, row_table_QX
    place_last(int32(*slots), int32(*ends), *places, block_size, INTERPRETER)
    for row, (slot, end) in enumerate(zip(slots, ends, strict=True)):
        at = max(end - 1, 0)
        num_entries = at // block_size + 1
        assert position_Q[row] == at
        assert kv_slot_Q[row] == table_SX[slot, at // block_size] * block_size + at % block_size
        assert torch.equal(row_table_QX[row, :num_entries], table_SX[slot, :num_entries])
        assert (row_table_QX[row, num_entries:] == UNTOUCHED).all()
    assert position_Q[3] == kv_slot_Q[3] == UNTOUCHED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_picked_tokens_come_in_the_order_in_which_they_are_named(dtype: torch.dtype) -> None:
    hidden_TD, residual_TD = torch.randn(2, 9, HIDDEN).to(dtype)
    picked_hidden_QD, picked_residual_QD = torch.full((2, 5, HIDDEN), torch.nan, dtype=dtype)
    pick(int32(8, 3, 0, 0), hidden_TD, residual_TD, picked_hidden_QD, picked_residual_QD, INTERPRETER)
    for picked_QD, token_TD in ((picked_hidden_QD, hidden_TD), (picked_residual_QD, residual_TD)):
        assert torch.equal(picked_QD[:4], token_TD[[8, 3, 0, 0]])
        assert picked_QD[4].isnan().all()
