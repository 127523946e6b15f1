"""Drives a decoder over a paged cache, without scheduler or runner: sequences with shuffled block tables, any chunks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from triode.cache.pool import elements_per_head
from triode.models.batch import build_batch
from triode.models.program import StepProgram

BLOCK_SIZE_TOKENS = 16


@dataclass
class PagedSequence:
    """The tokens of one sequence, how many of them are in the cache, and where."""

    token_ids: list[int]
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0


class PagedDecoding:
    """A pool full of NaN, and steps that mix prefill chunks and decodes in one batch."""

    def __init__(
        self, decoder: StepProgram, num_blocks: int, seed: int = 0, kv_dtype: torch.dtype | None = None
    ) -> None:
        config = decoder.config
        dtype = kv_dtype or decoder.dtype
        shape = (num_blocks, BLOCK_SIZE_TOKENS, config.num_kv_heads, elements_per_head(config.head_dim, dtype))
        # Four bytes of -1 are a scale that is NaN.
        nothing = -1 if dtype == torch.int8 else torch.nan
        self.decoder = decoder
        self.keys = [torch.full(shape, nothing, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.full(shape, nothing, dtype=dtype) for _ in range(config.num_layers)]
        self.free = np.random.default_rng(seed).permutation(np.arange(1, num_blocks)).tolist()

    @torch.inference_mode()
    def step(
        self, rows: Sequence[tuple[PagedSequence, int]], wanted: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Compute so many more tokens of each sequence in one batch; their logits [num_tokens, V], a row each.

        `wanted`: of how many of each row's last tokens instead.
        """
        counts = [count for _, count in rows] if wanted is None else wanted
        for sequence, num_query in rows:
            needed = -(-(sequence.num_computed + num_query) // BLOCK_SIZE_TOKENS)
            while len(sequence.blocks) < needed:
                sequence.blocks.append(self.free.pop())
        table_RC = np.zeros((len(rows), max(len(sequence.blocks) for sequence, _ in rows)), np.int32)
        for row, (sequence, _) in enumerate(rows):
            table_RC[row, : len(sequence.blocks)] = sequence.blocks
        batch = build_batch(
            np.concatenate([s.token_ids[s.num_computed : s.num_computed + count] for s, count in rows]),
            np.array([sequence.num_computed for sequence, _ in rows]),
            np.array([count for _, count in rows]),
            table_RC,
            block_size_tokens=BLOCK_SIZE_TOKENS,
            row_multiple=self.decoder.kernels.row_multiple,
            device=torch.device("cpu"),
            num_wanted_R=np.array(counts),
        )
        hidden_WD = self.decoder.forward(batch, self.keys, self.values)
        assert len(hidden_WD) == sum(counts)
        for sequence, count in rows:
            sequence.num_computed += count
        if not len(hidden_WD):
            return [torch.empty(0, self.decoder.config.vocab_size)] * len(rows)
        return list(self.decoder.logits(hidden_WD).split(list(counts)))

    def release(self, sequence: PagedSequence) -> None:
        """Give the blocks back; what they hold stays as it is."""
        self.free = sequence.blocks + self.free
        sequence.blocks = []
        sequence.num_computed = 0
