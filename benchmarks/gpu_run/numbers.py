"""The *numbers* stage: lines of ``benchmarks/end_to_end.py`` and ``kernels.py``, a 7B model's first, each written to
disk as soon as it is known. A worker of ``driver.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import end_to_end, kernels
from benchmarks.attention import Shape, attention_section
from benchmarks.gpu_run.worker import Place, Worker, read_records
from benchmarks.machine import Machine, gpu_machine, host_machine
from benchmarks.report import Section
from exl.planning.shapes import ModelShape


def gpu_sections(machine: Machine) -> tuple[Section, ...]:
    """Sections by priority. A section that has used its seconds waits until the others have used theirs."""
    decode, model = end_to_end.decode_section, ("llama-2-7b",)
    return (
        decode(machine, model, ("f16",), (0, 4096), (1, 4, 16), seconds=45),
        end_to_end.prompt_section(machine, model, seconds=15),
        end_to_end.stream_section(machine, "llama-2-13b", seconds=25),
        kernels.linear_section(machine, ("7B",), 4, (1, 16, 4, 64, 8), seconds=25),
        kernels.roofs_section(machine, seconds=10),
        end_to_end.host_section(machine, model, seconds=20),
        decode(machine, model, ("q8", "k8v4", "q4"), (4096, 0), (1, 16, 4), 25, "Decoding, quantized caches"),
        attention_section(machine, depths=(4096, 32768), batches=(1, 16), seconds=20),
        end_to_end.peer_section(machine, model, seconds=15),
        decode(
            machine,
            ("tinyllama-1.1b", "llama-3-8b", "llama-2-13b"),
            ("f16",),
            (0, 4096),
            (1, 16),
            60,
            "Decoding, other shapes",
        ),
    )


def dry_sections(machine: Machine) -> tuple[Section, ...]:
    """The same on the host shim, with small shapes."""
    end_to_end.SHAPES["tiny"] = ModelShape("llama", 128, 256, 2, 4, 2, 32, 128, 4096)
    end_to_end.PROMPT = 70
    kernels.MODELS["tiny"] = (("o", 128, 128),)
    sections = (
        end_to_end.decode_section(machine, ("tiny",), ("f16",), (0,), (1, 2), 30),
        end_to_end.prompt_section(machine, ("tiny",)),
        end_to_end.stream_section(machine, "tiny"),
        kernels.linear_section(machine, ("tiny",), 4, (1,), 20),
        kernels.roofs_section(machine),
        attention_section(machine, (Shape("tiny", 4, 2, 64),), (64,), (1,)),
    )
    return tuple(
        replace(section, title=f"{section.title} (host shim: these times say nothing)") for section in sections
    )


def spent_seconds(place: Place) -> dict[str, float]:
    """Seconds spent per section, including those of earlier workers and of lines that hung or crashed."""
    spent: dict[str, float] = {}
    for record in read_records(place.results)[0]:
        if record.get("stage") == place.stage and record.get("event") == "end":
            title = record["item"].partition(": ")[0]
            spent[title] = spent.get(title, 0.0) + (record.get("seconds") or 0.0)
    return spent


def run_all(worker: Worker, sections: Sequence[Section]) -> None:
    for last_round in (False, True):
        for section in sections:
            for measurement in section.measurements:
                if not last_round and spent_seconds(worker.place).get(section.title, 0.0) > section.seconds:
                    break
                item = f"{section.title}: {measurement.name}"
                if worker.claim(item):
                    worker.run(item, measurement.run, section=section.title, head=list(section.head))
                    if torch.cuda.is_initialized():
                        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--place", type=Place.parse, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--kernel-cache", type=Path)
    arguments = parser.parse_args()
    worker = Worker(arguments.place)
    torch.manual_seed(0)
    if arguments.dry_run:
        run_all(worker, dry_sections(host_machine()))
    else:
        run_all(worker, gpu_sections(gpu_machine(arguments.kernel_cache)))


if __name__ == "__main__":
    main()
