"""One rank's share of a decoder's tensors (`parallel.py`).

V vocab   D hidden   F intermediate   E rows of q, k and v
"""

from dataclasses import replace

import torch

from triode.models.config import ModelConfig
from triode.models.parallel import outputs_of
from triode.models.weights import DecoderWeights, LayerWeights


def share_of_ends(config: ModelConfig, weights: DecoderWeights, rank: int, num_ranks: int) -> DecoderWeights:
    """Embedding, last norm and this rank's outputs of the head; without layers."""
    outputs = outputs_of(config.vocab_size, rank, num_ranks)
    return replace(weights, layers=(), head_VD=weights.head_VD[outputs.start : outputs.stop])


def share_of_layer(config: ModelConfig, layer: LayerWeights, rank: int, num_ranks: int) -> LayerWeights:
    """This rank's rows of qkv and of gate and up, its columns of o and down. `config` is the whole model's."""
    qkv = (config.q_size, config.kv_size, config.kv_size)
    gate_up = (config.intermediate_size,) * 2

    def rows(fused: torch.Tensor | None, parts: tuple[int, ...]) -> torch.Tensor | None:
        if fused is None:
            return None
        return torch.cat([part.chunk(num_ranks)[rank] for part in fused.split(parts)])

    def matrix_rows(fused: torch.Tensor, parts: tuple[int, ...]) -> torch.Tensor:
        return torch.cat([part.chunk(num_ranks)[rank] for part in fused.split(parts)])

    return replace(
        layer,
        qkv_ED=matrix_rows(layer.qkv_ED, qkv),
        qkv_bias_E=rows(layer.qkv_bias_E, qkv),
        o_DE=layer.o_DE.chunk(num_ranks, 1)[rank].contiguous(),
        gate_up_FD=matrix_rows(layer.gate_up_FD, gate_up),
        gate_up_bias_F=rows(layer.gate_up_bias_F, gate_up),
        down_DF=layer.down_DF.chunk(num_ranks, 1)[rank].contiguous(),
    )
