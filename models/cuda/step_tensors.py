"""What the host sends with a packed step, and what the kernels of a step hand to each other.

T packed query tokens    R rows    Q rows that sample    X blocks of the longest table
"""

from dataclasses import dataclass
from itertools import chain

import torch

from triode.models.cuda.batch import packed_starts
from triode.models.cuda.programs import PREFILL_TOKENS

NUM_PAIRS = 512
"""Changes of the arena that a packed step brings along: those of a prompt of 8,000 tokens."""


class PackedArrays:
    """`PackedRows.words` on the device, cut into its arrays."""

    def __init__(self, words: torch.Tensor, num_tokens: int, num_rows: int, num_sampled: int) -> None:
        starts, sizes = packed_starts(num_tokens, num_rows, num_sampled)
        gaps = [end - start - size for start, end, size in zip(starts, starts[1:], sizes, strict=False)]
        # Cut at once, with what lies between them: one by one, ten views take longer than sending them.
        parts = words[: starts[-1]].split_with_sizes([*chain.from_iterable(zip(sizes, gaps, strict=True))])[::2]
        self.query_start_R1, self.start_R, self.end_R, self.slot_R = parts[:4]
        self.sample_token_Q, self.sample_end_Q, self.sample_slot_Q = parts[4:7]
        self.token_T, self.position_T, self.kv_slot_T = parts[7:]

    @staticmethod
    def num_words(num_tokens: int, num_rows: int) -> int:
        """Of a step of fixed shape."""
        starts, _ = packed_starts(num_tokens, num_rows, num_rows)
        return starts[-1]


@dataclass(frozen=True, slots=True)
class StepTensors:
    """What the kernels of one step hand to the next. Rows of one token are those of a decode step and the picked."""

    position_R: torch.Tensor
    kv_slot_R: torch.Tensor
    end_R: torch.Tensor
    query_start_R1: torch.Tensor
    """0, 1, 2, ..."""
    table_RX: torch.Tensor
    picked_table_RX: torch.Tensor
    """While a packed step's picked rows wait for the last layer, all of its rows use `table_RX`."""
    token_R: torch.Tensor
    words: torch.Tensor
    """Changes of the arena, then a packed step of fixed shape."""

    @classmethod
    def allocate(cls, num_rows: int, num_entries: int, device: torch.device) -> "StepTensors":
        """For steps of so many rows, whose block tables have so many entries."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            position_R=zeros(num_rows),
            kv_slot_R=zeros(num_rows),
            end_R=zeros(num_rows),
            query_start_R1=torch.arange(num_rows + 1, dtype=torch.int32).to(device),
            table_RX=zeros(num_rows, num_entries),
            picked_table_RX=zeros(num_rows, num_entries),
            token_R=zeros(num_rows),
            words=zeros(2 * NUM_PAIRS + PackedArrays.num_words(PREFILL_TOKENS[-1], num_rows)),
        )
