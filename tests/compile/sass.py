"""Reads disassembled machine code: a kernel's loops and their instructions. Needs nvdisasm (a wheel)."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SECTION = re.compile(r"^\s*\.section\s+\.text\.(\w+)")
LABEL = re.compile(r"^([.$\w]+):")
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?((?:@!?U?P\w+\s+)?)([A-Z][A-Z0-9_.]*)(.*?);")
TARGET = re.compile(r"`\((\.\w+)\)")


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # "HMMA.16816.F32"
    operands: str
    predicate: str  # "@!P0", or ""


@dataclass(frozen=True)
class Loop:
    """Instructions from a label to the branch back to it, in the order of their addresses."""

    instructions: tuple[Instruction, ...]

    def __len__(self) -> int:
        """Issue slots of one pass, predicated instructions included."""
        return len(self.instructions)

    def count(self, *prefixes: str) -> int:
        """Instructions whose opcode starts with one of ``prefixes``: ``count("HMMA")``."""
        return sum(i.opcode.startswith(prefixes) for i in self.instructions)

    def histogram(self) -> Counter[str]:
        return Counter(i.opcode.split(".")[0] for i in self.instructions)


def nvdisasm_path() -> Path | None:
    """nvdisasm from an installed wheel, otherwise from PATH."""
    try:
        spec = importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        spec = None
    for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        if (Path(folder) / "bin" / "nvdisasm").exists():
            return Path(folder) / "bin" / "nvdisasm"
    found = shutil.which("nvdisasm")
    return Path(found) if found else None


def disassemble(cubin: bytes) -> str:
    """nvdisasm's text of a cubin for sm_75 or higher. Raises ``RuntimeError`` with nvdisasm's message."""
    tool = nvdisasm_path()
    if tool is None:
        raise RuntimeError("nvdisasm is not installed (wheel nvidia-cuda-nvdisasm)")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr or done.stdout)
    return done.stdout


def loops(listing: str, entry: str) -> list[Loop]:
    """Innermost loops of ``entry`` (those that contain no loop), by address."""
    code, labels = body(listing, entry)
    spans = []
    for i, instruction in enumerate(code):
        target = TARGET.search(instruction.operands)
        if instruction.opcode.startswith("BRA") and target and labels.get(target[1], i + 1) <= i:
            spans.append((labels[target[1]], i))
    spans = sorted({(start, max(stop for a, stop in spans if a == start)) for start, _ in spans})
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    # The branch to itself after a kernel's code is not a loop.
    return [Loop(tuple(code[start : stop + 1])) for start, stop in inner if stop > start]


def hottest_loop(listing: str, entry: str, opcode: str = "HMMA") -> Loop:
    """The innermost loop with the most instructions ``opcode``. Raises ``ValueError`` if none has any."""
    found = max(loops(listing, entry), key=lambda loop: loop.count(opcode), default=None)
    if found is None or not found.count(opcode):
        raise ValueError(f"no loop of {entry} holds {opcode}")
    return found


def between(listing: str, entry: str, start: int, stop: int) -> Loop:
    """Instructions of ``entry`` with addresses in ``[start, stop)``."""
    return Loop(tuple(i for i in body(listing, entry)[0] if start <= i.address < stop))


def body(listing: str, entry: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of one kernel and of the functions after it, and the index of each label's instruction."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    inside = False
    for line in listing.splitlines():
        if section := SECTION.match(line):
            inside = section[1] == entry
        elif line.lstrip().startswith(".section\t"):
            inside = False
        elif not inside:
            continue
        elif label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            code.append(Instruction(int(found[1], 16), found[3], found[4].strip(), found[2].strip()))
    if not code:
        raise ValueError(f"no kernel {entry} in the listing")
    return code, labels
