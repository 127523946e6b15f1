"""Prefixes that the caller wants kept."""

from collections import Counter

from triode.cache.blocks import BlockStore
from triode.cache.chain import TokenChain
from triode.cache.prefix import Node


class Pins:
    """Counted locks on cached prefixes. The lock on a prefix's last node keeps all of it."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self._tips: dict[tuple[bytes, bytes], list[Node]] = {}

    def pin(self, chain: TokenChain) -> int:
        """Lock the cached full blocks of a chain and return how many; once more for each call."""
        nodes = self._store.tree.longest(chain, chain.num_full_blocks)
        if nodes:
            self._store.tree.lock(nodes[-1])
            self._tips.setdefault(chain.key(), []).append(nodes[-1])
        return len(nodes)

    def unpin(self, chain: TokenChain) -> int:
        """Undo the last pin of the same tokens, however much was cached since; 0 when there is none."""
        tips = self._tips.get(chain.key())
        if not tips:
            return 0
        tip = tips.pop()
        if not tips:
            del self._tips[chain.key()]
        self._store.unlock(tip)
        return tip.num_blocks

    def counts(self) -> Counter[Node]:
        """How many pins lock each node directly."""
        return Counter(tip for tips in self._tips.values() for tip in tips)

    def num_blocks(self) -> int:
        """Blocks that pins keep, each counted once."""
        kept: set[Node] = set()
        for tip in self.counts():
            node: Node | None = tip
            while node is not None and node not in kept:
                kept.add(node)
                node = node.parent
        return len(kept)
