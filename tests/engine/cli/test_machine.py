"""The machine is read from /proc and /sys, the limits of the process's control groups included."""

from pathlib import Path

import pytest

from triode.engine.cli.machine import read_processor, read_versions

CPUINFO = (
    "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512f avx512_vnni\n\nprocessor\t: 1\nflags\t: sve\n"
)


def test_the_processor_is_the_first_core_of_cpuinfo(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(CPUINFO)
    processor = read_processor(tmp_path)
    assert processor.name == "Some CPU"
    assert processor.features == ("avx2", "avx512f", "avx512_vnni")
    assert processor.num_allowed_cores >= 1


def test_a_machine_without_proc_has_no_known_features(tmp_path: Path) -> None:
    processor = read_processor(tmp_path)
    assert processor.features == ()
    assert processor.quota_cores is None


@pytest.mark.parametrize(
    ("files", "quota_cores"),
    [
        ({}, None),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"sys/fs/cgroup/a/b/cpu.max": "150000 100000"}, 1.5),
        ({"sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 0.5),
    ],
)
def test_the_tightest_group_from_the_process_to_the_root_limits_its_time(
    tmp_path: Path, files: dict[str, str], quota_cores: float | None
) -> None:
    for name, text in {"proc/self/cgroup": "0::/a/b", **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert read_processor(tmp_path).quota_cores == quota_cores


def test_the_old_hierarchy_keeps_quota_and_period_in_two_files(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,cpuacct:/a\n3:memory:/a\n")
    folder = tmp_path / "sys/fs/cgroup/cpu/a"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("200000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert read_processor(tmp_path).quota_cores == 2
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert read_processor(tmp_path).quota_cores is None


def test_versions_name_what_results_depend_on() -> None:
    assert {"python", "triode", "torch", "trio"} <= read_versions().keys()
