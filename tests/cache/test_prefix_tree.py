from collections import Counter
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from triode.cache.chain import TokenChain
from triode.cache.prefix import Node, PrefixTree
from triode.ids import BlockId, TokenId, pack_tokens

BLOCK = 16
Path = tuple[int, ...]
"""A prefix, one letter a block: the block's 16 tokens are all this letter."""

paths = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple)


def chain(path: Path, namespace: bytes = b"") -> TokenChain:
    made = TokenChain(namespace, BLOCK)
    made.extend(pack_tokens([TokenId(letter) for letter in path for _ in range(BLOCK)]))
    return made


class TreeMachine(RuleBasedStateMachine):
    """The tree against a dict of prefixes; a lock on a prefix stands for a table that lists all its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = PrefixTree()
        self.block_of: dict[Path, BlockId] = {}
        self.locked: list[Path] = []
        self.used_at_s: dict[Path, float] = {}
        self.now_s = 0.0
        self.block_ids = count(1)

    @rule(path=paths)
    def insert(self, path: Path) -> None:
        """As a sequence does at its release: insert what is missing, locked, then unlock from the end."""
        nodes: list[Node] = []
        for index in range(len(path)):
            parent = nodes[-1] if nodes else None
            node = self.tree.find(chain(path), index, parent)
            prefix = path[: index + 1]
            assert (node is not None) == (prefix in self.block_of)
            if node is None:
                self.block_of[prefix] = BlockId(next(self.block_ids))
                node = self.tree.insert(chain(path), index, parent, self.block_of[prefix], 1)
                assert node is not None
            else:
                self.tree.lock(node)
            nodes.append(node)
        self.unlock_all(path, nodes)

    @rule(path=paths, together=st.booleans())
    def lock(self, path: Path, together: bool) -> None:
        nodes = self.tree.longest(chain(path), len(path))
        if together:
            self.tree.lock_chain(nodes)
        for node in () if together else nodes:
            self.tree.lock(node)
        if nodes:
            self.locked.append(path[: len(nodes)])

    @precondition(lambda self: self.locked)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        path = self.locked.pop(data.draw(st.integers(0, len(self.locked) - 1)))
        nodes = self.tree.longest(chain(path), len(path))
        assert len(nodes) == len(path), "a locked prefix was forgotten"
        self.unlock_all(path, nodes)

    def unlock_all(self, path: Path, nodes: list[Node]) -> None:
        forecast: Counter[Node] = Counter()
        gain = sum(self.tree.unlock_gain(node, forecast) for node in reversed(nodes))
        num_idle = self.tree.num_idle_blocks
        for node in reversed(nodes):
            self.tree.unlock(node, self.now_s)
        assert self.tree.num_idle_blocks - num_idle == gain
        for end in range(1, len(path) + 1):
            self.used_at_s[path[:end]] = self.now_s

    @rule(seconds=st.sampled_from([0.0, 1.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @precondition(lambda self: self.idle())
    @rule()
    def evict(self) -> None:
        oldest_s = min(self.used_at_s[path] for path in self.idle())
        path = self.forget(self.tree.evict())
        assert self.used_at_s[path] == oldest_s, "not the least recently used"

    @precondition(lambda self: not self.idle())
    @rule()
    def evict_when_none_is_idle(self) -> None:
        with pytest.raises(KeyError):
            self.tree.evict()

    @rule(age_s=st.sampled_from([0.0, 1.0, 3.0]))
    def expire(self, age_s: float) -> None:
        due = {path for path in self.idle() if self.used_at_s[path] <= self.now_s - age_s}
        assert {self.forget(block_id) for block_id in self.tree.expire(self.now_s - age_s)} == due

    @rule()
    def clear(self) -> None:
        idle = self.idle()
        assert {self.forget(block_id) for block_id in self.tree.clear()} == idle

    def idle(self) -> set[Path]:
        locked = {path[:end] for path in self.locked for end in range(1, len(path) + 1)}
        return set(self.block_of) - locked

    def forget(self, block_id: BlockId) -> Path:
        path = next(path for path, known in self.block_of.items() if known == block_id)
        assert path in self.idle(), "a locked block was evicted"
        del self.block_of[path]
        assert not any(other[: len(path)] == path for other in self.block_of), "a block was evicted before its children"
        return path

    @invariant()
    def agrees_with_the_model(self) -> None:
        tables = Counter(self.block_of[path[:end]] for path in self.locked for end in range(1, len(path) + 1))
        self.tree.check_integrity(tables, Counter())
        assert self.tree.num_blocks == len(self.block_of)
        assert self.tree.num_idle_blocks == len(self.idle())
        for path, block_id in self.block_of.items():
            assert self.tree.longest(chain(path), len(path))[-1].block_id == block_id


TestPrefixTree = TreeMachine.TestCase
TestPrefixTree.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_colliding_digest_never_finds_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenChain, "digest", lambda _chain, _index: b"the same for all")
    tree = PrefixTree()
    first = tree.insert(chain((1,)), 0, None, BlockId(1), 1)
    assert tree.find(chain((1,)), 0, None) is first
    assert tree.find(chain((2,)), 0, None) is None
    assert tree.find(chain((1,), b"another namespace"), 0, None) is None
    assert tree.find(chain((1, 1)), 1, first) is None
    assert tree.insert(chain((2,)), 0, None, BlockId(2), 1) is None
    tree.check_integrity(Counter([BlockId(1)]), Counter())


def test_only_the_blocks_behind_a_branch_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = PrefixTree()
    nodes: list[Node] = []
    for path in ((0, 0, 0, 1), (0, 0, 0, 0, 0)):
        for index in range(len(path)):
            parent = nodes[index - 1] if index else None
            node = tree.find(chain(path), index, parent) or tree.insert(
                chain(path), index, parent, BlockId(index + 1), 1
            )
            assert node is not None
            nodes[index:] = [node]
    named: list[int] = []
    digest = TokenChain.digest

    def recording(chain: TokenChain, index: int) -> bytes:
        named.append(index)
        return digest(chain, index)

    monkeypatch.setattr(TokenChain, "digest", recording)
    assert tree.longest(chain((0,) * 6), 6) == nodes
    assert named == [0]
    assert len(tree.longest(chain((0, 0, 0, 1, 1)), 5)) == 4
    assert named == [0, 0, 3]
