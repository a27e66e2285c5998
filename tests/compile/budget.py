"""The budget file: registers, stack, spilled bytes and static shared memory of every kernel variant.

``python -m tests.compile.budget`` rewrites it. A test fails if a kernel takes more than the file allows.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from exl.kernels.variants import ARCHS, variants

from .nvrtc import Nvrtc, nvrtc
from .resources import Resources, measure_all, name_of

BUDGET = Path(__file__).resolve().parent / "budget.json"
Table = dict[str, dict[str, Resources]]  # variant -> arch -> resources


def measured(archs: tuple[int, ...] = ARCHS) -> Table:
    """The present resources of every variant."""
    specs = [variant.spec for arch in archs for variant in variants(arch)]
    table: Table = {}
    for spec, resources in zip(specs, measure_all(specs), strict=True):
        table.setdefault(name_of(spec), {})[str(spec.arch)] = resources
    return table


def read() -> Table:
    rows = json.loads(BUDGET.read_text())["kernels"]
    return {name: {arch: Resources(*row) for arch, row in by_arch.items()} for name, by_arch in rows.items()}


def write(table: Table, compiler: Nvrtc) -> None:
    rows = [
        f"  {json.dumps(name)}: "
        + json.dumps({arch: list(asdict(table[name][arch]).values()) for arch in sorted(table[name], key=int)})
        for name in sorted(table)
    ]
    head = {"compiler": compiler.version(), "columns": list(Resources.__dataclass_fields__)}
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    BUDGET.write_text(f'{{{text},\n"kernels": {{\n' + ",\n".join(rows) + "\n}}\n")


def over(table: Table, budget: Table) -> list[str]:
    """One message per excess, per variant that the budget lacks, and per budgeted variant that no longer exists."""
    found = []
    for name, by_arch in table.items():
        for arch, resources in by_arch.items():
            allowed = budget.get(name, {}).get(arch)
            if allowed is None:
                found.append(f"{name} sm_{arch} is not in the budget file")
                continue
            for field, value in asdict(resources).items():
                if value > getattr(allowed, field):
                    found.append(f"{name} sm_{arch}: {field} {value}, budget {getattr(allowed, field)}")
    gone = [
        f"{name} sm_{arch} is no longer a variant"
        for name, by_arch in budget.items()
        for arch in by_arch
        if arch not in table.get(name, {})
    ]
    return found + gone


if __name__ == "__main__":
    found_compiler = nvrtc()
    if found_compiler is None:
        raise SystemExit("install nvidia-cuda-nvrtc-cu12 first")
    write(measured(), found_compiler)
