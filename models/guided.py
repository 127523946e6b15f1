"""The rows of a step that have a guide, and which tokens each of them may get.

A mask follows from the tokens that a row has by then, so it is made anew for every step, beside the forward.

    G rows with a guide        R rows        V vocabulary        W 32-bit words of a mask, one bit a token
"""

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import torch

from triode.models.grammar import MaskWords
from triode.models.slots import SlotState


class GuidedRows:
    """Made once for as long as the same rows sample together."""

    def __init__(self, states: Sequence[SlotState]) -> None:
        guided = [(row, state.matcher) for row, state in enumerate(states) if state.matcher is not None]
        self.rows = [row for row, _ in guided]
        """Those of `states` that have a guide."""
        self._matchers = [matcher for _, matcher in guided]
        self._compiler = guided[0][1].compiler
        self._mask_GW = np.zeros((len(guided), self._compiler.num_words), np.int32)
        self._filling: Future[None] | None = None

    @classmethod
    def among(cls, states: Sequence[SlotState]) -> "GuidedRows | None":
        """None when no row has a guide."""
        return cls(states) if any(state.matcher is not None for state in states) else None

    def begin(self) -> None:
        """Start on the masks of the next tokens, in another thread."""
        self._filling = self._compiler.begin_fill(self._matchers, self._mask_GW)

    def masks(self) -> MaskWords:
        """The masks, one a guided row, to be read before the next `begin`. Waits for them."""
        assert self._filling is not None, "masks are begun before they are asked for"
        self._filling.result()
        return self._mask_GW

    def errors(self) -> dict[int, str]:
        """Why rows cannot follow their guides any further."""
        return {
            row: matcher.error
            for row, matcher in zip(self.rows, self._matchers, strict=True)
            if matcher.error is not None
        }


def forbid(logits_RV: torch.Tensor, mask_GW: MaskWords, rows: Sequence[int]) -> None:
    """Of each of `rows`, leave the tokens of its mask. The logits are in host memory."""
    vocab_size = logits_RV.shape[-1]
    bits_GV = np.unpackbits(mask_GW.view(np.uint8), axis=-1, count=vocab_size, bitorder="little")
    forbidden_GV = torch.from_numpy(bits_GV) == 0
    for forbidden_V, row in zip(forbidden_GV, rows, strict=True):
        logits_RV[row].masked_fill_(forbidden_V, -torch.inf)
