"""Run by test_ram_budget.py as a child process: loads a model under a budget and reports its memory use."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from pathlib import Path

import torch

import exl
from exl.memory.host import trim_heap


def resident_bytes(field: str) -> int:
    """``VmRSS``, the present value, or ``VmHWM``, the peak since its last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


def run(folder: str, context: int, **options) -> tuple[str, int]:
    """Uses the whole context, by prefill and by decode. Returns (digest of logits and tokens, plan)."""
    with exl.load(folder, context=context, **options) as llm:
        ids = [3 + i * 37 % (llm.config.vocab_size - 3) for i in range(context)]
        digest = hashlib.sha256(llm.logits(ids).numpy().tobytes())
        done = llm.generate(ids[: context - 6], 6)
        digest.update(json.dumps(done.token_ids).encode())
        return digest.hexdigest(), llm.plan.num_bytes


def main() -> None:
    folder, tiny, packed, context, ram = sys.argv[1:]
    torch.set_num_threads(1)  # as in all tests: on a busy machine a second thread waits at every barrier
    run(tiny, 64)  # once first, for torch's one-time allocations
    gc.collect()
    trim_heap()
    baseline = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    options = {"ram": ram, "packed_folder": packed} if ram != "none" else {}
    digest, planned = run(folder, int(context), **options)
    print(json.dumps({"digest": digest, "planned": planned, "peak": resident_bytes("VmHWM") - baseline}))


if __name__ == "__main__":
    main()
