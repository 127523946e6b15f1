"""A decoder as it is defined, in float64 over one whole sequence, without cache or batch."""

from collections.abc import Callable

import torch

from triode.models.config import ModelConfig
from triode.models.rope import rope_table
from triode.models.weights import DecoderWeights, LayerWeights

Stored = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From a layer's number, its exact keys and values [K, T, H] to those that a cache has of them."""


def logits_float64(
    config: ModelConfig,
    weights: DecoderWeights,
    token_ids: list[int],
    stored: Stored = lambda _, keys, values: (keys, values),
) -> torch.Tensor:
    """Logits [T, V] of every position."""
    x_TD = weights.embed_VD[torch.tensor(token_ids)].double()
    for index, layer in enumerate(weights.layers):
        x_TD = x_TD + _attention(config, index, layer, _rms_norm(x_TD, layer.input_norm_D, config), stored)
        gate_up_TF = _linear(_rms_norm(x_TD, layer.post_norm_D, config), layer.gate_up_FD, layer.gate_up_bias_F)
        gate, up = gate_up_TF.chunk(2, -1)
        x_TD = x_TD + _linear(torch.nn.functional.silu(gate) * up, layer.down_DF, layer.down_bias_D)
    return _linear(_rms_norm(x_TD, weights.final_norm_D, config), weights.head_VD, None)


def _attention(
    config: ModelConfig, index: int, layer: LayerWeights, x_TD: torch.Tensor, stored: Stored
) -> torch.Tensor:
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    qkv_TJH = _linear(x_TD, layer.qkv_ED, layer.qkv_bias_E).unflatten(-1, (N + 2 * K, H))
    q, k, v = (heads.transpose(0, 1) for heads in qkv_TJH.split((N, K, K), 1))
    q = _rotated(config, _rms_norm(q, layer.q_norm_H, config))
    k, v = stored(index, _rotated(config, _rms_norm(k, layer.k_norm_H, config)), v)
    k = k.repeat_interleave(N // K, 0)
    position = torch.arange(len(x_TD))
    seen = position <= position[:, None]
    window = config.window_tokens(index)
    if window is not None:
        seen &= position > position[:, None] - window
    scores = (q @ k.transpose(1, 2) * H**-0.5).masked_fill(~seen, -torch.inf)
    out_NTH = scores.softmax(-1) @ v.repeat_interleave(N // K, 0)
    return _linear(out_NTH.transpose(0, 1).flatten(1), layer.o_DE, layer.o_bias_D)


def _rotated(config: ModelConfig, heads_NTH: torch.Tensor) -> torch.Tensor:
    rope = rope_table(config, torch.device("cpu"))
    cos, sin = (table[: heads_NTH.shape[1]].double() for table in (rope.cos_XU, rope.sin_XU))
    first, second = heads_NTH.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, config: ModelConfig) -> torch.Tensor:
    if weight is None:
        return x
    return x * (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * weight.double()


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = x @ weight.double().T
    return y if bias is None else y + bias.double()
