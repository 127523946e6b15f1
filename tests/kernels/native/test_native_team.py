"""The threads of the compiled step: as many as are of use, each in its place, and gone with their decoder."""

import gc
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from native_steps import native_library
from tiny_decoders import tiny_config, tiny_weights
from triode.cache.config import CacheConfig
from triode.kernels.native import cpus, places
from triode.kernels.native.cpus import allowed_cpus, usable_threads
from triode.kernels.native.places import VARIABLE, held_elsewhere, take_places
from triode.kernels.native.team import Team
from triode.models.build import build_runner

TASKS = Path("/proc/self/task")


@pytest.fixture(autouse=True)
def nobody_else_has_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever engines run on this machine."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def threads() -> set[str]:
    return {task.name for task in TASKS.iterdir()}


def started(make: Callable[[], Team]) -> tuple[Team, set[str]]:
    before = threads()
    team = make()
    return team, threads() - before


def allowed(thread: str) -> str:
    lines = (TASKS / thread / "status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("Cpus_allowed_list"))


def test_helpers_end_with_their_team() -> None:
    library = native_library()
    before = threads()
    team = Team(library, 4)
    assert len(threads() - before) == 3
    del team
    gc.collect()
    assert threads() <= before


@pytest.mark.skipif(len(allowed_cpus()) < 2, reason="one CPU leaves nothing to choose")
def test_each_helper_stays_on_a_cpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    library, number = native_library(), len(allowed_cpus())
    _, helpers = started(lambda: Team(library, number))
    assert sorted(map(allowed, helpers)) == sorted(map(str, allowed_cpus()[1:]))
    everywhere = allowed(str(os.getpid()))
    _, more = started(lambda: Team(library, number + 1))
    assert {allowed(thread) for thread in more} == {everywhere}
    monkeypatch.setenv(VARIABLE, "0")
    _, free = started(lambda: Team(library, number))
    assert {allowed(thread) for thread in free} == {everywhere}


def test_two_engines_never_stay_on_the_same_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "allowed_cpus", lambda: (0, 2, 4, 1))
    first, second = take_places(2), take_places(2)
    assert (first.cpus, second.cpus) == ((2, 4), (1, 0))
    assert take_places(1).cpus == ()
    assert held_elsewhere((0, 1, 2, 3, 4)) == (0, 1, 2, 4)
    second.release()
    assert take_places(3).cpus == ()
    assert held_elsewhere((0, 1, 2, 3, 4)) == (2, 4)


@pytest.mark.skipif(len(allowed_cpus()) < 2, reason="one CPU leaves nothing to choose")
def test_a_team_leaves_its_cpus_to_the_next() -> None:
    library = native_library()
    team, helpers = started(lambda: Team(library, 2))
    _, others = started(lambda: Team(library, 2))
    assert {allowed(thread) for thread in helpers}.isdisjoint({allowed(thread) for thread in others})
    before = held_elsewhere(allowed_cpus())
    team.close()
    assert set(held_elsewhere(allowed_cpus())) < set(before)


def test_places_of_a_process_that_dies_are_free_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(places, "allowed_cpus", lambda: (0, 1))
    take = (
        "from triode.kernels.native import places as p; p.allowed_cpus = lambda: (0, 1); print(p.take_places(1).cpus)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    holding = subprocess.Popen(
        [sys.executable, "-c", f"{take}; input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert holding.stdout is not None
    assert holding.stdout.readline() == "(1,)\n"
    assert take_places(1).cpus == (0,)
    holding.kill()
    holding.communicate()
    assert take_places(1).cpus == (1,)


def test_threads_that_the_system_does_not_start_are_an_error_and_none_is_left() -> None:
    library, before = native_library(), threads()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    # Each thread needs address space for its stack.
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28, hard))
    try:
        with pytest.raises(OSError, match="does not start 4096 threads, lower num_threads"):
            Team(library, 4097)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert threads() <= before
    assert started(lambda: Team(library, 3))[1]


def test_second_hardware_threads_of_a_core_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 6})
    for cpu, siblings in ((0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    assert allowed_cpus(tmp_path) == (0, 2, 6, 1, 3)


@pytest.mark.parametrize(("quota", "most", "expected"), [(None, 8, 3), (1.5, 8, 2), (0.2, 8, 1), (None, 2, 2)])
def test_threads_are_no_more_than_can_run(
    quota: float | None, most: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpus, "allowed_cpus", lambda: (0, 1, 2))
    monkeypatch.setattr(cpus, "quota_cores", lambda: quota)
    assert usable_threads(most) == expected


def test_a_runner_takes_no_more_threads_than_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "quota_cores", lambda: 0.5)
    before = torch.get_num_threads()
    settings = CacheConfig(kv_cache_bytes=2**20)
    torch.set_num_threads(3)
    built = build_runner(
        tiny_config(), tiny_weights(tiny_config(), torch.float32), cache_config=settings, max_running=4
    )
    chosen = build_runner(
        tiny_config(), tiny_weights(tiny_config(), torch.float32), cache_config=settings, max_running=4, num_threads=3
    )
    torch.set_num_threads(before)
    assert (built.num_threads, chosen.num_threads) == (1, 3)
