"""Sequences in a shuffled KV pool, and attention over them in float64: the oracle of the GPU kernels' tests."""

import dataclasses
import math

import torch


@dataclasses.dataclass(frozen=True)
class PagedSequences:
    """One row a sequence; every number that a launcher takes. Blocks that no row owns hold NaN."""

    q_TNH: torch.Tensor
    key_PBKH: torch.Tensor
    value_PBKH: torch.Tensor
    block_table_RC: torch.Tensor
    query_start_R1: torch.Tensor
    start_R: torch.Tensor

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.q_TNH.shape[-1])

    @property
    def max_query_tokens(self) -> int:
        return int(self.query_start_R1.diff().max())


def paged_sequences(
    starts: list[int],
    num_queries: list[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> PagedSequences:
    """Random rows: row r has `starts[r]` tokens in the cache and `num_queries[r]` query tokens."""
    generator = torch.Generator().manual_seed(len(starts) + sum(starts) + head_dim)
    lengths = [start + num for start, num in zip(starts, num_queries, strict=True)]
    blocks = [math.ceil(length / block_size) for length in lengths]
    order = (torch.randperm(sum(blocks), generator=generator) + 1).int()
    table = torch.zeros(len(starts), max(blocks), dtype=torch.int32)
    pools = [torch.full((sum(blocks) + 1, block_size, num_kv_heads, head_dim), math.nan) for _ in range(2)]
    for row, own in enumerate(order.split(blocks)):
        table[row, : len(own)] = own
        for pool in pools:
            tokens = pool[own.long()].flatten(0, 1)
            tokens[: lengths[row]] = torch.randn(lengths[row], num_kv_heads, head_dim, generator=generator)
            pool[own.long()] = tokens.unflatten(0, (-1, block_size))
    key, value = (pool.to(kv_dtype or dtype).to(device) for pool in pools)
    return PagedSequences(
        q_TNH=torch.randn(sum(num_queries), num_heads, head_dim, generator=generator).to(dtype).to(device),
        key_PBKH=key,
        value_PBKH=value,
        block_table_RC=table.to(device),
        query_start_R1=torch.tensor([0, *num_queries]).cumsum(0).int().to(device),
        start_R=torch.tensor(starts, dtype=torch.int32, device=device),
    )


def attention_oracle(rows: PagedSequences, window_tokens: int = 0) -> torch.Tensor:
    """Attention of every query token, float64."""
    group = rows.q_TNH.shape[1] // rows.key_PBKH.shape[2]
    out_TNH = torch.empty(rows.q_TNH.shape, dtype=torch.float64, device=rows.q_TNH.device)
    bounds = rows.query_start_R1.tolist()
    for row, start in enumerate(rows.start_R.tolist()):
        first, last = bounds[row], bounds[row + 1]
        length = start + last - first
        blocks = rows.block_table_RC[row].long()
        key, value = (
            pool[blocks].flatten(0, 1)[:length].double().repeat_interleave(group, 1)
            for pool in (rows.key_PBKH, rows.value_PBKH)
        )
        position = start + torch.arange(last - first, device=key.device)[:, None]
        seen = torch.arange(length, device=key.device)[None, :]
        visible = (seen <= position) & ((seen > position - window_tokens) | (window_tokens == 0))
        scores = torch.einsum("qnh,knh->nqk", rows.q_TNH[first:last].double(), key) * rows.scale
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        out_TNH[first:last] = torch.einsum("nqk,knh->qnh", weights, value)
    return out_TNH


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖; NaN when anything is NaN."""
    return float((got.double() - want.double()).norm() / want.double().norm())
