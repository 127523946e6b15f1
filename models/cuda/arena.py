"""The slots on the device: one tensor of 32-bit words that the host changes word by word.

Everything the device knows about the batch is a column of this tensor, so that whatever a step changes (admissions,
block tables, histories, the set of rows) is one list of (index, value) pairs: one transfer and one small kernel, or nothing.

    S slots, the last of them nobody's    R rows of the largest decode step    X blocks of the longest table
"""

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from triode.kernels.sample.gpu import SlotColumns
from triode.kernels.step.gpu import scatter
from triode.models.cuda.gpu import Gpu
from triode.models.cuda.programs import bucket_for
from triode.models.step import Admission

Words = npt.NDArray[np.int32]
ALIGNED_WORDS = 4
"""A kernel is compiled anew for a pointer that is not at a multiple of 16 bytes."""


def aligned(num_words: int) -> int:
    """Where the array behind one of so many words begins."""
    return -(-num_words // ALIGNED_WORDS) * ALIGNED_WORDS


@dataclass(frozen=True, slots=True)
class ArenaLayout:
    """Where each column begins, in words. Columns of two words a slot come first, so that they are aligned."""

    num_slots: int
    num_rows: int
    num_entries: int
    max_context_tokens: int = 0
    """Room of a slot's history; 0 where no logits depend on it."""

    @property
    def nobody(self) -> int:
        """The slot of padding rows: its table is all block 0 and it never advances."""
        return self.num_slots

    @property
    def _stride(self) -> int:
        return aligned(self.num_slots + 1)

    @property
    def seed(self) -> int:
        """int64."""
        return 0

    @property
    def top_p(self) -> int:
        """float64."""
        return 2 * self._stride

    @property
    def min_p(self) -> int:
        """float64."""
        return 4 * self._stride

    @property
    def last_token(self) -> int:
        """int32, like what follows."""
        return 6 * self._stride

    @property
    def position(self) -> int:
        """Of the last token."""
        return 7 * self._stride

    @property
    def sample_index(self) -> int:
        """Which of a request's samples."""
        return 8 * self._stride

    @property
    def temperature(self) -> int:
        """float32."""
        return 9 * self._stride

    @property
    def top_k(self) -> int:
        """0 for all."""
        return 10 * self._stride

    @property
    def row_slot(self) -> int:
        """The slot of each row of the decode step."""
        return 11 * self._stride

    @property
    def table(self) -> int:
        """Block tables, slot by slot."""
        return self.row_slot + aligned(self.num_rows)

    @property
    def history(self) -> int:
        """Tokens of the sequences whose logits depend on them (`past`), slot by slot. Behind a sequence's end, and where
        nobody asked, they are anything."""
        return self.table + (self.num_slots + 1) * self.num_entries

    def history_of(self, slot: int) -> int:
        """Where a slot's first token is."""
        return self.history + slot * self.max_context_tokens

    @property
    def spare(self) -> int:
        """A word that nobody reads, the last one."""
        return self.history_of(self.num_slots)

    @property
    def num_words(self) -> int:
        """Size of the tensor."""
        return self.spare + 1

    @property
    def num_bytes(self) -> int:
        """The same in bytes."""
        return 4 * self.num_words


def layout_for(max_running: int, max_context_tokens: int, block_size_tokens: int) -> ArenaLayout:
    """Of a runner for so many sequences.

    Raises:
        ValueError: the arena would have more words than the kernels count.
    """
    num_entries = -(-max_context_tokens // block_size_tokens)
    layout = ArenaLayout(max_running, bucket_for(max_running), num_entries, max_context_tokens)
    if layout.num_words >= 2**31:
        raise ValueError(
            "max_running times max_context_tokens must be < 2**31, block tables and padding included, "
            f"got {max_running} * {max_context_tokens}"
        )
    return layout


_ADMITTED = struct.Struct("=Qddifi")
"""Seed, top_p, min_p, sample index, temperature and top_k."""


class Changes:
    """What the next step changes in the arena. Of several values for one word the last one holds."""

    def __init__(self, layout: ArenaLayout) -> None:
        self._layout = layout
        pairs = [first + word for first in (layout.seed, layout.top_p, layout.min_p) for word in (0, 1)]
        singles = [layout.sample_index, layout.temperature, layout.top_k]
        self._admitted_of_first = np.array(pairs + singles, np.int32)
        self._admitted_stride = np.array([2] * len(pairs) + [1] * len(singles), np.int32)
        self._indices: list[Words] = []
        self._values: list[Words] = []

    def set_words(self, first: int, values: Words) -> None:
        """Consecutive words."""
        self._indices.append(np.arange(first, first + len(values), dtype=np.int32))
        self._values.append(values)

    def admit(self, admission: Admission) -> None:
        """How a slot's new sequence is sampled."""
        params = admission.params
        # More than any vocabulary keeps all, as 0 does.
        top_k = min(params.top_k, 2**31 - 1)
        words = _ADMITTED.pack(
            admission.seed, params.top_p, params.min_p, admission.sample_index, params.temperature, top_k
        )
        self._indices.append(self._admitted_of_first + self._admitted_stride * np.int32(admission.slot))
        self._values.append(np.frombuffer(words, np.int32))

    def set_table(self, slot: int, first_block: int, blocks: Words) -> None:
        """Entries of a slot's block table."""
        self.set_words(self._layout.table + slot * self._layout.num_entries + first_block, blocks)

    def set_history(self, slot: int, position: int, tokens: Words) -> None:
        """Tokens of a slot's history that the device does not know."""
        self.set_words(self._layout.history_of(slot) + position, tokens)

    def set_newest(self, slots: Words, tokens: Words, positions: Words) -> None:
        """What these slots compute next, where the device does not know it."""
        self._indices += [self._layout.last_token + slots, self._layout.position + slots]
        self._values += [tokens, positions]

    def set_rows(self, slots: Words) -> None:
        """The rows of the decode steps from now on."""
        self.set_words(self._layout.row_slot, slots)

    def take(self) -> Words | None:
        """All indices, then all values; None when nothing changed."""
        if not self._indices:
            return None
        index = np.concatenate(self._indices)
        value = np.concatenate(self._values)
        self._indices.clear()
        self._values.clear()
        # Hardly ever, and found in a third of the time that sorting takes.
        if len(set(index.tolist())) < len(index):
            # np.unique keeps the first of equals: seen from behind, the last.
            index, first = np.unique(index[::-1], return_index=True)
            value = value[::-1][first]
        return np.concatenate([index, value])


class Arena:
    """The tensor, its columns as views, and the way changes reach it."""

    def __init__(self, layout: ArenaLayout, gpu: Gpu) -> None:
        self.layout = layout
        self._gpu = gpu
        self.words = torch.zeros(layout.num_words, dtype=torch.int32, device=gpu.device)
        num = layout.num_slots + 1

        def column(first: int, dtype: torch.dtype) -> torch.Tensor:
            return self.words[first : first + num * dtype.itemsize // 4].view(dtype)

        self.columns = SlotColumns(
            last_token_S=column(layout.last_token, torch.int32),
            position_S=column(layout.position, torch.int32),
            seed_S=column(layout.seed, torch.int64),
            sample_index_S=column(layout.sample_index, torch.int32),
            temperature_S=column(layout.temperature, torch.float32),
            top_k_S=column(layout.top_k, torch.int32),
            top_p_S=column(layout.top_p, torch.float64),
            min_p_S=column(layout.min_p, torch.float64),
        )
        self.columns.top_p_S.fill_(1)
        self.row_slot_R = self.words[layout.row_slot :][: layout.num_rows]
        self.row_slot_R.fill_(layout.nobody)
        self.table_SX = self.words[layout.table : layout.history].view(num, layout.num_entries)

    def apply(self, changes: Changes) -> None:
        """Send what has changed; nothing is launched when nothing has."""
        self._scatter(changes.take())

    def pairs(self, changes: Changes, num_pairs: int) -> Words:
        """What has changed as so many pairs, for a step that scatters them itself. Where there are more they are sent."""
        words = np.full(2 * num_pairs, self.layout.spare, np.int32)
        taken = changes.take()
        if taken is not None and len(taken) > len(words):
            self._scatter(taken)
        elif taken is not None:
            num_taken = len(taken) // 2
            words[:num_taken] = taken[:num_taken]
            words[num_pairs : num_pairs + num_taken] = taken[num_taken:]
        return words

    def _scatter(self, pairs: Words | None) -> None:
        if pairs is not None:
            scatter(self.words, self._gpu.upload(pairs), self._gpu.traits)
