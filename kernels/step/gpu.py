"""How a step begins on an NVIDIA GPU: changes reach the slots, and each query token finds its place and its embedding.

The batch lives on the device. `scatter` writes what the host has changed since the last step, all of it in one launch;
`begin_decode` then makes a decode step's inputs from the slots alone, so that a captured graph needs nothing else.
Prefill and mixed steps bring their tokens and places along; a token that only the device knows (the sample of a step
whose result nobody has read yet) comes as its slot. Behind the last layer's keys and values only some of these tokens go on:
`place_last` and `pick` make decode rows of them.

    R rows    Q picked rows    T packed query tokens    S slots    X blocks of the longest table    D hidden
    B block size
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from triode.kernels.device_code import wait_for_inputs
from triode.kernels.gpu_traits import GpuTraits

_PAIRS = 1024
_ENTRIES = 1024


@triton.jit(do_not_specialize=["num_pairs"])
def scatter_pairs(state_ptr, pair_ptr, num_pairs, PAIRS: tl.constexpr, PDL: tl.constexpr):
    """state[pair[i]] = pair[num_pairs + i]; no index occurs twice."""
    wait_for_inputs(PDL)
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    mask = pair < num_pairs
    index = tl.load(pair_ptr + pair, mask=mask, other=0)
    tl.store(state_ptr + index, tl.load(pair_ptr + num_pairs + pair, mask=mask, other=0), mask=mask)


@triton.jit
def copy_table(table_ptr, out_ptr, row, slot, num_entries, width, ENTRIES: tl.constexpr):
    """The first entries of a slot's block table, to a row of the step's table."""
    entry = tl.arange(0, ENTRIES)
    first = 0
    while first < num_entries:
        mask = first + entry < num_entries
        block = tl.load(table_ptr + slot.to(tl.int64) * width + first + entry, mask=mask, other=0)
        tl.store(out_ptr + row * width + first + entry, block, mask=mask)
        first += ENTRIES


@triton.jit
def place_row(
    row,
    slot,
    position,
    table_ptr,
    position_ptr,
    kv_slot_ptr,
    row_table_ptr,
    width,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """A row of one token: its position, its place in the cache, and the block table of its slot as far as that."""
    block = tl.load(table_ptr + slot.to(tl.int64) * width + position // BLOCK)
    tl.store(position_ptr + row, position)
    tl.store(kv_slot_ptr + row, block * BLOCK + position % BLOCK)
    copy_table(table_ptr, row_table_ptr, row, slot, position // BLOCK + 1, width, ENTRIES)


@triton.jit
def copy_row(from_ptr, to_ptr, from_row, to_row, HIDDEN: tl.constexpr, HIDDEN_PADDED: tl.constexpr):
    """A token's embedding or hidden state."""
    dim = tl.arange(0, HIDDEN_PADDED)
    state = tl.load(from_ptr + from_row.to(tl.int64) * HIDDEN + dim, mask=dim < HIDDEN, other=0.0)
    tl.store(to_ptr + to_row * HIDDEN + dim, state, mask=dim < HIDDEN)


