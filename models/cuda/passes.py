"""The passes of `triode.models.logits` on a GPU, over tokens that only the device may have yet.

Each is a few operations of torch for all rows together, whatever the number of rows. How many entries say something
depends on tokens, and leaving out the others would mean to wait for their number: so all entries write. Those of one
token write the same, or the least of what they write holds; integers are counted. No order can therefore change a bit,
and what is computed is what a CPU computes.

    Q rows that sample    V vocabulary    N = QV logits    P, E as in `past`    W bad words    K tokens looked back
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from triode.models.cuda.arena import Arena, Words
from triode.models.cuda.gpu import Gpu
from triode.models.cuda.past import Ends, Past, Record, looks_back, needs_entries
from triode.models.logits import penalised
from triode.models.sampling import SamplingColumns
from triode.models.slots import SlotState

_MOST_COMPARED = 16
"""Tokens of an n-gram that are compared at once: each takes a few bytes an entry."""
_ANY = -1
"""Stands for any token."""


class Pass(Protocol):
    """One change of the logits of a batch."""

    def __call__(self, logits_N: torch.Tensor, ends: Ends) -> None:
        """Change the logits in place."""


class Passes:
    """What some rows need, made once for as long as they sample together."""

    def __init__(
        self,
        columns: SamplingColumns,
        states: Sequence[SlotState],
        slots: Sequence[int],
        vocab_size: int,
        arena: Arena,
        gpu: Gpu,
    ) -> None:
        rows = [row for row, state in enumerate(states) if looks_back(state)]
        self._record = Record(rows, slots, arena, gpu) if rows else None
        rows = [row for row, state in enumerate(states) if needs_entries(state)]
        self._past = Past(rows, states, slots, vocab_size, arena, gpu) if rows else None
        self._passes: list[Pass] = []
        if columns.logit_bias is not None:
            self._passes.append(LogitBias(columns.logit_bias, vocab_size, gpu))
        if any(state.bad_word_ids for state in states):
            self._passes.append(BadWords(states, slots, vocab_size, arena, gpu))
        if self._past is not None and columns.no_repeat_ngram_size is not None:
            self._passes.append(NoRepeatNgram(columns.no_repeat_ngram_size, self._past, gpu))
        if columns.min_tokens is not None:
            self._passes.append(MinTokens(states, vocab_size, gpu))
        if self._past is not None and any(state.params.uses_penalties for state in states):
            self._passes.append(Penalties(columns, self._past, gpu))

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._passes)

    def change(self, logits_QV: torch.Tensor, ends: Ends) -> None:
        """Before a token is chosen. The logits are contiguous."""
        if self._past is not None:
            self._past.read(ends)
        for change in self._passes:
            change(logits_QV.view(-1), ends)

    def record(self, token_Q: torch.Tensor, ends: Ends) -> None:
        """When it is: the next step's passes read it."""
        if self._record is not None:
            self._record.add(token_Q, ends)


class LogitBias:
    """Adds to the logits of listed tokens; none is listed twice."""

    def __init__(self, biases_Q: Sequence[Sequence[tuple[int, float]]], vocab_size: int, gpu: Gpu) -> None:
        entries = [(row, token_id, bias) for row, biases in enumerate(biases_Q) for token_id, bias in biases]
        self._logit_E = _logits([(row, token_id) for row, token_id, _ in entries], vocab_size, gpu)
        self._bias_E = _floats([bias for _, _, bias in entries], gpu)

    def __call__(self, logits_N: torch.Tensor, ends: Ends) -> None:
        """Add the biases."""
        logits_N[self._logit_E] += self._bias_E


class BadWords:
    """Forbids a token that would complete one of a row's bad words."""

    def __init__(
        self, states: Sequence[SlotState], slots: Sequence[int], vocab_size: int, arena: Arena, gpu: Gpu
    ) -> None:
        words = [(row, word) for row, state in enumerate(states) for word in state.bad_word_ids]
        longest = max(len(word) for _, word in words) - 1
        prefix_WK = np.full((len(words), longest), _ANY, np.int32)
        for index, (_, word) in enumerate(words):
            prefix_WK[index, longest - len(word) + 1 :] = word[:-1]
        constants = [(row, arena.layout.history_of(slots[row]), len(word) - 1) for row, word in words]
        self._words = arena.words
        self._row_W, self._first_W, self._least_W = gpu.upload(np.array(constants, np.int32).T).long()
        self._prefix_WK = gpu.upload(prefix_WK)
        self._is_any_WK = self._prefix_WK == _ANY
        self._back_K = torch.arange(longest, 0, -1, device=gpu.device)
        self._logit_W = _logits([(row, word[-1]) for row, word in words], vocab_size, gpu)

    def __call__(self, logits_N: torch.Tensor, ends: Ends) -> None:
        """Forbid the last token of each word whose other tokens end the sequence."""
        end_W = ends.end_Q[self._row_W]
        place_WK = (self._first_W + end_W)[:, None] - self._back_K
        token_WK = self._words[torch.maximum(place_WK, self._first_W[:, None])]
        ends_in_W = ((token_WK == self._prefix_WK) | self._is_any_WK).all(1)
        _forbid(logits_N, self._logit_W, ends_in_W & (end_W >= self._least_W))


