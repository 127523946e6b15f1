"""Attention over a paged cache by torch's fused kernel for the CPU (FlashAttention, Dao et al., arXiv 2205.14135).

It is one operation where `reference.py` takes a dozen, and keeps the promise when three things hold, which
`fused_check.py` asks of the library when a model is loaded:

- rows do not depend on how many rows a call has, if those are a multiple of 4: a KV head's queries are packed into rows
  and padded;
- keys are walked in tiles of 512 positions counted from position 0, and tiles that a query does not see change nothing;
- the last tile has a length that adds in the order of a whole tile.

Everything is computed in float32, from keys and values as they are stored: for lower precisions the kernel takes one of
two matrix products according to the number of rows and threads, and their bits differ.

Where the check finds otherwise, and for sliding windows, whose first tiles may be hidden altogether, `reference.py` computes. One
layer is always served by one of them.

    T packed query tokens   N query heads   K KV heads   G = N / K   H head dim   P blocks   B block size
    R rows of a group   Q queries a row   X = R Q queries   M rows of a product   L positions
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from triode.kernels.paged_attention import reference
from triode.kernels.paged_attention.fused_check import MAX_ROWS, TILE_TOKENS, find_tile_lengths
from triode.kernels.paged_attention.reference import ROW_MULTIPLE, Attend
from triode.kernels.paged_attention.rows import AttentionRows

_MAX_QUERIES = 128
# Keys and values of decode rows that are gathered at once stay in the last-level cache.
_MAX_GATHERED = 2_000_000


@dataclass(frozen=True, slots=True)
class _Group:
    """R rows whose keys and values are gathered together."""

    num_rows: int
    token_X: torch.Tensor
    """int64 [R Q]: where the queries are packed."""
    slot_L: torch.Tensor
    """int64 [R L]: the positions' entries in the cache."""
    masks_RML: tuple[torch.Tensor, ...]
    """[R, 1, M, L] each, for one product after the other: 0 where a query sees a position, -inf elsewhere."""


