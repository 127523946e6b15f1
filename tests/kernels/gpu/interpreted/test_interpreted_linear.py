import pytest
import torch

from paged_sequences import relative_error
from triode.kernels.gpu_traits import INTERPRETER
from triode.kernels.linear.gpu import linear_sequential
from triode.kernels.linear.tiles import LinearTile
from triode.kernels.swiglu import gpu, reference

TILE = LinearTile(rows=32, tokens=16, features=64, num_warps=4, num_stages=2)
AHEAD = [LinearTile(16, 8, 64, 4, 1, ahead) for ahead in (32, 64, 128)]
"""Part of the weights, a whole number of steps, and more than there are."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "out_features", "in_features"), [(1, 64, 128), (5, 100, 96), (17, 33, 64)])
@pytest.mark.parametrize("tile", [TILE, *AHEAD])
def test_the_product_is_right_at_every_edge(
    tile: LinearTile, dtype: torch.dtype, num_tokens: int, out_features: int, in_features: int
) -> None:
    x, weight = torch.randn(num_tokens, in_features).to(dtype), torch.randn(out_features, in_features).to(dtype)
    bias = torch.randn(out_features).to(dtype)
    out = torch.full((num_tokens, out_features), torch.nan, dtype=dtype)
    linear_sequential(x, weight, out, tile, INTERPRETER, bias_N=bias)
    want = x.double() @ weight.double().T + bias.double()
    assert relative_error(out, want) < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]


def test_a_product_may_be_wider_than_its_operands() -> None:
    x, weight, out = torch.randn(3, 64).half(), torch.randn(40, 64).half(), torch.full((3, 40), torch.nan)
    linear_sequential(x, weight, out, TILE, INTERPRETER)
    assert relative_error(out, x.double() @ weight.double().T) < 1e-6


@pytest.mark.parametrize("tile", [TILE, *AHEAD])
def test_fused_and_separate_swiglu_agree_with_the_reference(tile: LinearTile) -> None:
    # Small integers: their sums are exact in every order, so equality is about the kernels and not about NumPy's matmul.
    x, weight = torch.randint(-3, 4, (5, 96)).half(), torch.randint(-3, 4, (80, 96)).half() / 16
    gate_up, fused, separate = (torch.full((5, width), torch.nan, dtype=torch.float16) for width in (80, 40, 40))
    linear_sequential(x, weight, gate_up, TILE, INTERPRETER)
    linear_sequential(x, weight, fused, tile, INTERPRETER, swiglu=True)
    gpu.swiglu(gate_up, separate, INTERPRETER)
    assert torch.equal(fused, separate)
    assert relative_error(fused, reference.swiglu(gate_up)) < 1e-3


def test_an_output_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"out must be \(3, 40\)"):
        linear_sequential(torch.randn(3, 64), torch.randn(40, 64), torch.empty(3, 41), TILE, INTERPRETER)
