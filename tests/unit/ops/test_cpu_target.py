"""Where exl's own kernels cannot run, torch computes, and one line says why."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import exl.cpu_kernels
from exl.errors import KernelError
from exl.ops import cpu_target as module

CASES = [
    (ImportError("No module named 'llvmlite'"), "llvmlite cannot be imported (No module named 'llvmlite')"),
    (OSError("libllvmlite.so: not found"), "llvmlite cannot be imported (libllvmlite.so: not found)"),
    (KernelError("the system forbids\n code"), "the system forbids code"),
    (RuntimeError("no target"), "no target"),
]


@pytest.mark.parametrize(("error", "reason"), CASES, ids=[type(error).__name__ for error, _ in CASES])
def test_torch_computes_where_kernels_cannot_run(monkeypatch, caplog, error, reason):
    def shared_library():
        raise error

    # Here with or without llvmlite: nothing of it is imported.
    monkeypatch.setitem(sys.modules, "exl.cpu_kernels.library", SimpleNamespace(shared_library=shared_library))
    monkeypatch.setattr(exl.cpu_kernels, "probe", SimpleNamespace(why_not=lambda: None), raising=False)
    monkeypatch.setattr(module, "why_not_compiled", module.why_not_compiled.__wrapped__)
    module._say_once.cache_clear()
    for _ in range(2):
        assert module.cpu_target() == module.torch_target()
    assert [record.message for record in caplog.records] == [
        f"computing through torch, slower and less exact: exl's own CPU kernels cannot run: {reason}"
    ]
    module._say_once.cache_clear()
