"""Writes tiny models in every format the engine reads."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

Metadata = Mapping[str, object]
BYTES = [chr(code) for code in range(33, 127)] + [chr(code) for code in range(161, 173)]
BYTES += [chr(code) for code in range(174, 256)] + [chr(256 + rank) for rank in range(68)]
CONTROL = ["<s>", "</s>"]


def byte_vocabulary(pre: str = "gpt-2") -> dict[str, object]:
    """Tokenizer metadata with a token for each byte, two control tokens, and the merges of "hello"."""
    merges = ["h e", "l l", "he ll", "hell o"]
    tokens = CONTROL + BYTES + [merge.replace(" ", "") for merge in merges]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def shape_metadata(architecture: str) -> dict[str, object]:
    """A decoder of 2 layers, hidden 64, 4 query and 2 KV heads of 16."""
    return {
        f"{architecture}.block_count": 2,
        f"{architecture}.context_length": 128,
        f"{architecture}.embedding_length": 64,
        f"{architecture}.feed_forward_length": 96,
        f"{architecture}.attention.head_count": 4,
        f"{architecture}.attention.head_count_kv": 2,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 10000.0,
    }


def layer_tensors(architecture: str, vocab_size: int) -> dict[str, npt.NDArray[np.float32]]:
    """Random tensors for `shape_metadata`, by their GGUF names; the head is tied."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab_size, 64), "output_norm.weight": (64,)}
    for layer in range(2):
        names = {
            "attn_norm.weight": (64,),
            "attn_q.weight": (64, 64),
            "attn_k.weight": (32, 64),
            "attn_v.weight": (32, 64),
            "attn_output.weight": (64, 64),
            "ffn_norm.weight": (64,),
            "ffn_gate.weight": (96, 64),
            "ffn_up.weight": (96, 64),
            "ffn_down.weight": (64, 96),
        }
        if architecture == "qwen2":
            names |= {"attn_q.bias": (64,), "attn_k.bias": (32,), "attn_v.bias": (32,)}
        if architecture == "qwen3":
            names |= {"attn_q_norm.weight": (16,), "attn_k_norm.weight": (16,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in names.items()}
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Metadata,
    tensors: Mapping[str, npt.NDArray[np.float32]],
    quantization: str = "F32",
    extra: Mapping[str, tuple[npt.NDArray[np.uint8], GGMLQuantizationType]] | None = None,
) -> Path:
    """One GGUF file; matrices are stored in `quantization`, those of `extra` as their bytes say."""
    extra = extra or {}
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, (stored, kind) in extra.items():
        writer.add_tensor(name, stored, raw_dtype=kind)
    for name, tensor in tensors.items():
        if name in extra:
            continue
        kind = GGMLQuantizationType[quantization if tensor.ndim == 2 else "F32"]
        writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiny_gguf(path: Path, architecture: str, quantization: str = "F32", **changes: object) -> Path:
    """A whole model; `changes` replace metadata, with "__" for the dots of a key, and None leaves a key out."""
    metadata = shape_metadata(architecture) | byte_vocabulary()
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    kept = {key: value for key, value in metadata.items() if value is not None}
    vocab_size = len(byte_vocabulary()["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    return write_gguf(path, architecture, kept, layer_tensors(architecture, vocab_size), quantization)


def write_safetensors(path: Path, header: Mapping[str, object], data: bytes) -> Path:
    """A `.safetensors` file with a header of one's own."""
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def _add(writer: GGUFWriter, key: str, value: object) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
