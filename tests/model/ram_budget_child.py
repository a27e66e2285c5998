"""Run by test_ram_budget.py as a child process: loads a model under a budget and reports its memory use."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

import exl
from exl.engine import build
from exl.memory.host import trim_heap
from exl.ops.cpu_target import torch_target
from exl.planning.plan import MemoryPlan


def resident_bytes(field: str) -> int:
    """``VmRSS``, the present value, or ``VmHWM``, the peak since its last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


def run(folder: str, context: int, **options) -> tuple[str, MemoryPlan]:
    """Uses the whole context, by prefill and by decode. Returns (digest of logits and tokens, plan)."""
    with exl.load(folder, context=context, **options) as llm:
        ids = [3 + i * 37 % (llm.config.vocab_size - 3) for i in range(context)]
        digest = hashlib.sha256(llm.logits(ids).numpy().tobytes())
        done = llm.generate(ids[: context - 6], 6)
        digest.update(json.dumps(done.token_ids).encode())
        return digest.hexdigest(), llm.plan


def main() -> None:
    folder, tiny, packed, context, ram = sys.argv[1:]
    torch.set_num_threads(1)  # as in all tests: on a busy machine a second thread waits at every barrier
    with pytest.MonkeyPatch.context() as patch:  # once first, for torch's one-time allocations; kernels are planned for
        patch.setattr(build, "cpu_target", torch_target)
        run(tiny, 64)
    gc.collect()
    trim_heap()
    baseline = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    options = {"ram": ram, "packed_folder": packed} if ram != "none" else {}
    digest, plan = run(folder, int(context), **options)
    kernels = sum(line.num_bytes for line in plan.lines if line.purpose == "kernels")
    peak = resident_bytes("VmHWM") - baseline
    print(json.dumps({"digest": digest, "planned": plan.num_bytes, "kernels": kernels, "peak": peak}))


if __name__ == "__main__":
    main()
