"""The rows of a step that have a guide, and which tokens each of them may get.

A mask follows from the tokens that a row has by then, so it is made anew for every step, beside the forward.

    G rows with a guide        R rows        W 32-bit words of a mask, one bit a token
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import numpy as np

from triode.ids import TokenId
from triode.models.matcher import MaskWords
from triode.models.slots import SlotState
from triode.models.step import RowError

NOTHING_KNOWN: Mapping[int, TokenId] = {}


class GuidedRows:
    """Made once for as long as the same rows sample together."""

    def __init__(self, states: Sequence[SlotState]) -> None:
        guided = [(row, state.matcher) for row, state in enumerate(states) if state.matcher is not None]
        self._matchers = [matcher for _, matcher in guided]
        self._masks = guided[0][1].masks
        num_guided, num_words = len(guided), self._masks.num_words
        self.words: MaskWords = np.zeros(num_guided * (1 + num_words), np.int32)
        """`row_G`, then `mask_GW`: one after the other, so that both are sent at once."""
        self.row_G = self.words[:num_guided]
        """Which of the rows have a guide."""
        self.row_G[:] = [row for row, _ in guided]
        self.mask_GW = self.words[num_guided:].reshape(num_guided, num_words)
        """Valid after `fill`, or `wait`."""
        self._filling: Future[None] | None = None

    @classmethod
    def among(cls, states: Sequence[SlotState]) -> "GuidedRows | None":
        """None when no row has a guide."""
        return cls(states) if any(state.matcher is not None for state in states) else None

    def fill(self, known: Mapping[int, TokenId] = NOTHING_KNOWN) -> None:
        """Make the masks of the next tokens. Where one is `known`, by row, it is the only one that may come."""
        if not known:
            self._masks.fill(self._matchers, self.mask_GW)
            return
        rows = self.row_G.tolist()
        self._masks.fill(
            [None if row in known else matcher for row, matcher in zip(rows, self._matchers, strict=True)], self.mask_GW
        )
        bits_GW = self.mask_GW.view(np.uint32)
        for index, row in enumerate(rows):
            if row in known:
                bits_GW[index] = 0
                bits_GW[index, known[row] // 32] = 1 << known[row] % 32

    def begin(self) -> None:
        """The same in another thread."""
        self._filling = self._masks.in_thread(self.fill)

    def wait(self) -> None:
        """Until what has begun is there."""
        assert self._filling is not None, "masks are begun before they are waited for"
        self._filling.result()

    def errors(self) -> dict[int, RowError]:
        """Why rows cannot follow their guides any further."""
        return {
            row: RowError(matcher.error)
            for row, matcher in zip(self.row_G.tolist(), self._matchers, strict=True)
            if matcher.error is not None
        }
