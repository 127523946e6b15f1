"""A sequence's tokens, cut into blocks that are named by everything up to their end."""

from collections.abc import Iterator
from hashlib import blake2b

from triode.ids import TOKEN_BYTES

_DIGEST_BYTES = 16


class TokenChain:
    """Block `i` is named by the BLAKE2b digest of the namespace and all tokens up to the last one of block `i`.

    So equal names mean equal tokens from the start on, but for a collision of 128 bits. Names are computed when first
    asked for and kept, by one hash that runs on from block to block, so that a sequence is never hashed twice.
    """

    __slots__ = ("_block_bytes", "_hash", "_names", "_packed", "namespace")

    def __init__(self, namespace: bytes, block_size_tokens: int) -> None:
        self.namespace = namespace
        self._block_bytes = block_size_tokens * TOKEN_BYTES
        self._packed = b""
        # Behind its length a namespace can imitate no block.
        self._hash = blake2b(len(namespace).to_bytes(8, "little") + namespace, digest_size=_DIGEST_BYTES)
        self._names: list[bytes] = []

    def extend(self, packed: bytes) -> None:
        """Learn the tokens of the sequence (`pack_tokens`), from the first on. Fewer than are known change nothing.

        Raises ValueError when they contradict the known ones.
        """
        known = self._packed
        if packed.startswith(known):
            self._packed = packed
        elif not known.startswith(packed):
            raise ValueError(f"tokens must continue the sequence's {len(known) // TOKEN_BYTES} known tokens")

    def tokens(self, index: int) -> bytes:
        """The packed tokens of block `index`."""
        return self._packed[index * self._block_bytes : (index + 1) * self._block_bytes]

    def digest(self, index: int) -> bytes:
        """The name of block `index`, which must be full."""
        names = self._names
        for i in range(len(names), index + 1):
            self._hash.update(self.tokens(i))
            names.append(self._hash.digest())
        return names[index]

    def blocks(self, num_blocks: int) -> Iterator[bytes]:
        """The packed tokens of the first blocks."""
        packed, size = self._packed, self._block_bytes
        return (packed[start : start + size] for start in range(0, num_blocks * size, size))

    def agrees(self, other: "TokenChain", num_tokens: int) -> bool:
        """Whether the first `num_tokens` tokens are known to both, and equal, in the same namespace."""
        end = num_tokens * TOKEN_BYTES
        return (
            self.namespace == other.namespace and len(self._packed) >= end and self._packed[:end] == other._packed[:end]
        )

    def key(self) -> tuple[bytes, bytes]:
        """The whole chain as a dict key."""
        return self.namespace, self._packed

    @property
    def num_full_blocks(self) -> int:
        """Blocks whose tokens are all known."""
        return len(self._packed) // self._block_bytes
