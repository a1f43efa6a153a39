"""The host: what a process may use of its memory and processors, whatever the machine has.

A container sees the machine's memory in full and is killed at its cgroup's limit, so the tightest
limit on the way up counts, in both versions of cgroups.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from sftplan.facts.hardware import Host

_NO_LIMIT = 1 << 60  # version 1 writes "no limit" as a huge number
_ROOT = Path("/")


def detect_host(root: Path = _ROOT) -> Host:
    """Memory and processors that this process may use; `root` is where /proc and /sys are."""
    import psutil  # type: ignore[import-untyped]

    limits = [int(psutil.virtual_memory().total)]
    limit = memory_limit_bytes(root)
    if limit is not None:
        limits.append(limit)
    return Host(memory_bytes=min(limits), num_cpus=num_cpus(root))


def memory_limit_bytes(root: Path = _ROOT) -> int | None:
    """The tightest memory limit of the cgroup and its ancestors in bytes, or None."""
    found = []
    for file in ("memory.max", "memory.limit_in_bytes"):
        for folder in _cgroup_folders(root, "memory"):
            value = _whole(_read(folder / file))
            if value is not None and 0 < value < _NO_LIMIT:
                found.append(value)
    return min(found, default=None)


def num_cpus(root: Path = _ROOT) -> int:
    """Processors by affinity and by the cgroup's quota, at least 1."""
    import psutil

    try:
        allowed = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        allowed = psutil.cpu_count() or 1
    quota = _cpu_quota(root)
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


def _cpu_quota(root: Path) -> float | None:
    """Processors that the tightest quota allows, or None."""
    found = []
    for folder in _cgroup_folders(root, "cpu"):
        words = _read(folder / "cpu.max").split()
        if len(words) != 2:
            words = [_read(folder / f"cpu.cfs_{word}_us") for word in ("quota", "period")]
        quota, period = (_whole(word) for word in words)
        if quota is not None and period is not None and quota > 0 and period > 0:
            found.append(quota / period)
    return min(found, default=None)


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """The folders of this process's cgroup and its ancestors, of both versions.

    Inside a container the path that /proc names may lie outside of what is mounted; then only the
    mounted root is there, which is the container's own.
    """
    base = root / "sys/fs/cgroup"
    folders = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            mounts = [base, base / "unified"]
        elif controller in controllers.split(","):
            mounts = [base / controller, base / controllers]
        else:
            continue
        parts = [part for part in path.strip().split("/") if part not in ("", "..")]
        for mount in mounts:
            folders += [mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    return folders or [base, base / controller]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except (OSError, ValueError):
        return ""


def _whole(text: str) -> int | None:
    """A whole number; None for "max" and for what is none."""
    try:
        return int(text)
    except ValueError:
        return None
