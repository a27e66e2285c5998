"""What Linux's control groups leave to this process: a container or a service may have less than the machine.

A limit is a file of the process's own group or of one of its parents. Control groups v2 have one tree for all
controllers, v1 a tree for each (https://docs.kernel.org/admin-guide/cgroup-v2.html, .../cgroup-v1/index.html).
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIPS = Path("/proc/self/cgroup")


def cpu_quota() -> float | None:
    """Processors' worth of time per period; None: no limit."""
    quotas = [_quota_v2(folder) for folder in _group_folders("")]
    quotas += [_quota_v1(folder) for folder in _group_folders("cpu")]
    return min((quota for quota in quotas if quota is not None), default=None)


def memory_limit() -> int | None:
    """Bytes; None: no limit."""
    files = [folder / "memory.max" for folder in _group_folders("")]
    files += [folder / "memory.limit_in_bytes" for folder in _group_folders("memory")]
    limits = []
    for file in files:
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            limits.append(int(file.read_text()))
    return min(limits, default=None)


def _group_folders(controller: str) -> list[Path]:
    """This process's control group and its parents, as far as they are visible. ``controller`` "" is v2."""
    if not sys.platform.startswith("linux"):
        return []
    base = _ROOT / controller
    folders = [base]
    try:
        lines = _MEMBERSHIPS.read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controller in controllers.split(","):
            path = base / group.lstrip("/")
            folders += [path, *(parent for parent in path.parents if base in parent.parents)]
    return folders


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return None if quota <= 0 else quota / period
    except (OSError, ValueError, ZeroDivisionError):
        return None
