"""Which processors this process may use, and how much of them."""

import math
import os
from pathlib import Path


def allowed_cpus(root: Path = Path("/")) -> tuple[int, ...]:
    """Their numbers, one hardware thread of each core before the second of any; empty where the system does not say.

    Args:
        root: where `sys` is looked for.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    seen: dict[str, int] = {}

    def turn(cpu: int) -> int:
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        core = siblings.read_text() if siblings.exists() else str(cpu)
        seen[core] = seen.get(core, -1) + 1
        return seen[core]

    return tuple(sorted(sorted(os.sched_getaffinity(0)), key=turn))


def usable_threads(most: int) -> int:
    """How many threads can run at once here, at most `most`."""
    return max(1, min(most, len(allowed_cpus()) or most, math.ceil(quota_cores() or most)))


def quota_cores(root: Path = Path("/")) -> float | None:
    """How many cores' worth of time this process gets; None without a limit.

    The tightest CPU limit of this process's control groups, the unified hierarchy or the old one.
    """
    quotas = []
    for line in _lines(root / "proc/self/cgroup"):
        hierarchy, controllers, group = line.split(":", 2)
        if hierarchy == "0":
            mount, files = root / "sys/fs/cgroup", ["cpu.max"]
        elif "cpu" in controllers.split(","):
            mount, files = root / "sys/fs/cgroup/cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        own = mount / group.lstrip("/")
        for folder in (own, *own.parents):
            words = [word for name in files for text in _lines(folder / name) for word in text.split()]
            # "max" and -1: no limit.
            if len(words) == 2 and words[0].isdigit():
                quotas.append(int(words[0]) / int(words[1]))
            if folder == mount:
                break
    return min(quotas, default=None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
