"""One run of a quantizer, in a process and a Python of its own; see quantizing.py. Imports nothing of exl's benchmarks.

    PYTHON - NAME SOURCE DESTINATION SETTINGS < quantizing_child.py

Prints one line of JSON: seconds from the dense folder to the quantized one, imports excluded; seconds of all threads;
the quantizer's version.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def make_exl(source: str, destination: str, settings: dict[str, Any]) -> tuple[Callable[[], None], str]:
    import exl
    from exl.quantize.options import QuantizeOptions
    from exl.quantize.run import quantize

    options = QuantizeOptions(**settings["exl"], **settings["shared"])
    return lambda: quantize(source, destination, options), exl.__version__


def make_gptqmodel(source: str, destination: str, settings: dict[str, Any]) -> tuple[Callable[[], None], str]:
    """As it comes: its own choice of type, order and grid."""
    from gptqmodel import GPTQModel, QuantizeConfig

    sequences = json.loads(Path(settings["token_ids"]).read_text())
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sequences]

    def run() -> None:
        model = GPTQModel.load(source, QuantizeConfig(**settings["shared"]), device="cpu")
        model.quantize(rows, batch_size=settings["batch_size"], calibration_data_min_length=1)
        model.save(destination)

    return run, version("gptqmodel")


QUANTIZERS = {"exl": make_exl, "gptqmodel": make_gptqmodel}


def main() -> None:
    name, source, destination, settings = sys.argv[1:]
    run, found = QUANTIZERS[name](source, destination, json.loads(settings))
    began, used = time.perf_counter(), time.process_time()
    run()
    result = {
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - used,
        "version": found,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
