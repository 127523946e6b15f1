"""What changes the logits before a token is chosen: one pass for each parameter that some row uses, in a fixed order.

A pass is made once for a set of rows and called on the logits of each step. It touches the entries its rows name and no
others, with operations that are exact or round once, so a row's result does not depend on its neighbours. All passes
work in place, on raw float32 logits of a CPU; `triode.models.cuda.passes` are their equals on a GPU.

    R rows        V vocabulary        E entries: (row, token) pairs
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from triode.models.sampling import SamplingColumns
from triode.models.slots import IntArray, SlotState


class LogitPass(Protocol):
    """One change of the logits of a batch."""

    def __call__(self, logits_RV: torch.Tensor) -> None:
        """Change the logits in place."""


def passes_for(columns: SamplingColumns, states: Sequence[SlotState]) -> tuple[LogitPass, ...]:
    """The passes that these rows need, in order. `columns` are the packed parameters of `states`."""
    passes: list[LogitPass] = []
    if columns.logit_bias is not None:
        passes.append(LogitBias(columns.logit_bias))
    if any(state.bad_word_ids for state in states):
        passes.append(BadWords(states))
    if columns.no_repeat_ngram_size is not None:
        passes.append(NoRepeatNgram(states))
    if columns.min_tokens is not None:
        passes.append(MinTokens(states))
    if any(state.params.uses_penalties for state in states):
        passes.append(Penalties(columns, states))
    return tuple(passes)


class LogitBias:
    """Adds to the logits of listed tokens."""

    def __init__(self, biases_R: Sequence[Sequence[tuple[int, float]]]) -> None:
        entries = [(row, token_id, bias) for row, biases in enumerate(biases_R) for token_id, bias in biases]
        self._row_E = torch.tensor([row for row, _, _ in entries])
        self._token_E = torch.tensor([token_id for _, token_id, _ in entries])
        self._bias_E = torch.tensor([bias for _, _, bias in entries], dtype=torch.float32)

    def __call__(self, logits_RV: torch.Tensor) -> None:
        """Add the biases; no entry occurs twice."""
        logits_RV[self._row_E, self._token_E] += self._bias_E


class BadWords:
    """Forbids a token that would complete one of a row's bad words."""

    def __init__(self, states: Sequence[SlotState]) -> None:
        self._rows = [(row, state) for row, state in enumerate(states) if state.bad_word_ids]

    def __call__(self, logits_RV: torch.Tensor) -> None:
        """Forbid the last token of each word whose other tokens end the sequence."""
        entries: list[tuple[int, int]] = []
        for row, state in self._rows:
            longest = max(map(len, state.bad_word_ids))
            tail = tuple(state.tokens[-longest:].tolist())
            entries += [(row, word[-1]) for word in state.bad_word_ids if (*tail, word[-1])[-len(word) :] == word]
        _forbid(logits_RV, [row for row, _ in entries], [token_id for _, token_id in entries])


class NoRepeatNgram:
    """Forbids a token that would complete an n-gram which the sequence already contains."""

    def __init__(self, states: Sequence[SlotState]) -> None:
        self._rows = [(row, state) for row, state in enumerate(states) if state.params.no_repeat_ngram_size]

    def __call__(self, logits_RV: torch.Tensor) -> None:
        """Forbid each token that followed the sequence's last n - 1 tokens before."""
        for row, state in self._rows:
            followers = _followers(state.tokens, state.params.no_repeat_ngram_size)
            if len(followers):
                logits_RV[row, torch.from_numpy(followers)] = -torch.inf


def _followers(tokens: IntArray, size: int) -> IntArray:
    num_ngrams = len(tokens) - size + 1
    if num_ngrams <= 0:
        return np.zeros(0, np.int64)
    # The n - 1 tokens at the end; none for size 1, where every token has occurred.
    prefix = tokens[num_ngrams:]
    is_match = np.ones(num_ngrams, bool)
    for offset, token_id in enumerate(prefix.tolist()):
        is_match &= tokens[offset : offset + num_ngrams] == token_id
    return tokens[size - 1 :][is_match].astype(np.int64)


class MinTokens:
    """Forbids a row's stop tokens until it has generated enough."""

    def __init__(self, states: Sequence[SlotState]) -> None:
        self._rows = [(row, state) for row, state in enumerate(states) if state.params.min_tokens]

    def __call__(self, logits_RV: torch.Tensor) -> None:
        """Forbid the stop tokens of the rows that are still short."""
        short = [(row, state) for row, state in self._rows if state.num_generated < state.params.min_tokens]
        _forbid(
            logits_RV,
            [row for row, state in short for _ in state.stop_token_ids],
            [token_id for _, state in short for token_id in state.stop_token_ids],
        )


class Penalties:
    """Repetition penalty for tokens of prompt and output, then presence and frequency penalty for those of the output.

    One gather and one scatter serve all three.
    """

    def __init__(self, columns: SamplingColumns, states: Sequence[SlotState]) -> None:
        self._rows = [row for row, state in enumerate(states) if state.params.uses_penalties]
        self._states = [states[row] for row in self._rows]
        self._repetition_R = self._column(columns.repetition_penalty)
        self._presence_R = self._column(columns.presence_penalty)
        self._frequency_R = self._column(columns.frequency_penalty)

    def _column(self, values: Sequence[float] | None) -> torch.Tensor | None:
        return None if values is None else torch.tensor([values[row] for row in self._rows], dtype=torch.float32)

    def __call__(self, logits_RV: torch.Tensor) -> None:
        """Penalise every token that occurred."""
        counts = [state.counts for state in self._states]
        num_distinct = torch.tensor([len(count.token_ids) for count in counts])
        index_E = torch.arange(len(counts)).repeat_interleave(num_distinct)
        row_E = torch.tensor(self._rows)[index_E]
        token_E = torch.from_numpy(np.concatenate([count.token_ids for count in counts]))
        count_E = torch.from_numpy(np.concatenate([count.output_counts for count in counts]))
        penalties = (self._repetition_R, self._presence_R, self._frequency_R)
        penalties_E = [None if penalty_R is None else penalty_R[index_E] for penalty_R in penalties]
        logits_RV[row_E, token_E] = penalised(logits_RV[row_E, token_E], count_E, *penalties_E)


def penalised(
    logits_E: torch.Tensor,
    count_E: torch.Tensor | None,
    repetition_E: torch.Tensor | None,
    presence_E: torch.Tensor | None,
    frequency_E: torch.Tensor | None,
) -> torch.Tensor:
    """Logits of tokens that occurred, `count_E` times in the output; None is a penalty that nobody asked for. Only the
    first one does without counts."""
    if repetition_E is not None:
        logits_E = torch.where(logits_E > 0, logits_E / repetition_E, logits_E * repetition_E)
    if count_E is not None and presence_E is not None:
        logits_E = logits_E - presence_E * (count_E > 0)
    if count_E is not None and frequency_E is not None:
        logits_E = logits_E - frequency_E * count_E
    return logits_E


def _forbid(logits_RV: torch.Tensor, rows: list[int], token_ids: Sequence[int]) -> None:
    if rows:
        logits_RV[torch.tensor(rows), torch.tensor(token_ids)] = -torch.inf
