"""Memory that all ranks of a model share: where they meet, add up their sums, and put the logits of their parts.

T tokens of the largest step     R rows of logits at a time     D hidden     V largest part of the vocabulary
"""

import ctypes
import mmap
import os

import torch

from triode.kernels.native.library import RanksStruct
from triode.models.config import ModelConfig
from triode.models.parallel import RankOrder, outputs_of

MAX_LOGIT_ROWS = 64
"""Rows whose logits are computed at a time: they take up to a quarter of a megabyte each."""

_PAGE_BYTES = 4096
_LINE_BYTES = 64
_PANEL = 64


class RankMemory:
    """This process's view of it; the same everywhere, whoever is first."""

    def __init__(self, order: RankOrder, config: ModelConfig, dtype: torch.dtype, max_tokens: int) -> None:
        padded_hidden = -(-config.hidden_size // _PANEL) * _PANEL
        parts = [outputs_of(config.vocab_size, rank, order.num_ranks) for rank in range(order.num_ranks)]
        largest = max(map(len, parts))
        arrivals_bytes = order.num_ranks * _LINE_BYTES
        sums_bytes = 2 * order.num_ranks * max_tokens * padded_hidden * 4
        hidden_bytes = MAX_LOGIT_ROWS * config.hidden_size * dtype.itemsize
        logits_bytes = order.num_ranks * MAX_LOGIT_ROWS * largest * 4
        starts = [0]
        for num_bytes in (arrivals_bytes, sums_bytes, hidden_bytes, logits_bytes):
            starts.append(-(-(starts[-1] + num_bytes) // _PAGE_BYTES) * _PAGE_BYTES)
        os.ftruncate(order.memory_fd, starts[-1])
        self._memory = mmap.mmap(order.memory_fd, starts[-1])
        os.close(order.memory_fd)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.order = order
        self.struct = RanksStruct(
            rank=order.rank,
            num_ranks=order.num_ranks,
            max_tokens=max_tokens,
            arrivals=address,
            sums=address + starts[1],
        )
        """As the compiled step knows it."""
        self.hidden_RD = self._tensor(dtype, starts[2], MAX_LOGIT_ROWS, config.hidden_size)
        """Written by rank 0, for logits."""
        self.parts = parts
        """The tokens of each rank's logits."""
        self.logits_RV = [
            self._tensor(torch.float32, starts[3] + rank * MAX_LOGIT_ROWS * largest * 4, MAX_LOGIT_ROWS, largest)
            for rank in range(order.num_ranks)
        ]
        """Each rank's, of which a shorter part uses the first columns."""

    def _tensor(self, dtype: torch.dtype, start: int, rows: int, columns: int) -> torch.Tensor:
        flat = torch.frombuffer(self._memory, dtype=dtype, count=rows * columns, offset=start)
        return flat.view(rows, columns)
