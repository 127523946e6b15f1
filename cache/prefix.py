"""Which full blocks are remembered, found by the tokens they hold, and which of them go first.

A node is one block; its parent is the block before it. A node is *locked* by each table that lists its block, by each
pin on it and by each locked child. Hence whatever lies before a locked node is locked too, and the idle (unlocked)
nodes are whole subtrees that nobody uses.

Nodes join the idle queue when their last lock goes. A node's descendants have lost theirs before it (a locked child is
a lock), so they stand before it in the queue: taking from the front evicts the least recently used block, is always
allowed to, never leaves a node without its parent, and costs O(1). With a clock that never runs back the queue is also
in order of last use, which is all that expiry needs.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from triode.cache.chain import TokenChain
from triode.ids import BlockId


# Compared and hashed by identity.
@dataclass(eq=False, slots=True)
class Node:
    """One remembered block."""

    parent: "Node | None"
    namespace: bytes
    digest: bytes
    tokens: bytes
    block_id: BlockId
    num_blocks: int
    """Length of the chain that ends here."""
    num_locks: int
    last_used_s: float = 0.0
    """When the last lock went; meaningless while the node is locked."""
    is_cached: bool = True
    """False once the node was forgotten."""
    num_children: int = 0
    newest: "Node | None" = None
    """The child that came last; None if it was forgotten."""


@dataclass(eq=False, slots=True)
class PrefixTree:
    """The remembered blocks. Whoever owns the blocks themselves takes back what `evict` and its kin return."""

    _nodes: dict[bytes, Node] = field(default_factory=dict)
    _node_of: dict[BlockId, Node] = field(default_factory=dict)
    _idle: OrderedDict[Node, None] = field(default_factory=OrderedDict)

    @property
    def num_blocks(self) -> int:
        """Remembered blocks."""
        return len(self._nodes)

    @property
    def num_idle_blocks(self) -> int:
        """Remembered blocks that `evict` may take."""
        return len(self._idle)

    def node_of(self, block_id: BlockId) -> Node | None:
        """The node that holds this block, if it is remembered."""
        return self._node_of.get(block_id)

    def find(self, chain: TokenChain, index: int, parent: Node | None) -> Node | None:
        """The child of `parent` for block `index` of the chain. Tokens are compared: a collision finds nothing."""
        node = self._nodes.get(chain.digest(index))
        if node is None or node.parent is not parent or node.namespace != chain.namespace:
            return None
        return node if node.tokens == chain.tokens(index) else None

    def longest(self, chain: TokenChain, max_blocks: int) -> list[Node]:
        """The nodes of the chain's remembered prefix, first block first.

        A long prompt has hundreds of blocks, and its first step waits for this. So a block is named, which takes longer
        than all else, only where some block continues the chain, and the one that was remembered last is another.
        """
        nodes: list[Node] = []
        node: Node | None = None
        for index, tokens in enumerate(chain.blocks(max_blocks)):
            child = None if node is None else node.newest
            if child is None or child.tokens != tokens:
                child = self.find(chain, index, node) if node is None or node.num_children else None
            if child is None:
                break
            nodes.append(child)
            node = child
        return nodes

    def insert(
        self, chain: TokenChain, index: int, parent: Node | None, block_id: BlockId, num_tables: int
    ) -> Node | None:
        """Remember a block that `find` does not find, locked by the `num_tables` (>= 1) tables that list it.

        None when another block has the same digest: then this one cannot be remembered.
        """
        digest = chain.digest(index)
        if digest in self._nodes:
            return None
        node = Node(parent, chain.namespace, digest, chain.tokens(index), block_id, index + 1, num_tables)
        self._nodes[digest] = node
        self._node_of[block_id] = node
        if parent is not None:
            parent.num_children += 1
            parent.newest = node
            self.lock(parent)
        return node

    def lock(self, node: Node) -> None:
        """Keep a node, and so all before it, until `unlock`."""
        at: Node | None = node
        while at is not None:
            at.num_locks += 1
            if at.num_locks > 1:
                return
            del self._idle[at]
            at = at.parent

    def lock_chain(self, nodes: Iterable[Node]) -> None:
        """`lock` each of a chain's nodes, the first of which has no parent: each follows its parent."""
        for node in nodes:
            if not node.num_locks:
                del self._idle[node]
                if node.parent is not None:
                    node.parent.num_locks += 1
            node.num_locks += 1

    def unlock(self, node: Node, now_s: float) -> None:
        """Undo one `lock`. `now_s` never runs back."""
        at: Node | None = node
        while at is not None:
            at.num_locks -= 1
            if at.num_locks:
                return
            at.last_used_s = now_s
            self._idle[at] = None
            at = at.parent

    @staticmethod
    def unlock_gain(node: Node, lost: Counter[Node]) -> int:
        """How many nodes would become idle by `unlock(node)`, after the unlocks counted in `lost`, which it joins."""
        gain = 0
        at: Node | None = node
        while at is not None:
            lost[at] += 1
            if lost[at] < at.num_locks:
                break
            gain += 1
            at = at.parent
        return gain

    def evict(self) -> BlockId:
        """Forget the least recently used idle node and return its block. Raises KeyError when none is idle."""
        node, _ = self._idle.popitem(last=False)
        del self._nodes[node.digest]
        del self._node_of[node.block_id]
        node.is_cached = False
        parent = node.parent
        if parent is not None:
            parent.num_children -= 1
            if parent.newest is node:
                parent.newest = None
        return node.block_id

    def expire(self, until_s: float) -> list[BlockId]:
        """Forget the idle nodes that nobody has used since `until_s`, and return their blocks."""
        blocks = []
        while self._idle and next(iter(self._idle)).last_used_s <= until_s:
            blocks.append(self.evict())
        return blocks

    def clear(self) -> list[BlockId]:
        """Forget all idle nodes and return their blocks."""
        return [self.evict() for _ in range(len(self._idle))]

    def check_integrity(self, num_tables: Counter[BlockId], num_pins: Counter[Node]) -> None:
        """Raise AssertionError unless locks, queue and maps agree with the tables that list each block and the pins."""
        nodes = set(self._nodes.values())
        locks = Counter({node: num_tables[node.block_id] for node in nodes}) + num_pins
        locks.update(node.parent for node in nodes if node.num_locks and node.parent is not None)
        children = Counter(node.parent for node in nodes)
        for node in nodes:
            assert node.num_locks == locks[node], f"block {node.block_id}: {node.num_locks} locks, {locks[node]} owed"
            assert node.is_cached, f"block {node.block_id} is forgotten and found"
            assert node.parent is None or node.parent in nodes, f"block {node.block_id} has lost its parent"
            assert node.num_children == children[node], f"block {node.block_id} has not {node.num_children} children"
            newest = node.newest
            assert newest is None or (newest in nodes and newest.parent is node), f"{newest} is no child of {node}"
            assert self._node_of.get(node.block_id) is node, f"block {node.block_id} is not found by its id"
        assert len(self._node_of) == len(nodes), "two nodes hold one block, or a forgotten one is still found"
        assert set(self._idle) == {node for node in nodes if not node.num_locks}, "the queue is not the idle nodes"
        ages = [node.last_used_s for node in self._idle]
        assert ages == sorted(ages), "the queue is not in order of last use"
        places = {node: place for place, node in enumerate(self._idle)}
        for node in places:
            assert node.parent not in places or places[node] < places[node.parent], "a parent would go before its child"
