"""The tensors of a GGUF file, dequantised a piece at a time.

In files of the `llama` architecture the rows of q and k are interleaved within each head: ggml rotates neighbouring
rows (2 i, 2 i + 1), where transformers and Triode rotate (i, i + H/2). Reading puts them back in order.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from triode.errors import UnsupportedModel
from triode.models.config import ModelConfig
from triode.models.gguf import GGUFFile, GGUFTensor

# Small enough for the intermediate arrays of a dequantisation to stay in the L2 cache.
_CHUNK_ELEMENTS = 2**18

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_INTERLEAVED = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_proj\.(weight|bias)")
# Divisors of the rotary frequencies: the config has read them (gguf_config.py).
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class GGUFTensors:
    """A `TensorReader` of one GGUF file."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self._file = file
        self._head_dim = config.head_dim
        self._interleaved = config.architecture == "llama"
        self._tensors = {hf_name(name): tensor for name, tensor in file.tensors.items() if name not in ROPE_FACTORS}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor but the rotary factors."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def label(self, name: str) -> str:
        """File and tensor, by the name the file has for it."""
        own_name = next((own for own in _own_names(name)), name)
        return f"{self._file.path}: tensor {own_name}"

    def read_into(self, name: str, destination: torch.Tensor) -> None:
        """Dequantises the tensor into `destination`."""
        if self._interleaved and _INTERLEAVED.fullmatch(name):
            # Stored row (head, i, half) belongs to row (head, half, i).
            pairs, columns = self._head_dim // 2, destination.shape[1:]
            heads = destination.view(-1, 2, pairs, *columns).transpose(1, 2)
            for start, rows in _chunks(self._file, self._tensors[name], self._head_dim):
                first = start // self._head_dim
                interleaved = rows.reshape(-1, pairs, 2, *columns)
                heads[first : first + interleaved.shape[0]].copy_(interleaved)
        else:
            for start, rows in _chunks(self._file, self._tensors[name], 1):
                destination[start : start + rows.shape[0]].copy_(rows)


def read_vector(file: GGUFFile, tensor: GGUFTensor) -> tuple[float, ...]:
    """A one-dimensional tensor as numbers."""
    return tuple(float(value) for _, rows in _chunks(file, tensor, 1) for value in rows.flatten().tolist())


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; its own where it has none."""
    if match := _LAYER.fullmatch(name):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}" if part in _LAYER_NAMES else name
    part, _, kind = name.rpartition(".")
    return f"{_NAMES[part]}.{kind}" if part in _NAMES else name


def _own_names(name: str) -> Iterator[str]:
    """The GGUF name of a tensor with this Hugging Face name, if it has one."""
    for own, module in _NAMES.items():
        if name.startswith(f"{module}."):
            yield own + name[len(module) :]
    for own, module in _LAYER_NAMES.items():
        if match := re.fullmatch(rf"model\.layers\.(\d+)\.{re.escape(module)}\.(weight|bias)", name):
            yield f"blk.{match[1]}.{own}.{match[2]}"


def _chunks(file: GGUFFile, tensor: GGUFTensor, row_multiple: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Pieces of a tensor with the row each begins at; a vector's elements are its rows."""
    if len(tensor.shape) == 1:
        yield 0, _decode(file, tensor, 0, 1).flatten()
        return
    num_rows, row_elements = tensor.shape[0], tensor.shape[-1]
    step = max(1, _CHUNK_ELEMENTS // (row_elements * row_multiple)) * row_multiple
    for start in range(0, num_rows, step):
        yield start, _decode(file, tensor, start, min(start + step, num_rows))


def _decode(file: GGUFFile, tensor: GGUFTensor, start: int, stop: int) -> torch.Tensor:
    rows = file.rows(tensor, start, stop)
    if (dtype := _PLAIN.get(tensor.quantization)) is not None:
        return torch.from_numpy(rows).view(dtype)
    try:
        return torch.from_numpy(dequantize(rows, GGMLQuantizationType[tensor.quantization]))
    except NotImplementedError as error:
        raise UnsupportedModel(
            f"{file.path}: tensor {tensor.name} has the quantisation {tensor.quantization}, which cannot be dequantised"
        ) from error
