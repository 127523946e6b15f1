from pathlib import Path

from triode.cache.memory import available_memory_bytes

MIB = 2**20


def machine(root: Path, files: dict[str, str]) -> Path:
    """A file system with 1000 MiB available and what the test adds."""
    for name, text in {"proc/meminfo": "MemTotal: 9999999 kB\nMemAvailable: 1024000 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group_v2(path: str, limit: str, used_mib: int, inactive_mib: int = 0) -> dict[str, str]:
    folder = f"sys/fs/cgroup/{path}"
    return {
        f"{folder}memory.max": f"{limit}\n",
        f"{folder}memory.current": f"{used_mib * MIB}\n",
        f"{folder}memory.stat": f"anon 5\ninactive_file {inactive_mib * MIB}\n",
    }


def test_without_a_limit_the_machine_decides(tmp_path: Path) -> None:
    root = machine(tmp_path, {"proc/self/cgroup": "0::/job\n", **group_v2("job/", "max", 7)})
    assert available_memory_bytes(root) == 1000 * MIB


def test_the_limit_of_the_own_group_counts_less_what_is_used_and_not_reclaimable(tmp_path: Path) -> None:
    root = machine(tmp_path, {"proc/self/cgroup": "0::/job\n", **group_v2("job/", str(500 * MIB), 300, 100)})
    assert available_memory_bytes(root) == 300 * MIB


def test_the_limit_of_a_parent_group_counts_too(tmp_path: Path) -> None:
    files = group_v2("a/b/", "max", 1) | group_v2("a/", str(400 * MIB), 100)
    root = machine(tmp_path, {"proc/self/cgroup": "0::/a/b\n", **files})
    assert available_memory_bytes(root) == 300 * MIB


def test_in_a_container_the_visible_root_group_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, {"proc/self/cgroup": "0::/of/the/host\n", **group_v2("", str(90 * MIB), 10)})
    assert available_memory_bytes(root) == 80 * MIB


def test_the_older_hierarchy_counts(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory/job"
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/job\n",
        f"{folder}/memory.limit_in_bytes": f"{200 * MIB}\n",
        f"{folder}/memory.usage_in_bytes": f"{150 * MIB}\n",
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {20 * MIB}\n",
    }
    assert available_memory_bytes(machine(tmp_path, files)) == 70 * MIB


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    root = machine(tmp_path, {"proc/self/cgroup": "0::/\n", **group_v2("", str(10 * MIB), 12)})
    assert available_memory_bytes(root) == 0


def test_where_there_is_no_proc_all_physical_memory_counts(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path) > 0


def test_a_process_that_is_bound_to_nodes_has_what_they_have_free(tmp_path: Path) -> None:
    def node(number: int, free_mib: int) -> dict[str, str]:
        fields = {"MemFree": free_mib, "Active(file)": 5, "Inactive(file)": 10, "Inactive(anon)": 500}
        lines = [f"Node {number} {name}: {mib * 1024} kB\n" for name, mib in fields.items()]
        return {f"sys/devices/system/node/node{number}/meminfo": "".join(lines)}

    root = machine(tmp_path, {"proc/self/cgroup": "0::/job\n", **node(0, 300), **node(1, 200)})
    assert available_memory_bytes(root) == 1000 * MIB
    assert available_memory_bytes(root, [1]) == 215 * MIB
    assert available_memory_bytes(root, [0, 1]) == 530 * MIB
