"""An embedding in a format of its own: what is looked up is what the format stands for, and a tied one is not kept twice."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model_files import write_tiny_gguf
from native_steps import ISAS, native_decoder, native_library
from paged_decoding import PagedDecoding, PagedSequence
from quantized_weights import rounded_weight
from tiny_decoders import tiny_config, tiny_weights
from triode.models.config import ModelOptions
from triode.models.loader import open_checkpoint
from triode.models.native import NativeDecoder
from triode.models.quantization import Quantization, plan_weights
from triode.models.weights import DecoderWeights

CPU = torch.device("cpu")
# More than a panel, inputs that fill neither a word nor a group.
CONFIG = tiny_config(hidden_size=70, vocab_size=101, num_layers=1)
TOKENS = [(7 * i) % 101 for i in range(60)]
FORMATS: list[tuple[Quantization, int | None]] = [
    ("none", None),
    ("a16w8", None),
    ("a8w8", 32),
    ("a8w8", 64),
    ("a8w8", 0),
    ("a16w4", 32),
    ("a8w4", 128),
]


def logits_of(decoder: NativeDecoder) -> torch.Tensor:
    decoding, sequence = PagedDecoding(decoder, num_blocks=20), PagedSequence(TOKENS)
    return decoding.step([(sequence, len(TOKENS))])[0]


def tied(weights: DecoderWeights) -> DecoderWeights:
    return replace(weights, head_VD=weights.embed_VD)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("quantization", "group"), FORMATS)
def test_tokens_are_looked_up_in_the_rounded_numbers(isa: str, quantization: Quantization, group: int | None) -> None:
    weights = tiny_weights(CONFIG, torch.float32)
    got = native_decoder(CONFIG, weights, isa, "none", group, {"embedding": quantization})
    embed_VD = weights.embed_VD if quantization == "none" else rounded_weight(weights.embed_VD, quantization, group)
    expected = native_decoder(CONFIG, replace(weights, embed_VD=embed_VD.float()), isa)
    difference = logits_of(got) - logits_of(expected)
    assert float(difference.norm() / logits_of(expected).norm()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("quantization", "group"), FORMATS)
def test_a_tied_embedding_of_the_heads_format_is_kept_once_and_no_bit_changes(
    dtype: torch.dtype, quantization: Quantization, group: int | None
) -> None:
    weights = tiny_weights(CONFIG, dtype)
    overrides = {"head": quantization, "embedding": quantization}
    once = native_decoder(CONFIG, tied(weights), None, "none", group, overrides)
    # The same numbers in another tensor.
    twice = native_decoder(CONFIG, replace(weights, head_VD=weights.embed_VD.clone()), None, "none", group, overrides)
    assert torch.equal(logits_of(once), logits_of(twice))
    assert once.weights_bytes < twice.weights_bytes
    assert once.matrices_bytes == twice.matrices_bytes


def test_a_tied_embedding_stays_as_it_is_beside_a_rounded_head() -> None:
    weights = tiny_weights(CONFIG, torch.bfloat16)
    rounded = native_decoder(CONFIG, tied(weights), None, "a8w8")
    by_name = native_decoder(CONFIG, tied(weights), None, "a8w8", None, {"embedding": "none"})
    assert torch.equal(logits_of(rounded), logits_of(by_name))
    all_rounded = native_decoder(CONFIG, tied(weights), None, "a8w8", None, {"embedding": "a8w8"})
    assert all_rounded.weights_bytes < rounded.weights_bytes
    assert not torch.equal(logits_of(all_rounded), logits_of(rounded))


@pytest.mark.parametrize("blocks", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("head", ["a16gguf", "none"])
def test_an_embedding_keeps_the_blocks_of_its_file(tmp_path: Path, blocks: str, head: Quantization) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", "llama", blocks)
    checkpoint = open_checkpoint(ModelOptions(model=str(path)))
    tokens = PagedSequence([(7 * i) % checkpoint.config.vocab_size for i in range(60)])

    def decoder(overrides: dict[str, str]) -> NativeDecoder:
        plan = plan_weights("none", None, overrides)
        with torch.inference_mode():
            weights = checkpoint.load_weights(torch.float32, CPU, plan=plan)
            return NativeDecoder(checkpoint.config, weights, native_library(), plan=plan)

    kept, read = decoder({"head": head, "embedding": "a16gguf"}), decoder({"head": head})
    got, expected = (
        PagedDecoding(each, num_blocks=20).step([(replace(tokens), len(TOKENS))])[0] for each in (kept, read)
    )
    assert float((got - expected).norm() / expected.norm()) < 1e-5
    # Beside a head of numbers, which would have done for both, the blocks are one matrix more.
    assert (kept.weights_bytes < read.weights_bytes) == (head == "a16gguf")


def test_blocks_of_an_embedding_that_its_tied_head_wants_as_numbers_are_read_as_both(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", "llama", "Q8_0")
    checkpoint = open_checkpoint(ModelOptions(model=str(path)))
    assert checkpoint.config.tie_word_embeddings
    both = checkpoint.load_weights(torch.float32, CPU, plan=plan_weights("none", None, {"embedding": "a16gguf"}))
    assert not both.head_VD.is_meta
    neither = checkpoint.load_weights(
        torch.float32, CPU, plan=plan_weights("none", None, {"embedding": "a16gguf", "head": "a8gguf"})
    )
    assert neither.head_VD.is_meta
    assert neither.embed_VD is neither.head_VD
