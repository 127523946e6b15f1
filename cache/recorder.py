"""Recorder: puts the blocks that launched steps have computed into the prefix tree."""

from collections.abc import Iterable

from triode.cache.blocks import BlockStore
from triode.cache.messages import ReserveRow
from triode.cache.sequence import CachedSequence
from triode.ids import SequenceId


class Recorder:
    """Remembers full blocks of sequences; follows those whose prompt blocks are not all in the tree."""

    def __init__(self, store: BlockStore, block_size_tokens: int, *, is_on: bool) -> None:
        self._store = store
        self._block_size = block_size_tokens
        self._is_on = is_on
        self._filling: dict[SequenceId, CachedSequence] = {}

    def follow(self, sequence: CachedSequence) -> None:
        """From now on `remember_launched` looks after this admitted sequence's prompt."""
        if self._is_on and sequence.num_inserted < sequence.num_prompt_tokens // self._block_size:
            self._filling[sequence.sequence_id] = sequence

    def drop(self, sequence: CachedSequence) -> None:
        """Its table is gone."""
        self._filling.pop(sequence.sequence_id, None)

    def remember_launched(self, rows: Iterable[ReserveRow]) -> None:
        """Rows say how many of their tokens the launched steps have covered."""
        if not self._filling:
            return
        for row in rows:
            sequence = self._filling.get(row.sequence_id)
            if sequence is None:
                continue
            self.remember(sequence, min(row.num_computed_tokens, sequence.num_prompt_tokens, sequence.num_tokens))
            if sequence.num_inserted >= sequence.num_prompt_tokens // self._block_size:
                del self._filling[row.sequence_id]

    def remember(self, sequence: CachedSequence, num_tokens: int) -> None:
        """Put the full blocks of the first `num_tokens` into the tree. Where it has an equal one, ours stays private."""
        if not self._is_on:
            return
        if sequence.tip is not None and not sequence.tip.is_cached:
            sequence.tip, sequence.num_inserted = None, 0
        for index in range(sequence.num_inserted, num_tokens // self._block_size):
            node = self._store.remember(sequence.chain, index, sequence.tip, sequence.table[index])
            if node is None:
                return
            sequence.tip, sequence.num_inserted = node, index + 1

    def check_integrity(self, known: Iterable[SequenceId]) -> None:
        """Raise AssertionError unless those that are followed are known and admitted."""
        assert all(sequence.is_admitted for sequence in self._filling.values()), "only admitted sequences fill up"
        assert self._filling.keys() <= set(known), "a released sequence would enter the tree"
