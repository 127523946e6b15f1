"""The tensors of a decoder, laid out as the kernels read them.

    V vocab   D hidden   F intermediate   H head dim   E = (N + 2 K) H rows of q, k and v

Matrices are in `torch.nn.Linear`'s orientation, [out, in]. What is multiplied by the same input is one matrix: the
rows of `qkv_ED` are all query heads, then all key heads, then all value heads; those of `gate_up_FD` are gate, then
up. Loading writes each tensor of the checkpoint straight into its rows.
"""

from dataclasses import dataclass

import torch


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


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A whole decoder. `head_VD` is the same tensor object as `embed_VD` where the model ties them."""

    embed_VD: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm_D: torch.Tensor
    head_VD: torch.Tensor
