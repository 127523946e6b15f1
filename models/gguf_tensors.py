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

# Small enough for a dequantisation to stay in the L2 cache, and for torch to copy the piece without waking its threads:
# where other processes hold the cores, thousands of such meetings cost more than the whole load.
_PIECE_ELEMENTS = 2**15

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
        tensor = self._tensors[name]
        if self._interleaved and _INTERLEAVED.fullmatch(name):
            self._read_interleaved(tensor, destination)
            return
        for start, rows in _pieces(self._file, tensor, 0, tensor.shape[0]):
            destination[start : start + rows.shape[0]].copy_(rows)

    def format(self, name: str) -> str:
        """How the file keeps the tensor, as GGUF spells it."""
        return self._tensors[name].quantization

    def blocks(self, name: str) -> torch.Tensor:
        """A matrix's bytes as they are stored, [rows, bytes a row], its rows in order."""
        tensor = self._tensors[name]
        rows = torch.from_numpy(self._file.rows(tensor, 0, tensor.shape[0]))
        if not (self._interleaved and _INTERLEAVED.fullmatch(name)):
            return rows
        return rows.view(-1, self._head_dim // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)

    def _read_interleaved(self, tensor: GGUFTensor, destination: torch.Tensor) -> None:
        """Stored row (head, i, half) belongs to row (head, half, i)."""
        columns = destination.shape[1:]
        for first in range(0, tensor.shape[0], self._head_dim):
            head = destination[first : first + self._head_dim].view(2, -1, *columns).transpose(0, 1)
            for start, rows in _pieces(self._file, tensor, first, first + self._head_dim):
                pairs = rows.reshape(-1, 2, *columns)
                pair = (start - first) // 2
                head[pair : pair + pairs.shape[0]].copy_(pairs)


def read_vector(file: GGUFFile, tensor: GGUFTensor) -> tuple[float, ...]:
    """A one-dimensional tensor as numbers."""
    return tuple(float(value) for _, rows in _pieces(file, tensor, 0, tensor.shape[0]) for value in rows.tolist())


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


def _pieces(file: GGUFFile, tensor: GGUFTensor, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows `start` to `stop` in pieces of an even number of rows, with the row each begins at.

    The elements of a vector are its rows.
    """
    if len(tensor.shape) == 1:
        yield start, _decode(file, tensor, 0, 1).flatten()[start:stop]
        return
    is_plain = tensor.quantization in _PLAIN
    step = stop - start if is_plain else max(2, _PIECE_ELEMENTS // tensor.shape[-1] // 2 * 2)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        yield first, _decode(file, tensor, first, last)


def _decode(file: GGUFFile, tensor: GGUFTensor, start: int, stop: int) -> torch.Tensor:
    rows = file.rows(tensor, start, stop)
    if (dtype := _PLAIN.get(tensor.quantization)) is not None:
        return torch.from_numpy(rows).view(dtype)
    try:
        return torch.from_numpy(dequantize(rows, GGMLQuantizationType[tensor.quantization]))
    except NotImplementedError as error:
        # The package has no public list of what it can dequantise; this is how it says that a type is not among it.
        raise UnsupportedModel(
            f"{file.path}: tensor {tensor.name} has the quantisation {tensor.quantization}, which cannot be dequantised"
        ) from error
