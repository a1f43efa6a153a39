"""Limits of containers: memory and processors, in both versions of cgroups."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftplan.detect.host import detect_host, memory_limit_bytes, num_cpus

if TYPE_CHECKING:
    from pathlib import Path

GIB = 2**30


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/job/task\n"}
V1 = {"proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n"}
BASE = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({**V2, f"{BASE}/job/task/memory.max": "max\n"}, None),
        ({**V2, f"{BASE}/job/task/memory.max": f"{8 * GIB}\n"}, 8 * GIB),
        ({**V2, f"{BASE}/job/task/memory.max": f"{8 * GIB}",
          f"{BASE}/job/memory.max": f"{4 * GIB}"}, 4 * GIB),
        ({**V2, f"{BASE}/memory.max": f"{3 * GIB}"}, 3 * GIB),
        ({**V2, f"{BASE}/job/task/memory.max": "garbage"}, None),
        ({**V2, f"{BASE}/job/task/memory.max": ""}, None),
        ({**V1, f"{BASE}/memory/docker/abc/memory.limit_in_bytes": f"{2 * GIB}"}, 2 * GIB),
        ({**V1, f"{BASE}/memory/memory.limit_in_bytes": f"{2 * GIB}"}, 2 * GIB),
        ({**V1, f"{BASE}/memory/docker/abc/memory.limit_in_bytes": "9223372036854771712"}, None),
        ({f"{BASE}/memory.max": f"{GIB}"}, GIB),
        ({"proc/self/cgroup": "0::/../../other", f"{BASE}/memory.max": f"{GIB}"}, GIB),
    ],
)  # fmt: skip
def test_memory_limit(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    assert memory_limit_bytes(tree(tmp_path, files)) == expected


def test_the_host_has_the_smaller_of_machine_and_limit(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    assert detect_host(tmp_path).memory_bytes == total
    huge = tree(tmp_path, {**V2, f"{BASE}/memory.max": str(2 * total)})
    assert detect_host(huge).memory_bytes == total
    small = tree(tmp_path, {f"{BASE}/memory.max": str(GIB)})
    assert detect_host(small).memory_bytes == GIB


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16),
        ({**V2, f"{BASE}/job/cpu.max": "max 100000"}, 16),
        ({**V2, f"{BASE}/job/cpu.max": "250000 100000"}, 3),
        ({**V2, f"{BASE}/job/cpu.max": "10000 100000"}, 1),
        ({**V2, f"{BASE}/job/cpu.max": "100000 0"}, 16),
        ({**V2, f"{BASE}/job/cpu.max": "nonsense"}, 16),
        ({**V1, f"{BASE}/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "400000",
          f"{BASE}/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000"}, 4),
        ({**V1, f"{BASE}/cpu/cpu.cfs_quota_us": "-1",
          f"{BASE}/cpu/cpu.cfs_period_us": "100000"}, 16),
    ],
)  # fmt: skip
def test_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)), raising=False)
    assert num_cpus(tree(tmp_path, files)) == expected


def test_without_affinity_all_processors_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert num_cpus(tmp_path) == psutil.cpu_count()


@given(content=st.binary(max_size=30))
def test_no_content_of_a_cgroup_file_is_an_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    root = tmp_path_factory.mktemp("root")
    for name in ("proc/self/cgroup", f"{BASE}/memory.max", f"{BASE}/cpu.max"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    limit = memory_limit_bytes(root)
    assert limit is None or limit > 0
    assert num_cpus(root) >= 1
