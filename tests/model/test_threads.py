"""Through torch results do not depend on the number of threads that compute, so that it may change from layer to layer.

exl's own kernels: ``test_compiled_bits.py``.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from exl.checkpoint.hub import BUNDLED_MODEL
from exl.engine.build import Engine, load_engine
from exl.ops.cpu_target import torch_target
from exl.planning.options import EngineOptions
from exl.quantize import run as run_module
from exl.quantize.options import QuantizeOptions
from exl.sampling_params import SamplingParams
from exl.threads import Threads, using

DATA = Path(__file__).parents[1] / "data"
LIMIT = 3
COUNTS = (2, 3, 5, 8)
IDS = torch.randint(3, 500, (150,), generator=torch.Generator().manual_seed(5)).tolist()


class FixedThreads(Threads):
    """``count`` threads for whatever may vary, as if that were fastest; ``LIMIT`` for what always takes all."""

    def __init__(self, count: int) -> None:
        super().__init__(LIMIT)
        self.count = count

    @contextmanager
    def measured(self, kind: str, units: float):
        with using(self.count):
            yield

    @contextmanager
    def like(self, kind: str):
        with using(self.count):
            yield


def outputs(engine: Engine, count: int) -> dict[str, object]:
    generator = engine.generator
    generator.runner.decoder.ops.threads = FixedThreads(count)
    found: dict[str, object] = {}
    for num_rows in (2, 5, 11, 19, 27, 61, 150):
        chunks = [chunk.clone() for chunk in generator.logits(IDS[:num_rows])]
        found[f"{num_rows} rows"] = torch.cat(chunks).numpy().tobytes()
    sequence = generator.begin(60)
    steps = [generator.extend(sequence, IDS[:37]).clone()]
    steps += [generator.extend(sequence, [token_id]).clone() for token_id in IDS[37:57]]
    generator.end(sequence)
    found["decode"] = torch.cat(steps).numpy().tobytes()
    params = SamplingParams(max_tokens=16, temperature=1.0, top_k=40, top_p=0.9, min_p=0.01, seed=7)
    found["sampled"] = [token.token_id for token in generator.stream(IDS[:9], params)]
    return found


@pytest.mark.parametrize(
    ("folder", "options"),
    [
        (BUNDLED_MODEL, {}),
        (BUNDLED_MODEL, {"kv_cache": "q4", "head": 4}),
        (DATA / "stories260K", {"kv_cache": "f32"}),
        (DATA / "stories260K", {"kv_cache": "q8", "head": 8}),
    ],
    ids=["int4", "int4-q4", "dense-f32", "dense-q8"],
)
def test_bits_do_not_depend_on_the_number_of_threads(folder, options):
    engine = load_engine(folder, EngineOptions(context=256, device="cpu", **options), cpu=torch_target())
    try:
        expected = outputs(engine, 1)
        for count in COUNTS:
            found = outputs(engine, count)
            assert [name for name in expected if found[name] != expected[name]] == [], f"{count} threads"
    finally:
        engine.close()


def test_a_quantized_file_does_not_depend_on_the_number_of_threads(tmp_path, monkeypatch):
    """Cholesky factors and products run with all threads; what is many small operations with those that are fastest."""
    calibration = tmp_path / "text.txt"
    calibration.write_text("Once upon a time there was a dog that liked to run in the park with a red ball.\n" * 6)
    written = []
    for count in (1, 2, 3):
        monkeypatch.setattr(run_module, "Threads", lambda limit, count=count: FixedThreads(count))
        for static_groups in (True, False):
            options = QuantizeOptions(
                group_size=32, calibration=calibration, num_samples=3, seq_len=64, static_groups=static_groups
            )
            out = tmp_path / f"{count} {static_groups}"
            run_module.quantize(DATA / "stories260K", out, options)
            written.append((static_groups, (out / "model.safetensors").read_bytes()))
    assert len(set(written)) == 2
