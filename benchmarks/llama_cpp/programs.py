"""The two programs that are compared: exl in a process of its own, and llama-bench. Both measure a ``Case`` after a
warm-up of the same kind that does not count, and return tokens per second."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.llama_cpp.cases import Case

ROOT = Path(__file__).parents[2]


class ProgramError(RuntimeError):
    """A program ended, or said something that is no result."""


class ExlProcess(AbstractContextManager["ExlProcess"]):
    """A process in which exl has loaded a model. Between measurements it waits for input, and computes nothing."""

    def __init__(self, model: Path, options: Mapping[str, object]) -> None:
        """``options``: keywords of ``exl.load``. Raises ``ProgramError`` if the model cannot be loaded."""
        command = [sys.executable, "-m", "benchmarks.llama_cpp.exl_process", str(model), json.dumps(dict(options))]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        try:
            self.description = str(self._answer())
        except BaseException:
            self._process.kill()
            self.__exit__()
            raise

    def measure(self, case: Case, repeats: int) -> list[float]:
        """Raises ``ProgramError`` if the process has ended; it has said why on standard error."""
        try:
            self._process.stdin.write(json.dumps({"case": asdict(case), "repeats": repeats}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: there is no answer
        return [float(run) for run in self._answer()]

    def _answer(self) -> object:
        line = self._process.stdout.readline()
        if not line:
            raise ProgramError(f"exl's process ended with status {self._process.wait()}")
        return json.loads(line)

    def __exit__(self, *exc_info: object) -> None:
        self._process.stdin.close()  # its loop ends with its input
        self._process.wait()
        self._process.stdout.close()


@dataclass(frozen=True)
class LlamaRun:
    """``speeds``: tokens per second of each repetition. ``facts``: what llama-bench says of itself and the file."""

    speeds: tuple[float, ...]
    facts: dict[str, str]


@dataclass(frozen=True)
class LlamaBench:
    """llama-bench on one GGUF file, all of it on the CPU. ``options``: more of its command line."""

    program: Path
    model: Path
    threads: int
    options: tuple[str, ...] = ()

    def measure(self, case: Case, repeats: int) -> LlamaRun:
        """Raises ``ProgramError`` if llama-bench fails, or its output is not this case's."""
        done = subprocess.run(self.command(case, repeats), capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            raise ProgramError(f"{self.program.name} ended with status {done.returncode}: {_last_line(done.stderr)}")
        return parse(done.stdout, case)

    def command(self, case: Case, repeats: int) -> list[str]:
        prompt, generated = (case.tokens, 0) if case.kind == "prefill" else (0, case.tokens)
        values = {"-m": self.model, "-t": self.threads, "-p": prompt, "-n": generated, "-d": case.depth, "-r": repeats}
        named = [str(part) for pair in values.items() for part in pair]
        return [str(self.program), *named, "-ngl", "0", "-o", "json", *self.options]


def parse(output: str, case: Case) -> LlamaRun:
    """llama-bench's ``-o json``. Raises ``ProgramError`` unless it holds one test, and that test is ``case``."""
    try:
        (test,) = json.loads(output)
        found = Case("prefill", test["n_prompt"], test["n_depth"])
        if test["n_gen"]:
            found = Case("decode", test["n_gen"], test["n_depth"])
        facts = {
            "build": test["build_commit"],
            "processor": test["cpu_info"],
            "backends": test["backends"],
            "weights": f"{test['model_size'] / 1e6:.0f} MB",
            "cache": f"{test['type_k']}/{test['type_v']}",
        }
        speeds = tuple(float(speed) for speed in test["samples_ts"])
    except (ValueError, KeyError, TypeError) as error:
        raise ProgramError(f"llama-bench: found {output[:80]!r}, expected one test: {error!r}") from None
    if found != case or not speeds:
        raise ProgramError(f"llama-bench: found {len(speeds)} runs of {found}, expected {case}")
    return LlamaRun(speeds, facts)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
