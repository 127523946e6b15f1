from collections.abc import Callable

import pytest
import torch

from triode.kernels.linear.cpu import CpuLinears
from triode.kernels.linear.reference import PreparedLinear
from triode.kernels.linear.row_check import SAFE_RULE, RowRule, find_row_rule
from triode.kernels.threads import cpu_threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The matrices of SmolLM2 (but the head), one of Qwen2.5-0.5B, and shapes that no kernel likes.
SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536), (896, 4864), (100, 36), (7, 3), (1, 64)]
ROWS = [1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 31, 33, 64, 65, 100, 127, 200]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_does_not_depend_on_the_number_of_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias, x = (
        torch.randn(shape).to(dtype),
        torch.randn(shape[0]).to(dtype),
        torch.randn(200, shape[1]).to(dtype),
    )
    product = CpuLinears(dtype)(weight, bias)
    expected = product(x)
    for rows in ROWS:
        assert torch.equal(product(x[:rows]), expected[:rows]), rows
        # Rows at another address, which is no multiple of a vector, and in another place.
        storage = torch.empty(200 * shape[1] + 1, dtype=dtype)[1:].view(200, shape[1])
        shifted = storage[200 - rows :].copy_(x[200 - rows :])
        assert torch.equal(product(shifted), expected[200 - rows :]), rows


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_does_not_depend_on_the_threads(num_threads: int) -> None:
    torch.manual_seed(0)
    product = CpuLinears(torch.float32)(torch.randn(3072, 576), None)
    x = torch.randn(40, 576)
    expected = product(x)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(product(x), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_agree_with_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 80).to(dtype), torch.randn(96).to(dtype), torch.randn(5, 80).to(dtype)
    expected = x.double() @ weight.double().t() + bias.double()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-1, torch.float16: 2e-2}[dtype]
    torch.testing.assert_close(CpuLinears(dtype)(weight, bias)(x).double(), expected, rtol=tolerance, atol=tolerance)


def prefers_rows(multiple: int | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A product that adds in another order unless the rows are a multiple (None: unless they are 16 exactly)."""

    def product(x: torch.Tensor) -> torch.Tensor:
        usual = x.shape[0] == 16 if multiple is None else x.shape[0] % multiple == 0
        return x.sum(-1, keepdim=True) if usual else x.flip(-1).cumsum(-1)[:, -1:]

    return product


@pytest.mark.parametrize(
    ("multiple", "rule"), [(1, RowRule(4)), (4, RowRule(4)), (8, RowRule(8)), (16, RowRule(16)), (None, SAFE_RULE)]
)
def test_the_check_finds_how_rows_must_be_grouped(multiple: int | None, rule: RowRule) -> None:
    assert find_row_rule(prefers_rows(multiple), 1000, 1, torch.float32) == rule


def test_a_shape_that_needs_blocks_is_named_and_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triode.kernels.linear.cpu.find_row_rule", lambda *_: SAFE_RULE)
    torch.manual_seed(0)
    weight, x = torch.randn(32, 48), torch.randn(37, 48)
    linears = CpuLinears(torch.float32)
    torch.testing.assert_close(linears(weight)(x), x @ weight.t())
    assert linears.exceptions() == ["linear 32 × 48: rows taken in blocks of 16"]


def test_each_shape_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []

    def record(product: PreparedLinear, in_features: int, out_features: int, dtype: torch.dtype) -> RowRule:
        checked.append((in_features, out_features, dtype))
        return RowRule()

    monkeypatch.setattr("triode.kernels.linear.cpu.find_row_rule", record)
    linears = CpuLinears(torch.float32)
    for shape in ((8, 16), (8, 16), (16, 8)):
        linears(torch.zeros(shape))
    assert checked == [(16, 8, torch.float32), (8, 16, torch.float32)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_fused_products_agree_with_float64(dtype: torch.dtype, with_bias: bool) -> None:
    torch.manual_seed(0)
    weight, x, residual = (torch.randn(shape).to(dtype) for shape in ((96, 80), (5, 80), (5, 96)))
    bias = torch.randn(96).to(dtype) if with_bias else None
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    gate, up = exact.chunk(2, 1)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    linears = CpuLinears(dtype)
    gated = linears.gated(weight, bias)(x).double()
    torch.testing.assert_close(gated, gate * gate.sigmoid() * up, rtol=tolerance, atol=10 * tolerance)
    added = linears.adding(weight, bias)(x, residual.clone()).double()
    torch.testing.assert_close(added, residual.double() + exact, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3072, 576), (576, 1536), (100, 36), (14, 3)], ids=str)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_row_of_a_fused_product_does_not_depend_on_the_others(
    num_threads: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, x, residual = (torch.randn(size).to(dtype) for size in (shape, (200, shape[1]), (200, shape[0])))
    linears = CpuLinears(dtype)
    gated, adding = linears.gated(weight), linears.adding(weight)
    expected_gated, expected_added = gated(x), adding(x, residual.clone())
    with cpu_threads(num_threads):
        for rows in ROWS:
            assert torch.equal(gated(x[:rows]), expected_gated[:rows]), rows
            assert torch.equal(adding(x[:rows], residual[:rows].clone()), expected_added[:rows]), rows


def test_fused_products_are_served_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triode.kernels.linear.cpu.find_row_rule", lambda *_: SAFE_RULE)
    torch.manual_seed(0)
    weight, x, residual = torch.randn(32, 48), torch.randn(37, 48), torch.randn(37, 32)
    expected = residual + x @ weight.t()
    torch.testing.assert_close(CpuLinears(torch.float32).adding(weight)(x, residual), expected)
