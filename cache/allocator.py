"""Which blocks are free, and how many owners each of the others has."""

from triode.ids import BlockId


class BlockAllocator:
    """Blocks 1, 2, ..., num_blocks - 1 with a reference count each. Block 0 is for padding and never handed out."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be >= 2, got {num_blocks}")
        self.capacity_blocks = num_blocks - 1
        self.num_references: list[int] = [0] * num_blocks
        """By block id; 0 for a free block. Read it, never write it: a step asks once a row, too often for a call."""
        # The block freed last is reused first, while its memory may still be in a CPU's cache.
        self._free = [BlockId(block_id) for block_id in range(num_blocks - 1, 0, -1)]

    @property
    def num_free_blocks(self) -> int:
        """Blocks without an owner."""
        return len(self._free)

    def allocate(self) -> BlockId:
        """Hand out a free block with one reference. Raises IndexError when there is none."""
        block_id = self._free.pop()
        self.num_references[block_id] = 1
        return block_id

    def share(self, block_id: BlockId) -> None:
        """Add an owner to a block that has one."""
        if self.num_references[block_id] < 1:
            raise _not_in_use(block_id)
        self.num_references[block_id] += 1

    def release(self, block_id: BlockId) -> None:
        """Take one owner away; with the last one the block becomes free."""
        if self.num_references[block_id] < 1:
            raise _not_in_use(block_id)
        self.num_references[block_id] -= 1
        if not self.num_references[block_id]:
            self._free.append(block_id)

    def check_integrity(self) -> None:
        """Raise AssertionError unless exactly the blocks without references are free, each once."""
        unowned = {block_id for block_id, count in enumerate(self.num_references) if block_id and not count}
        assert sorted(self._free) == sorted(unowned), "the free list differs from the blocks without references"
        assert self.num_references[0] == 0, "block 0 has an owner"
        assert min(self.num_references) >= 0, "a block was released more often than it was taken"


def _not_in_use(block_id: BlockId) -> ValueError:
    return ValueError(f"block_id must be of a block in use, got {block_id}")
