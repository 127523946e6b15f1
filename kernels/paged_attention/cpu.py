"""Attention over a paged cache by torch's fused kernel for the CPU (FlashAttention, Dao et al., arXiv 2205.14135).

It is one operation where `reference.py` takes a dozen, and keeps the promise when three things hold, which
`fused_check.py` asks of the library when a model is loaded:

- rows do not depend on how many rows a call has, if those are a multiple of 4: a KV head's queries are packed into rows
  and padded;
- keys are walked in tiles of 512 positions counted from position 0, and tiles that a query does not see change nothing;
- the last tile has a length that adds in the order of a whole tile.

Everything is computed in float32, from keys and values as they are stored: for lower precisions the kernel takes one of
two matrix products according to the number of rows and threads, and their bits differ.

Where the check finds otherwise, and for sliding windows, whose first tiles may be hidden altogether, `reference.py`
computes. One layer is always served by one of them.

    T packed query tokens   N query heads   K KV heads   G = N / K   H head dim   P blocks   B block size
    R rows   Q queries a row   M rows of a product   L positions
"""

import math
from collections import defaultdict
from collections.abc import Sequence
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


class _Scratch:
    """Memory that keys and values are gathered into, layer after layer.

    Memory that is taken anew costs a page fault for every 4 KB, which is more than filling it.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def gather(self, name: str, cache_PBKH: torch.Tensor, slot_L: torch.Tensor, num_rows: int) -> torch.Tensor:
        """float32 [R, K, L, H], until something else is gathered by this name."""
        K, H = cache_PBKH.shape[2:]
        found = self._memory(name, cache_PBKH.dtype, len(slot_L), K * H)
        torch.index_select(cache_PBKH.view(-1, K * H), 0, slot_L, out=found)
        if found.dtype != torch.float32:
            found = self._memory(name, torch.float32, len(slot_L), K * H).copy_(found)
        return found.view(num_rows, -1, K, H).transpose(1, 2)

    def _memory(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        size = math.prod(shape)
        # A long context's chunk has memory for itself.
        if size > _MAX_GATHERED:
            return torch.empty(shape, dtype=dtype)
        if (name, dtype) not in self._kept:
            # Steps run in inference mode, and others may follow that do not.
            with torch.inference_mode(mode=False):
                self._kept[name, dtype] = torch.empty(_MAX_GATHERED, dtype=dtype)
        return self._kept[name, dtype][:size].view(shape)


@dataclass(frozen=True, slots=True)
class _Product:
    """Queries that the fused kernel serves in one call."""

    num_query: int
    mask_R1ML: torch.Tensor
    """[R, 1, M, L]: 0 where a query sees a position, -inf elsewhere. M is Q G, padded."""


@dataclass(frozen=True, slots=True)
class _DecodeRows:
    """R rows of one query, whose keys and values are gathered together."""

    token_R: torch.Tensor
    """int64: where the queries are packed."""
    slot_L: torch.Tensor
    """int64 [R L]: the positions' entries in the cache."""
    product: _Product

    def attend(
        self,
        scratch: _Scratch,
        q_TNH: torch.Tensor,
        out_TNH: torch.Tensor,
        key_PBKH: torch.Tensor,
        value_PBKH: torch.Tensor,
        scale: float,
    ) -> None:
        """Write the outputs of these rows' tokens."""
        R, K = len(self.token_R), key_PBKH.shape[2]
        key_RKLH = scratch.gather("keys", key_PBKH, self.slot_L, R)
        value_RKLH = scratch.gather("values", value_PBKH, self.slot_L, R)
        q_RKGH = q_TNH.index_select(0, self.token_R).unflatten(1, (K, -1))
        G, mask_R1ML = q_RKGH.shape[2], self.product.mask_R1ML
        q_RKMH = torch.nn.functional.pad(q_RKGH.float(), (0, 0, 0, mask_R1ML.shape[2] - G))
        out_RKMH = _fused(q_RKMH, key_RKLH, value_RKLH, mask_R1ML, scale)
        out_TNH.index_copy_(0, self.token_R, out_RKMH[:, :, :G].flatten(1, 2).to(out_TNH.dtype))


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One row of several queries, in products that see about the same positions."""

    first_token: int
    slot_L: torch.Tensor
    """As in `_DecodeRows`."""
    products: tuple[_Product, ...]

    def attend(
        self,
        scratch: _Scratch,
        q_TNH: torch.Tensor,
        out_TNH: torch.Tensor,
        key_PBKH: torch.Tensor,
        value_PBKH: torch.Tensor,
        scale: float,
    ) -> None:
        """Write the outputs of this row's tokens."""
        K = key_PBKH.shape[2]
        key_1KLH = scratch.gather("keys", key_PBKH, self.slot_L, 1)
        value_1KLH = scratch.gather("values", value_PBKH, self.slot_L, 1)
        num_queries = [product.num_query for product in self.products]
        tokens = slice(self.first_token, self.first_token + sum(num_queries))
        q_KQGH, out_KQGH = (_by_kv_head(x_TNH[tokens], K) for x_TNH in (q_TNH, out_TNH))
        q_1KMH = self._packed(q_KQGH)
        parts_1KMH = q_1KMH.split([product.mask_R1ML.shape[2] for product in self.products], dim=2)
        outs_KQGH = out_KQGH.split(num_queries, dim=1)
        for product, part_1KMH, part_KQGH in zip(self.products, parts_1KMH, outs_KQGH, strict=True):
            L, num_rows = product.mask_R1ML.shape[3], product.num_query * q_KQGH.shape[2]
            result_1KMH = _fused(part_1KMH, key_1KLH[:, :, :L], value_1KLH[:, :, :L], product.mask_R1ML, scale)
            part_KQGH.copy_(result_1KMH[0, :, :num_rows].view(part_KQGH.shape))

    def _packed(self, q_KQGH: torch.Tensor) -> torch.Tensor:
        """float32 [1, K, M, H] of all products, one after the other; only the last one is padded."""
        K, Q, G, H = q_KQGH.shape
        num_rows = sum(product.mask_R1ML.shape[2] for product in self.products)
        q_1KMH = torch.empty(1, K, num_rows, H)
        q_1KMH[0, :, : Q * G].view(q_KQGH.shape).copy_(q_KQGH)
        q_1KMH[0, :, Q * G :] = 0
        return q_1KMH


