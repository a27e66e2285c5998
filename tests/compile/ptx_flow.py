"""Accesses to global memory in PTX, with the parameters from which their addresses are computed."""

from __future__ import annotations

import re
from dataclasses import dataclass

ENTRY = re.compile(r"\.entry (\w+)\((.*?)\)[^{]*\{(.*?)^\}", re.DOTALL | re.MULTILINE)
LABEL = re.compile(r"^(\$\w+):")
INSTRUCTION = re.compile(r"^(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
REGISTER = re.compile(r"%[a-zA-Z]\w*")
PARAMETER = re.compile(r"_param_(\d+)")
WAIT = "griddepcontrol.wait"
GLOBAL_READ = re.compile(
    r"^(ld\.(volatile\.|relaxed\.\w+\.|acquire\.\w+\.)?global|cp\.async\.[\w.:]*global|ldu\.global)"
)
GENERIC = re.compile(r"^(ld|st)\.((volatile|v2|v4)\.)*[busf]\d+$")  # an access whose address space is unknown
GLOBAL_WRITE = re.compile(r"^(st\.([\w.]+\.)?global|atom\.|red\.(?!async))")
OTHER_SPACES = re.compile(r"^(ld|st)\.([\w.]+\.)?(param|shared|local|const)")
NO_MEMORY = re.compile(r"^(cp\.async\.(commit|wait)|redux\.|atom\.shared|red\.shared|ldmatrix|prefetch)")


@dataclass(frozen=True)
class Line:
    opcode: str
    operands: str
    predicate: str

    @property
    def text(self) -> str:
        return f"{self.opcode} {self.operands}"


def read_ptx(ptx: str, entry: str, parameters: dict[int, str]) -> list[tuple[str, str, frozenset[str], bool]]:
    """``(text, kind, origins, early)`` of each access and each end of ``entry``: see ``dependence.Access``.

    ``parameters``: the pointers, by parameter number. A register's origins are those of every value moved into it.
    """
    lines, labels, tables = _lines(next(found[3] for found in ENTRY.finditer(ptx) if found[1] == entry))
    successors = [_successors(i, line, labels, tables, len(lines)) for i, line in enumerate(lines)]
    early = _without_wait(lines, successors)
    origins = _origins(lines, parameters)
    found = []
    for i, line in enumerate(lines):
        kind = _kind(line.opcode)
        if kind is not None:
            addresses = re.findall(r"\[([^\]]*)\]", line.operands)
            address = addresses[-1] if addresses else ""
            names = frozenset().union(*(origins.get(r, frozenset()) for r in REGISTER.findall(address)))
            found.append((line.text, kind, names, i in early))
    return found


def _lines(body: str) -> tuple[list[Line], dict[str, int], dict[str, list[str]]]:
    """Instructions, the index of each label's instruction, and the targets in branch tables."""
    lines: list[Line] = []
    labels: dict[str, int] = {}
    tables: dict[str, list[str]] = {}
    name = ""
    text = "\n".join(line.split("//")[0].strip() for line in body.splitlines())
    for statement in text.split(";"):
        statement = " ".join(statement.split())
        statement = statement.lstrip("{} ")  # braces of scopes
        while label := LABEL.match(statement):
            name = label[1]
            labels[name] = len(lines)
            statement = statement[label.end() :].lstrip("{} ")
        if statement.startswith(".branchtargets"):
            tables[name] = re.findall(r"\$\w+", statement)
        elif found := INSTRUCTION.match(statement):
            lines.append(Line(found[2], found[3].strip(), found[1] or ""))
    return lines, labels, tables


def _successors(i: int, line: Line, labels: dict[str, int], tables: dict[str, list[str]], count: int) -> list[int]:
    opcode = line.opcode.split(".")[0]
    following = [i + 1] if i + 1 < count else []
    if opcode in ("ret", "exit"):
        return following if line.predicate else []
    if opcode == "brx":
        return [labels[name] for name in tables[re.search(r"\$\w+", line.operands)[0]]]
    if opcode == "bra":
        target = [labels[re.search(r"\$\w+", line.operands)[0]]]
        return target + following if line.predicate else target
    if opcode in ("call", "jmp"):
        raise ValueError(f"a way that is not followed: {line.text}")
    return following


def _without_wait(lines: list[Line], successors: list[list[int]]) -> set[int]:
    """Instructions that some path reaches without a wait."""
    seen: set[int] = set()
    todo = [0]
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        if not lines[at].opcode.startswith(WAIT) or lines[at].predicate:
            todo.extend(successors[at])
    return seen


def _kind(opcode: str) -> str | None:
    if opcode in ("ret", "exit"):
        return "exit"
    if OTHER_SPACES.match(opcode) or NO_MEMORY.match(opcode):
        return None
    if GLOBAL_READ.match(opcode):
        return "read-only read" if ".nc" in opcode or opcode.startswith("ldu") else "read"
    if GLOBAL_WRITE.match(opcode):
        return "write"
    if GENERIC.match(opcode):
        return "read" if opcode.startswith("ld") else "write"
    if re.match(r"^(ld|st|cp|tex|suld|prefetchu)[.u]", opcode):
        raise ValueError(f"an access to memory that is not known: {opcode}")
    return None


def _origins(lines: list[Line], parameters: dict[int, str]) -> dict[str, frozenset[str]]:
    moves: list[tuple[list[str], list[str]]] = []
    origins: dict[str, frozenset[str]] = {}
    for line in lines:
        parts = re.split(r",\s*(?![^{]*\})", line.operands)
        targets = REGISTER.findall(parts[0]) if "[" not in parts[0] else []
        if line.opcode.startswith("ld.param"):
            number = int(PARAMETER.search(parts[1])[1])
            if number in parameters:
                origins[targets[0]] = origins.get(targets[0], frozenset()) | {parameters[number]}
        elif targets and not (_kind(line.opcode) or OTHER_SPACES.match(line.opcode)):
            moves.append((targets, [r for part in parts[1:] for r in REGISTER.findall(part)]))
    changed = True
    while changed:
        changed = False
        for targets, sources in moves:
            names = frozenset().union(*(origins.get(r, frozenset()) for r in sources))
            for register in targets:
                if names - origins.get(register, frozenset()):
                    origins[register] = origins.get(register, frozenset()) | names
                    changed = True
    return origins
