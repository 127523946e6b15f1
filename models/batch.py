"""StepBatch: where every query token of one step comes from and where its key and value go.

A step mixes rows that decode one token with rows that prefill a chunk. Their query tokens are packed one row after
the other, so that every operation but attention sees one matrix of T tokens and no rows at all.

    T packed query tokens, padding included     R rows     C blocks in the longest table     B block size     P = 1
    W query tokens whose hidden states are wanted

The packed tokens are padded to a multiple that the kernels name (`Kernels.row_multiple`), once a step instead of once
a matrix product. A padding token is token 0 at position 0; it is written to block 0, which belongs to nobody, and no
row's attention sees it.

Behind the last layer's keys and values only those tokens are computed whose hidden states somebody reads: the last one
of a row that samples or whose last token is its embedding, all of a row whose prompt is scored or whose mean is its
embedding, none of another chunk in the middle of a prompt.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from triode.kernels.paged_attention.rows import AttentionRows

IntArray = npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The index tensors of one step, on the device that computes it."""

    token_ids_T: torch.Tensor
    """int64."""
    positions_PT: torch.Tensor
    """int64: what the rotary embedding rotates by. P is 1 for text."""
    slot_T: torch.Tensor
    """int64: `block * B + offset`, where the token's key and value are stored in every layer."""
    rows: AttentionRows
    """Which tokens attend to which blocks."""
    wanted_start_R1: IntArray
    """int64: of row r the last `wanted_start_R1[r + 1] - wanted_start_R1[r]` query tokens are wanted, and these are
    their places among all W."""

    @property
    def num_tokens(self) -> int:
        """Query tokens without padding."""
        return self.rows.num_tokens

    @property
    def num_wanted(self) -> int:
        """W."""
        return int(self.wanted_start_R1[-1])


def build_batch(
    token_ids_T: IntArray,
    start_R: IntArray,
    num_query_R: IntArray,
    block_table_RC: IntArray,
    *,
    block_size_tokens: int,
    row_multiple: int,
    device: torch.device,
    num_wanted_R: IntArray | None = None,
) -> StepBatch:
    """A batch from host arrays.

    Args:
        token_ids_T: the query tokens of all rows, one row after the other, without padding.
        start_R: how many tokens of each row are in the cache already: the position of its first query token.
        num_query_R: how many query tokens each row has, at least 1.
        block_table_RC: each row's blocks. Entries past the blocks of its last query token are never read.
        block_size_tokens: B.
        row_multiple: T becomes a multiple of this.
        device: where the tensors go.
        num_wanted_R: of how many of each row's last query tokens the hidden states are wanted; None for all.
    """
    num_tokens = len(token_ids_T)
    if num_tokens == 0 or num_tokens != int(num_query_R.sum()):
        raise ValueError(f"token_ids_T must have sum(num_query_R) = {num_query_R.sum()} >= 1 tokens, got {num_tokens}")
    if num_tokens == len(num_query_R):
        # Each row decodes: with a small model what is done here between two steps counts.
        query_start_R1 = np.arange(num_tokens + 1)
        row_T, position_T = query_start_R1[:-1], start_R
    else:
        query_start_R1 = np.zeros(len(num_query_R) + 1, np.int64)
        np.cumsum(num_query_R, out=query_start_R1[1:])
        row_T = np.repeat(np.arange(len(num_query_R)), num_query_R)
        position_T = np.arange(num_tokens) - query_start_R1[row_T] + start_R[row_T]
    block_T = block_table_RC[row_T, position_T // block_size_tokens].astype(np.int64)

    padded = -(-num_tokens // row_multiple) * row_multiple
    packed = np.zeros((3, padded), np.int64)
    packed[0, :num_tokens] = token_ids_T
    packed[1, :num_tokens] = position_T
    packed[2, :num_tokens] = block_T * block_size_tokens + position_T % block_size_tokens
    # One transfer instead of three; on the CPU the tensor shares the array's memory.
    index_3T = torch.from_numpy(packed).to(device)
    rows = AttentionRows(
        query_start_R1=query_start_R1,
        start_R=np.asarray(start_R, np.int64),
        block_table_RC=np.asarray(block_table_RC, np.int64),
        block_size_tokens=block_size_tokens,
    )
    wanted_start_R1 = query_start_R1
    if num_wanted_R is not None and not np.array_equal(num_wanted_R, num_query_R):
        wanted_start_R1 = np.zeros_like(query_start_R1)
        np.cumsum(num_wanted_R, out=wanted_start_R1[1:])
    return StepBatch(index_3T[0], index_3T[1:2], index_3T[2], rows, wanted_start_R1)
