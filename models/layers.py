"""One transformer layer, bound to its weights and kernels.

T packed tokens     D hidden     N query heads     K KV heads     H head dim     U = H / 2
P blocks     B block size     E = (N + 2 K) H     F intermediate     W tokens that go on behind the cache: T, or fewer
"""

from dataclasses import dataclass

import torch

from triode.kernels.dispatch import Kernels
from triode.kernels.paged_attention.reference import Attend
from triode.models.config import ModelConfig
from triode.models.weights import LayerWeights


@dataclass(frozen=True, slots=True)
class StepContext:
    """What all layers of one step share."""

    cos_TU: torch.Tensor
    sin_TU: torch.Tensor
    slot_T: torch.Tensor
    attends: dict[int | None, Attend]
    """Sliding window, or None, to the attention of the tokens that go on."""
    going_on_W: torch.Tensor | None = None
    """Which tokens have more computed of them than keys and values, padding included; None for all."""


class Attention:
    """Projections, rotation, cache and attention of one layer."""

    def __init__(self, config: ModelConfig, layer: int, weights: LayerWeights, kernels: Kernels) -> None:
        self._kernels = kernels
        self._num_heads = config.num_heads
        self._num_kv_heads = config.num_kv_heads
        self._head_dim = config.head_dim
        self._eps = config.rms_norm_eps
        self._scale = config.head_dim**-0.5
        self._window = config.window_tokens(layer)
        self._q_norm_H = weights.q_norm_H
        self._k_norm_H = weights.k_norm_H
        self._qkv = kernels.prepare_linear(weights.qkv_ED, weights.qkv_bias_E)
        self._add_o = kernels.prepare_adding(weights.o_DE, weights.o_bias_D)

    def __call__(
        self,
        x_TD: torch.Tensor,
        residual_TD: torch.Tensor,
        key_PBKH: torch.Tensor,
        value_PBKH: torch.Tensor,
        context: StepContext,
    ) -> torch.Tensor:
        """Store the tokens' keys and values. Those that go on attend to the cache, and add what comes out to their
        residual.

        Returns:
            Their residual stream, [W, D].
        """
        kernels, N, K = self._kernels, self._num_heads, self._num_kv_heads
        qkv_TJH = self._qkv(x_TD).unflatten(-1, (N + 2 * K, self._head_dim))
        q_TNH, k_TKH, v_TKH = qkv_TJH.split((N, K, K), dim=1)
        if self._q_norm_H is not None and self._k_norm_H is not None:
            q_TNH.copy_(kernels.rms_norm(q_TNH, self._q_norm_H, self._eps))
            k_TKH.copy_(kernels.rms_norm(k_TKH, self._k_norm_H, self._eps))
        kernels.rotary(qkv_TJH[:, : N + K], context.cos_TU, context.sin_TU)
        kernels.store_kv(k_TKH, v_TKH, key_PBKH, value_PBKH, context.slot_T)
        if context.going_on_W is not None:
            q_TNH, residual_TD = q_TNH[context.going_on_W], residual_TD[context.going_on_W]
        if not len(residual_TD):
            return residual_TD
        out_WNH = context.attends[self._window](q_TNH, key_PBKH, value_PBKH, self._scale)
        return self._add_o(out_WNH.flatten(1), residual_TD)


class Mlp:
    """The gated feed-forward network of one layer."""

    def __init__(self, weights: LayerWeights, kernels: Kernels) -> None:
        self._gated = kernels.prepare_gated(weights.gate_up_FD, weights.gate_up_bias_F)
        self._add_down = kernels.prepare_adding(weights.down_DF, weights.down_bias_D)

    def __call__(self, x_TD: torch.Tensor, residual_TD: torch.Tensor) -> torch.Tensor:
        """`residual + down(silu(gate(x)) * up(x))`."""
        return self._add_down(self._gated(x_TD), residual_TD)


class Layer:
    """Attention and feed-forward network, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, weights: LayerWeights, kernels: Kernels) -> None:
        self._rms_norm = kernels.rms_norm
        self._eps = config.rms_norm_eps
        self._input_norm_D = weights.input_norm_D
        self._post_norm_D = weights.post_norm_D
        self._attention = Attention(config, layer, weights, kernels)
        self._mlp = Mlp(weights, kernels)

    def __call__(
        self, residual_TD: torch.Tensor, key_PBKH: torch.Tensor, value_PBKH: torch.Tensor, context: StepContext
    ) -> torch.Tensor:
        """The residual stream behind this layer of the tokens that go on, [W, D]; the one given may be overwritten."""
        x_TD = self._rms_norm(residual_TD, self._input_norm_D, self._eps)
        residual_WD = self._attention(x_TD, residual_TD, key_PBKH, value_PBKH, context)
        if not len(residual_WD):
            return residual_WD
        x_WD = self._rms_norm(residual_WD, self._post_norm_D, self._eps)
        return self._mlp(x_WD, residual_WD)
