"""What ties the ranks of one model together: memory that they share, and a socket from rank 0 to every other.

The engine's process makes them and hands them over to the workers that it starts. It keeps none: when a rank ends, nobody holds
its ends of them.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from triode.cache.memory import available_memory_bytes
from triode.models.parallel import RankOrder


@contextmanager
def rank_orders(num_ranks: int) -> Iterator[tuple[RankOrder, ...]]:
    """What the worker of each rank is told. The file descriptors are to be passed on under the same numbers; they are
    open until the block is left, by when the workers have been started.

    Raises:
        ValueError: the system has no files in memory.
        OSError: it has no more files or memory for this process.
    """
    if not hasattr(os, "memfd_create"):
        raise ValueError(f"tensor_parallel must be 1 where the system is not Linux, got {num_ranks}")
    with ExitStack() as opened:
        memory_fd = os.memfd_create("triode-ranks")
        opened.callback(os.close, memory_fd)
        ends: tuple[list[int], list[int]] = [], []
        for _ in range(num_ranks - 1):
            for fds, end in zip(ends, socket.socketpair(), strict=True):
                fds.append(opened.enter_context(end).fileno())
        links = [tuple(ends[0]), *((fd,) for fd in ends[1])]
        free_bytes = available_memory_bytes()
        yield tuple(
            RankOrder(rank=rank, num_ranks=num_ranks, memory_fd=memory_fd, links=links[rank], free_bytes=free_bytes)
            for rank in range(num_ranks)
        )
