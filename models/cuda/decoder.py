"""CudaDecoder: the layers of a model in Triton and cuBLASLt, over buffers that are allocated once.

Nothing here allocates, synchronises or reads from the device, so any call can be captured in a CUDA graph. The buffers
are shared by all steps and all graphs: the stream orders them.

T packed tokens     R rows     D hidden     E q, k and v features     N query heads     K KV heads     H head dim
F intermediate      V vocab    P blocks     B block size     U = H / 2     X blocks of the longest table
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.linear.tiles import QKV_FUSED_TOKENS, qkv_tile
from triode.kernels.paged_attention.gpu import AttentionWorkspace, paged_attention
from triode.kernels.paged_attention.tiles import (
    HOPPER_PAIRS,
    SEGMENT_TOKENS,
    decode_tile,
    prefill_tile,
    splits_for,
    splits_of_long_rows,
)
from triode.kernels.qkv_epilogue.fused import qkv_fused
from triode.kernels.qkv_epilogue.gpu import qkv_epilogue
from triode.kernels.rms_norm.gpu import add_rms_norm, rms_norm
from triode.models.config import ModelConfig
from triode.models.cuda.linears import GpuGateUp, GpuLinear, Proofs
from triode.models.cuda.one_token import OneTokenLayers
from triode.models.rope import rope_table
from triode.models.weights import DecoderWeights, LayerWeights

# States of programs that share a long context between the tiles of a short chunk.
_WORKSPACE_BYTES = 256 << 20


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
            attended_TNH=empty(config.num_heads, config.head_dim),
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
        self._qkv = decoder.linear(weights.qkv_ED, None)
        rotates_whole = 2 * decoder.rope.cos_XU.shape[1] == config.head_dim
        self._fuses_qkv = weights.q_norm_H is None and rotates_whole
        self._o = decoder.linear(weights.o_DE, weights.o_bias_D)
        self._gate_up = GpuGateUp(decoder.linear(weights.gate_up_FD, weights.gate_up_bias_F))
        self._down = decoder.linear(weights.down_DF, weights.down_bias_D)

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

    def project_o(self, buffers: Buffers) -> None:
        """From `attended` to `x`."""
        self._o(buffers.attended_TNH.flatten(1), buffers.x_TD)

    def project_qkv(
        self, key_PBKH: torch.Tensor, value_PBKH: torch.Tensor, places: TokenPlaces, buffers: Buffers
    ) -> None:
        """From `hidden`: keys and values go to the cache, rotated queries are in `qkv`."""
        config, weights, rope = self._config, self._weights, self._rope
        slots = (places.position_T, places.kv_slot_T, key_PBKH, value_PBKH)
        if self._fuses_qkv and len(buffers.hidden_TD) <= QKV_FUSED_TOKENS:
            qkv_fused(
                buffers.hidden_TD,
                weights.qkv_ED,
                buffers.qkv_TE,
                rope.cos_XU,
                rope.sin_XU,
                *slots,
                config.num_heads,
                qkv_tile(weights.qkv_ED.shape[0] // 2, config.hidden_size),
                self._traits,
                bias_E=weights.qkv_bias_E,
            )
            return
        self._qkv(buffers.hidden_TD, buffers.qkv_TE)
        qkv_epilogue(
            buffers.qkv_TE,
            rope.cos_XU,
            rope.sin_XU,
            *slots,
            config.num_heads,
            self._traits,
            bias_E=weights.qkv_bias_E,
            q_norm_H=weights.q_norm_H,
            k_norm_H=weights.k_norm_H,
            eps=config.rms_norm_eps,
        )

    def feed_forward(self, buffers: Buffers) -> None:
        """From `hidden` to `x`: the gated network."""
        self._gate_up(buffers.hidden_TD, buffers.gate_up_TF2, buffers.activated_TF)
        self._down(buffers.activated_TF, buffers.x_TD)

    def add_post_norm(self, buffers: Buffers) -> None:
        """Add `x` to the residual; its norm becomes `hidden`."""
        self._add_norm(self._weights.post_norm_D, buffers)

    def add_input_norm(self, buffers: Buffers) -> None:
        """The same before the layer."""
        self._add_norm(self._weights.input_norm_D, buffers)

    def _add_norm(self, weight_D: torch.Tensor, buffers: Buffers) -> None:
        eps = self._config.rms_norm_eps
        add_rms_norm(buffers.x_TD, buffers.residual_TD, weight_D, eps, buffers.hidden_TD, self._traits)


class CudaDecoder:
    """A model bound to its weights, kernels and buffers.

    Belongs in `Gpu.active()` and in `kernels.linear.blas.in_order`.
    """

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights, traits: GpuTraits, *, max_tokens: int, max_rows: int
    ) -> None:
        self.config = config
        self.traits = traits
        self.device = weights.embed_VD.device
        self.dtype = weights.embed_VD.dtype
        self.rope = rope_table(config, self.device)
        self.embed_VD = weights.embed_VD
        self.proofs = Proofs(traits)
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.max_segments = -(-config.max_context_tokens // SEGMENT_TOKENS)
        self.workspace = self._allocate_workspace()
        self.prefill_workspace = self._allocate_prefill_workspace()
        self.buffers = Buffers.allocate(config, max_tokens, max_rows, self.dtype, self.device)
        self._weights = weights
        self._layers = [CudaLayer(config, index, layer, self) for index, layer in enumerate(weights.layers)]
        self._one_token = OneTokenLayers.of(config, weights, self)
        self._head = self._bind_head(weights.head_VD)

    def linear(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None) -> GpuLinear:
        """A product over the tokens of a step."""
        proof = self.proofs.of(weight_ED, bias_E, self.dtype, self.max_tokens)
        return GpuLinear(weight_ED, bias_E, proof.triton_tokens, self.traits)

    def forward(
        self, places: TokenPlaces, keys_PBKH: Sequence[torch.Tensor], values_PBKH: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Compute the step whose embeddings are the first rows of `buffers.residual_TD`; store its keys and values.

        Returns:
            The hidden states after the final norm, [T, D]: a view that the next step overwrites.
        """
        buffers = self.buffers.first(places.num_tokens)
        eps = self.config.rms_norm_eps
        rms_norm(buffers.residual_TD, self._weights.layers[0].input_norm_D, eps, buffers.hidden_TD, self.traits)
        if places.num_tokens == 1 and self._one_token is not None:
            residual_TD = self._forward_one(self._one_token, places, keys_PBKH, values_PBKH, buffers)
        else:
            residual_TD = self._forward_many(places, keys_PBKH, values_PBKH, buffers)
        add_rms_norm(buffers.x_TD, residual_TD, self._weights.final_norm_D, eps, buffers.hidden_TD, self.traits)
        return buffers.hidden_TD

    def _forward_many(
        self,
        places: TokenPlaces,
        keys_PBKH: Sequence[torch.Tensor],
        values_PBKH: Sequence[torch.Tensor],
        buffers: Buffers,
    ) -> torch.Tensor:
        """From the first norm to `x` of the last layer; returns the residual that it is yet to be added to."""
        for index, (layer, key_PBKH, value_PBKH) in enumerate(zip(self._layers, keys_PBKH, values_PBKH, strict=True)):
            if index > 0:
                layer.add_input_norm(buffers)
            layer.project_qkv(key_PBKH, value_PBKH, places, buffers)
            layer.attend(key_PBKH, value_PBKH, places, buffers)
            layer.project_o(buffers)
            layer.add_post_norm(buffers)
            layer.feed_forward(buffers)
        return buffers.residual_TD

    def _forward_one(
        self,
        one_token: OneTokenLayers,
        places: TokenPlaces,
        keys_PBKH: Sequence[torch.Tensor],
        values_PBKH: Sequence[torch.Tensor],
        buffers: Buffers,
    ) -> torch.Tensor:
        """The same, of one token."""
        self._layers[0].project_qkv(keys_PBKH[0], values_PBKH[0], places, buffers)
        for index, layer in enumerate(self._layers):
            layer.attend(keys_PBKH[index], values_PBKH[index], places, buffers)
            one_token.finish(index, keys_PBKH, values_PBKH, places, buffers)
        return one_token.residual(len(self._layers), buffers)[None]

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """float32 logits [R, V] of the rows that need them: a view that the next call overwrites."""
        logits_RV = self.buffers.logits_RV[: len(hidden_RD)]
        self._head(hidden_RD, logits_RV)
        return logits_RV

    def splits(self, num_rows: int, max_segments: int) -> int:
        """How many programs share the KV of a row, for so many rows of at most so many segments."""
        return splits_for(num_rows, self.config.num_kv_heads, min(max_segments, self.max_segments), self.traits)

    def prefill_splits(self, num_tokens: int, num_rows: int, longest: int, *, walks_fast: bool) -> int:
        """The same for a packed step of so many tokens and rows, of which none ends beyond `longest`.

        1 where the workspace cannot hold the states, and where a program that shares nothing is done sooner.

        Args:
            walks_fast: Hopper's own kernel serves such rows.
        """
        config, traits = self.config, self.traits
        group = config.num_heads // config.num_kv_heads
        if num_tokens <= decode_tile(group, config.head_dim, self.dtype, traits).pairs // group:
            # Such rows take the decode tile: one program a row.
            return 1
        pairs = HOPPER_PAIRS if walks_fast else prefill_tile(group, config.head_dim, self.dtype, traits).pairs
        num_tiles = num_tokens // (pairs // group) + num_rows
        num_programs = num_tiles * config.num_kv_heads
        if num_programs > len(self.prefill_workspace.arrivals_W):
            return 1
        segments = -(-longest // SEGMENT_TOKENS)
        if walks_fast:
            return splits_of_long_rows(num_programs, segments, self.max_segments, traits)
        splits = self.splits(num_tiles, self.max_segments)
        waves = -(-num_programs * min(splits, segments) // traits.num_sms)
        return splits if waves * -(-segments // splits) < segments else 1

    def _allocate_workspace(self) -> AttentionWorkspace:
        # More than one program shares a row only while that leaves the GPU unfilled.
        num_programs = 2 * self.traits.num_sms + self.config.num_kv_heads
        group = self.config.num_heads // self.config.num_kv_heads
        return AttentionWorkspace.allocate(num_programs, self.max_segments, group, self.config.head_dim, self.device)

    def _allocate_prefill_workspace(self) -> AttentionWorkspace:
        """For as many programs as fit, of tiles that a long chunk takes."""
        config = self.config
        pairs = prefill_tile(config.num_heads // config.num_kv_heads, config.head_dim, self.dtype, self.traits).pairs
        state_bytes = self.max_segments * pairs * (config.head_dim + 2) * 4
        num_programs = min(2 * self.traits.num_sms + config.num_kv_heads, max(1, _WORKSPACE_BYTES // state_bytes))
        return AttentionWorkspace.allocate(num_programs, self.max_segments, pairs, config.head_dim, self.device)

    def _bind_head(self, head_VD: torch.Tensor) -> GpuLinear:
        proof = self.proofs.of(head_VD, None, torch.float32, self.max_rows)
        return GpuLinear(head_VD, None, proof.triton_tokens, self.traits)
