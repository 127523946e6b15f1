import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from exact_attention import attention_float64
from triode.kernels.paged_attention import reference
from triode.kernels.paged_attention.reference import paged_attention, plan_attention
from triode.kernels.paged_attention.rows import AttentionRows

SCALE = 0.31


@dataclass
class Step:
    """Queries over a cache in which every entry that no row has written is NaN."""

    q_TNH: torch.Tensor
    key_PBKH: torch.Tensor
    value_PBKH: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    rows: AttentionRows

    def attend(self, window: int | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        N, H = self.q_TNH.shape[1:]
        K = self.key_PBKH.shape[2]
        plan = plan_attention(
            self.rows, num_heads=N, num_kv_heads=K, head_dim=H, window=window, device=torch.device("cpu")
        )
        return paged_attention(self.q_TNH.to(dtype), self.key_PBKH.to(dtype), self.value_PBKH.to(dtype), plan, SCALE)


def make_step(
    lengths: list[tuple[int, int]], *, heads: tuple[int, int, int] = (6, 2, 16), block: int = 16, seed: int = 0
) -> Step:
    """A step of rows (tokens in the cache before it, query tokens), with shuffled blocks."""
    N, K, H = heads
    generator = torch.Generator().manual_seed(seed)
    ends = [start + count for start, count in lengths]
    num_blocks = [-(-end // block) for end in ends]
    free = random.Random(seed).sample(range(1, 1 + sum(num_blocks)), sum(num_blocks))
    cache = torch.full((2, 1 + sum(num_blocks), block, K, H), torch.nan)
    table_RC = np.full((len(lengths), max(num_blocks)), 10**6)
    contiguous: list[list[torch.Tensor]] = [[], []]
    for row, (end, count) in enumerate(zip(ends, num_blocks, strict=True)):
        table_RC[row, :count] = blocks = [free.pop() for _ in range(count)]
        for kind in (0, 1):
            entries = torch.randn(end, K, H, generator=generator)
            contiguous[kind].append(entries)
            slot = torch.tensor(blocks)[torch.arange(end) // block] * block + torch.arange(end) % block
            cache[kind].flatten(0, 1)[slot] = entries
    counts = [count for _, count in lengths]
    rows = AttentionRows(
        query_start_R1=np.cumsum([0, *counts]),
        start_R=np.array([start for start, _ in lengths]),
        block_table_RC=table_RC,
        block_size_tokens=block,
    )
    q_TNH = torch.randn(sum(counts), N, H, generator=generator)
    return Step(q_TNH, cache[0], cache[1], contiguous[0], contiguous[1], rows)


MIXED = [(0, 1), (130, 1), (63, 1), (0, 90), (64, 1), (100, 37), (700, 1), (5, 2)]


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("heads", [(6, 2, 16), (4, 4, 8), (5, 1, 64), (14, 2, 80)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 50, 600])
def test_mixed_rows_agree_with_the_definition(block: int, heads: tuple[int, int, int], window: int | None) -> None:
    step = make_step(MIXED, heads=heads, block=block)
    expected = attention_float64(step.q_TNH, step.keys, step.values, step.rows, SCALE, window)
    torch.testing.assert_close(step.attend(window).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_low_precision_cache_is_read_as_it_is_stored() -> None:
    step = make_step(MIXED)
    keys, values = ([entries.bfloat16() for entries in part] for part in (step.keys, step.values))
    expected = attention_float64(step.q_TNH.bfloat16(), keys, values, step.rows, SCALE)
    output = step.attend(dtype=torch.bfloat16)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("window", [None, 70, 900])
@pytest.mark.parametrize("heads", [(6, 2, 16), (4, 4, 8), (7, 1, 128), (2, 1, 256)], ids=str)
def test_a_query_is_the_same_decoded_and_prefilled(heads: tuple[int, int, int], window: int | None) -> None:
    """Positions of a long row, as part of one chunk and alone among others; the window starts in many tiles."""
    step = make_step([(0, 1300)], heads=heads)
    whole = step.attend(window)
    for position in (*range(0, 130, 3), 511, 512, 575, 576, 640, 1023, 1024, 1088, 1299):
        step.rows = AttentionRows(
            query_start_R1=np.array([0, 1, 2, 3]),
            start_R=np.array([position, 0, max(0, position - 64)]),
            block_table_RC=step.rows.block_table_RC.repeat(3, 0)[:3],
            block_size_tokens=16,
        )
        q_TNH = step.q_TNH
        step.q_TNH = q_TNH[[position, 0, max(0, position - 64)]]
        assert torch.equal(step.attend(window)[0], whole[position])
        step.q_TNH = q_TNH


def test_the_cut_into_groups_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step(MIXED)
    expected = step.attend()
    monkeypatch.setattr(reference, "_MAX_KEYS", 1)
    monkeypatch.setattr(reference, "_MAX_SCORES", 1)
    assert torch.equal(step.attend(), expected)


def test_another_tile_length_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step(MIXED)
    expected = step.attend()
    monkeypatch.setattr(reference, "TILE_TOKENS", 32)
    assert not torch.equal(step.attend(), expected)


def test_torch_attention_would_not_keep_the_promise() -> None:
    """The reason for an attention of our own: torch's decodes a position otherwise than it prefills it."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 9, 100, 64)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    whole = sdpa(q, k, v, is_causal=True)
    alone = [sdpa(q[:, :, p : p + 1], k[:, :, : p + 1], v[:, :, : p + 1]) for p in range(100)]
    assert not torch.equal(torch.cat(alone, 2), whole)


def test_rows_that_no_plan_names_are_zero() -> None:
    step = make_step([(3, 2)])
    step.q_TNH = torch.cat((step.q_TNH, torch.full_like(step.q_TNH, torch.nan)))
    assert torch.equal(step.attend()[2:], torch.zeros(2, 6, 16))
