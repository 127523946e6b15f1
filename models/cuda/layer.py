"""One transformer layer on a GPU, and what its operations hand to each other.

T packed tokens     R rows     D hidden     E q, k and v features     N query heads     K KV heads     H head dim
F intermediate      V vocab    P blocks     B block size     X blocks of the longest table
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from triode.kernels.hopper_product.tiles import Ending
from triode.kernels.linear.tiles import QKV_FUSED_TOKENS, qkv_tile
from triode.kernels.paged_attention.gpu import paged_attention
from triode.kernels.qkv_epilogue.fused import qkv_fused
from triode.kernels.qkv_epilogue.gpu import qkv_epilogue
from triode.kernels.rms_norm.gpu import add_rms_norm, rms_norm
from triode.models.config import ModelConfig
from triode.models.cuda.linears import GpuLinear
from triode.models.weights import LayerWeights

if TYPE_CHECKING:
    from triode.models.cuda.decoder import CudaDecoder


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows of one kind, which share an attention launch. Their query tokens are packed before those of the next group.

    A group of rows with one query token each may lie anywhere; rows with more come first in the step.
    """

    num_tokens: int
    """Query tokens of the step up to this group's end."""
    query_start_R1: torch.Tensor
    """int32, like the other tensors."""
    start_R: torch.Tensor
    table_RX: torch.Tensor
    max_query_tokens: int
    num_splits: int
    """How many programs share a row's KV."""


@dataclass(frozen=True, slots=True)
class TokenPlaces:
    """Where the query tokens of a step stand, on the device."""

    num_tokens: int
    position_T: torch.Tensor
    """int32."""
    kv_slot_T: torch.Tensor
    """int32: block * B + offset."""
    groups: tuple[RowGroup, ...]


@dataclass(frozen=True, slots=True)
class Buffers:
    """What one layer hands to the next operation, for the largest step."""

    residual_TD: torch.Tensor
    hidden_TD: torch.Tensor
    x_TD: torch.Tensor
    qkv_TE: torch.Tensor
    attended_TNH: torch.Tensor
    gate_up_TF2: torch.Tensor
    activated_TF: torch.Tensor
    logits_RV: torch.Tensor
    """float32."""

    @classmethod
    def allocate(
        cls, config: ModelConfig, max_tokens: int, max_rows: int, dtype: torch.dtype, device: torch.device
    ) -> "Buffers":
        """For steps of at most `max_tokens` tokens, of which at most `max_rows` need logits."""

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(max_tokens, *shape, dtype=dtype, device=device)

        return cls(
            residual_TD=empty(config.hidden_size),
            hidden_TD=empty(config.hidden_size),
            x_TD=empty(config.hidden_size),
            qkv_TE=empty(config.q_size + 2 * config.kv_size),
            # Of padding tokens attention writes nothing, and what follows computes on with what is there.
            attended_TNH=empty(config.num_heads, config.head_dim).zero_(),
            gate_up_TF2=empty(2 * config.intermediate_size),
            activated_TF=empty(config.intermediate_size),
            logits_RV=torch.empty(max_rows, config.vocab_size, dtype=torch.float32, device=device),
        )

    def first(self, num_tokens: int) -> "Buffers":
        """Views of a step's size; the logits stay whole."""
        return Buffers(
            self.residual_TD[:num_tokens],
            self.hidden_TD[:num_tokens],
            self.x_TD[:num_tokens],
            self.qkv_TE[:num_tokens],
            self.attended_TNH[:num_tokens],
            self.gate_up_TF2[:num_tokens],
            self.activated_TF[:num_tokens],
            self.logits_RV,
        )

    def swapped(self) -> "Buffers":
        """With the residual where `x` was."""
        return replace(self, residual_TD=self.x_TD, x_TD=self.residual_TD)


