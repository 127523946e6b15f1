"""AMX's tiles, which C++ stands in for (`emulated_tiles.h`), and the instructions that the compiler makes for them.

`make test-amx` puts all tests of the compiled step through them; here is what must hold of tiles alone.
"""

import subprocess

import pytest
import torch

from emulated_amx import AMX, broken_tiles, emulated_isa
from native_steps import EMULATES, ISAS, native_decoder, native_library
from tiny_decoders import tiny_config, tiny_weights
from triode.kernels.native import library
from triode.kernels.native.build import MAIN, SOURCES, NativeUnavailable, find_compiler
from triode.kernels.native.isa import X86, supported
from triode.models.native import NativeDecoder
from triode.models.quantization import Quantization

pytestmark = pytest.mark.skipif(EMULATES, reason="another processor is emulated")

OTHER = next(isa for isa in ISAS if isa != AMX.name) if len(ISAS) > 1 else "portable"
# Fewer rows than tiles take, one to 16 in the last tile, and several parts of a product.
COUNTS = (1, 5, 6, 15, 16, 17, 33, 99, 101)


def head_decoder(
    num_inputs: int,
    num_outputs: int,
    dtype: torch.dtype,
    isa: str,
    quantization: Quantization = "none",
    group: int | None = None,
) -> NativeDecoder:
    """A model whose logits are one product."""
    config = tiny_config(hidden_size=num_inputs, vocab_size=num_outputs, num_layers=1, intermediate_size=40)
    weights = tiny_weights(config, dtype, seed=num_inputs)
    return native_decoder(config, weights, isa, quantization, group, {"head": quantization})


def rows(count: int, num_inputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    x_TD = torch.randn(count, num_inputs, generator=generator) * torch.logspace(-3, 3, count)[:, None]
    return x_TD.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("quantization", "group"), [("a8w8", 32), ("a8w8", 64), ("a8w8", 128), ("a8w8", 0), ("a8w4", 32), ("a8w4", 128)]
)
def test_bytes_have_the_bits_that_they_have_without_tiles(quantization: Quantization, group: int) -> None:
    for num_inputs in (24, 96, 129, 320):
        tiled, plain = (
            head_decoder(num_inputs, 101, torch.bfloat16, isa, quantization, group) for isa in (AMX.name, OTHER)
        )
        for count in COUNTS:
            x_TD = rows(count, num_inputs)
            assert torch.equal(tiled.logits(x_TD), plain.logits(x_TD)), (num_inputs, count)


@pytest.mark.parametrize("num_inputs", [24, 33, 64, 97, 512, 585])
def test_bfloat16_is_near_float64_and_has_the_same_bits_in_any_company(num_inputs: int) -> None:
    decoder = head_decoder(num_inputs, 101, torch.bfloat16, AMX.name)
    config = tiny_config(hidden_size=num_inputs, vocab_size=101, num_layers=1, intermediate_size=40)
    weight_VD = tiny_weights(config, torch.bfloat16, seed=num_inputs).head_VD.double()
    x_TD = rows(101, num_inputs)
    together = decoder.logits(x_TD)
    expected = x_TD.double() @ weight_VD.T
    assert float(((together - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 1e-6
    for count in COUNTS:
        for first in (0, 101 - count):
            assert torch.equal(decoder.logits(x_TD[first : first + count]), together[first : first + count]), count


def test_numbers_too_small_to_be_normal_are_zero() -> None:
    decoder = head_decoder(64, 64, torch.bfloat16, AMX.name)
    assert not decoder.logits(torch.full((3, 64), 1e-39, dtype=torch.bfloat16)).any()


def test_nan_and_infinity_stay_in_their_row() -> None:
    decoder = head_decoder(97, 70, torch.bfloat16, AMX.name)
    x_TD = rows(20, 97)
    expected = decoder.logits(x_TD)
    x_TD[3, 96], x_TD[17, 5] = torch.nan, torch.inf
    got = decoder.logits(x_TD)
    assert got[3].isnan().all()
    assert not got[17].isfinite().any()
    kept = [row for row in range(20) if row not in (3, 17)]
    assert torch.equal(got[kept], expected[kept])


def test_tiles_that_add_up_by_the_number_of_rows_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    native_library(AMX.name)
    good = native_library(OTHER).isa
    monkeypatch.setattr(library, "candidates", lambda: (emulated_isa(), good))
    with broken_tiles():
        loaded = library.load_library(lambda _: None)
    assert loaded.isa == good
    (reason,) = loaded.passed_over
    assert (
        reason == "the CPU kernels for amx compute wrongly here: a row of numbers has other bits in company than alone"
    )


def test_the_compiler_makes_the_instructions() -> None:
    if supported()[0].machine != X86:
        pytest.skip("another processor's compiler")
    try:
        command = [*find_compiler(), "-std=c++17", "-O0", "-S", *AMX.flags, str(SOURCES / MAIN), "-o", "-"]
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized command" in finished.stderr or "unknown argument" in finished.stderr:
        pytest.skip(finished.stderr)
    assert finished.returncode == 0, finished.stderr
    for instruction in (
        "ldtilecfg",
        "tilezero",
        "tileloadd",
        "tdpbf16ps",
        "tdpbsud",
        "tilestored",
        "tilerelease",
    ):
        assert f"\t{instruction}" in finished.stdout, instruction
