"""One vector for a whole sequence, gathered chunk by chunk.

T query positions of a chunk        W of them whose hidden states are read: the last ones        D hidden
"""

import torch

from triode.models.step import Pooling


class PooledHidden:
    """The embedding of the positions seen so far."""

    def __init__(self, pooling: Pooling | None) -> None:
        assert pooling is not None, "a sequence is pooled that asked for no embedding"
        self._pooling = pooling
        self._state_D: torch.Tensor | None = None
        self.num_positions = 0

    def add(self, hidden_WD: torch.Tensor, num_positions: int) -> None:
        """The next T = `num_positions` positions, and the hidden states of the last W: of all, or, if the last of the sequence
        is its embedding, of at least one."""
        self.num_positions += num_positions
        if self._pooling is Pooling.LAST:
            self._state_D = hidden_WD[-1].double()
            return
        assert len(hidden_WD) == num_positions, "the mean is of all positions"
        if self._state_D is None:
            self._state_D = torch.zeros(hidden_WD.shape[1], dtype=torch.float64, device=hidden_WD.device)
        # One position after the other: a sum over the chunk would add in an order that depends on the chunking.
        for hidden_D in hidden_WD:
            self._state_D += hidden_D

    def result(self) -> tuple[float, ...]:
        """The embedding, not normalised."""
        assert self._state_D is not None, "a result needs at least one position"
        divisor = self.num_positions if self._pooling is Pooling.MEAN else 1
        return tuple((self._state_D / divisor).tolist())
