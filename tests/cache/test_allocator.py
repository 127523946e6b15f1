from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from triode.cache.allocator import BlockAllocator
from triode.ids import BlockId

CAPACITY = 5


class AllocatorMachine(RuleBasedStateMachine):
    """The allocator against a Counter of references."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(CAPACITY + 1)
        self.references: Counter[BlockId] = Counter()

    @precondition(lambda self: len(self.references) < CAPACITY)
    @rule()
    def allocate(self) -> None:
        block_id = self.allocator.allocate()
        assert 1 <= block_id <= CAPACITY
        assert block_id not in self.references
        self.references[block_id] = 1

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.references)))
        self.allocator.share(block_id)
        self.references[block_id] += 1

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.references)))
        self.allocator.release(block_id)
        self.references -= Counter([block_id])

    @precondition(lambda self: len(self.references) == CAPACITY)
    @rule()
    def allocate_without_a_free_block(self) -> None:
        with pytest.raises(IndexError):
            self.allocator.allocate()

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.allocator.check_integrity()
        assert self.allocator.num_free_blocks == CAPACITY - len(self.references)
        assert Counter(dict(enumerate(self.allocator.num_references))) - Counter() == self.references


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_free_block_is_neither_shared_nor_released() -> None:
    allocator = BlockAllocator(3)
    for act in (allocator.share, allocator.release):
        with pytest.raises(ValueError, match="block_id must be of a block in use, got 2"):
            act(BlockId(2))


def test_a_pool_holds_at_least_one_block_beside_block_0() -> None:
    with pytest.raises(ValueError, match="num_blocks must be >= 2, got 1"):
        BlockAllocator(1)


def test_the_integrity_check_sees_a_lost_block() -> None:
    allocator = BlockAllocator(3)
    allocator.num_references[allocator.allocate()] = 0
    with pytest.raises(AssertionError, match="free list"):
        allocator.check_integrity()
