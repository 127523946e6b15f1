import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from exact_attention import attention_float64
from triode.kernels.paged_attention import cpu, reference
from triode.kernels.paged_attention.cpu import CpuAttention
from triode.kernels.paged_attention.fused_check import find_tile_lengths
from triode.kernels.paged_attention.reference import paged_attention, plan_attention
from triode.kernels.paged_attention.rows import AttentionRows
from triode.kernels.threads import cpu_threads

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
        return paged_attention(plan, self.q_TNH.to(dtype), self.key_PBKH.to(dtype), self.value_PBKH.to(dtype), SCALE)


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


def attend_fused(step: Step, dtype: torch.dtype, rows: AttentionRows | None = None) -> torch.Tensor:
    """The queries of a step by what the CPU takes: torch's fused kernel where it keeps the promise."""
    N, H = step.q_TNH.shape[1:]
    K = step.key_PBKH.shape[2]
    kernels = CpuAttention()
    kernels.prepare(H)
    attend = kernels.plan(
        rows or step.rows, num_heads=N, num_kv_heads=K, head_dim=H, window=None, device=torch.device("cpu")
    )
    return attend(step.q_TNH.to(dtype), step.key_PBKH.to(dtype), step.value_PBKH.to(dtype), SCALE)


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("heads", [(6, 2, 16), (5, 1, 64), (14, 2, 80), (9, 3, 64)], ids=str)
def test_fused_mixed_rows_agree_with_the_definition(block: int, heads: tuple[int, int, int]) -> None:
    step = make_step(MIXED, heads=heads, block=block)
    expected = attention_float64(step.q_TNH, step.keys, step.values, step.rows, SCALE)
    torch.testing.assert_close(attend_fused(step, torch.float32).double(), expected, rtol=1e-5, atol=1e-5)


class Allocated(TorchDispatchMode):
    """Counts the bytes of what operations return and were not given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        returned = function(*args, **(kwargs or {}))
        given, found = (
            {each.untyped_storage().data_ptr(): each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)}
            for tree in ((args, kwargs), returned)
        )
        self.num_bytes += sum(found[key].untyped_storage().nbytes() for key in found.keys() - given.keys())
        return returned


def bytes_of_repeated_attention(num_positions: int) -> int:
    step = make_step([(num_positions - 1, 1)] * 8, heads=(9, 3, 64))
    query, keys, values = (part.bfloat16() for part in (step.q_TNH, step.key_PBKH, step.value_PBKH))
    kernels = CpuAttention()
    kernels.prepare(64)
    attend = kernels.plan(step.rows, num_heads=9, num_kv_heads=3, head_dim=64, window=None, device=torch.device("cpu"))
    attend(query, keys, values, SCALE)
    with Allocated() as allocated:
        attend(query, keys, values, SCALE)
    num_bytes: int = allocated.num_bytes
    return num_bytes


def test_what_a_layers_attention_allocates_does_not_grow_with_what_it_reads() -> None:
    """Fresh memory is faulted in page by page: it took several times as long as attention itself."""
    assert bytes_of_repeated_attention(60) == bytes_of_repeated_attention(500) > 0


def test_a_fused_low_precision_cache_is_read_as_it_is_stored() -> None:
    step = make_step(MIXED, heads=(9, 3, 64))
    keys, values = ([entries.bfloat16() for entries in part] for part in (step.keys, step.values))
    expected = attention_float64(step.q_TNH.bfloat16(), keys, values, step.rows, SCALE)
    output = attend_fused(step, torch.bfloat16)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_query_is_the_same_decoded_and_prefilled_by_the_fused_kernel(num_threads: int, dtype: torch.dtype) -> None:
    """Positions whose last tile is padded to every length that is used."""
    step = make_step([(0, 1300)], heads=(9, 3, 64))
    whole = attend_fused(step, dtype)
    generator = random.Random(1)
    positions = [generator.randrange(1300) for _ in range(120)] + [0, 63, 191, 192, 383, 384, 511, 512, 1023, 1024]
    chunk = 600
    rows = AttentionRows(
        query_start_R1=np.array([*range(len(positions) + 1), len(positions) + chunk]),
        start_R=np.array([*positions, 1300 - chunk]),
        block_table_RC=step.rows.block_table_RC.repeat(len(positions) + 1, 0),
        block_size_tokens=16,
    )
    order = [*positions, *range(1300 - chunk, 1300)]
    step.q_TNH = step.q_TNH[order]
    with cpu_threads(num_threads):
        assert torch.equal(attend_fused(step, dtype, rows), whole[order])


def lengths_of(order_of: Callable[[int], int]) -> tuple[int, ...]:
    """What the check finds for a kernel that adds `order_of(length of the last tile)` positions at a time."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
        prob = torch.softmax(q @ k.transpose(2, 3) * scale + mask, -1)
        length = (k.shape[2] - 1) % 512 + 1
        step = order_of(length)
        out = torch.zeros_like(q)
        for at in range(0, k.shape[2], step):
            out += (
                (prob[..., None][:, :, :4, at : at + step] * v[:, :, None, at : at + step])
                .sum(3)
                .repeat(1, 1, q.shape[2] // 4, 1)
            )
        return out

    return find_tile_lengths(attend, 8)


def test_the_check_finds_which_tiles_add_in_one_order() -> None:
    assert lengths_of(lambda length: 64) == (64, 128, 192, 256, 320, 384, 448, 512)
    assert lengths_of(lambda length: 32 if length in (256, 320) else 64) == (64, 128, 192, 384, 448, 512)


def test_a_kernel_that_does_not_keep_the_promise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "find_tile_lengths", lambda *_: ())
    step = make_step(MIXED)
    assert torch.equal(attend_fused(step, torch.float32), step.attend())
    kernels = CpuAttention()
    kernels.prepare(16)
    assert kernels.exceptions() == ["attention, heads of 16: reference"]
