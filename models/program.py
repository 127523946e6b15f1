"""What a runner needs of whatever computes its steps: torch operations (`Decoder`) or compiled code (`NativeDecoder`).

T packed tokens     R rows     W wanted tokens     D hidden     V vocab
P blocks     B block size     K KV heads     H head dim
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from triode.models.batch import StepBatch
from triode.models.config import ModelConfig


class KernelSet(Protocol):
    """Which kernels compute a step, and what they ask of it."""

    @property
    def row_multiple(self) -> int:
        """Steps are padded to a multiple of this many tokens."""

    @property
    def names(self) -> dict[str, str]:
        """Operation to implementation."""


class StepProgram(Protocol):
    """A model on a device. Steps are synchronous and belong in `torch.inference_mode()`."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype

    @property
    def kernels(self) -> KernelSet:
        """The kernels in use."""

    def forward(
        self, batch: StepBatch, keys_PBKH: Sequence[torch.Tensor], values_PBKH: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Compute one step and store its keys and values.

        Returns:
            The hidden states after the final norm that the batch wants, [W, D].
        """

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """float32 logits [R, V] of the rows that need them."""

    def likeliest(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """The token with the largest logit of each row, [R], int64, the lowest id among equals; `IMPOSSIBLE` where a
        logit is NaN or the largest one is not finite."""