@triton.jit
def begin_rows(
    slot_ptr,
    last_token_ptr,
    slot_position_ptr,
    table_ptr,
    embed_ptr,
    residual_ptr,
    position_ptr,
    kv_slot_ptr,
    end_ptr,
    row_table_ptr,
    width,
    BLOCK: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
    ENTRIES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One decode row: position, place in the cache, block table and embedding of its slot's last token."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + row)
    position = tl.load(slot_position_ptr + slot)
    tl.store(end_ptr + row, position + 1)
    copy_row(embed_ptr, residual_ptr, tl.load(last_token_ptr + slot), row, HIDDEN, HIDDEN_PADDED)
    place_row(row, slot, position, table_ptr, position_ptr, kv_slot_ptr, row_table_ptr, width, BLOCK, ENTRIES)


@triton.jit
def embed_tokens(
    token_ptr,
    last_token_ptr,
    embed_ptr,
    residual_ptr,
    HIDDEN: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token's embedding; -1 - s stands for the last token of slot s."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ptr + row)
    if token < 0:
        token = tl.load(last_token_ptr - 1 - token)
    copy_row(embed_ptr, residual_ptr, token, row, HIDDEN, HIDDEN_PADDED)


@triton.jit
def copy_tables(
    slot_ptr,
    end_ptr,
    table_ptr,
    row_table_ptr,
    width,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row's block table, as far as the row's end."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    num_entries = (tl.load(end_ptr + row) + BLOCK - 1) // BLOCK
    copy_table(table_ptr, row_table_ptr, row, tl.load(slot_ptr + row), num_entries, width, ENTRIES)


@triton.jit
def place_last_tokens(
    slot_ptr,
    end_ptr,
    table_ptr,
    position_ptr,
    kv_slot_ptr,
    row_table_ptr,
    width,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row's last token; that of a row without tokens is at position 0."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    position = tl.maximum(tl.load(end_ptr + row) - 1, 0)
    slot = tl.load(slot_ptr + row)
    place_row(row, slot, position, table_ptr, position_ptr, kv_slot_ptr, row_table_ptr, width, BLOCK, ENTRIES)


@triton.jit
def pick_tokens(
    token_ptr,
    hidden_ptr,
    residual_ptr,
    picked_hidden_ptr,
    picked_residual_ptr,
    HIDDEN: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One picked token, to a row of its own."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ptr + row)
    copy_row(hidden_ptr, picked_hidden_ptr, token, row, HIDDEN, HIDDEN_PADDED)
    if residual_ptr is not None:
        copy_row(residual_ptr, picked_residual_ptr, token, row, HIDDEN, HIDDEN_PADDED)


def scatter(state: torch.Tensor, pairs: torch.Tensor, traits: GpuTraits) -> None:
    """Write values at indices of the int32 `state`: `pairs` is first all indices, then all values, both int32."""
    num_pairs = len(pairs) // 2
    scatter_pairs[(triton.cdiv(num_pairs, _PAIRS),)](
        state,
        pairs,
        num_pairs,
        PAIRS=_PAIRS,
        PDL=traits.dependent_launch,
        **traits.launch_options,
    )


def begin_decode(
    slot_R: torch.Tensor,
    last_token_S: torch.Tensor,
    position_S: torch.Tensor,
    table_SX: torch.Tensor,
    embed_VD: torch.Tensor,
    residual_RD: torch.Tensor,
    position_R: torch.Tensor,
    kv_slot_R: torch.Tensor,
    end_R: torch.Tensor,
    row_table_RX: torch.Tensor,
    block_size_tokens: int,
    traits: GpuTraits,
) -> None:
    """Fill the inputs of a step in which every row computes its slot's last token. Indices are int32."""
    hidden = embed_VD.shape[1]
    begin_rows[(len(slot_R),)](
        slot_R,
        last_token_S,
        position_S,
        table_SX,
        embed_VD,
        residual_RD,
        position_R,
        kv_slot_R,
        end_R,
        row_table_RX,
        table_SX.shape[1],
        BLOCK=block_size_tokens,
        HIDDEN=hidden,
        HIDDEN_PADDED=triton.next_power_of_2(hidden),
        ENTRIES=_ENTRIES,
        PDL=traits.dependent_launch,
        **traits.launch_options,
    )


def embed(
    token_T: torch.Tensor,
    last_token_S: torch.Tensor,
    embed_VD: torch.Tensor,
    residual_TD: torch.Tensor,
    traits: GpuTraits,
) -> None:
    """Write the embeddings of packed tokens; -1 - s stands for the last token of slot s."""
    hidden = embed_VD.shape[1]
    embed_tokens[(len(token_T),)](
        token_T,
        last_token_S,
        embed_VD,
        residual_TD,
        HIDDEN=hidden,
        HIDDEN_PADDED=triton.next_power_of_2(hidden),
        PDL=traits.dependent_launch,
        **traits.launch_options,
    )


def gather_tables(
    slot_R: torch.Tensor,
    end_R: torch.Tensor,
    table_SX: torch.Tensor,
    row_table_RX: torch.Tensor,
    block_size_tokens: int,
    traits: GpuTraits,
) -> None:
    """Copy the block table of each row's slot, as far as the row's end."""
    copy_tables[(len(slot_R),)](
        slot_R,
        end_R,
        table_SX,
        row_table_RX,
        table_SX.shape[1],
        BLOCK=block_size_tokens,
        ENTRIES=_ENTRIES,
        PDL=traits.dependent_launch,
        **traits.launch_options,
    )


def place_last(
    slot_Q: torch.Tensor,
    end_Q: torch.Tensor,
    table_SX: torch.Tensor,
    position_Q: torch.Tensor,
    kv_slot_Q: torch.Tensor,
    row_table_QX: torch.Tensor,
    block_size_tokens: int,
    traits: GpuTraits,
) -> None:
    """Write where the last tokens of rows that end at these positions stand, each as a row of one token.

    A padding row ends at 0 and is put at position 0 of its slot.
    """
    place_last_tokens[(len(slot_Q),)](
        slot_Q,
        end_Q,
        table_SX,
        position_Q,
        kv_slot_Q,
        row_table_QX,
        table_SX.shape[1],
        BLOCK=block_size_tokens,
        ENTRIES=_ENTRIES,
        PDL=traits.dependent_launch,
        **traits.launch_options,
    )


def pick(
    token_Q: torch.Tensor,
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    picked_hidden_QD: torch.Tensor,
    picked_residual_QD: torch.Tensor | None,
    traits: GpuTraits,
) -> None:
    """Copy the hidden states of some of the packed tokens, and their residuals if there are any. All are contiguous."""
    hidden = hidden_TD.shape[1]
    pick_tokens[(len(token_Q),)](
        token_Q,
        hidden_TD,
        residual_TD,
        picked_hidden_QD,
        picked_residual_QD,
        HIDDEN=hidden,
        HIDDEN_PADDED=triton.next_power_of_2(hidden),
        PDL=traits.dependent_launch,
        **traits.launch_options,
    )