class CudaLayer:
    """One transformer layer, bound to its weights and products."""

    def __init__(self, config: ModelConfig, index: int, weights: LayerWeights, decoder: "CudaDecoder") -> None:
        self._config = config
        self._weights = weights
        self._traits = decoder.traits
        self._rope = decoder.rope
        self._workspace = decoder.workspace
        self._prefill_workspace = decoder.prefill_workspace
        self._window_tokens = config.window_tokens(index) or 0
        # The bias of queries, keys and values is added after the product, by the kernel that rotates them.
        self._qkv = decoder.linear(weights.qkv_ED, None, Ending.STORE)
        # Of the last layer alone, but no layer knows that it is; this is a view, and all layers share a proof.
        self._kv = decoder.linear(weights.qkv_ED[config.q_size :], None)
        rotates_whole = 2 * decoder.rope.cos_XU.shape[1] == config.head_dim
        self._fuses_qkv = weights.q_norm_H is None and rotates_whole
        self._o = decoder.linear(weights.o_DE, weights.o_bias_D, Ending.STORE, Ending.ADD)
        self._gate_up = decoder.gate_up(weights.gate_up_FD, weights.gate_up_bias_F)
        self._down = decoder.linear(weights.down_DF, weights.down_bias_D, Ending.STORE, Ending.ADD)

    def forward(
        self,
        key_PBKH: torch.Tensor,
        value_PBKH: torch.Tensor,
        places: TokenPlaces,
        buffers: Buffers,
        next_norm_D: torch.Tensor,
    ) -> Buffers:
        """From `hidden` to `hidden` of what comes next, whose norm is given. Returns what holds it, and the residual."""
        self.project_qkv(key_PBKH, value_PBKH, places, buffers)
        self.attend(key_PBKH, value_PBKH, places, buffers)
        buffers = self._add(self._o, buffers.attended_TNH.flatten(1), self._weights.post_norm_D, buffers)
        self._gate_up(buffers.hidden_TD, buffers.gate_up_TF2, buffers.activated_TF)
        return self._add(self._down, buffers.activated_TF, next_norm_D, buffers)

    def attend(self, key_PBKH: torch.Tensor, value_PBKH: torch.Tensor, places: TokenPlaces, buffers: Buffers) -> None:
        """From queries in `qkv` to `attended`."""
        config = self._config
        q_TNH = buffers.qkv_TE[:, : config.q_size].unflatten(1, (config.num_heads, config.head_dim))
        for group in places.groups:
            paged_attention(
                q_TNH[: group.num_tokens],
                key_PBKH,
                value_PBKH,
                group.table_RX,
                group.query_start_R1,
                group.start_R,
                buffers.attended_TNH,
                scale=config.head_dim**-0.5,
                max_query_tokens=group.max_query_tokens,
                traits=self._traits,
                window_tokens=self._window_tokens,
                num_splits=group.num_splits,
                workspace=self._workspace if group.max_query_tokens == 1 else self._prefill_workspace,
            )

    def project_qkv(
        self, key_PBKH: torch.Tensor, value_PBKH: torch.Tensor, places: TokenPlaces, buffers: Buffers
    ) -> None:
        """From `hidden`: keys and values go to the cache, rotated queries are in `qkv`."""
        config, weights, rope = self._config, self._weights, self._rope
        if self._fuses_qkv and len(buffers.hidden_TD) <= QKV_FUSED_TOKENS:
            qkv_fused(
                buffers.hidden_TD,
                weights.qkv_ED,
                buffers.qkv_TE,
                rope.cos_XU,
                rope.sin_XU,
                places.position_T,
                places.kv_slot_T,
                key_PBKH,
                value_PBKH,
                config.num_heads,
                qkv_tile(weights.qkv_ED.shape[0] // 2, config.hidden_size),
                self._traits,
                bias_E=weights.qkv_bias_E,
            )
            return
        self._qkv(buffers.hidden_TD, buffers.qkv_TE)
        self._finish_qkv(buffers.qkv_TE, weights.qkv_bias_E, config.num_heads, key_PBKH, value_PBKH, places)

    def project_kv(
        self, key_PBKH: torch.Tensor, value_PBKH: torch.Tensor, places: TokenPlaces, buffers: Buffers
    ) -> None:
        """From `hidden`: keys and values alone."""
        num_tokens, width = len(buffers.hidden_TD), 2 * self._config.kv_size
        # Side by side, as in the proof: cuBLASLt may choose another kernel for rows that lie farther apart.
        kv_TE = buffers.qkv_TE.view(-1)[: num_tokens * width].view(num_tokens, width)
        bias_E = self._weights.qkv_bias_E
        if bias_E is not None:
            bias_E = bias_E[self._config.q_size :]
        self._kv(buffers.hidden_TD, kv_TE)
        self._finish_qkv(kv_TE, bias_E, 0, key_PBKH, value_PBKH, places)

    def _finish_qkv(
        self,
        qkv_TE: torch.Tensor,
        bias_E: torch.Tensor | None,
        num_heads: int,
        key_PBKH: torch.Tensor,
        value_PBKH: torch.Tensor,
        places: TokenPlaces,
    ) -> None:
        weights, rope = self._weights, self._rope
        qkv_epilogue(
            qkv_TE,
            rope.cos_XU,
            rope.sin_XU,
            places.position_T,
            places.kv_slot_T,
            key_PBKH,
            value_PBKH,
            num_heads,
            self._traits,
            bias_E=bias_E,
            q_norm_H=weights.q_norm_H,
            k_norm_H=weights.k_norm_H,
            eps=self._config.rms_norm_eps,
        )

    def _add(self, product: GpuLinear, input_TE: torch.Tensor, norm_D: torch.Tensor, buffers: Buffers) -> Buffers:
        """Add a product to the residual, which may change its place; the norm of the sum becomes `hidden`."""
        eps = self._config.rms_norm_eps
        if product.adds(len(input_TE)):
            product.add(input_TE, buffers.residual_TD, buffers.x_TD)
            buffers = buffers.swapped()
            rms_norm(buffers.residual_TD, norm_D, eps, buffers.hidden_TD, self._traits)
        else:
            product(input_TE, buffers.x_TD)
            add_rms_norm(buffers.x_TD, buffers.residual_TD, norm_D, eps, buffers.hidden_TD, self._traits)
        return buffers
