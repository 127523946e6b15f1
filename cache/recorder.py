"""Recorder: puts the blocks that launched steps have computed into the prefix tree."""

from triode.cache.blocks import BlockStore
from triode.cache.sequence import CachedSequence


class Recorder:
    """Remembers full blocks of sequences."""

    def __init__(self, store: BlockStore, block_size_tokens: int, *, is_on: bool) -> None:
        self._store = store
        self._block_size = block_size_tokens
        self._is_on = is_on

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
