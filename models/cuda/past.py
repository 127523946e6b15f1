"""The tokens of rows whose logits depend on them, as the device keeps them in the arena.

Which tokens a row has only the device may know yet; how many, both know. So what is launched for a step follows from
counts alone, and the host waits for no token: rows share one list of entries, in which each has some room to grow.

    Q rows that sample    P those whose tokens matter    E entries: a row's tokens, then those of the next row
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from triode.models.cuda.arena import Arena, Words
from triode.models.cuda.gpu import Gpu
from triode.models.slots import SlotState

_ROOM_TOKENS = 64
"""Entries are laid out anew after so many steps of the same rows."""


@dataclass(frozen=True, slots=True)
class Ends:
    """How many tokens each row has: the position of its sample."""

    counted_Q: Words
    """On the host."""
    end_Q: torch.Tensor
    """On the device."""


def looks_back(state: SlotState) -> bool:
    """Whether some pass reads the sequence's tokens."""
    return bool(needs_entries(state) or state.bad_word_ids)


def needs_entries(state: SlotState) -> bool:
    """Whether some pass reads all of them."""
    return bool(state.params.uses_penalties or state.params.no_repeat_ngram_size)


class Record:
    """Adds what was sampled to the histories of some rows."""

    def __init__(self, rows: Sequence[int], slots: Sequence[int], arena: Arena, gpu: Gpu) -> None:
        self._words = arena.words
        first_P = [arena.layout.history_of(slots[row]) for row in rows]
        self._row_P, self._first_P = gpu.upload(np.array([rows, first_P], np.int32)).long()

    def add(self, token_Q: torch.Tensor, ends: Ends) -> None:
        """A row that failed goes on from token 0, on the host as here."""
        place_P = self._first_P + ends.end_Q[self._row_P]
        self._words[place_P] = token_Q[self._row_P].clamp(min=0)


class Past:
    """The entries of some rows. `read` brings them up to date before the passes of each step."""

    token_E: torch.Tensor
    """int32; beyond a row's end its first token, again and again."""
    logit_E: torch.Tensor
    """Where the logit of each token is, in the logits of all rows one after the other."""
    is_known_E: torch.Tensor
    """False beyond a row's end."""
    position_E: torch.Tensor
    is_output_E: torch.Tensor
    """int32: 1 behind the prompt."""
    index_E: torch.Tensor
    """Which of the P rows."""

    def __init__(
        self,
        rows: Sequence[int],
        states: Sequence[SlotState],
        slots: Sequence[int],
        vocab_size: int,
        arena: Arena,
        gpu: Gpu,
    ) -> None:
        self.rows = tuple(rows)
        self.max_tokens = arena.layout.max_context_tokens
        self._gpu = gpu
        self._words = arena.words
        self._vocab_size = vocab_size
        first_P = [arena.layout.history_of(slots[row]) for row in rows]
        self._constants = np.array([rows, first_P, [states[row].num_prompt_tokens for row in rows]], np.int32)
        self._room_P = np.zeros(len(rows), np.int32)

    @property
    def longest(self) -> int:
        """No row has more entries."""
        return int(self._room_P.max())

    def read(self, ends: Ends) -> None:
        """Take the tokens that the rows have by now."""
        counted_P = ends.counted_Q[self._constants[0]]
        if (counted_P > self._room_P).any():
            self._lay_out(np.minimum(counted_P + _ROOM_TOKENS, self.max_tokens))
        self.is_known_E = self.position_E < ends.end_Q[self._row_E]
        self.token_E = self._words[torch.where(self.is_known_E, self._place_E, self._first_E)]
        self.logit_E = self._first_logit_E + self.token_E

    def last_tokens(self, back_K: torch.Tensor, ends: Ends) -> torch.Tensor:
        """[P, K] tokens of each row so far from its end; any token where there are not so many."""
        next_P = self._first_P + ends.end_Q[self._row_P]
        return self._words[torch.maximum(next_P[:, None] - back_K, self._first_P[:, None])]

    def _lay_out(self, room_P: Words) -> None:
        self._room_P = room_P
        num_entries = int(room_P.sum())
        device_P = self._gpu.upload(np.vstack([self._constants, room_P])).long()
        self._row_P, self._first_P, _, device_room_P = device_P
        # Told how many there are, torch need not wait for their sum.
        self.index_E = torch.repeat_interleave(device_room_P, output_size=num_entries)
        self._row_E, self._first_E, prompt_E, _ = device_P[:, self.index_E]
        before_P = device_room_P.cumsum(0) - device_room_P
        self.position_E = torch.arange(num_entries, device=self._words.device) - before_P[self.index_E]
        self.is_output_E = (self.position_E >= prompt_E).int()
        self._place_E = self._first_E + self.position_E
        self._first_logit_E = self._row_E * self._vocab_size
