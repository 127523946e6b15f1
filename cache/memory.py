"""How much main memory this process may still take, and giving back what it no longer needs.

Linux kills a process that outgrows its control group, whatever the machine has free. The limit of every group from
the process's own up to the root counts. A group's usage includes file pages that the kernel drops under pressure
(model files just read, mostly); `inactive_file` of them is taken as free, as the kernel's own MemAvailable does.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


def available_memory_bytes(root: Path = Path("/"), nodes: Sequence[int] = ()) -> int:
    """Bytes of main memory that can be taken without swapping or being killed.

    Args:
        root: where `proc` and `sys` are looked for. Where there is no /proc/meminfo, all physical memory counts.
        nodes: the only ones that memory comes from; none where it comes from all.
    """
    rooms = [_system_available_bytes(root), *_group_rooms_bytes(root)]
    if nodes:
        rooms.append(sum(_node_available_bytes(root, node) for node in nodes))
    return min(rooms)


def return_freed_memory() -> None:
    """Have the C library return to the system what was freed.

    glibc keeps the freed blocks of each thread for that thread. Models are loaded in short-lived threads, so the memory
    of a closed engine would serve nobody: hundreds of megabytes for each thread that ever loaded one.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _system_available_bytes(root: Path) -> int:
    try:
        return _fields(root / "proc/meminfo")["MemAvailable:"] * 1024
    except FileNotFoundError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _node_available_bytes(root: Path, node: int) -> int:
    """What is free, and what the kernel would drop: it has no MemAvailable of a node."""
    lines = map(str.split, _lines(root / f"sys/devices/system/node/node{node}/meminfo"))
    counted = {"MemFree:", "Active(file):", "Inactive(file):"}
    return sum(int(kib) * 1024 for _, _, name, kib, *_ in lines if name in counted)


def _group_rooms_bytes(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/self/cgroup"):
        hierarchy, controllers, group = line.split(":", 2)
        if hierarchy == "0":
            yield from _rooms_bytes(root / "sys/fs/cgroup", group, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            yield from _rooms_bytes(
                mount, group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            )


def _rooms_bytes(mount: Path, group: str, limit_file: str, usage_file: str, reclaimable: str) -> Iterator[int]:
    # In a container the path of the group is the host's, and only the mount itself is visible.
    own = mount / group.lstrip("/")
    for folder in [own, *own.parents]:
        limit = _lines(folder / limit_file)
        usage = _lines(folder / usage_file)
        # "max": no limit.
        if limit and usage and limit[0].isdigit():
            yield max(0, int(limit[0]) - int(usage[0]) + _fields(folder / "memory.stat").get(reclaimable, 0))
        if folder == mount:
            return


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _fields(path: Path) -> dict[str, int]:
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines())}
