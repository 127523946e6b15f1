"""How several processes, the *ranks*, compute one model together (tensor parallelism, arXiv 1909.08053).

Each rank has an equal share of the KV heads, with the query heads that belong to them, and of the inner features of the
feed-forward network: rows of the matrices that lead there, columns of those that lead back. What leads back is summed over
ranks, in their order. Of the head each has the outputs for some of the vocabulary. Embedding, norms and residual stream are
everybody's.

Rank 0 has the batch and samples; the others do what it says.
"""

from typing import Protocol, runtime_checkable

import msgspec

from triode.models.config import ModelConfig

_SHARED = ("num_kv_heads", "num_heads", "intermediate_size")


class RankOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What a process is told about its place among the ranks."""

    rank: int
    num_ranks: int
    memory_fd: int
    """An empty file in memory, which all ranks map."""
    links: tuple[int, ...]
    """File descriptors of connected sockets: to ranks 1, 2, ... in rank 0, to rank 0 in every other."""
    free_bytes: int
    """Of main memory, before any of them was started: what they all load must fit in it."""


@runtime_checkable
class Follower(Protocol):
    """A rank that does what rank 0 says."""

    def fileno(self) -> int:
        """What is readable when there is something to do."""

    def obey(self) -> bool:
        """Do the next thing; False if rank 0 has no more to say."""


def check_shares(config: ModelConfig, num_ranks: int) -> None:
    """Refuse a number of ranks that the model cannot be divided by.

    Raises:
        ValueError: naming what is not divisible.
    """
    for name in _SHARED:
        if (size := getattr(config, name)) % num_ranks:
            raise ValueError(f"tensor_parallel must divide {name} = {size} of this model, got {num_ranks}")


def share_of(config: ModelConfig, num_ranks: int) -> ModelConfig:
    """The model as one rank computes it."""
    return msgspec.structs.replace(config, **{name: getattr(config, name) // num_ranks for name in _SHARED})


def outputs_of(vocab_size: int, rank: int, num_ranks: int) -> range:
    """The tokens whose logits a rank computes."""
    return range(vocab_size * rank // num_ranks, vocab_size * (rank + 1) // num_ranks)
