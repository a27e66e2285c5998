"""Limits of control groups, in folders laid out as the kernel's documentation describes them."""

from __future__ import annotations

import pytest

from exl import control_groups
from exl.control_groups import cpu_quota, memory_limit

V1 = "7:memory:/a/b\n4:cpu,cpuacct:/a/b\n1:name=systemd:/other\n"


@pytest.mark.parametrize(
    ("membership", "files", "quota", "limit"),
    [
        ("0::/a/b\n", {}, None, None),
        ("0::/a/b\n", {"cpu.max": "150000 100000", "memory.max": "4096000"}, 1.5, 4096000),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000", "a/b/memory.max": "8192"}, 0.5, 8192),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3, None),
        ("0::/a/b\n", {"a/memory.max": "8192", "a/b/memory.max": "max"}, None, 8192),
        ("0::/a/b\n", {"a/memory.max": "8192", "a/b/memory.max": "16384"}, None, 8192),
        ("0::/a/b\n", {"c/memory.max": "1", "c/cpu.max": "1 100000"}, None, None),
        ("0::/a\n", {"a/b/memory.max": "1"}, None, None),
        (V1, {"memory/a/memory.limit_in_bytes": "8192", "cpu/a/b/cpu.cfs_quota_us": "-1"}, None, 8192),
        (V1, {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"}, 2.5, None),
        (V1, {"other/memory.max": "1", "memory/other/memory.limit_in_bytes": "1"}, None, None),
        (None, {"cpu.max": "200000 100000", "memory.max": "nonsense"}, 2, None),
    ],
)
def test_the_least_of_its_own_and_its_parents(membership, files, quota, limit, tmp_path, monkeypatch):
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    if membership is not None:
        (tmp_path / "membership").write_text(membership)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(control_groups, "_ROOT", tmp_path / "groups")
    monkeypatch.setattr(control_groups, "_MEMBERSHIPS", tmp_path / "membership")
    assert cpu_quota() == quota
    assert memory_limit() == limit
