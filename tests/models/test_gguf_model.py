import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from model_files import byte_vocabulary, layer_tensors, shape_metadata, write_gguf, write_tiny_gguf
from triode.errors import CorruptModel, UnsupportedModel
from triode.models.config import ModelConfig, ModelOptions
from triode.models.gguf import GGUFFile
from triode.models.gguf_config import read_config
from triode.models.gguf_tensors import GGUFTensors
from triode.models.loader import open_checkpoint
from triode.models.progress import NullProgress
from triode.models.source import locate
from triode.models.weights import DecoderWeights

CPU = torch.device("cpu")


def load(path: Path, dtype: torch.dtype = torch.float32) -> DecoderWeights:
    return open_checkpoint(ModelOptions(model=str(path))).load_weights(dtype, CPU)


def config_of(path: Path) -> ModelConfig:
    return read_config(GGUFFile(path))


def deinterleaved(rows: npt.NDArray[np.float32], head_dim: int = 16) -> npt.NDArray[np.float32]:
    """Stored row (head, i, half) as row (head, half, i): the definition, one head at a time."""
    heads = [np.concatenate([head[0::2], head[1::2]]) for head in np.split(rows, len(rows) // head_dim)]
    return np.concatenate(heads)


def test_smollm2_has_the_known_config() -> None:
    config = config_of(locate("smollm2-135m", NullProgress()))
    assert (config.architecture, config.num_layers, config.hidden_size, config.intermediate_size) == (
        "llama",
        30,
        576,
        1536,
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (9, 3, 64, 49_152)
    assert (config.rope.theta, config.rope.kind, config.max_context_tokens) == (100_000.0, "default", 8192)
    assert (config.bos_token_id, config.eos_token_ids, config.tie_word_embeddings) == (1, (2,), True)


def test_smollm2_tensors_are_those_that_gguf_dequantises() -> None:
    file = GGUFFile(locate("smollm2-135m", NullProgress()))
    reader = GGUFTensors(file, read_config(file))
    for own_name, name in (
        ("blk.29.ffn_down.weight", "model.layers.29.mlp.down_proj.weight"),
        ("blk.7.attn_v.weight", "model.layers.7.self_attn.v_proj.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ):
        tensor = file.tensors[own_name]
        stored = file.rows(tensor, 0, int(np.prod(tensor.shape[:-1])))
        expected = gguf.dequantize(stored, gguf.GGMLQuantizationType[tensor.quantization]).reshape(tensor.shape)
        read = torch.full(tensor.shape, torch.nan)
        reader.read_into(name, read)
        assert torch.equal(read, torch.from_numpy(expected.copy()))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_every_tensor_arrives_in_its_place(tmp_path: Path, architecture: str) -> None:
    weights = load(write_tiny_gguf(tmp_path / "m.gguf", architecture))
    stored = layer_tensors(architecture, len(weights.embed_VD))
    arrange = deinterleaved if architecture == "llama" else np.asarray
    for index, layer in enumerate(weights.layers):
        part = {name.removeprefix(f"blk.{index}."): value for name, value in stored.items() if f"blk.{index}." in name}
        qkv = [arrange(part["attn_q.weight"]), arrange(part["attn_k.weight"]), part["attn_v.weight"]]
        assert torch.equal(layer.qkv_ED, torch.from_numpy(np.concatenate(qkv)))
        gate_up = [part["ffn_gate.weight"], part["ffn_up.weight"]]
        assert torch.equal(layer.gate_up_FD, torch.from_numpy(np.concatenate(gate_up)))
        assert torch.equal(layer.o_DE, torch.from_numpy(part["attn_output.weight"]))
        assert torch.equal(layer.down_DF, torch.from_numpy(part["ffn_down.weight"]))
        if architecture == "qwen2":
            biases = [part[f"attn_{kind}.bias"] for kind in "qkv"]
            assert layer.qkv_bias_E is not None
            assert torch.equal(layer.qkv_bias_E, torch.from_numpy(np.concatenate(biases)))
        else:
            assert layer.qkv_bias_E is None
        if architecture == "qwen3":
            assert layer.k_norm_H is not None
            assert torch.equal(layer.k_norm_H, torch.from_numpy(part["attn_k_norm.weight"]))
    assert weights.head_VD is weights.embed_VD
    assert torch.equal(weights.embed_VD, torch.from_numpy(stored["token_embd.weight"]))


# Q4_K and its like need rows of 256 elements; their decoding is gguf's and is shared by all.
@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q4_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantised_tensors_are_converted_to_the_dtype(tmp_path: Path, quantization: str, dtype: torch.dtype) -> None:
    weights = load(write_tiny_gguf(tmp_path / "m.gguf", "qwen2", quantization), dtype)
    down = layer_tensors("qwen2", len(weights.embed_VD))["blk.1.ffn_down.weight"]
    kind = gguf.GGMLQuantizationType[quantization]
    expected = gguf.dequantize(gguf.quantize(down, kind), kind)
    assert weights.layers[1].down_DF.dtype == dtype
    assert torch.equal(weights.layers[1].down_DF, torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("kind", list(gguf.quants._type_traits), ids=lambda kind: kind.name)
def test_every_type_that_gguf_dequantises_is_read(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    num_blocks = 256 // block_elements
    # Bytes below 0x3B keep the float16 scales among them finite.
    stored = np.random.default_rng(0).integers(0, 0x3B, (262, num_blocks * block_bytes), dtype=np.uint8)
    metadata = shape_metadata("qwen2") | byte_vocabulary() | {"qwen2.feed_forward_length": 256}
    tensors = layer_tensors("qwen2", 262)
    path = write_gguf(
        tmp_path / "m.gguf", "qwen2", metadata, tensors, extra={"blk.0.ffn_down.weight": (stored[:64], kind)}
    )
    file = GGUFFile(path)
    read = torch.empty(64, 256)
    GGUFTensors(file, read_config(file)).read_into("model.layers.0.mlp.down_proj.weight", read)
    assert np.array_equal(read.numpy(), gguf.dequantize(stored[:64], kind))


def test_a_type_that_gguf_cannot_dequantise_is_refused_by_name(tmp_path: Path) -> None:
    metadata = shape_metadata("qwen2") | byte_vocabulary()
    raw = {
        "blk.0.ffn_down.weight": (
            np.zeros((64, 3 * gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_1][1]), np.uint8),
            gguf.GGMLQuantizationType.Q8_1,
        )
    }
    path = write_gguf(tmp_path / "m.gguf", "qwen2", metadata, layer_tensors("qwen2", 262), extra=raw)
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.ffn_down\.weight has the quantisation Q8_1, which cannot be"):
        load(path)


def test_weights_beyond_the_range_of_float16_are_refused(tmp_path: Path) -> None:
    tensors = layer_tensors("qwen2", 262)
    tensors["blk.1.attn_v.weight"][3, 5] = 1e5
    path = write_gguf(tmp_path / "m.gguf", "qwen2", shape_metadata("qwen2") | byte_vocabulary(), tensors)
    with pytest.raises(UnsupportedModel, match=r"blk\.1\.attn_v\.weight has values beyond float16's range"):
        load(path, torch.float16)


def test_a_head_of_its_own_is_read(tmp_path: Path) -> None:
    metadata = shape_metadata("qwen2") | byte_vocabulary()
    tensors = layer_tensors("qwen2", 262)
    tensors["output.weight"] = tensors["token_embd.weight"][::-1].copy()
    weights = load(write_gguf(tmp_path / "m.gguf", "qwen2", metadata, tensors))
    assert torch.equal(weights.head_VD, weights.embed_VD.flip(0))


def test_llama_3_factors_are_read_from_their_tensor(tmp_path: Path) -> None:
    metadata = shape_metadata("llama") | byte_vocabulary()
    tensors = layer_tensors("llama", 262) | {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", "llama", metadata, tensors)
    rope = config_of(path).rope
    assert (rope.kind, rope.short_factors) == ("factors", (1, 2, 3, 4, 5, 6, 7, 8))
    assert load(path).layers


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"qwen2__rope__scaling__type": "none"}, {"kind": "default"}),
        (
            {"qwen2__rope__scaling__type": "linear", "qwen2__rope__scaling__factor": 4.0},
            {"kind": "linear", "factor": 4.0},
        ),
        ({"qwen2__rope__scale_linear": 2.0}, {"kind": "linear", "factor": 2.0}),
        (
            {
                "qwen2__rope__scaling__type": "yarn",
                "qwen2__rope__scaling__factor": 4.0,
                "qwen2__rope__scaling__original_context_length": 32,
            },
            {"kind": "yarn", "factor": 4.0, "original_max_position": 32, "attention_factor": None},
        ),
    ],
)
def test_rope_scalings_are_read_from_the_metadata(
    tmp_path: Path, changes: dict[str, Any], expected: dict[str, object]
) -> None:
    rope = config_of(write_tiny_gguf(tmp_path / "m.gguf", "qwen2", **changes)).rope
    assert {name: getattr(rope, name) for name in expected} == expected


def test_a_sliding_window_holds_for_all_layers(tmp_path: Path) -> None:
    config = config_of(write_tiny_gguf(tmp_path / "m.gguf", "llama", llama__attention__sliding_window=64))
    assert [config.window_tokens(layer) for layer in range(2)] == [64, 64]


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("llama", {"llama__expert_count": 8}, r"mixture of experts is not supported \(expert_count = 8\)"),
        (
            "llama",
            {"llama__attn_logit_softcapping": 30.0},
            r"unsupported feature: llama\.attn_logit_softcapping = 30\.0",
        ),
        ("llama", {"llama__attention__head_count_kv": [2, 1]}, "llama.attention.head_count_kv differs by layer"),
        ("llama", {"llama__rope__dimension_count": 8}, r"partial rotary is not supported \(8 of 16 dimensions\)"),
        ("llama", {"llama__attention__value_length": 8}, "values of 8 dimensions beside keys of 16"),
        ("llama", {"llama__rope__scaling__type": "wobbly"}, "unsupported rope scaling 'wobbly'"),
        ("qwen2", {"tokenizer__ggml__pre": "klingon"}, r"unsupported tokenizer\.ggml\.pre 'klingon'"),
        ("qwen2", {"tokenizer__ggml__model": "bert"}, r"unsupported tokenizer\.ggml\.model 'bert'"),
    ],
)
def test_an_unsupported_feature_is_refused_by_name(
    tmp_path: Path, architecture: str, changes: dict[str, Any], message: str
) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", architecture, **changes)
    with pytest.raises(UnsupportedModel, match=message):
        open_checkpoint(ModelOptions(model=str(path)))


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "mamba", {}, {})
    with pytest.raises(UnsupportedModel, match="unsupported architecture 'mamba'"):
        open_checkpoint(ModelOptions(model=str(path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama__block_count": None}, r"llama\.block_count is missing"),
        ({"llama__block_count": "two"}, r"llama\.block_count must be an integer, got 'two'"),
        ({"llama__attention__head_count_kv": 3}, "num_heads must be a multiple of num_kv_heads = 3"),
        ({"tokenizer__ggml__tokens": None}, r"tokenizer\.ggml\.tokens must be a list of strings"),
        ({"tokenizer__ggml__tokens": ["a", "b", "a"], "tokenizer__ggml__token_type": [1, 1, 1]}, "has a token twice"),
        ({"tokenizer__ggml__token_type": [1, 1]}, r"tokenizer\.ggml\.token_type must have a number for each"),
        ({"tokenizer__ggml__merges": ["he"]}, "has 'he', which is not a pair"),
        ({"tokenizer__ggml__merges": ["he llo"]}, "do not fit the vocabulary"),
        ({"tokenizer__ggml__bos_token_id": 999}, "bos_token_id is 999 of 262 tokens"),
        (
            {"llama__embedding_length": 32},
            r"tensor token_embd\.weight must have the shape \[262, 32\], got \[262, 64\]",
        ),
        ({"llama__block_count": 3}, r"tensor blk\.2\.attn_norm\.weight is missing"),
    ],
)
def test_a_corrupt_model_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", "llama", **changes)
    with pytest.raises(CorruptModel, match=message):
        load(path)


def test_a_tensor_too_many_is_refused_by_name(tmp_path: Path) -> None:
    tensors = layer_tensors("llama", 262) | {"blk.0.ffn_gate_inp.weight": np.ones((4, 64), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", "llama", shape_metadata("llama") | byte_vocabulary(), tensors)
    message = re.escape(f"{path}: tensor blk.0.ffn_gate_inp.weight is unexpected")
    with pytest.raises(UnsupportedModel, match=message):
        load(path)
