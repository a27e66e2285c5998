"""``exl.load`` and ``exl.plan`` list the options for their users; inside, all are one ``EngineOptions``."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

import exl
from exl import load_model
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.planning import ask
from exl.planning.options import EngineOptions

# Of each function: arguments that are no options of an engine, and options that it does not have.
PLANNED = {"model", "shape", "bits", "group_size", "gpu", "arch", "depth", "revision", "token"}
PLANNED |= {"vram_speed", "pcie", "disk", "ram_speed"}
OWN = {"load": {"model", "revision", "token", "progress"}, "plan": PLANNED}
MISSING = {"load": set(), "plan": {"device", "packed_folder", "threads", "max_queue"}}
ADAPTER = Path(__file__).parents[2] / "data" / "adapter"
CHANGED = {
    "device": "cuda", "vram": "3GB", "ram": "2GB", "context": 100, "kv_cache": "q4", "max_sequences": 3,
    "cache_tokens": 300, "window_cache": False, "kv_ram": "1GB",
    "prefill_chunk": 64, "prefill_window": 640, "resident_layers": 1, "head": 8, "dense": 4, "embed": "disk",
    "packed_folder": "somewhere", "threads": 1, "arithmetic": "int8", "max_queue": 5, "draft": BUNDLED_MODEL,
    "rope": {"rope_theta": 5e5}, "lora": {"written": ADAPTER},
}  # fmt: skip


class Reached(Exception):
    pass


def options_of(monkeypatch, function: str, **arguments) -> EngineOptions:
    """What is passed on inside."""

    def load_engine(folder, options, tell):
        raise Reached(options)

    def plan_model(files, options, target, speeds, depth):
        raise Reached(options)

    monkeypatch.setattr(load_model, "load_engine", load_engine)
    monkeypatch.setattr(ask, "plan_model", plan_model)
    with pytest.raises(Reached) as reached:
        getattr(exl, function)(**arguments)
    return reached.value.args[0]


@pytest.mark.parametrize("function", ["load", "plan"])
def test_every_option_has_one_default_and_arrives(monkeypatch, function):
    parameters = inspect.signature(getattr(exl, function)).parameters
    names = {field.name for field in dataclasses.fields(EngineOptions)}
    assert names == CHANGED.keys()
    assert parameters.keys() == OWN[function] | names - MISSING[function]
    assert options_of(monkeypatch, function) == EngineOptions()
    for name, value in CHANGED.items():
        if name not in MISSING[function]:
            found = options_of(monkeypatch, function, **{name: value})
            assert found == dataclasses.replace(EngineOptions(), **{name: value})
