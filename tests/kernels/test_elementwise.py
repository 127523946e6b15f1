"""Norms, rotation, gate and store against float64; their rows do not depend on where they stand."""

from collections.abc import Callable

import pytest
import torch

from triode.kernels.rms_norm.reference import add_rms_norm, rms_norm
from triode.kernels.rotary.reference import rotary
from triode.kernels.store_kv.reference import store_kv
from triode.kernels.swiglu.reference import swiglu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (7, 576), (5, 3, 16), (33, 100)], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).mul(3).to(dtype), torch.rand(shape[-1]).to(dtype)
    x64 = x.double()
    close(rms_norm(x, weight, 1e-5), x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_keeps_the_sum(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(5, 64).to(dtype), torch.randn(5, 64).to(dtype), torch.rand(64).to(dtype)
    total = residual + x
    output = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total)
    assert torch.equal(output, rms_norm(total, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_turns_each_pair_by_its_angle(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(5, 4, 16).to(dtype)
    angle = torch.randn(5, 8, dtype=torch.float64)
    pairs = torch.complex(qkv[:, :3, :8].double(), qkv[:, :3, 8:].double())
    turned = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
    untouched = qkv[:, 3].clone()
    rotary(qkv[:, :3], angle.cos().float(), angle.sin().float())
    close(qkv[:, :3], torch.cat((turned.real, turned.imag), -1))
    assert torch.equal(qkv[:, 3], untouched)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(7, 200).mul(4).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    close(swiglu(gate_up), torch.nn.functional.silu(gate) * up)


def test_swiglu_of_extreme_gates_is_finite() -> None:
    gate_up = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4] + [2.0] * 5])
    torch.testing.assert_close(swiglu(gate_up), torch.tensor([[0.0, 0.0, 0.0, 180.0, 2e4]]))


def test_store_kv_writes_its_slots_and_nothing_else() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(3, 8, 16)
    key, value = torch.full((2, 5, 4, 2, 16), torch.nan)
    slot = torch.tensor([17, 3, 9])
    store_kv(qkv[:, 4:6], qkv[:, 6:], key, value, slot)
    assert torch.equal(key.flatten(0, 1)[slot], qkv[:, 4:6])
    assert torch.equal(value.flatten(0, 1)[slot], qkv[:, 6:])
    assert int(key.isnan().all(-1).all(-1).sum()) == 17


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "operation", [swiglu, lambda x: rms_norm(x, torch.full_like(x[0], 0.7), 1e-5)], ids=["swiglu", "rms_norm"]
)
def test_a_row_does_not_depend_on_where_it_stands(
    operation: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    for features in (576, 100, 6):
        x = torch.randn(300, features).mul(4).to(dtype)
        expected = operation(x)
        for first, count in ((0, 1), (1, 1), (3, 5), (17, 64), (299, 1), (1, 299)):
            assert torch.equal(operation(x[first : first + count].clone()), expected[first : first + count])


def test_torch_silu_would_not_keep_the_promise() -> None:
    torch.manual_seed(0)
    x = torch.randn(10_000) * 4
    whole = torch.nn.functional.silu(x)
    assert not torch.equal(torch.cat([torch.nn.functional.silu(part.clone()) for part in x.split(7)]), whole)
