"""Decoder: packed tokens in, hidden states out, for every family that `ModelConfig` describes.

T packed tokens     R rows     W wanted tokens     S rows that have some     D hidden     V vocab
P blocks     B block size     K KV heads     H head dim
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from triode.kernels.dispatch import Kernels
from triode.kernels.paged_attention.reference import Attend
from triode.kernels.paged_attention.rows import AttentionRows
from triode.kernels.sample.reference import greedy
from triode.kernels.threads import cpu_threads
from triode.models.batch import StepBatch
from triode.models.config import ModelConfig
from triode.models.layers import Layer, StepContext
from triode.models.rope import rope_table
from triode.models.weights import DecoderWeights, LayerWeights

# Steps of fewer tokens run on one thread: they are many short operations, and what a second thread saves in each is
# less than what starting and awaiting it costs. The results are the same bits.
_MIN_TOKENS_FOR_THREADS = 8


class Decoder:
    """The layers of a model, bound to their kernels.

    Matrices may be laid out anew for the kernels, so that the weights can be dropped once the decoder exists. A step
    is synchronous and belongs in `torch.inference_mode()`.

    Args:
        config: the model's sizes.
        weights: its tensors.
        kernels: what computes with them.
        layers: taken instead of `weights.layers`, one at a time, so that each can be freed before the next is laid out.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        kernels: Kernels,
        layers: Iterable[LayerWeights] | None = None,
    ) -> None:
        self.config = config
        self.kernels = kernels
        self.device = weights.embed_VD.device
        self.dtype = weights.embed_VD.dtype
        self.rope = rope_table(config, self.device)
        self._embed_VD = weights.embed_VD
        self._final_norm_D = weights.final_norm_D
        kernels.prepare_attention(config.head_dim)
        self._layers = [
            Layer(config, index, layer, kernels)
            for index, layer in enumerate(weights.layers if layers is None else layers)
        ]
        self._head = kernels.prepare_linear(weights.head_VD, None)
        self._windows = {config.window_tokens(index) for index in range(config.num_layers)}

    def forward(
        self, batch: StepBatch, keys_PBKH: Sequence[torch.Tensor], values_PBKH: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Compute one step and store its keys and values.

        Args:
            batch: the step's tokens; their number is a multiple of `Kernels.row_multiple`.
            keys_PBKH: each layer's keys (`KVPool.keys`).
            values_PBKH: each layer's values.

        Returns:
            The hidden states after the final norm that the batch wants, [W, D].
        """
        with cpu_threads(self._num_threads(len(batch.token_ids_T))):
            return self._forward(batch, keys_PBKH, values_PBKH)

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """float32 logits [R, V] of the rows that need them."""
        with cpu_threads(self._num_threads(len(hidden_RD))):
            return self._head(hidden_RD).float()

    def _num_threads(self, num_tokens: int) -> int | None:
        return 1 if num_tokens < _MIN_TOKENS_FOR_THREADS and self.device.type == "cpu" else None

    def _forward(
        self, batch: StepBatch, keys_PBKH: Sequence[torch.Tensor], values_PBKH: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        context = self._context(batch)
        contexts = [context] * len(self._layers)
        if batch.num_wanted < batch.num_tokens:
            contexts[-1] = self._last_context(batch, context)
        residual_TD = torch.nn.functional.embedding(batch.token_ids_T, self._embed_VD)
        for layer, key_PBKH, value_PBKH, own in zip(self._layers, keys_PBKH, values_PBKH, contexts, strict=True):
            residual_TD = layer(residual_TD, key_PBKH, value_PBKH, own)
        # Those that are wanted, by now, and padding.
        hidden_TD = self.kernels.rms_norm(residual_TD, self._final_norm_D, self.config.rms_norm_eps)
        return hidden_TD[: batch.num_wanted]

    def likeliest(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """The token with the largest logit of each row, [R]."""
        return greedy(self.logits(hidden_RD))

    def _context(self, batch: StepBatch) -> StepContext:
        position_T = batch.positions_PT[0]
        attends = {window: self._attend(batch.rows, window) for window in self._windows}
        return StepContext(self.rope.cos_XU[position_T], self.rope.sin_XU[position_T], batch.slot_T, attends)

    def _last_context(self, batch: StepBatch, context: StepContext) -> StepContext:
        """For the last layer, behind whose keys and values only wanted tokens are computed."""
        num_wanted_R = np.diff(batch.wanted_start_R1)
        num_others_R = np.diff(batch.rows.query_start_R1) - num_wanted_R
        # Padded as a step is, with whatever the first token has.
        token_W = np.zeros(-(-batch.num_wanted // self.kernels.row_multiple) * self.kernels.row_multiple, np.int64)
        token_W[: batch.num_wanted] = np.arange(batch.num_wanted) + np.repeat(num_others_R.cumsum(), num_wanted_R)
        (row_S,) = num_wanted_R.nonzero()
        rows = AttentionRows(
            query_start_R1=np.append(0, batch.wanted_start_R1[1:][row_S]),
            start_R=(batch.rows.start_R + num_others_R)[row_S],
            block_table_RC=batch.rows.block_table_RC[row_S],
            block_size_tokens=batch.rows.block_size_tokens,
        )
        window = self.config.window_tokens(self.config.num_layers - 1)
        attends = {window: self._attend(rows, window)}
        return replace(context, going_on_W=torch.from_numpy(token_W).to(self.device), attends=attends)

    def _attend(self, rows: AttentionRows, window: int | None) -> Attend:
        return self.kernels.plan_attention(
            rows,
            num_heads=self.config.num_heads,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            window=window,
            device=self.device,
        )
