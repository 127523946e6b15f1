"""Attention over a paged cache, in plain torch.

The promise: a query's result depends on its own tokens alone. It is the same bit for bit whether the query is decoded
or part of a prefill chunk, whatever the chunk, the neighbours, the block table and the number of threads. Therefore

- keys and values are walked in tiles of 64 positions counted from position 0, never in a split that suits the batch;
- the queries of a KV head's group are packed into the rows of one matrix product, padded to a multiple of 4, because
  the matrix libraries choose another kernel, with another order of addition, for fewer rows;
- scores and softmax see whole rows: what lies outside is -inf, and adding exact zeros changes nothing, so the length
  to which a row is padded does not matter;
- probabilities times values are summed within each tile, then over the 8 tiles of a segment as a balanced tree, then
  over segments in order. A product over all positions at once would be blocked by a rule that knows the length.

Everything is computed in float32, from keys and values as they are stored, the chunk's own included.

To be quick the work is cut into products of equal shape: all decode rows of similar length together, a prefill chunk
in blocks of queries. The cut follows from the batch and is free to, because it changes no result. A position past the end
of its row reads the row's last key again: its probability is zero, and nothing unwritten is ever multiplied.

    T packed query tokens   N query heads   K KV heads   G = N / K   H head dim   P blocks   B block size
    R rows of a group   Q queries a row   M = Q G rows of a product, padded   S positions of a tile   L = J S positions
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from triode.kernels.paged_attention.rows import AttentionRows

TILE_TOKENS = 64
SEGMENT_TILES = 8
ROW_MULTIPLE = 4

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""The attention of one step: queries, a layer's keys and values, and the scale to outputs."""

_MAX_QUERIES = 64
# What one group touches should stay in the last-level cache: 600 K float32 scores and 2 M elements of keys.
_MAX_SCORES = 600_000
_MAX_KEYS = 2_000_000


@dataclass(frozen=True, slots=True)
class _Block:
    """Q queries of each row of a group, over some of its tiles."""

    token_RQ: torch.Tensor
    """Where the queries are packed."""
    first_tile: int
    last_tile: int
    """The tiles that some query sees, counted from the group's first; `last_tile` is excluded."""
    mask_RQL: torch.Tensor
    """0 where a query sees a position, -inf elsewhere, from column `mask_from` on."""
    mask_from: int


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows whose keys and values are gathered together: R rows over the positions of J tiles."""

    key_index: torch.Tensor
    """int64 [R K L] into the cache as a [P B K, H] matrix."""
    value_index: torch.Tensor
    """The same entries in the order [J, R, K, S]."""
    blocks: tuple[_Block, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's groups. It holds for every layer with the same window."""

    groups: tuple[_Group, ...]


def plan_attention(
    rows: AttentionRows, *, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None, device: torch.device
) -> AttentionPlan:
    """Cut a step into groups and find their positions in the cache: once a step, not once a layer.

    Args:
        rows: which query tokens attend to which blocks.
        num_heads: N.
        num_kv_heads: K.
        head_dim: H.
        window: how many positions a query sees, its own included; None for all.
        device: where queries and cache are.
    """
    planner = _Planner(rows, num_heads, num_kv_heads, head_dim, window, device)
    return AttentionPlan(tuple(planner.decode_groups() + planner.chunk_groups()))


