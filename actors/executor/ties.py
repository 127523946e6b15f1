"""What ties the ranks of one model together: memory that they share, and a socket from rank 0 to every other.

The engine's process makes them and hands them over to the workers that it starts. It keeps none: when a rank ends, nobody holds
its ends of them.
"""

import os
import socket
from types import TracebackType

from triode.models.parallel import RankOrder


class Ties:
    """Open until the block is left, by when the workers have been started."""

    def __init__(self, num_ranks: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise ValueError(f"tensor_parallel must be 1 where the system is not Linux, got {num_ranks}")
        self._memory_fd = os.memfd_create("triode-ranks")
        self._pairs = [socket.socketpair() for _ in range(num_ranks - 1)]

    def order(self, rank: int) -> RankOrder:
        """What the worker of this rank is told. The file descriptors are to be passed on under the same numbers."""
        links = [ours.fileno() for ours, _ in self._pairs] if rank == 0 else [self._pairs[rank - 1][1].fileno()]
        return RankOrder(rank=rank, num_ranks=len(self._pairs) + 1, memory_fd=self._memory_fd, links=tuple(links))

    def __enter__(self) -> "Ties":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._memory_fd)
        for pair in self._pairs:
            for end in pair:
                end.close()
