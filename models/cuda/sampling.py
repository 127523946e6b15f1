"""The rows that sample in one step: who they are, what changes their logits, who wants logprobs."""

from collections.abc import Sequence

import torch

from triode.models.cuda.arena import Arena
from triode.models.cuda.gpu import Gpu
from triode.models.cuda.passes import Passes
from triode.models.cuda.scores import PendingScores
from triode.models.guided import GuidedRows
from triode.models.sampling import pack
from triode.models.slots import SlotState


class SampledSet:
    """What follows from which rows sample together, made once for as long as they do."""

    def __init__(
        self, states: Sequence[SlotState], slots: Sequence[int], vocab_size: int, arena: Arena, gpu: Gpu
    ) -> None:
        columns = pack([state.params for state in states])
        self.states = tuple(states)
        self.guided = GuidedRows.among(states)
        self.passes = Passes(columns, states, slots, vocab_size, arena, gpu)
        asked = columns.logprobs or ()
        self._scored_rows = [row for row, num in enumerate(asked) if num is not None]
        self._num_alternatives = [num for num in asked if num is not None]

    def score(self, logits_RV: torch.Tensor, gpu: Gpu) -> PendingScores | None:
        """Logprobs of raw logits, for the rows that asked."""
        if not self._scored_rows:
            return None
        return PendingScores(logits_RV, self._scored_rows, self._num_alternatives, gpu)
