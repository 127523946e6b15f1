"""CudaDecoder: the layers of a model in Triton and cuBLASLt, over buffers that are allocated once.

Nothing here allocates, synchronises or reads from the device, so any call can be captured in a CUDA graph. The buffers
are shared by all steps and all graphs: the stream orders them.

A prompt is read for its keys and values, and for the hidden state of its last token. So of most tokens the last layer
computes keys and values alone; the picked ones then go through it by themselves, as rows of a decode step do.

T packed tokens    R rows    Q picked tokens    D hidden    V vocab    K KV heads    H head dim
P blocks    B block size
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from triode.kernels.gpu_traits import GpuTraits
from triode.kernels.hopper_product.tiles import Ending
from triode.kernels.paged_attention.gpu import AttentionWorkspace
from triode.kernels.paged_attention.tiles import (
    HOPPER_PAIRS,
    SEGMENT_TOKENS,
    decode_tile,
    prefill_tile,
    splits_for,
    splits_of_long_rows,
)
from triode.kernels.rms_norm.gpu import add_rms_norm, rms_norm
from triode.kernels.step.gpu import pick
from triode.models.config import ModelConfig
from triode.models.cuda.layer import Buffers, CudaLayer, TokenPlaces
from triode.models.cuda.linears import GpuGateUp, GpuLinear, Proofs
from triode.models.cuda.one_token import OneTokenLayers
from triode.models.rope import rope_table
from triode.models.weights import DecoderWeights

# States of programs that share a long context between the tiles of a short chunk.
_WORKSPACE_BYTES = 256 << 20
# So few tokens go through the last layer together: to pick some of them is to launch more kernels for less work.
_FEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class PickedTokens:
    """The query tokens of a step whose hidden states are wanted."""

    token_Q: torch.Tensor
    """int32: which of the step's."""
    places: TokenPlaces
    """Where they stand, as rows of one token each."""


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
        self._picked_buffers = self._allocate_picked()
        self._weights = weights
        self._layers = [CudaLayer(config, index, layer, self) for index, layer in enumerate(weights.layers)]
        self._one_token = OneTokenLayers.of(config, weights, self)
        self._head = self._bind_head(weights.head_VD)

    def linear(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, *endings: Ending) -> GpuLinear:
        """A product over the tokens of a step, and what else may be asked of it."""
        proof = self.proofs.of(weight_ED, bias_E, self.dtype, self.max_tokens)
        product = GpuLinear(weight_ED, bias_E, proof.triton_tokens, self.traits)
        hopper = (ending for ending in endings if self.proofs.hopper(ending, product, self.max_tokens))
        return replace(product, hopper=frozenset(hopper))

    def gate_up(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None) -> GpuGateUp:
        """A product whose out features are gates, then ups, and SwiGLU of it."""
        return GpuGateUp(self.linear(weight_ED, bias_E, Ending.SWIGLU))

    def gains_by_picking(self, num_tokens: int, num_picked: int) -> bool:
        """Whether a step of so many tokens, of which so many are wanted, is done sooner if it picks them."""
        return num_tokens > max(_FEW_TOKENS, 2 * num_picked)

    def forward(
        self,
        places: TokenPlaces,
        keys_PBKH: Sequence[torch.Tensor],
        values_PBKH: Sequence[torch.Tensor],
        picked: PickedTokens | None = None,
    ) -> torch.Tensor:
        """Compute the step whose embeddings are the first rows of `buffers.residual_TD`; store its keys and values.

        Args:
            picked: of a step of several tokens those whose hidden states are wanted, if not all.

        Returns:
            The hidden states after the final norm, [T, D] or [Q, D]: a view that the next step overwrites.
        """
        buffers = self.buffers.first(places.num_tokens)
        eps = self.config.rms_norm_eps
        rms_norm(buffers.residual_TD, self._weights.layers[0].input_norm_D, eps, buffers.hidden_TD, self.traits)
        if places.num_tokens == 1 and self._one_token is not None:
            assert picked is None, "a step of one token that picks"
            return self._forward_one(self._one_token, places, keys_PBKH, values_PBKH, buffers)
        return self._forward_many(places, keys_PBKH, values_PBKH, picked, buffers)

    def _forward_many(
        self,
        places: TokenPlaces,
        keys_PBKH: Sequence[torch.Tensor],
        values_PBKH: Sequence[torch.Tensor],
        picked: PickedTokens | None,
        buffers: Buffers,
    ) -> torch.Tensor:
        """From behind the first norm to behind the last."""
        norms = [*(layer.input_norm_D for layer in self._weights.layers[1:]), self._weights.final_norm_D]
        for layer, key_PBKH, value_PBKH, norm_D in zip(self._layers, keys_PBKH, values_PBKH, norms, strict=True):
            if picked is not None and layer is self._layers[-1]:
                layer.project_kv(key_PBKH, value_PBKH, places, buffers)
                places, buffers = picked.places, self._pick(picked, buffers)
            if places.num_tokens:
                buffers = layer.forward(key_PBKH, value_PBKH, places, buffers, norm_D)
        return buffers.hidden_TD

    def _pick(self, picked: PickedTokens, buffers: Buffers) -> Buffers:
        """The hidden states and residuals of picked tokens, in buffers of their own."""
        mine = self._picked_buffers.first(picked.places.num_tokens)
        if picked.places.num_tokens:
            tokens = buffers.hidden_TD, buffers.residual_TD, mine.hidden_TD, mine.residual_TD
            pick(picked.token_Q, *tokens, self.traits)
        return mine

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
        residual_TD, weight_D = one_token.residual(len(self._layers), buffers)[None], self._weights.final_norm_D
        add_rms_norm(buffers.x_TD, residual_TD, weight_D, self.config.rms_norm_eps, buffers.hidden_TD, self.traits)
        return buffers.hidden_TD

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

    def _allocate_picked(self) -> Buffers:
        """What picked tokens are copied to; the rest is free when they go on."""
        hidden_RD, residual_RD = torch.empty(
            2, self.max_rows, self.config.hidden_size, dtype=self.dtype, device=self.device
        ).unbind()
        return replace(self.buffers, hidden_TD=hidden_RD, residual_TD=residual_RD)

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