class CpuAttention:
    """Plans steps, and remembers what was found for each head size."""

    name = "torch"

    def __init__(self) -> None:
        self._lengths: dict[int, tuple[int, ...]] = {}
        self._scratch = _Scratch()

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
        return partial(_attend, self._scratch, [*planner.decode_rows(), *planner.chunks()], rows.num_tokens)

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

    def decode_rows(self) -> list[_DecodeRows]:
        """Rows of one query go with those that are padded to the same length."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for row in np.flatnonzero(self.num_query_R == 1).tolist():
            by_length[self._padded(int(self.rows.start_R[row]) + 1)].append(row)
        planned = []
        for length, members in sorted(by_length.items()):
            at_once = max(1, _MAX_GATHERED // (length * self.elements_a_token))
            for first in range(0, len(members), at_once):
                row_R = np.array(members[first : first + at_once])
                token_R = torch.from_numpy(self.rows.query_start_R1[row_R])
                planned.append(_DecodeRows(token_R, self._slots(row_R, 1), self._product(row_R, 0, 1)))
        return planned

    def chunks(self) -> list[_Chunk]:
        """Each row of several queries."""
        planned = []
        for row in np.flatnonzero(self.num_query_R > 1).tolist():
            row_R, num_query = np.array([row]), int(self.num_query_R[row])
            products = tuple(self._product(row_R, *cut) for cut in self._cuts(int(self.rows.start_R[row]), num_query))
            planned.append(_Chunk(int(self.rows.query_start_R1[row]), self._slots(row_R, num_query), products))
        return planned

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

    def _slots(self, row_R: npt.NDArray[np.int64], num_query: int) -> torch.Tensor:
        """Where the positions that so many queries of each row walk are stored."""
        rows = self.rows
        last_R1 = rows.start_R[row_R][:, None] + (num_query - 1)
        # Positions past the row's end read its last key, which exists.
        key_RL = np.minimum(np.arange(self._padded(int(last_R1.max()) + 1)), last_R1)
        block_RL = rows.block_table_RC[row_R[:, None], key_RL // rows.block_size_tokens]
        return torch.from_numpy((block_RL * rows.block_size_tokens + key_RL % rows.block_size_tokens).reshape(-1))

    def _product(self, row_R: npt.NDArray[np.int64], first: int, last: int) -> _Product:
        """The queries `first : last`, counted within each row."""
        position_RQ = self.rows.start_R[row_R][:, None] + np.arange(first, last)
        position_L = np.arange(self._padded(int(position_RQ.max()) + 1))
        hidden_RML = (position_L > position_RQ[:, :, None]).repeat(self.heads_a_group, 1)
        missing = -hidden_RML.shape[1] % ROW_MULTIPLE
        hidden_RML = np.pad(hidden_RML, ((0, 0), (0, missing), (0, 0)))
        mask_RML = torch.zeros(hidden_RML.shape).masked_fill_(torch.from_numpy(hidden_RML), -torch.inf)
        return _Product(last - first, mask_RML[:, None])


def _attend(
    scratch: _Scratch,
    parts: Sequence[_DecodeRows | _Chunk],
    num_tokens: int,
    q_TNH: torch.Tensor,
    key_PBKH: torch.Tensor,
    value_PBKH: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    out_TNH[num_tokens:] = 0
    for part in parts:
        part.attend(scratch, q_TNH, out_TNH, key_PBKH, value_PBKH, scale)
    return out_TNH


def _by_kv_head(x_QNH: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """The same memory as [K, Q, G, H]."""
    x_KQGH: torch.Tensor = x_QNH.unflatten(1, (num_kv_heads, -1)).transpose(0, 1)
    return x_KQGH


def _fused(
    q_RKMH: torch.Tensor, key_RKLH: torch.Tensor, value_RKLH: torch.Tensor, mask_R1ML: torch.Tensor, scale: float
) -> torch.Tensor:
    # Called by name, so that no rule of torch's picks another kernel for some shape.
    R, K, M, _ = q_RKMH.shape
    out_RKMH: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_RKMH, key_RKLH, value_RKLH, 0.0, False, attn_mask=mask_R1ML.expand(R, K, M, -1), scale=scale
    )[0]
    return out_RKMH
