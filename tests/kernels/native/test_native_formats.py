"""Every weight format on every instruction set: against float64, and against itself in other company.

A model of one layer is a product: zero matrices but the head leave the embedding, normalised, times the head.
"""

import pytest
import torch

from native_steps import ISAS, native_decoder
from quantized_weights import rounded_inputs, rounded_weight
from tiny_decoders import tiny_config, tiny_weights
from triode.models.native import NativeDecoder
from triode.models.quantization import Quantization
from triode.models.weights import DecoderWeights

FORMATS: list[tuple[Quantization, int | None]] = [
    ("a16w8", None),
    ("a16w8", 64),
    ("a8w8", 64),
    ("a8w8", 0),
    ("a16w4", 32),
    ("a8w4", 32),
]
GROUPED: tuple[Quantization, ...] = ("a16w8", "a8w8", "a16w4", "a8w4")
# The size of groups is a number to all instruction sets alike: one of them meets every size.
CASES = [
    *((isa, *case) for isa in ISAS for case in FORMATS),
    *((ISAS[0], name, group) for name in GROUPED for group in (32, 64, 128) if (name, group) not in FORMATS),
]
EVERY_CASE = pytest.mark.parametrize(
    ("isa", "quantization", "group"), CASES, ids=["-".join(map(str, case)) for case in CASES]
)
# Inputs of less than a group, of whole ones, and with a last one that is not full; outputs of part of a panel and of more.
SHAPES = ((24, 5), (64, 64), (70, 101), (129, 130), (320, 67))


def head_of(num_inputs: int, num_outputs: int, dtype: torch.dtype) -> DecoderWeights:
    config = tiny_config(hidden_size=num_inputs, vocab_size=num_outputs, num_layers=1, intermediate_size=40)
    return tiny_weights(config, dtype, seed=num_inputs)


def product(
    weights: DecoderWeights, x_TD: torch.Tensor, isa: str, quantization: Quantization, group: int | None
) -> torch.Tensor:
    return decoder_of(weights, isa, quantization, group).logits(x_TD)


def decoder_of(weights: DecoderWeights, isa: str, quantization: Quantization, group: int | None) -> NativeDecoder:
    num_outputs, num_inputs = weights.head_VD.shape
    config = tiny_config(hidden_size=num_inputs, vocab_size=num_outputs, num_layers=1, intermediate_size=40)
    return native_decoder(config, weights, isa, quantization, group, {"head": quantization})


def rows(count: int, num_inputs: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Each of another magnitude, with an outlier."""
    generator = torch.Generator().manual_seed(count)
    x_TD = torch.randn(count, num_inputs, generator=generator) * torch.logspace(-3, 3, count)[:, None]
    x_TD[:, num_inputs // 2] *= 30
    return x_TD.to(dtype)


def expected_product(
    weights: DecoderWeights, x_TD: torch.Tensor, quantization: Quantization, group: int | None
) -> torch.Tensor:
    weight = rounded_weight(weights.head_VD, quantization, group)
    if quantization.startswith("a8"):
        default = 64 if quantization == "a8w8" else 32
        x_TD = rounded_inputs(x_TD, default if group is None else group)
    return x_TD.double() @ weight.T


def row_errors(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    difference = got.double() - expected
    return difference.square().sum(1).sqrt() / expected.square().sum(1).sqrt()


@EVERY_CASE
def test_a_product_is_that_of_the_rounded_numbers(isa: str, quantization: Quantization, group: int | None) -> None:
    for num_inputs, num_outputs in SHAPES:
        weights = head_of(num_inputs, num_outputs, torch.float32)
        for count in (1, 5, 17, 99):
            x_TD = rows(count, num_inputs)
            got = product(weights, x_TD, isa, quantization, group)
            expected = expected_product(weights, x_TD, quantization, group)
            assert float(row_errors(got, expected).max()) < 1e-5, (num_inputs, num_outputs, count)


@EVERY_CASE
def test_bfloat16_costs_a_product_its_own_rounding_only(
    isa: str, quantization: Quantization, group: int | None
) -> None:
    weights = head_of(129, 130, torch.bfloat16)
    x_TD = rows(20, 129, torch.bfloat16)
    got = product(weights, x_TD, isa, quantization, group)
    expected = expected_product(weights, x_TD, quantization, group)
    # Groups of weights become bfloat16 before they meet 16-bit activations; bytes are multiplied exactly.
    assert float(row_errors(got, expected).max()) < (1e-5 if quantization.startswith("a8") else 4e-3)


@EVERY_CASE
def test_a_row_has_the_same_bits_in_any_company(isa: str, quantization: Quantization, group: int | None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        decoder = decoder_of(head_of(320, 130, dtype), isa, quantization, group)
        x_TD = rows(101, 320, dtype)
        together = decoder.logits(x_TD)
        for count in (1, 4, 7, 16, 17):
            for first in (0, 101 - count):
                part = decoder.logits(x_TD[first : first + count])
                assert torch.equal(part, together[first : first + count]), (count, first)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quantization", GROUPED)
def test_the_largest_bytes_do_not_overflow(quantization: Quantization, isa: str) -> None:
    """All weights and inputs at the ends of their range, which saturates pairs of products in 16 bits."""
    weights = head_of(256, 64, torch.float32)
    sign_ED = torch.where(torch.arange(256) % 64 < 63, 1.0, -1.0).expand(64, 256)
    weights.head_VD.copy_(sign_ED * torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)[:, None])
    for sign in (1.0, -1.0):
        x_TD = torch.full((3, 256), 2.0 * sign)
        got = product(weights, x_TD, isa, quantization, 64)
        expected = expected_product(weights, x_TD, quantization, 64)
        assert float(row_errors(got, expected).max()) < 1e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quantization", GROUPED)
def test_huge_and_tiny_numbers_are_computed_with(quantization: Quantization, isa: str) -> None:
    for weight_scale, x_scale in ((1e28, 1e4), (1e-30, 1e-2), (1e-4, 1e-22), (1e15, 1e15)):
        weights = head_of(129, 70, torch.float32)
        weights.head_VD.mul_(weight_scale)
        x_TD = rows(4, 129) * x_scale
        got = product(weights, x_TD, isa, quantization, 64)
        expected = expected_product(weights, x_TD, quantization, 64)
        assert got.isfinite().all()
        assert float(row_errors(got, expected).max()) < 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quantization", GROUPED)
def test_nan_stays_in_its_row_and_its_output(quantization: Quantization, isa: str) -> None:
    weights = head_of(129, 70, torch.float32)
    x_TD = rows(5, 129)
    expected = product(weights, x_TD, isa, quantization, 64)
    x_TD[2, 100] = torch.nan
    weights.head_VD[7, 3] = torch.nan
    got = product(weights, x_TD, isa, quantization, 64)
    assert got[2].isnan().all()
    assert got[:, 7].isnan().all()
    kept = torch.ones_like(got, dtype=torch.bool)
    kept[2], kept[:, 7] = False, False
    assert torch.equal(got[kept], expected[kept])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quantization", ["a8w8", "a8w4", "a16w4"])
def test_numbers_too_small_for_bytes_are_zero(quantization: Quantization, isa: str) -> None:
    weights = head_of(129, 70, torch.float32)
    x_TD = torch.full((1, 129), 1e-42)
    assert float(product(weights, x_TD, isa, quantization, 64).abs().max()) < 1e-39
    assert not product(weights, torch.zeros(2, 129), isa, quantization, 64).any()
