"""What a GPU has no kernels for is refused by the plan, before any byte is spent, and by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file

import exl
from exl.planning.shapes import ModelShape

SHAPE = ModelShape("ministral3", 128, 256, 2, 4, 2, 32, 320, 262_144)


@pytest.fixture
def ministral(tmp_path) -> Path:
    import numpy as np

    tensors = {name: np.zeros(shape, np.float16) for name, _, shape in SHAPE.tensors(16, 0)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {key: value for key, value in SHAPE.config(16, 0).items() if key != "rope_theta"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_queries_that_grow_bound_a_gpus_context(ministral):
    """Ministral 3 multiplies queries from position 16,384 on, which the class in transformers sets where a file says
    nothing."""
    assert exl.plan(ministral, vram="8GB", context=16_384).context == 16_384
    with pytest.raises(exl.ConfigError, match="context: found 16385, expected 16384 or less: beyond it queries"):
        exl.plan(ministral, vram="8GB", context=16_385)
    assert exl.plan(ministral, vram="8GB", context="auto").context == 16_384
    assert exl.plan(ministral, ram="8GB", context=20_000).context == 20_000
