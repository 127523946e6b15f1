"""Where processes that compute together run: decided from files, and done by the system."""

import subprocess
import sys
from pathlib import Path

import pytest

from triode.kernels.native import numa
from triode.kernels.native.numa import Place, choose_places

NODE0 = Path("/sys/devices/system/node/node0")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two nodes of four processors each; this process may not use the last one."""
    monkeypatch.setattr(numa, "allowed_cpus", lambda _: (0, 1, 2, 3, 4, 5, 6))
    for node, cpus in ((0, "0-1,4-5"), (1, "2-3,6-7")):
        folder = tmp_path / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpus}\n")
    return tmp_path


def test_one_process_without_a_node_runs_where_it_likes(machine: Path) -> None:
    assert choose_places(1, (), machine) == (None,)


def test_ranks_without_nodes_share_all_processors(machine: Path) -> None:
    assert choose_places(2, (), machine) == (Place((0, 1, 2)), Place((3, 4, 5, 6)))
    assert choose_places(7, (), machine) == tuple(Place((cpu,)) for cpu in range(7))
    assert choose_places(8, (), machine) == (None,) * 8


def test_a_rank_has_the_processors_of_its_node_that_this_process_may_use(machine: Path) -> None:
    assert choose_places(2, (1, 0), machine) == (Place((2, 3, 6), 1), Place((0, 1, 4, 5), 0))


def test_ranks_of_one_node_share_its_processors(machine: Path) -> None:
    assert choose_places(3, (0, 1, 0), machine) == (Place((0, 1), 0), Place((2, 3, 6), 1), Place((4, 5), 0))


def test_a_node_that_is_not_there_or_too_small_is_refused(machine: Path) -> None:
    with pytest.raises(ValueError, match="numa_nodes must be of nodes that this machine has, got 2"):
        choose_places(1, (2,), machine)
    with pytest.raises(ValueError, match=r"for each rank, got 4 x 1, of whose processors .* may use 3"):
        choose_places(4, (1, 1, 1, 1), machine)


BOUND = """
import os
from triode.kernels.native.numa import Place, bind, bound_nodes
assert bound_nodes() == ()
cpu = max(os.sched_getaffinity(0))
try:
    bind(Place((cpu,), 0))
except OSError as error:
    print(error)
else:
    memory = bytearray(2**24)
    print(os.sched_getaffinity(0) == {cpu}, bound_nodes(), any(" bind:0 " in line for line in open("/proc/self/numa_maps")))
"""


@pytest.mark.skipif(not NODE0.exists() or not Path("/proc/self/numa_maps").exists(), reason="no NUMA in this kernel")
def test_a_bound_process_has_its_processors_and_its_nodes_memory() -> None:
    finished = subprocess.run([sys.executable, "-c", BOUND], capture_output=True, text=True, check=True)
    if "the system refuses memory of node 0 alone" in finished.stdout:
        pytest.skip(finished.stdout)
    assert finished.stdout == "True (0,) True\n"


def test_binding_to_a_node_that_is_not_there_is_an_error() -> None:
    script = "import os; from triode.kernels.native.numa import *; bind(Place(tuple(os.sched_getaffinity(0)), 1000))"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "the system refuses memory of node 1000 alone" in finished.stderr
