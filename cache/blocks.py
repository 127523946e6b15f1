"""Blocks with everything that can own one: tables, and the prefix tree that remembers them.

A block has one reference from each table that lists it and one from the tree. It is

    free        without references
    evictable   remembered by the tree and idle there (`triode.cache.prefix`): taken when no block is free
    used        anything else
"""

from collections import Counter
from collections.abc import Sequence

from triode.cache.allocator import BlockAllocator
from triode.cache.chain import TokenChain
from triode.cache.prefix import Node, PrefixTree
from triode.ids import BlockId


class BlockStore:
    """The allocator and the prefix tree, kept in agreement, under one clock."""

    def __init__(self, num_blocks: int, ttl_s: float | None) -> None:
        self._allocator = BlockAllocator(num_blocks)
        self._ttl_s = ttl_s
        # Order of use needs a clock that never runs back.
        self._now_s = 0.0
        self.tree = PrefixTree()
        self.num_references = self._allocator.num_references
        """By block id; to read."""
        self.capacity_blocks = self._allocator.capacity_blocks
        self.num_evicted_blocks = 0
        self.num_expired_blocks = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks without references."""
        return self._allocator.num_free_blocks

    @property
    def num_available_blocks(self) -> int:
        """Free and evictable blocks: what `take` can hand out."""
        return self._allocator.num_free_blocks + self.tree.num_idle_blocks

    def advance(self, now_s: float) -> None:
        """Set the clock, if that is forward, and forget what has expired."""
        self._now_s = max(self._now_s, now_s)
        if self._ttl_s is not None:
            self.num_expired_blocks += self._free(self.tree.expire(self._now_s - self._ttl_s))

    def take(self) -> BlockId:
        """A block for one table, free or else evicted. Raises KeyError when none is available."""
        if not self._allocator.num_free_blocks:
            self.num_evicted_blocks += self._free([self.tree.evict()])
        return self._allocator.allocate()

    def share(self, block_id: BlockId) -> None:
        """Another table lists this block."""
        self._allocator.share(block_id)
        node = self.tree.node_of(block_id)
        if node is not None:
            self.tree.lock(node)

    def share_chain(self, nodes: Sequence[Node]) -> None:
        """Another table lists these nodes' blocks, which begin a chain."""
        for node in nodes:
            self._allocator.share(node.block_id)
        self.tree.lock_chain(nodes)

    def drop(self, block_id: BlockId) -> None:
        """A table lists this block no longer."""
        node = self.tree.node_of(block_id)
        if node is not None:
            self.unlock(node)
        self._allocator.release(block_id)

    def drop_table(self, table: Sequence[BlockId]) -> None:
        """`drop` each block of a table."""
        node_of, unlock, release = self.tree.node_of, self.tree.unlock, self._allocator.release
        # As `drop` does, without two calls a block: a long table has hundreds.
        for block_id in table:
            node = node_of(block_id)
            if node is not None:
                unlock(node, self._now_s)
            release(block_id)

    def unlock(self, node: Node) -> None:
        """Undo a `tree.lock`, now."""
        self.tree.unlock(node, self._now_s)

    def remember(self, chain: TokenChain, index: int, parent: Node | None, block_id: BlockId) -> Node | None:
        """The node for block `index` of a chain: the one there is, else a new one for `block_id`.

        None when a colliding digest keeps the block from being remembered.
        """
        node = self.tree.find(chain, index, parent)
        if node is None:
            node = self.tree.insert(chain, index, parent, block_id, self.num_references[block_id])
            if node is not None:
                self._allocator.share(block_id)
        return node

    def clear(self) -> int:
        """Forget all evictable blocks; how many there were."""
        return self._free(self.tree.clear())

    def check_integrity(self, tables: Counter[BlockId], pins: Counter[Node]) -> None:
        """Raise AssertionError unless references and locks are those of these tables and pins. Looks at every block."""
        self._allocator.check_integrity()
        self.tree.check_integrity(tables, pins)
        for block_id in map(BlockId, range(self.capacity_blocks + 1)):
            owed = tables[block_id] + (self.tree.node_of(block_id) is not None)
            count = self.num_references[block_id]
            assert count == owed, f"block {block_id} has {count} references, {owed} owed"

    def _free(self, forgotten: list[BlockId]) -> int:
        for block_id in forgotten:
            self._allocator.release(block_id)
        return len(forgotten)


class Forecast:
    """How many blocks would become available if tables were dropped, one after the other. Drops nothing."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self._references: Counter[BlockId] = Counter()
        self._locks: Counter[Node] = Counter()

    def drop(self, table: Sequence[BlockId]) -> int:
        """The gain from this table, after those that were asked about before."""
        gain = 0
        for block_id in table:
            node = self._store.tree.node_of(block_id)
            if node is not None:
                gain += PrefixTree.unlock_gain(node, self._locks)
            else:
                self._references[block_id] += 1
                gain += self._references[block_id] == self._store.num_references[block_id]
        return gain
