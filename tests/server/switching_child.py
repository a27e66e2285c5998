"""Run by test_models_switching.py as a child process: a server whose two models take turns, and what it holds."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from pathlib import Path

import httpx
import pytest
import torch

import exl
from exl.engine import build
from exl.memory.host import proc_bytes, trim_heap
from exl.ops.cpu_target import torch_target
from exl.server.assemble import models_of
from exl.server.options import ServerOptions
from tests.live_bytes import live_bytes
from tests.server.running import SECONDS, RunningServer

DATA = Path(__file__).parents[1] / "data"
NAMES = ("stories260K", "stories2M")
OPTIONS = {"context": 512, "kv_cache": "q8", "max_sequences": 4, "prefill_chunk": 64, "prefill_window": 64}
BODY = {"messages": [{"role": "user", "content": "Tell me of a dog."}], "max_tokens": 8, "seed": 5}
WAYS: tuple[dict, ...] = ({}, {"stream": True}, {"choices": ["yes", "no"]}, {"n": 2}, {"stop": ["dog"]})


def ask(client: httpx.Client, name: str, way: dict) -> bool:
    """Whether the model was loaded for this."""
    answer = client.post("/v1/chat/completions", json=BODY | {"model": name} | way)
    assert answer.status_code == 200, answer.text
    return answer.headers.get("X-Exl-Model-Loaded") == "1"


def sample(server: RunningServer, baseline: int) -> dict:
    held = server.server.models._residency.held
    plans = [state.served.llm.plan for state in held]
    shared = {line.purpose: line.num_bytes for plan in plans for line in plan.lines if line.purpose == "kernels"}
    # Of the server's two pools, which start them as they are needed, up to a number.
    workers = sum(thread.name.startswith(("asyncio_", "exl-server")) for thread in threading.enumerate())
    return {
        "held": [state.name for state in held],
        "exact": sum(plan.exact_bytes for plan in plans),
        "live": live_bytes(),
        "at_most": sum(plan.num_bytes for plan in plans) - (len(plans) - 1) * sum(shared.values()),
        "resident": proc_bytes("self/status", "VmRSS") - baseline,
        "peak": proc_bytes("self/status", "VmHWM") - baseline,
        "threads": threading.active_count() - workers,
        "system_threads": len(os.listdir("/proc/self/task")) - workers,
        "files": len(os.listdir("/proc/self/fd")),
    }


def warm_up() -> None:
    """Torch's one-time allocations, and llguidance's; kernels are planned for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "cpu_target", torch_target)
        with exl.load(DATA / NAMES[0], device="cpu", context=64) as llm:
            llm.generate("Once", 4, choices=["yes", "no"])


def main() -> None:
    count, num_fit = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    warm_up()
    gc.collect()
    gc.freeze()  # as ``serve`` does; also fewer objects to look through for tensors
    sizes = [exl.plan(DATA / name, **OPTIONS).num_bytes for name in NAMES]
    ram = sum(sizes) if num_fit == 2 else max(sizes) + 10**5
    options = ServerOptions(port=0, models_dir=DATA)
    server = RunningServer(models=models_of(None, options, {**OPTIONS, "device": "cpu", "ram": ram}))
    with server, httpx.Client(base_url=server.url, timeout=SECONDS) as client:
        client.get("/v1/models")
        before = live_bytes()
        trim_heap()
        baseline = proc_bytes("self/status", "VmRSS")
        samples = []
        for i in range(count):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            was_loaded = ask(client, NAMES[i % 2], WAYS[i // 2 % len(WAYS)])
            samples.append(sample(server, baseline) | {"was_loaded": was_loaded})
    print(json.dumps({"ram": ram, "before": before, "after": live_bytes(), "samples": samples}))


if __name__ == "__main__":
    main()
