"""Every variant that a launcher can choose, compiled for GPUs that are not there. Nothing runs.

What whole models launch is compiled by `tests/models/cuda/test_cross_compiled_models.py`.
"""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from cross_compile import AMPERE, HOPPER, fits, launches_compiled_for
from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.guide_mask.gpu import forbid
from triode.kernels.linear.gpu import linear_sequential
from triode.kernels.linear.tiles import (
    MEASURED,
    MEASURED_QKV,
    MEASURED_SWIGLU,
    LinearTile,
    linear_tile,
    qkv_tile,
    swiglu_tile,
)
from triode.kernels.paged_attention.gpu import AttentionWorkspace, paged_attention
from triode.kernels.qkv_epilogue.fused import qkv_fused
from triode.kernels.rms_norm.gpu import rms_norm
from triode.kernels.swiglu.gpu import swiglu

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

GPUS = pytest.mark.parametrize("traits", [AMPERE, HOPPER], ids=["sm80", "sm90"])
HEAD_DIMS = (64, 80, 96, 128, 256)


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*size, dtype=dtype)


def indices(*size: int) -> torch.Tensor:
    return torch.zeros(*size, dtype=torch.int32)


def attend(
    head_dim: int,
    traits: GpuTraits,
    *,
    query_tokens: int,
    num_splits: int,
    window_tokens: int = 0,
    kv_dtype: torch.dtype = torch.bfloat16,
    block_size: int = 16,
) -> None:
    num_heads, num_kv_heads, num_rows = 14, 2, 3
    pool = empty(4, block_size, num_kv_heads, head_dim, dtype=kv_dtype)
    q = empty(num_rows * query_tokens, num_heads, head_dim)
    workspace = AttentionWorkspace.allocate(200, 4, 128, head_dim, torch.device("cpu"))
    paged_attention(
        q,
        pool,
        pool,
        indices(num_rows, 4),
        indices(num_rows + 1),
        indices(num_rows),
        torch.empty_like(q),
        scale=0.1,
        max_query_tokens=query_tokens,
        traits=traits,
        window_tokens=window_tokens,
        num_splits=num_splits,
        workspace=workspace,
    )


def product(tile: LinearTile, in_features: int, traits: GpuTraits, *, fused: bool = False) -> None:
    rows = 2 * tile.rows if fused else tile.rows
    out = empty(tile.tokens, tile.rows)
    linear_sequential(empty(tile.tokens, in_features), empty(rows, in_features), out, tile, traits, swiglu=fused)


@pytest.mark.slow
@GPUS
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention_compiles_for_every_head_size_cache_and_window(head_dim: int, traits: GpuTraits) -> None:
    caches = [torch.bfloat16, torch.float8_e4m3fn] if traits.has_fp8 else [torch.bfloat16]
    launches = itertools.product(((1, 1), (1, 4), (200, 1), (200, 4)), (0, 100), caches)
    with launches_compiled_for(traits) as compiled:
        for (query_tokens, num_splits), window_tokens, kv_dtype in launches:
            attend(
                head_dim,
                traits,
                query_tokens=query_tokens,
                num_splits=num_splits,
                window_tokens=window_tokens,
                kv_dtype=kv_dtype,
            )
    assert fits(compiled, traits)


@pytest.mark.parametrize(
    "block_size", [pytest.param(16, marks=pytest.mark.slow), 64, pytest.param(128, marks=pytest.mark.slow)]
)
def test_long_rows_have_a_kernel_of_their_own_on_hopper_alone(block_size: int) -> None:
    for traits, kernel, instruction in (
        (AMPERE, "attend", "cp.async.cg.shared.global"),
        (HOPPER, "attend_long_rows", "cp.async.bulk.tensor"),
    ):
        with launches_compiled_for(traits) as compiled:
            attend(128, traits, query_tokens=200, num_splits=1, block_size=block_size)
        assert [each.metadata.name for each in compiled] == [kernel]
        assert instruction in compiled[0].asm["ptx"]
        assert fits(compiled, traits)


def test_programs_that_share_long_rows_on_hopper_leave_states_to_a_kernel_that_merges() -> None:
    with launches_compiled_for(HOPPER) as compiled:
        attend(64, HOPPER, query_tokens=200, num_splits=4)
    assert [each.metadata.name for each in compiled] == ["attend_long_rows", "merge_long_rows"]
    assert fits(compiled, HOPPER)


@pytest.mark.slow
@GPUS
def test_products_compile_for_every_tile_of_the_table(traits: GpuTraits) -> None:
    plain = {(tile, size[1]) for size, tiles in MEASURED.items() for tile in tiles.values()}
    plain |= {(linear_tile(size, size, tokens), size) for size in (576, 4096) for tokens in (1, 16, 32, 64, 128)}
    fused = {(tile, size[1]) for size, tiles in MEASURED_SWIGLU.items() for tile in tiles.values()}
    fused |= {(swiglu_tile(size, size, tokens), size) for size in (576, 4096) for tokens in (1, 16, 32, 64, 128)}
    with launches_compiled_for(traits) as compiled:
        for tile, in_features in plain:
            product(tile, in_features, traits)
        for tile, in_features in fused:
            product(tile, in_features, traits, fused=True)
    assert fits(compiled, traits)


@GPUS
def test_fused_projections_compile_for_every_tile_of_the_table(traits: GpuTraits) -> None:
    shapes = [*((2 * pairs, hidden, 64) for pairs, hidden in MEASURED_QKV), (1152, 896, 32), (960, 1536, 32)]
    with launches_compiled_for(traits) as compiled:
        for width, hidden, half in shapes:
            num_kv_heads = 2
            pool = empty(4, 16, num_kv_heads, 2 * half)
            qkv_fused(
                empty(3, hidden),
                empty(width, hidden),
                empty(3, width),
                empty(8, half, dtype=torch.float32),
                empty(8, half, dtype=torch.float32),
                indices(3),
                indices(3),
                pool,
                pool,
                width // (2 * half) - 2 * num_kv_heads,
                qkv_tile(width // 2, hidden),
                traits,
                bias_E=empty(width),
            )
    assert fits(compiled, traits)


@GPUS
def test_masks_compile(traits: GpuTraits) -> None:
    with launches_compiled_for(traits) as compiled:
        forbid(empty(64, 152_064, dtype=torch.float32), indices(64, 4752), indices(64), traits)
        forbid(empty(1, 499, dtype=torch.float32), indices(1, 16), indices(1), traits)
    assert fits(compiled, traits)


def test_a_kernel_for_sm90_starts_before_its_predecessor_ends_and_one_for_sm80_does_not() -> None:
    for traits, expected in ((AMPERE, False), (HOPPER, True)):
        with launches_compiled_for(traits) as compiled:
            swiglu(empty(3, 2048), empty(3, 1024), traits)
        assert ("griddepcontrol.wait" in compiled[0].asm["ptx"]) == expected


def test_no_multiply_add_is_fused_but_where_the_source_says_so() -> None:
    with launches_compiled_for(HOPPER) as compiled:
        swiglu(empty(3, 2048), empty(3, 1024), HOPPER)
        rms_norm(empty(3, 3584), empty(3584), 1e-6, empty(3, 3584), HOPPER)
    assert all("fma.rn.f32" not in kernel.asm["ptx"] for kernel in compiled)
