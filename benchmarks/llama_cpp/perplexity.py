"""llama-perplexity on predictions that exl has recorded: the same tokens, the same reference, another program.

The program compares a GGUF file with a file of token ids and log-probabilities, which it writes itself from another
model (``--kl-divergence-base``). Here that file is written from a ``Recording``. Its format (tools/perplexity of
llama.cpp): ``_logits_``; n_ctx, n_vocab, n_chunk, i32; the chunks' token ids, i32; then, for each of the n_ctx - 1 -
n_ctx // 2 predicted tokens of each chunk, the scale and the lowest log-probability, f32, and a code for each token of
the vocabulary, u16, in an even number. A log-probability is lowest + scale * code; lowest is at most 16 nats below the
highest, so that each is off by up to 16 / 65535 / 2 = 1.2e-4 nats; the program leaves out what is below -16. So a
token of the text that is less likely than that seems likelier than it is to the reference, whose loss and the
difference of losses that the program prints are wrong by as much (0.03 on 24 chats); they are not read.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.llama_cpp.programs import ProgramError
from exl.evaluate import Recording

_RANGE = 16.0  # nats
# A thread of the program's writes what it prints, and the program does not always wait for it at its end: with a small
# model one run in four loses its last lines, which are the figures.
_TRIES = 8
_NUMBER = r"(-?[\d.]+(?:e-?\d+)?|-?nan|-?inf)"
# The program's words -> the name of the figure, and of its error.
_LINES = {
    r"Mean    KLD": ("kl_mean", "kl_error"),
    r"Maximum KLD": ("kl_max", None),
    r"99\.9%   KLD": ("kl_99_9th", None),
    r"99\.0%   KLD": ("kl_99th", None),
    r"Median  KLD": ("kl_median", None),
    r"RMS Δp": ("delta_p_rms", None),
    r"Mean    Δp": ("delta_p_mean", "delta_p_error"),
    r"Same top p": ("top1_agreement", "top1_error"),
}


def write_base(path: Path, recording: Recording, window: int) -> None:
    """``recording``: of chunks of ``window`` tokens, as ``read_chunks`` cuts them. Raises ``ValueError`` if not."""
    first = window // 2 + 1
    if any((len(passage.ids), passage.first) != (window, first) for passage in recording.passages):
        raise ValueError(
            f"found other passages, expected chunks of {window} tokens of which the second half is predicted"
        )
    head = np.array([window, recording.vocab_size, len(recording.passages)], "<i4")
    ids = np.array([passage.ids for passage in recording.passages], "<i4")
    with open(path, "wb") as file:
        file.write(b"_logits_" + head.tobytes() + ids.tobytes())
        for i in range(len(recording.passages)):
            for rows in recording.log_probs(i):
                file.write(base_rows(rows).tobytes())


def base_rows(log_probs: torch.Tensor) -> np.ndarray:
    """The records of log-probabilities [n, V]."""
    num_codes = -(-log_probs.shape[1] // 2) * 2
    found = np.zeros(len(log_probs), [("scale", "<f4"), ("lowest", "<f4"), ("codes", "<u2", (num_codes,))])
    highest = log_probs.amax(1, keepdim=True)
    lowest = torch.maximum(log_probs.amin(1, keepdim=True), highest - _RANGE)
    scale = (highest - lowest) / 65535
    codes = ((log_probs - lowest) / scale.clamp_(min=torch.finfo(torch.float32).tiny)).round_().clamp_(min=0)
    found["scale"], found["lowest"] = scale[:, 0].numpy(), lowest[:, 0].numpy()
    found["codes"][:, : log_probs.shape[1]] = codes.numpy()
    return found


def measure(program: Path, model: Path, base: Path, window: int, threads: int, options: Sequence[str] = ()) -> dict:
    """What llama-perplexity finds, by the names of ``exl.evaluate.Comparison``, shares and probabilities from 0 to 1.
    ``options``: more of its command line, such as ``-ctk q8_0``. Raises ``ProgramError``."""
    named = {"-m": model, "--kl-divergence-base": base, "-c": window, "-b": window, "-t": threads, "-ngl": 0}
    command = [str(program), "--kl-divergence", *(str(part) for pair in named.items() for part in pair), *options]
    for i in range(_TRIES):
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ProgramError(f"{program.name} ended with status {done.returncode}: {last}")
        try:
            return parse(done.stdout + done.stderr)
        except ProgramError:
            if i == _TRIES - 1:
                raise
    raise AssertionError("unreachable")


def parse(output: str) -> dict[str, float]:
    """Raises ``ProgramError`` if a figure is missing; the program prints none for fewer than 100 tokens."""
    found: dict[str, float] = {}
    loss = re.search(rf"Mean PPL\(Q\)\s*:\s*{_NUMBER}\s*±\s*{_NUMBER}", output)
    if loss is not None:
        found["loss"], found["loss_error"] = float(np.log(float(loss[1]))), float(loss[2]) / float(loss[1])
    for words, (name, error) in _LINES.items():
        line = re.search(rf"{words}\s*:\s*{_NUMBER}\s*%?(?:\s*±\s*{_NUMBER})?\s*(%)?", output)
        if loss is None or line is None:
            raise ProgramError(f"llama-perplexity: found {output[-200:]!r}, expected a line like {words}")
        unit = 0.01 if name.startswith(("delta_p", "top1")) else 1.0
        found[name] = unit * float(line[1])
        if error is not None:
            found[error] = unit * float(line[2])
    return found
