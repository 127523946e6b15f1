"""The tensors of a decoder, laid out as the kernels read them.

    V vocab   D hidden   F intermediate   H head dim   E = (N + 2 K) H rows of q, k and v

Matrices are in `torch.nn.Linear`'s orientation, [out, in]. What is multiplied by the same input is one matrix: the
rows of `qkv_ED` are all query heads, then all key heads, then all value heads; those of `gate_up_FD` are gate, then
up. Loading writes each tensor of the checkpoint straight into its rows.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from triode.models.config import ModelConfig
from triode.models.packed_file import PackedArrays, PackedFile


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One transformer layer; a bias or norm is None where the model has none."""

    input_norm_D: torch.Tensor
    qkv_ED: torch.Tensor
    o_DE: torch.Tensor
    post_norm_D: torch.Tensor
    gate_up_FD: torch.Tensor
    down_DF: torch.Tensor
    qkv_bias_E: torch.Tensor | None = None
    q_norm_H: torch.Tensor | None = None
    k_norm_H: torch.Tensor | None = None
    o_bias_D: torch.Tensor | None = None
    gate_up_bias_F: torch.Tensor | None = None
    down_bias_D: torch.Tensor | None = None


HEAD = "head"
EMBEDDING = "embedding"
MATRIX_PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The matrices of a layer, and the tensors of a checkpoint whose rows they join."""


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix in the quantised blocks of its file."""

    format: str
    """As GGUF spells it: Q4_0, Q4_1 or Q8_0."""
    parts: tuple[str, ...]
    """The checkpoint's tensors whose rows it joins, by their Hugging Face names."""
    read: Callable[[], torch.Tensor]
    """Gives the bytes, [rows, bytes a row]."""


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A whole decoder. `head_VD` is the same tensor object as `embed_VD` where the model ties them."""

    embed_VD: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm_D: torch.Tensor
    head_VD: torch.Tensor
    stored: Mapping[str, StoredMatrix] = field(default_factory=dict)
    """Matrices that are not read into tensors, by name (`layers.I.qkv`, ..., `head`): their tensors are on no device
    ("meta")."""
    packed: PackedArrays | None = None
    """All of it as a file of packed weights holds it; no tensor is on a device then."""
    pack_to: PackedFile | None = None
    """Where it is to be written once it is packed."""


def allocate(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str, unread: Collection[str] = ()
) -> DecoderWeights:
    """Uninitialised weights of the right shapes; the matrices in `unread` take no memory."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def matrix(name: str, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta" if name in unread else device)

    embed_VD = matrix(EMBEDDING, config.vocab_size, config.hidden_size)
    return DecoderWeights(
        embed_VD=embed_VD,
        layers=tuple(_allocate_layer(config, f"layers.{i}", empty, matrix) for i in range(config.num_layers)),
        final_norm_D=empty(config.hidden_size),
        head_VD=embed_VD if config.tie_word_embeddings else matrix(HEAD, config.vocab_size, config.hidden_size),
    )


def _allocate_layer(
    config: ModelConfig, name: str, empty: Callable[..., torch.Tensor], matrix: Callable[..., torch.Tensor]
) -> LayerWeights:
    hidden, inner = config.hidden_size, config.intermediate_size
    qkv_size = config.q_size + 2 * config.kv_size
    return LayerWeights(
        input_norm_D=empty(hidden),
        qkv_ED=matrix(f"{name}.qkv", qkv_size, hidden),
        o_DE=matrix(f"{name}.o", hidden, config.q_size),
        post_norm_D=empty(hidden),
        gate_up_FD=matrix(f"{name}.gate_up", 2 * inner, hidden),
        down_DF=matrix(f"{name}.down", hidden, inner),
        qkv_bias_E=empty(qkv_size) if config.qkv_bias else None,
        q_norm_H=empty(config.head_dim) if config.qk_norm else None,
        k_norm_H=empty(config.head_dim) if config.qk_norm else None,
        o_bias_D=empty(hidden) if config.o_bias else None,
        gate_up_bias_F=empty(2 * inner) if config.mlp_bias else None,
        down_bias_D=empty(hidden) if config.mlp_bias else None,
    )


def places(config: ModelConfig, weights: DecoderWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint by its Hugging Face name, and the view of `weights` that it fills."""
    yield "model.embed_tokens.weight", weights.embed_VD
    for index, layer in enumerate(weights.layers):
        for name, view in _layer_places(config, layer):
            yield f"model.layers.{index}.{name}", view
    yield "model.norm.weight", weights.final_norm_D
    if not config.tie_word_embeddings:
        yield "lm_head.weight", weights.head_VD


def _layer_places(config: ModelConfig, layer: LayerWeights) -> Iterator[tuple[str, torch.Tensor]]:
    qkv = (
        ("self_attn.q_proj", config.q_size),
        ("self_attn.k_proj", config.kv_size),
        ("self_attn.v_proj", config.kv_size),
    )
    gate_up = (("mlp.gate_proj", config.intermediate_size), ("mlp.up_proj", config.intermediate_size))
    yield "input_layernorm.weight", layer.input_norm_D
    yield from _split("weight", layer.qkv_ED, qkv)
    yield from _split("bias", layer.qkv_bias_E, qkv)
    yield from _split("weight", layer.q_norm_H, (("self_attn.q_norm", config.head_dim),))
    yield from _split("weight", layer.k_norm_H, (("self_attn.k_norm", config.head_dim),))
    yield "self_attn.o_proj.weight", layer.o_DE
    yield from _split("bias", layer.o_bias_D, (("self_attn.o_proj", config.hidden_size),))
    yield "post_attention_layernorm.weight", layer.post_norm_D
    yield from _split("weight", layer.gate_up_FD, gate_up)
    yield from _split("bias", layer.gate_up_bias_F, gate_up)
    yield "mlp.down_proj.weight", layer.down_DF
    yield from _split("bias", layer.down_bias_D, (("mlp.down_proj", config.hidden_size),))


def _split(
    kind: str, fused: torch.Tensor | None, parts: tuple[tuple[str, int], ...]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The named row ranges of a fused tensor; nothing where the model has no such tensor."""
    if fused is None:
        return
    start = 0
    for name, num_rows in parts:
        yield f"{name}.{kind}", fused[start : start + num_rows]
        start += num_rows
