"""The sampler: logits to tokens, logprobs and errors, for the rows of one step.

What can be known before the logits (which passes the rows need, which rows are greedy, the parameter columns as
tensors) is in `SampledRows`, made once and reused for as long as the same rows decode together.

A row that has no possible token gets an error instead of a token and fails alone: `guide`, `logit_bias`, `bad_words`,
`no_repeat_ngram_size` and `min_tokens` may forbid the whole vocabulary between them, and nothing that could be chosen
then would be what was asked for.

    R rows        Q the rows of one kind (greedy, drawn, or with logprobs)        V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from triode.ids import TokenId
from triode.kernels.guide_mask.reference import forbid
from triode.kernels.sample.reference import IMPOSSIBLE, draw, greedy
from triode.models.draws import uniform_draws
from triode.models.guided import GuidedRows
from triode.models.logits import passes_for
from triode.models.logprobs import score
from triode.models.sampling import pack
from triode.models.slots import SlotState
from triode.models.step import RowError, TokenLogprobs

ALL_FORBIDDEN = RowError(
    "no token is possible: guide, logit_bias, bad_words, no_repeat_ngram_size and min_tokens together forbid the whole "
    "vocabulary; allow at least one token"
)
NOT_FINITE = RowError(
    "the model's logits are not finite: its weights or their dtype cannot carry this input", is_unsatisfiable=False
)


@dataclass(frozen=True, slots=True)
class Samples:
    """What R rows got. The fields are parallel; `token_ids` and `logprobs` have None where `errors` has one."""

    token_ids: tuple[TokenId | None, ...]
    errors: tuple[RowError | None, ...] | None
    """None when every row got a token."""
    logprobs: tuple[TokenLogprobs | None, ...] | None
    """None when no row asked."""


class SampledRows:
    """A set of rows that sample together, and what follows from their parameters alone."""

    def __init__(self, states: Sequence[SlotState], device: torch.device) -> None:
        columns = pack([state.params for state in states])
        self.states = tuple(states)
        self.guided = GuidedRows.among(states)
        self.passes = passes_for(columns, states)
        greedy_rows = [row for row, is_greedy in enumerate(columns.greedy) if is_greedy]
        drawn_rows = [row for row, is_greedy in enumerate(columns.greedy) if not is_greedy]
        self.greedy_Q = torch.tensor(greedy_rows, dtype=torch.int64, device=device)
        self.drawn_Q = torch.tensor(drawn_rows, dtype=torch.int64, device=device)
        self.drawn_states = [states[row] for row in drawn_rows]

        def column(values: Sequence[float] | None, dtype: torch.dtype) -> torch.Tensor | None:
            return None if values is None else torch.tensor([values[row] for row in drawn_rows], dtype=dtype).to(device)

        self.temperature_Q = column(columns.temperature, torch.float32)
        self.top_k_Q = column(columns.top_k, torch.int64)
        self.top_p_Q = column(columns.top_p, torch.float64)
        self.min_p_Q = column(columns.min_p, torch.float64)
        asked = columns.logprobs or ()
        self.scored_rows = [row for row, num in enumerate(asked) if num is not None]
        self.num_alternatives = [num for num in asked if num is not None]

    @property
    def takes_likeliest(self) -> bool:
        """Whether each row's token is that of its largest logit, and nothing else is asked of the logits."""
        return not (len(self.drawn_Q) or self.passes or self.scored_rows or self.guided is not None)

    def begin(self) -> None:
        """Start on what does not need the logits. Called once before each `sample`."""
        if self.guided is not None:
            self.guided.begin()


def likeliest(chosen: Sequence[int]) -> Samples:
    """What rows get that take the likeliest token (`StepProgram.likeliest`). Nothing is forbidden to them."""
    token_ids = tuple(None if token_id == IMPOSSIBLE else TokenId(token_id) for token_id in chosen)
    errors = tuple(NOT_FINITE if token_id is None else None for token_id in token_ids)
    return Samples(token_ids, errors=errors if any(errors) else None, logprobs=None)


def sample(logits_RV: torch.Tensor, rows: SampledRows) -> Samples:
    """One token a row. The logits are float32 and overwritten."""
    # Taken before the passes: logprobs are of the model's own distribution.
    logprobs_QV = torch.log_softmax(logits_RV[rows.scored_rows], dim=-1) if rows.scored_rows else None
    if rows.guided is not None:
        rows.guided.wait()
        forbid(logits_RV, rows.guided.mask_GW, rows.guided.row_G)
    for change in rows.passes:
        change(logits_RV)
    chosen = _choose(logits_RV, rows).tolist()
    token_ids = tuple(None if token_id == IMPOSSIBLE else TokenId(token_id) for token_id in chosen)
    unguided = rows.guided.errors() if rows.guided is not None else {}
    errors = tuple(
        unguided.get(row) or _reason(logits_RV[row]) if token_id is None else None
        for row, token_id in enumerate(token_ids)
    )
    return Samples(
        token_ids=token_ids,
        errors=errors if any(errors) else None,
        logprobs=None if logprobs_QV is None else _score(logprobs_QV, token_ids, rows),
    )


def _choose(logits_RV: torch.Tensor, rows: SampledRows) -> torch.Tensor:
    if not len(rows.drawn_Q):
        return greedy(logits_RV)
    uniform_Q = torch.from_numpy(uniform_draws(rows.drawn_states)).to(logits_RV.device)
    truncation = (rows.temperature_Q, rows.top_k_Q, rows.top_p_Q, rows.min_p_Q)
    if not len(rows.greedy_Q):
        return draw(logits_RV, uniform_Q, *truncation)
    token_R = torch.empty(len(logits_RV), dtype=torch.int64, device=logits_RV.device)
    token_R[rows.greedy_Q] = greedy(logits_RV[rows.greedy_Q])
    token_R[rows.drawn_Q] = draw(logits_RV[rows.drawn_Q], uniform_Q, *truncation)
    return token_R


def _reason(logits_V: torch.Tensor) -> RowError:
    return ALL_FORBIDDEN if bool((logits_V == -torch.inf).all()) else NOT_FINITE


def _score(
    logprobs_QV: torch.Tensor, token_ids: Sequence[TokenId | None], rows: SampledRows
) -> tuple[TokenLogprobs | None, ...]:
    """An entry for each row that asked and got a token."""
    scored_ids = [token_ids[row] for row in rows.scored_rows]
    # A row without a token is scored as token 0 and left out below.
    scores = score(logprobs_QV, [token_id or 0 for token_id in scored_ids], rows.num_alternatives)
    entries: list[TokenLogprobs | None] = [None] * len(token_ids)
    for row, token_id, entry in zip(rows.scored_rows, scored_ids, scores, strict=True):
        entries[row] = None if token_id is None else entry
    return tuple(entries)
