"""How long OpenMP's threads, with which torch computes on the CPU, look for work before they sleep.

An operation of torch wakes them, and waits for all of them at its end. GCC's OpenMP has them look for milliseconds, which is
well while they have a core each: the next operation finds them awake. When another process takes a core, every operation
waits that long for a thread that does not run, and a step takes ten times as long. A fraction of a millisecond is longer
than what lies between two operations, and costs little when it is in vain.
"""

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

SPIN_COUNT = 20_000
"""Rounds of GCC's OpenMP, each of some tens of nanoseconds."""
_SETTINGS = frozenset({"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"})


def bound_spinning(environment: MutableMapping[str, str]) -> None:
    """Set the bound for a process that has not imported torch yet, unless its environment says something already."""
    if not _SETTINGS & environment.keys():
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


@contextmanager
def spinning_bounded(environment: MutableMapping[str, str]) -> Iterator[None]:
    """The same where torch is imported inside the block. A process that has it already, and those that this one starts
    later, are as they would be."""
    before = environment.get("GOMP_SPINCOUNT")
    bound_spinning(environment)
    try:
        yield
    finally:
        if before is None:
            environment.pop("GOMP_SPINCOUNT", None)