class _Planner:
    def __init__(
        self,
        rows: AttentionRows,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None,
        device: torch.device,
    ) -> None:
        self.rows = rows
        self.num_query_R = np.diff(rows.query_start_R1)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.window = window
        self.device = device

    def decode_groups(self) -> list[_Group]:
        """Rows of one query share a group when the longer is at most twice the shorter, or both are short."""
        by_size: dict[int, list[int]] = defaultdict(list)
        for row in np.flatnonzero(self.num_query_R == 1).tolist():
            num_tiles = int(self.rows.start_R[row]) // TILE_TOKENS + 1
            by_size[max(4, 1 << (num_tiles - 1).bit_length())].append(row)
        groups = []
        for num_tiles, members in sorted(by_size.items()):
            at_once = max(1, _MAX_KEYS // (num_tiles * TILE_TOKENS * self.num_kv_heads * self.head_dim))
            starts = range(0, len(members), at_once)
            groups += [self._group(np.array(members[at : at + at_once]), [(0, 1)]) for at in starts]
        return groups

    def chunk_groups(self) -> list[_Group]:
        """Each row of several queries, in blocks of at most 64: fewer where scores would be many."""
        groups = []
        for row in np.flatnonzero(self.num_query_R > 1).tolist():
            num_query = int(self.num_query_R[row])
            fitting = _MAX_SCORES // (self.num_heads * (int(self.rows.start_R[row]) + num_query))
            size = min(_MAX_QUERIES, max(ROW_MULTIPLE, fitting // ROW_MULTIPLE * ROW_MULTIPLE))
            cuts = [(first, min(first + size, num_query)) for first in range(0, num_query, size)]
            groups.append(self._group(np.array([row]), cuts))
        return groups

    def _group(self, row_R: npt.NDArray[np.int64], cuts: list[tuple[int, int]]) -> _Group:
        """Gather every position that a query sees; `cuts` are the blocks of queries, counted within each row."""
        rows = self.rows
        start_R1 = rows.start_R[row_R][:, None]
        last_R1 = start_R1 + (cuts[-1][1] - 1)
        begin = self._first_tile(start_R1)
        position_L = np.arange(begin * TILE_TOKENS, (int(last_R1.max()) // TILE_TOKENS + 1) * TILE_TOKENS)
        # Positions past the row's end read its last key, which exists.
        key_RL = np.minimum(position_L, last_R1)
        block_RL = rows.block_table_RC[row_R[:, None], key_RL // rows.block_size_tokens]
        slot_RL = torch.from_numpy(block_RL * rows.block_size_tokens + key_RL % rows.block_size_tokens)
        index_RKL = slot_RL[:, None, :] * self.num_kv_heads + torch.arange(self.num_kv_heads)[:, None]
        index_JRKS = index_RKL.unflatten(2, (-1, TILE_TOKENS)).permute(2, 0, 1, 3)
        return _Group(
            key_index=index_RKL.reshape(-1).to(self.device),
            value_index=index_JRKS.reshape(-1).to(self.device),
            blocks=tuple(self._block(row_R, np.arange(first, last), begin) for first, last in cuts),
        )

    def _block(self, row_R: npt.NDArray[np.int64], query_Q: npt.NDArray[np.int64], group_begin: int) -> _Block:
        position_RQ = self.rows.start_R[row_R][:, None] + query_Q
        begin = self._first_tile(position_RQ)
        end = int(position_RQ.max()) // TILE_TOKENS + 1
        # Without a window every query sees all positions up to the block's lowest: those columns need no mask.
        mask_from = (int(position_RQ.min()) + 1) // TILE_TOKENS * TILE_TOKENS if self.window is None else 0
        position_L = np.arange(begin * TILE_TOKENS + mask_from, end * TILE_TOKENS)
        hidden_RQL = position_L > position_RQ[:, :, None]
        if self.window is not None:
            hidden_RQL |= position_L <= position_RQ[:, :, None] - self.window
        mask_RQL = torch.zeros(hidden_RQL.shape).masked_fill_(torch.from_numpy(hidden_RQL), -torch.inf)
        token_RQ = torch.from_numpy(self.rows.query_start_R1[row_R][:, None] + query_Q)
        return _Block(
            token_RQ=token_RQ.to(self.device),
            first_tile=begin - group_begin,
            last_tile=end - group_begin,
            mask_RQL=mask_RQL.to(self.device),
            mask_from=mask_from,
        )

    def _first_tile(self, position: npt.NDArray[np.int64]) -> int:
        """The first tile that is not hidden from all, rounded down to a segment: sums must pair the same tiles."""
        if self.window is None:
            return 0
        tile = max(0, int(position.min()) - self.window + 1) // TILE_TOKENS
        return tile // SEGMENT_TILES * SEGMENT_TILES


def prepare_step(
    rows: AttentionRows, *, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None, device: torch.device
) -> Attend:
    """`paged_attention` of one step, for every layer with the same window; the arguments are `plan_attention`'s."""
    plan = plan_attention(
        rows, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, window=window, device=device
    )
    return partial(paged_attention, plan)


def paged_attention(
    plan: AttentionPlan, q_TNH: torch.Tensor, key_PBKH: torch.Tensor, value_PBKH: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention of each query over its row's cached positions, its own included.

    Args:
        plan: from `plan_attention` for this step.
        q_TNH: queries, rotated; rows that the plan does not name (padding) are not read.
        key_PBKH: keys; those of this step have been stored already.
        value_PBKH: values.
        scale: multiplies the scores.

    Returns:
        The outputs [T, N, H] in the dtype of `q_TNH`; zero for rows that the plan does not name.
    """
    K, H = key_PBKH.shape[2:]
    out_TNH = torch.zeros_like(q_TNH, memory_format=torch.contiguous_format)
    for group in plan.groups:
        R = group.blocks[0].token_RQ.shape[0]
        keys = key_PBKH.view(-1, H).index_select(0, group.key_index).float().view(R * K, -1, H)
        values = value_PBKH.view(-1, H).index_select(0, group.value_index).float().view(-1, R * K, TILE_TOKENS, H)
        for block in group.blocks:
            seen = keys[:, block.first_tile * TILE_TOKENS : block.last_tile * TILE_TOKENS]
            seen_values = values[block.first_tile : block.last_tile]
            out_RQNH = _attend(q_TNH[block.token_RQ].float(), seen, seen_values, block, scale)
            out_TNH[block.token_RQ] = out_RQNH.to(q_TNH.dtype)
    return out_TNH


def _attend(
    q_RQNH: torch.Tensor, key_XLH: torch.Tensor, value_JXSH: torch.Tensor, block: _Block, scale: float
) -> torch.Tensor:
    """One block of queries over its keys and values, X = R K."""
    R, Q, N, H = q_RQNH.shape
    X = key_XLH.shape[0]
    K, G = X // R, N * R // X
    M = -(-Q * G // ROW_MULTIPLE) * ROW_MULTIPLE

    def unpacked(packed: torch.Tensor) -> torch.Tensor:
        queries: torch.Tensor = packed.view(R, K, M, -1)[:, :, : Q * G].unflatten(2, (Q, G))
        return queries

    q_XMH = q_RQNH.new_zeros(X, M, H)
    torch.mul(q_RQNH.unflatten(2, (K, G)).transpose(1, 2), scale, out=unpacked(q_XMH))
    score_XML = torch.bmm(q_XMH, key_XLH.transpose(1, 2))
    unpacked(score_XML)[..., block.mask_from :] += block.mask_RQL[:, None, :, None]
    torch.softmax(score_XML, -1, out=score_XML)

    prob_JXMS = score_XML.unflatten(2, (-1, TILE_TOKENS)).permute(2, 0, 1, 3)
    partial_ZMH = torch.bmm(prob_JXMS.reshape(-1, M, TILE_TOKENS), value_JXSH.flatten(0, 1))
    out_XMH = _sum_tiles(partial_ZMH.view(-1, X, M, H))
    return unpacked(out_XMH).transpose(1, 2).reshape(R, Q, N, H)


def _sum_tiles(partial_J: torch.Tensor) -> torch.Tensor:
    """Sum over the first axis, in place: a balanced tree within each segment, then segment after segment."""
    stride = 1
    while stride < SEGMENT_TILES:
        right = partial_J[stride :: 2 * stride]
        partial_J[:: 2 * stride][: len(right)] += right
        stride *= 2
    total, *segments = partial_J[::SEGMENT_TILES].unbind()
    for segment in segments:
        total += segment
    return total