class NoRepeatNgram:
    """Forbids a token that would complete an n-gram which the sequence already contains."""

    def __init__(self, size_Q: Sequence[int], past: Past, gpu: Gpu) -> None:
        self._past = past
        # No row has so many tokens before another one that its token would be forbidden.
        never = past.max_tokens
        num_before = [min(size_Q[row] - 1, never) if size_Q[row] else never for row in past.rows]
        self._longest = max(size_Q) - 1
        self._num_before_P = gpu.upload(np.array(num_before, np.int32))

    def __call__(self, logits_N: torch.Tensor, ends: Ends) -> None:
        """Forbid each token that followed the sequence's last n - 1 tokens before."""
        past = self._past
        is_repeat_E = past.is_known_E & (past.position_E >= self._num_before_P[past.index_E])
        longest = min(self._longest, past.longest)
        for first in range(1, longest + 1, _MOST_COMPARED):
            is_repeat_E &= self._agrees(first, min(first + _MOST_COMPARED - 1, longest), ends)
        _forbid(logits_N, past.logit_E, is_repeat_E)

    def _agrees(self, first: int, last: int, ends: Ends) -> torch.Tensor:
        """[E] whether the tokens `first` to `last` before an entry are those so far from the sequence's end, as far as
        they are among its n - 1."""
        past = self._past
        back_K = torch.arange(last, first - 1, -1, device=past.token_E.device)
        matters_PK = back_K <= self._num_before_P[:, None]
        wanted_PK = torch.where(matters_PK, past.last_tokens(back_K, ends), _ANY)
        wanted_EK = wanted_PK[past.index_E]
        before_EK: torch.Tensor = torch.nn.functional.pad(past.token_E, (last, 0)).unfold(0, last - first + 1, 1)[
            : len(wanted_EK)
        ]
        agrees_E: torch.Tensor = ((before_EK == wanted_EK) | (wanted_EK == _ANY)).all(1)
        return agrees_E


class MinTokens:
    """Forbids a row's stop tokens until it has generated enough. The host sees that without knowing a token."""

    def __init__(self, states: Sequence[SlotState], vocab_size: int, gpu: Gpu) -> None:
        self._gpu = gpu
        self._vocab_size = vocab_size
        self._stop_token_ids = [state.stop_token_ids for state in states]
        # Rows without the parameter are never short.
        self._least_Q = np.array([state.num_prompt_tokens + state.params.min_tokens for state in states])
        self._short: list[int] = []

    def __call__(self, logits_N: torch.Tensor, ends: Ends) -> None:
        """Forbid the stop tokens of the rows that are still short."""
        short: list[int] = (ends.counted_Q < self._least_Q).nonzero()[0].tolist()
        if short != self._short:
            entries = [(row, token_id) for row in short for token_id in self._stop_token_ids[row]]
            self._short, self._logit_E = short, _logits(entries, self._vocab_size, self._gpu)
        if short:
            logits_N.index_fill_(0, self._logit_E, -torch.inf)


class Penalties:
    """Repetition penalty for tokens of prompt and output, then presence and frequency penalty for those of the output."""

    def __init__(self, columns: SamplingColumns, past: Past, gpu: Gpu) -> None:
        self._past = past
        names = (columns.repetition_penalty, columns.presence_penalty, columns.frequency_penalty)
        self._is_used = [column is not None for column in names]
        used = [column for column in names if column is not None]
        self._penalty_KP = _floats([column[row] for column in used for row in past.rows], gpu).view(len(used), -1)

    def __call__(self, logits_N: torch.Tensor, ends: Ends) -> None:
        """Penalise every token that occurred."""
        past = self._past
        penalties = iter(self._penalty_KP[:, past.index_E])
        repetition_E, presence_E, frequency_E = (next(penalties) if used else None for used in self._is_used)
        count_E = None
        if presence_E is not None or frequency_E is not None:
            count_N = torch.zeros(len(logits_N), dtype=torch.int32, device=logits_N.device)
            count_N.scatter_add_(0, past.logit_E, past.is_output_E * past.is_known_E)
            count_E = count_N[past.logit_E]
        logits_N[past.logit_E] = penalised(logits_N[past.logit_E], count_E, repetition_E, presence_E, frequency_E)


def _forbid(logits_N: torch.Tensor, logit_E: torch.Tensor, is_forbidden_E: torch.Tensor) -> None:
    """Forbid some of the entries, of which many may name one logit."""
    logits_N.scatter_reduce_(0, logit_E, torch.where(is_forbidden_E, -torch.inf, torch.inf), "amin")


def _logits(entries: Sequence[tuple[int, int]], vocab_size: int, gpu: Gpu) -> torch.Tensor:
    """Where the logits of (row, token) pairs are."""
    pairs: Words = np.array(entries, np.int32).reshape(-1, 2)
    row_E, token_E = gpu.upload(pairs.T).long()
    logit_E: torch.Tensor = row_E * vocab_size + token_E
    return logit_E


def _floats(values: Sequence[float], gpu: Gpu) -> torch.Tensor:
    return gpu.upload(np.array(values, np.float32).view(np.int32)).view(torch.float32)
