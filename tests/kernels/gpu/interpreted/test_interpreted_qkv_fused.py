"""The fused projection gives the bits of the two kernels that it replaces."""

import pytest
import torch

from triode.kernels.gpu_traits import INTERPRETER
from triode.kernels.linear.gpu import linear_sequential
from triode.kernels.linear.tiles import LinearTile
from triode.kernels.qkv_epilogue.fused import qkv_fused
from triode.kernels.qkv_epilogue.gpu import qkv_epilogue

NUM_TOKENS, HIDDEN, NUM_HEADS, NUM_KV_HEADS = 5, 96, 3, 2
NUM_ALL_HEADS = NUM_HEADS + 2 * NUM_KV_HEADS
TILES = [LinearTile(16, 8, 32, 4, 2), LinearTile(16, 16, 32, 4, 2, ahead=32), LinearTile(32, 8, 64, 4, 1, ahead=128)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("head_dim", [32, 80])
@pytest.mark.parametrize("tile", TILES)
def test_the_fused_projection_gives_what_product_and_epilogue_give(
    tile: LinearTile, head_dim: int, with_bias: bool, dtype: torch.dtype
) -> None:
    width = NUM_ALL_HEADS * head_dim
    # Small integers: the sums are exact in every order, so equality is about the kernels and not about NumPy's matmul.
    x, weight = (
        torch.randint(-3, 4, (NUM_TOKENS, HIDDEN)).to(dtype),
        torch.randint(-3, 4, (width, HIDDEN)).to(dtype) / 16,
    )
    bias = torch.randn(width).to(dtype) if with_bias else None
    angle = torch.rand(64, head_dim // 2) * 6
    position, slot = torch.randint(0, 64, (NUM_TOKENS,)), torch.randperm(32)[:NUM_TOKENS] + 16
    outs = []
    for fused in (False, True):
        qkv = torch.full((NUM_TOKENS, width), torch.nan, dtype=dtype)
        key, value = (torch.full((3, 16, NUM_KV_HEADS, head_dim), torch.nan, dtype=dtype) for _ in range(2))
        tables = (angle.cos(), angle.sin(), position, slot, key, value)
        if fused:
            q = qkv_fused(x, weight, qkv, *tables, num_heads=NUM_HEADS, tile=tile, traits=INTERPRETER, bias_E=bias)
        else:
            linear_sequential(x, weight, qkv, tile, INTERPRETER)
            q = qkv_epilogue(qkv, *tables, num_heads=NUM_HEADS, traits=INTERPRETER, bias_E=bias)
        outs.append((q, key.flatten(0, 1)[slot], value.flatten(0, 1)[slot]))
    for got, want in zip(outs[1], outs[0], strict=True):
        assert got.isfinite().all()
        assert torch.equal(got, want)


def test_heads_that_are_rotated_in_part_are_refused() -> None:
    pool = torch.zeros(2, 16, 1, 32)
    with pytest.raises(ValueError, match="heads must be rotated whole, got 16 of 32"):
        qkv_fused(
            torch.zeros(1, 16),
            torch.zeros(96, 16),
            torch.zeros(1, 96),
            torch.zeros(4, 8),
            torch.zeros(4, 8),
            torch.zeros(1, dtype=torch.long),
            torch.zeros(1, dtype=torch.long),
            pool,
            pool,
            1,
            TILES[0],
            INTERPRETER,
        )
