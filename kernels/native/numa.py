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

# By processor, `set_mempolicy` and `get_mempolicy`, which no C library has.
_SYSTEM_CALLS = {"x86_64": (238, 239), "aarch64": (237, 236)}
_MPOL_BIND = 2
MAX_NODES = 1024
"""Linux has no more."""
_NodeSet = ctypes.c_ulong * (MAX_NODES // 64)


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
    if platform.machine() not in _SYSTEM_CALLS:
        raise OSError(
            f"memory of one node is to be had on {' and '.join(_SYSTEM_CALLS)} only, not {platform.machine()}"
        )
    nodes = _NodeSet()
    nodes[place.node // 64] = 1 << place.node % 64
    libc = ctypes.CDLL(None, use_errno=True)
    number = ctypes.c_long(_SYSTEM_CALLS[platform.machine()][0])
    if libc.syscall(number, ctypes.c_int(_MPOL_BIND), ctypes.byref(nodes), ctypes.c_ulong(MAX_NODES)):
        code = ctypes.get_errno()
        raise OSError(code, f"the system refuses memory of node {place.node} alone: {os.strerror(code)}")


def bound_nodes() -> tuple[int, ...]:
    """The nodes that this thread has memory from, and from nowhere else; none where the system is to choose."""
    if platform.system() != "Linux" or platform.machine() not in _SYSTEM_CALLS:
        return ()
    policy, nodes = ctypes.c_int(), _NodeSet()
    number = ctypes.c_long(_SYSTEM_CALLS[platform.machine()][1])
    size, nowhere, no_flags = ctypes.c_ulong(MAX_NODES), ctypes.c_void_p(), ctypes.c_ulong()
    # An error is that of a system without such policies.
    if ctypes.CDLL(None).syscall(number, ctypes.byref(policy), ctypes.byref(nodes), size, nowhere, no_flags):
        return ()
    if policy.value != _MPOL_BIND:
        return ()
    return tuple(node for node in range(MAX_NODES) if nodes[node // 64] >> node % 64 & 1)
