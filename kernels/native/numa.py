"""Where a process that computes may run and have its memory: on a NUMA node, or on its share of the processors.

Memory comes from the node of the processor that first writes to it. A process that is bound before it starts a thread or
reads a weight therefore has all of its memory where it computes; the policy refuses to take it elsewhere when the node is full.
"""

import ctypes
import os
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from triode.kernels.native.cpus import allowed_cpus

_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
_MPOL_BIND = 2
MAX_NODES = 1024
"""Linux has no more."""


class Place(msgspec.Struct, frozen=True):
    """Where one process runs."""

    cpus: tuple[int, ...]
    node: int | None = None
    """Where its memory comes from; None leaves that to the system."""


def choose_places(num_ranks: int, nodes: Sequence[int], root: Path = Path("/")) -> tuple[Place | None, ...]:
    """A place for each of so many processes that compute together; None where the system is to choose.

    With `nodes`, one each, a process has the processors of its node, and those of one node share them. Without, several
    processes share all processors. In both cases only those that this process may use are given away.

    Raises:
        ValueError: a node does not exist, or has no processor for each of its processes.
    """
    allowed = allowed_cpus(root)
    if nodes:
        return _on_nodes(nodes, allowed, root)
    if num_ranks == 1 or len(allowed) < num_ranks:
        return (None,) * num_ranks
    return tuple(Place(cpus) for cpus in _divided(allowed, num_ranks))


def _on_nodes(nodes: Sequence[int], allowed: Sequence[int], root: Path) -> tuple[Place, ...]:
    shares: dict[int, list[tuple[int, ...]]] = {}
    for node, num_processes in Counter(nodes).items():
        path = root / f"sys/devices/system/node/node{node}/cpulist"
        if not path.exists():
            raise ValueError(f"numa_nodes must be of nodes that this machine has, got {node}")
        own = set(_parsed(path.read_text()))
        cpus = [cpu for cpu in allowed if cpu in own]
        if len(cpus) < num_processes:
            raise ValueError(
                f"numa_nodes must be of nodes with a processor for each rank, got {num_processes} x {node}, of whose "
                f"processors this process may use {len(cpus)}"
            )
        shares[node] = list(_divided(cpus, num_processes))
    return tuple(Place(shares[node].pop(0), node) for node in nodes)


def _divided(cpus: Sequence[int], num_shares: int) -> list[tuple[int, ...]]:
    return [tuple(cpus[len(cpus) * i // num_shares : len(cpus) * (i + 1) // num_shares]) for i in range(num_shares)]


def _parsed(text: str) -> list[int]:
    """What the kernel means by `0-3,8`."""
    spans = [part.partition("-") for part in text.strip().split(",") if part]
    return [cpu for first, _, last in spans for cpu in range(int(first), int(last or first) + 1)]


def bind(place: Place) -> None:
    """Keep this process, and the threads that it starts from now on, where `place` says.

    Raises:
        OSError: the system does not allow it.
    """
    os.sched_setaffinity(0, place.cpus)
    if place.node is None:
        return
    nodes = (ctypes.c_ulong * (MAX_NODES // 64))()
    nodes[place.node // 64] = 1 << place.node % 64
    libc = ctypes.CDLL(None, use_errno=True)
    number = ctypes.c_long(_SET_MEMPOLICY[platform.machine()])
    if libc.syscall(number, ctypes.c_int(_MPOL_BIND), ctypes.byref(nodes), ctypes.c_ulong(MAX_NODES)):
        code = ctypes.get_errno()
        raise OSError(code, f"the system refuses memory of node {place.node} alone: {os.strerror(code)}")