class CpuAttention:
    """Plans steps, and remembers what was found for each head size."""

    name = "torch"

    def __init__(self) -> None:
        self._lengths: dict[int, tuple[int, ...]] = {}

    def prepare(self, head_dim: int) -> None:
        """Check the fused kernel, once a head size."""
        if head_dim not in self._lengths:
            self._lengths[head_dim] = find_tile_lengths(_fused, head_dim)

    def plan(
        self,
        rows: AttentionRows,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None,
        device: torch.device,
    ) -> Attend:
        """As `reference.prepare_step`, for a prepared head size."""
        lengths = self._lengths[head_dim]
        if window is not None or not lengths or num_heads // num_kv_heads > MAX_ROWS // ROW_MULTIPLE:
            return reference.prepare_step(
                rows,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                window=window,
                device=device,
            )
        planner = _Planner(rows, num_heads // num_kv_heads, num_kv_heads * head_dim, lengths)
        return partial(_attend, planner.decode_groups() + planner.chunk_groups())

    def exceptions(self) -> list[str]:
        """The head sizes that the fused kernel does not serve."""
        return [f"attention, heads of {size}: reference" for size, lengths in self._lengths.items() if not lengths]


class _Planner:
    def __init__(
        self, rows: AttentionRows, heads_a_group: int, elements_a_token: int, lengths: tuple[int, ...]
    ) -> None:
        self.rows = rows
        self.num_query_R = np.diff(rows.query_start_R1)
        self.heads_a_group = heads_a_group
        self.elements_a_token = elements_a_token
        self.lengths = lengths

    def decode_groups(self) -> list[_Group]:
        """Rows of one query share a group with those that are padded to the same length."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for row in np.flatnonzero(self.num_query_R == 1).tolist():
            by_length[self._padded(int(self.rows.start_R[row]) + 1)].append(row)
        groups = []
        for length, members in sorted(by_length.items()):
            at_once = max(1, _MAX_GATHERED // (length * self.elements_a_token))
            starts = range(0, len(members), at_once)
            groups += [self._group(np.array(members[at : at + at_once]), [(0, 1)]) for at in starts]
        return groups

    def chunk_groups(self) -> list[_Group]:
        """Each row of several queries, in products that see about the same positions."""
        rows = np.flatnonzero(self.num_query_R > 1).tolist()
        return [
            self._group(np.array([row]), self._cuts(int(self.rows.start_R[row]), int(self.num_query_R[row])))
            for row in rows
        ]

    def _cuts(self, start: int, num_query: int) -> list[tuple[int, int]]:
        """A product ends where the next one has to walk a longer tile. Only the last one is not a multiple of 4 queries."""
        size = min(_MAX_QUERIES, MAX_ROWS // self.heads_a_group) // ROW_MULTIPLE * ROW_MULTIPLE
        cuts, first = [], 0
        while first < num_query:
            num_walked = self._padded(start + first + 1) - (start + first)
            last = first + min(size, max(num_walked // ROW_MULTIPLE, 1) * ROW_MULTIPLE)
            cuts.append((first, min(last, num_query)))
            first = last
        return cuts

    def _padded(self, num_positions: int) -> int:
        """The positions that are walked for so many that are seen."""
        whole = (num_positions - 1) // TILE_TOKENS * TILE_TOKENS
        return whole + next(length for length in self.lengths if length >= num_positions - whole)

    def _group(self, row_R: npt.NDArray[np.int64], cuts: list[tuple[int, int]]) -> _Group:
        """`cuts` are the queries of each product, counted within each row."""
        rows = self.rows
        num_query = cuts[-1][1]
        last_R1 = rows.start_R[row_R][:, None] + (num_query - 1)
        # Positions past the row's end read its last key, which exists.
        key_RL = np.minimum(np.arange(self._padded(int(last_R1.max()) + 1)), last_R1)
        block_RL = rows.block_table_RC[row_R[:, None], key_RL // rows.block_size_tokens]
        slot_RL = block_RL * rows.block_size_tokens + key_RL % rows.block_size_tokens
        token_RQ = rows.query_start_R1[row_R][:, None] + np.arange(num_query)
        return _Group(
            num_rows=len(row_R),
            token_X=torch.from_numpy(token_RQ.reshape(-1)),
            slot_L=torch.from_numpy(slot_RL.reshape(-1)),
            masks_RML=tuple(self._mask(row_R, np.arange(first, last)) for first, last in cuts),
        )

    def _mask(self, row_R: npt.NDArray[np.int64], query_Q: npt.NDArray[np.int64]) -> torch.Tensor:
        position_RQ = self.rows.start_R[row_R][:, None] + query_Q
        position_L = np.arange(self._padded(int(position_RQ.max()) + 1))
        hidden_RML = (position_L > position_RQ[:, :, None]).repeat(self.heads_a_group, 1)
        missing = -hidden_RML.shape[1] % ROW_MULTIPLE
        hidden_RML = np.pad(hidden_RML, ((0, 0), (0, missing), (0, 0)))
        return torch.zeros(hidden_RML.shape).masked_fill_(torch.from_numpy(hidden_RML), -torch.inf)[:, None]


def _attend(
    groups: list[_Group], q_TNH: torch.Tensor, key_PBKH: torch.Tensor, value_PBKH: torch.Tensor, scale: float
) -> torch.Tensor:
    out_TNH = torch.zeros_like(q_TNH, memory_format=torch.contiguous_format)
    for group in groups:
        q_XNH = q_TNH.index_select(0, group.token_X)
        out_TNH.index_copy_(0, group.token_X, _attend_group(group, q_XNH, key_PBKH, value_PBKH, scale))
    return out_TNH


def _attend_group(
    group: _Group, q_XNH: torch.Tensor, key_PBKH: torch.Tensor, value_PBKH: torch.Tensor, scale: float
) -> torch.Tensor:
    """The outputs [X, N, H] of X = R Q queries."""
    (X, N, H), K, R = q_XNH.shape, key_PBKH.shape[2], group.num_rows
    key_RKLH, value_RKLH = (
        cache.view(-1, K * H).index_select(0, group.slot_L).float().view(R, -1, K, H).transpose(1, 2)
        for cache in (key_PBKH, value_PBKH)
    )
    # Queries and, in their place, outputs.
    x_RKMH = key_RKLH.new_empty(R, K, sum(mask.shape[2] for mask in group.masks_RML), H)
    Q, G = X // R, N // K
    x_RKMH[:, :, Q * G :] = 0
    x_RKQGH = x_RKMH[:, :, : Q * G].view(R, K, Q, G, H)
    x_RKQGH.copy_(q_XNH.view(R, Q, K, G, H).transpose(1, 2))
    first = 0
    for mask_RML in group.masks_RML:
        M, L = mask_RML.shape[2:]
        rows = x_RKMH[:, :, first : first + M]
        rows.copy_(_fused(rows, key_RKLH[:, :, :L], value_RKLH[:, :, :L], mask_RML.expand(R, K, M, L), scale))
        first += M
    out_XNH = torch.empty_like(q_XNH)
    out_XNH.view(R, Q, K, G, H).copy_(x_RKQGH.transpose(1, 2))
    return out_XNH


def _fused(
    q_RKMH: torch.Tensor, key_RKLH: torch.Tensor, value_RKLH: torch.Tensor, mask_RKML: torch.Tensor, scale: float
) -> torch.Tensor:
    # Called by name, so that no rule of torch's picks another kernel for some shape.
    out_RKMH: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_RKMH, key_RKLH, value_RKLH, 0.0, False, attn_mask=mask_RKML, scale=scale
    )[0]
    return out_RKMH
