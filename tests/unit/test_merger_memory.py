"""What is left of the host's memory, and of control groups of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from samepage_merger.memory import RESERVE_BYTES, HostMemory

MIB = 1 << 20


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 1048576 kB\n")
    (proc / "self/cgroup").write_text("0::/pod/container\n")
    return proc


def group(path: Path, **files: int | str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (path / name.replace("__", ".")).write_text(f"{value}\n")


def left(proc: Path, cgroups: Path) -> int:
    return (HostMemory(proc, cgroups).available() + RESERVE_BYTES) // MIB


def test_without_limits_it_is_what_the_kernel_calls_available(tmp_path: Path, proc: Path) -> None:
    assert left(proc, tmp_path / "none") == 1024
    files: dict[str, int | str] = {"memory__current": 5, "memory__stat": "inactive_file 5"}
    group(tmp_path / "cgroup/pod/container", memory__max="max", **files)
    assert left(proc, tmp_path / "cgroup") == 1024


def test_the_tightest_group_around_the_process_counts(tmp_path: Path, proc: Path) -> None:
    stat = f"anon 7\ninactive_file {10 * MIB}"
    used: dict[str, int | str] = {"memory__current": 100 * MIB, "memory__stat": stat}
    group(tmp_path / "cgroup/pod/container", memory__max=900 * MIB, **used)
    assert left(proc, tmp_path / "cgroup") == 810
    group(tmp_path / "cgroup/pod", memory__max=400 * MIB, **used)
    assert left(proc, tmp_path / "cgroup") == 310
    group(tmp_path / "cgroup/pod", memory__max=50 * MIB, **used)
    assert HostMemory(proc, tmp_path / "cgroup").available() == 0


def test_the_first_version_of_control_groups(tmp_path: Path, proc: Path) -> None:
    (proc / "self/cgroup").write_text("4:cpu:/else\n3:hugetlb,memory:/pod\n0::/\n")
    group(
        tmp_path / "cgroup/memory/pod",
        memory__limit_in_bytes=200 * MIB,
        memory__usage_in_bytes=80 * MIB,
        memory__stat=f"inactive_file 0\ntotal_inactive_file {5 * MIB}",
    )
    group(
        tmp_path / "cgroup/memory",
        memory__limit_in_bytes=9223372036854771712,
        memory__usage_in_bytes=80 * MIB,
        memory__stat="total_inactive_file 0",
    )
    assert left(proc, tmp_path / "cgroup") == 125


def test_a_container_that_does_not_see_its_path_sees_its_limit(tmp_path: Path, proc: Path) -> None:
    group(
        tmp_path / "cgroup",
        memory__max=300 * MIB,
        memory__current=100 * MIB,
        memory__stat="inactive_file 0",
    )
    assert left(proc, tmp_path / "cgroup") == 200


def test_this_machine() -> None:
    assert HostMemory().available() >= 0
