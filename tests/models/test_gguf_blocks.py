"""Matrices that keep the blocks of a GGUF file: no bit of them changes, and products are those of what they stand for."""

from pathlib import Path

import pytest
import torch

from exact_decoder import logits_float64
from model_files import write_tiny_gguf
from native_steps import ISAS, native_library
from paged_decoding import PagedDecoding, PagedSequence
from quantized_weights import rounded_inputs
from triode.models.config import ModelOptions
from triode.models.loader import open_checkpoint
from triode.models.native import NativeDecoder
from triode.models.quantization import plan_weights

CPU = torch.device("cpu")
BLOCKS = ("Q4_0", "Q4_1", "Q8_0")
TOKENS = [(7 * i) % 200 for i in range(80)]


def decoder_of(
    path: Path, quantization: str, isa: str | None = None, overrides: dict[str, str] | None = None
) -> NativeDecoder:
    plan = plan_weights(quantization, None, overrides)  # type: ignore[arg-type]
    checkpoint = open_checkpoint(ModelOptions(model=str(path)))
    with torch.inference_mode():
        weights = checkpoint.load_weights(torch.float32, CPU, plan=plan)
        return NativeDecoder(checkpoint.config, weights, native_library(isa), plan=plan)


def logits_of(decoder: NativeDecoder, chunks: list[int]) -> torch.Tensor:
    decoding, sequence = PagedDecoding(decoder, num_blocks=20), PagedSequence(TOKENS)
    return torch.cat([decoding.step([(sequence, count)])[0] for count in chunks])


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_blocks_compute_what_their_dequantised_weights_do(
    tmp_path: Path, blocks: str, architecture: str, isa: str
) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", architecture, blocks)
    checkpoint = open_checkpoint(ModelOptions(model=str(path)))
    weights = checkpoint.load_weights(torch.float32, CPU)
    expected = logits_float64(checkpoint.config, weights, TOKENS)
    assert relative_error(logits_of(decoder_of(path, "a16gguf", isa), [80]), expected) < 2e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_rows_of_bytes_meet_blocks_exactly(tmp_path: Path, blocks: str, isa: str) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", "llama", blocks)
    head_VD = open_checkpoint(ModelOptions(model=str(path))).load_weights(torch.float32, CPU).head_VD.double()
    x_TD = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 20)[:, None]
    got = decoder_of(path, "a8gguf", isa).logits(x_TD)
    expected = rounded_inputs(x_TD, 32) @ head_VD.T
    assert all(relative_error(*rows) < 1e-6 for rows in zip(got, expected, strict=True))


@pytest.mark.parametrize("quantization", ["a16gguf", "a8gguf"])
def test_chunks_change_no_bit(tmp_path: Path, quantization: str) -> None:
    for blocks in BLOCKS:
        decoder = decoder_of(write_tiny_gguf(tmp_path / "m.gguf", "llama", blocks), quantization)
        expected = logits_of(decoder, [80])
        for chunks in ([1, 79], [17, 16, 47], [60] + [1] * 20):
            assert torch.equal(logits_of(decoder, chunks), expected)


def test_matrices_that_the_file_holds_as_floats_stay_floats(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", "llama", "F32")
    assert torch.equal(logits_of(decoder_of(path, "a8gguf"), [80]), logits_of(decoder_of(path, "none"), [80]))


def test_blocks_that_cannot_be_kept_are_refused_by_name_unless_they_get_another_format(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", "llama", "Q5_1")
    with pytest.raises(
        ValueError, match=r"layers\.0\.qkv is stored as Q5_1, .*Q4_0, Q4_1, Q8_0 .*quantization_overrides"
    ):
        decoder_of(path, "a8gguf")
    decoder = decoder_of(path, "a8gguf", overrides={r"layers\..*": "a8w8", "head": "none"})
    assert torch.equal(logits_of(decoder, [80]), logits_of(decoder_of(path, "a8w8", overrides={"head": "none"}), [80]))


def test_only_a_gguf_file_has_blocks_to_keep() -> None:
    plan = plan_weights("a8gguf")
    with pytest.raises(
        ValueError, match="quantization must not be that of a GGUF file where there is none, got 'a8gguf'"
    ):
        open_checkpoint(ModelOptions(model="random:tiny")).load_weights(torch.float32, CPU, plan=plan)


def test_matrices_that_keep_their_blocks_are_not_read_as_floats() -> None:
    checkpoint = open_checkpoint(ModelOptions(model="smollm2-135m"))
    weights = checkpoint.load_weights(torch.bfloat16, CPU, plan=plan_weights("a8gguf", None, {"head": "none"}))
    assert all(layer.down_DF.is_meta and layer.qkv_ED.is_meta for layer in weights.layers)
    assert {matrix.format for matrix in weights.stored.values()} == {"Q4_1"}
    assert not weights.head_VD.is_meta
