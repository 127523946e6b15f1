"""What is read from hidden states themselves: prompt logprobs and embeddings. Both wait for their step.

T packed query tokens    D hidden
"""

from collections.abc import Iterator
from typing import TypeAlias

import torch

from triode.ids import SlotId
from triode.models.cuda.batch import PackedRows
from triode.models.cuda.decoder import CudaDecoder
from triode.models.logprobs import score_positions
from triode.models.pooling import PooledHidden
from triode.models.slots import SlotState
from triode.models.step import Output, StepPlan, TokenLogprobs

_SCORING = frozenset({Output.PROMPT_LOGPROBS, Output.PROMPT_LOGPROBS_AND_SAMPLE})
READING_HIDDEN = _SCORING | {Output.HIDDEN}
"""Outputs that are made here."""
PromptScores: TypeAlias = tuple[tuple[TokenLogprobs, ...], ...]
"""Per row of a plan."""
RowEmbeddings: TypeAlias = tuple[tuple[float, ...], ...]
"""Per row of a plan, the complete ones."""


def score_prompts(
    decoder: CudaDecoder, hidden_TD: torch.Tensor, packed: PackedRows, plan: StepPlan, states: list[SlotState]
) -> PromptScores | None:
    """None when no row asks. Overwrites the decoder's logits."""
    if _SCORING.isdisjoint(plan.outputs):
        return None
    scores: list[tuple[TokenLogprobs, ...]] = [()] * len(states)
    for row, rows_hidden_TD in _rows(hidden_TD, packed):
        if plan.outputs[row] in _SCORING:
            start, end = plan.start_positions[row], plan.start_positions[row] + len(rows_hidden_TD)
            next_ids = states[row].tokens[start + 1 : end + 1].tolist()
            num_alternatives = states[row].params.prompt_logprobs
            assert num_alternatives is not None, "a row is scored that asked for no prompt_logprobs"
            scores[row] = score_positions(rows_hidden_TD, next_ids, num_alternatives, decoder.logits)
    return tuple(scores)


class Embeddings:
    """Embeddings in the making, by slot."""

    def __init__(self) -> None:
        self._pooled: dict[SlotId, PooledHidden] = {}

    def forget(self, slot: SlotId) -> None:
        """The slot has a new sequence."""
        self._pooled.pop(slot, None)

    def add(
        self, hidden_TD: torch.Tensor, packed: PackedRows, plan: StepPlan, states: list[SlotState]
    ) -> RowEmbeddings | None:
        """None when no row asks."""
        if Output.HIDDEN not in plan.outputs:
            return None
        embeddings: list[tuple[float, ...]] = [()] * len(states)
        for row, rows_hidden_TD in _rows(hidden_TD, packed):
            if plan.outputs[row] is Output.HIDDEN:
                pooled = self._pooled.setdefault(plan.slots[row], PooledHidden(states[row].pooling))
                assert pooled.num_positions == plan.start_positions[row], "pooled positions are consecutive"
                pooled.add(rows_hidden_TD, len(rows_hidden_TD))
                if pooled.num_positions == states[row].num_tokens:
                    embeddings[row] = self._pooled.pop(plan.slots[row]).result()
        return tuple(embeddings)


def _rows(hidden_TD: torch.Tensor, packed: PackedRows) -> Iterator[tuple[int, torch.Tensor]]:
    """Each row of the plan with its hidden states."""
    bounds = packed.query_start_R1.tolist()
    for index, row in enumerate(packed.order.tolist()):
        yield row, hidden_TD[bounds[index] : bounds[index + 1]]
