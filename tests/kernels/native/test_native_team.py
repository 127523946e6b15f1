"""The threads of the compiled step: as many as are of use, each in its place, and gone with their decoder."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from native_steps import native_library
from tiny_decoders import tiny_config, tiny_weights
from triode.cache.config import CacheConfig
from triode.kernels.native import cpus
from triode.kernels.native.cpus import allowed_cpus, usable_threads
from triode.kernels.native.team import VARIABLE, Team
from triode.models.build import build_runner

TASKS = Path("/proc/self/task")


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
