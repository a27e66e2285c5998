"""Accesses to global memory in machine code, with the parameters from which their addresses are computed.

A data-flow analysis over registers. A register loaded from a parameter's words in constant bank 0 comes from that
parameter; so does the result of every instruction that reads such a register. Values loaded from memory come from none.
Where paths join, origins are united. An instruction under a predicate adds its origins to the old ones of its target; a
later instruction under the same predicate sees only the new ones. An address that comes from no parameter is unknown,
which a check must not let pass.
"""

from __future__ import annotations

import functools
import heapq
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .sass import TARGET, Instruction, body

WAIT = "ACQBULK"  # griddepcontrol.wait
REGISTER = re.compile(r"(?<![\w.])(U?R)(\d+)")
BARE_REGISTER = re.compile(r"^[-|~!]*(U?R)(\d+|Z)\b[^\[\]]*$")
BANK = re.compile(r"c\[0x0\]\[(.*?)\]")
LABELS = re.compile(r"\.L_x_\d+")
CALLED = re.compile(r"`\(([.$\w]+)\)")
READS, READ_ONLY = ("LDG", "LDGSTS", "LD", "ULDG"), "CONSTANT"
WRITES = ("STG", "ST", "RED", "ATOMG", "ATOM", "REDG")
# Instructions that name memory without accessing global memory, and instructions without memory.
OTHERS = (
    *("LDS", "LDSM", "LDC", "LDCU", "ULDC", "LDL", "LDGDEPBAR", "LDTRAM", "LEA", "STS", "STSM", "STL", "ATOMS"),
    *("REDUX", "CREDUX"),
)
MEMORY = re.compile(r"^(U?LD|U?ST|U?ATOM|U?RED|UBLK|UTMA|TLD|TEX|SULD|SUST|SURED|LEPC_LD|SYNCS|UCGABAR_LD)")
# The results of these are no addresses.
ARITHMETIC = re.compile(r"^(FADD|FMUL|FFMA|FMNMX|DADD|DMUL|DFMA|H\w*2|HMMA|MUFU|F2F|F2FP|F2I|I2F|I2FP)$")
# The first register of these is not written.
NO_TARGET = (
    *("STG", "STS", "STL", "ST", "RED", "LDGSTS"),
    *("BAR", "BSSY", "BSYNC", "BRA", "WARPSYNC", "DEPBAR", "CALL", "RET"),
)
BEHIND_PREDICATE = ("SHFL", "ATOMG", "ATOM", "ATOMS", "R2UR")  # their first operand may be a predicate

# Per register the parameters that it comes from ("R2"), and the same as seen by an instruction under a predicate, if
# the register was written under that predicate ("R2@!P0"). Per barrier register the labels where BSYNC continues. And
# whether some path leads here without a wait.
EARLY = "early"
State = dict[str, frozenset[str]]
Found = list[tuple[str, str, frozenset[str], bool]]


def read_sass(listing: str, entry: str, parameters: Mapping[int, str]) -> Found:
    """``(text, kind, origins, early)`` of each access and each end of ``entry``: see ``dependence.Access``.

    ``parameters``: pointers, by their offset in constant bank 0. Raises ``ValueError`` for an instruction whose
    effect on memory or on the paths through the kernel is not known here.
    """
    return _Flow(listing, entry, parameters).accesses()


class _Flow:
    def __init__(self, listing: str, entry: str, parameters: Mapping[int, str]) -> None:
        self.code, self.labels = body(listing, entry)
        self.parameters = {offset + word: name for offset, name in parameters.items() for word in (0, 4)}
        self.kept: frozenset[str] = frozenset()  # origins of all that is stored in shared or local memory

    def accesses(self) -> Found:
        states = self._states()
        found: Found = []
        for i, state in enumerate(states):
            one = self.code[i]
            kind = None if state is None else _kind(one)
            if kind is not None:
                text = f"{one.address:#06x} {one.predicate} {one.opcode} {one.operands}"
                found.append((" ".join(text.split()), kind, self._address(one, state), bool(state[EARLY])))
        return found

    def _address(self, one: Instruction, state: State) -> frozenset[str]:
        if one.opcode.startswith("EXIT"):
            return frozenset()
        brackets = re.findall(r"(desc)?\[([^\]]*)\]", one.operands)
        inner = next(text for i, (desc, text) in reversed(list(enumerate(brackets))) if not desc)
        registers = []
        for kind, number in REGISTER.findall(inner):
            registers += [f"{kind}{number}", f"{kind}{int(number) + 1}"]  # an address is 64 bits: two registers
        return _union(state, registers, one.predicate).union(*(self._of_bank(bank, 0) for bank in BANK.findall(inner)))

    # ways

    def _successors(self, i: int, state: State) -> list[int]:
        one = self.code[i]
        name = one.opcode.split(".")[0]
        following = [i + 1] if i + 1 < len(self.code) else []
        if name in ("EXIT", "RET", "KILL"):
            return following if one.predicate else []
        if name == "BSYNC":
            targets = state.get(one.operands.strip(), frozenset())
            if not targets:
                raise ValueError(f"a barrier that no instruction has set: {one}")
            return [self.labels[name] for name in targets] + (following if one.predicate else [])
        if name == "CALL":
            return following  # the callee: see _called
        if name in ("BRX", "BRXU"):
            targets = [self.labels[label] for label in LABELS.findall(one.operands)]
            if not targets:
                raise ValueError(f"a branch without known targets: {one}")
            return targets
        if name in ("BRA", "WARPSYNC") and (target := TARGET.search(one.operands)):
            plain = one.opcode == "BRA" and not one.predicate and one.operands.startswith("`")
            return [self.labels[target[1]]] + ([] if plain else following)
        if name.startswith(("BRA", "BMOV", "JM", "BPT", "RTT")):
            raise ValueError(f"a way that is not followed: {one}")
        return following

    def _called(self, one: Instruction) -> list[Instruction]:
        """The body of the function that a CALL runs, which must be a leaf that computes in registers only."""
        found = CALLED.search(one.operands)
        start = self.labels[found[1]] if found else None
        if start is None:
            raise ValueError(f"a call of an unknown function: {one}")
        inside = [self.code[i] for i, state in enumerate(self._walk(start)) if state is not None]
        if any(_kind(i) or i.opcode.startswith(("CALL", WAIT, "LDS", "LDL", "STS", "STL")) for i in inside):
            raise ValueError(f"{found[1]}: expected a function without calls and memory")
        return inside

    # data

    def _states(self) -> list[State | None]:
        """The state before each instruction; None if it is unreachable."""
        while True:
            kept = self.kept
            states = self._walk(0)
            if self.kept == kept:
                return states

    def _walk(self, start: int) -> list[State | None]:
        states: list[State | None] = [None] * len(self.code)
        states[start] = {EARLY: frozenset(["yes"])}
        todo = [start]  # a heap, in the order of the code: paths join before they continue
        while todo:
            i = heapq.heappop(todo)
            after = self._step(self.code[i], states[i])
            for j in self._successors(i, after):
                joined = after if states[j] is None else _joined(states[j], after)
                if joined is not states[j]:
                    states[j] = joined
                    if j not in todo:
                        heapq.heappush(todo, j)
        return states

    def _step(self, one: Instruction, state: State) -> State:
        name = one.opcode.split(".")[0]
        if name == "CALL":
            return self._after_call(one, state)
        if one.opcode == WAIT and not one.predicate:
            return {**state, EARLY: frozenset()}
        if name == "BSSY":
            return {**state, one.operands.split(",")[0].strip(): frozenset([TARGET.search(one.operands)[1]])}
        data = _data(one)
        sources = _union(state, data.sources, one.predicate)
        if data.stores:
            self.kept |= sources
        if data.loads:
            sources = self.kept if data.loads == "kept" else frozenset()
        after = state
        for word, register in enumerate(data.targets):
            # A load of several words from a bank gives each target register its own word.
            banks = (self._of_bank(bank, word if data.words else 0) for bank in data.banks)
            after = _written(after, register, sources.union(*banks), one.predicate)
        return _without_guards(after, data.predicates)

    def _after_call(self, one: Instruction, state: State) -> State:
        inside = [_data(i) for i in self._called(one)]
        origins = _union(state, {r for data in inside for r in data.sources}, "")
        after = {key: names for key, names in state.items() if "@" not in key}
        for register in {r for data in inside for r in data.targets}:
            after[register] = after.get(register, frozenset()) | origins
        return after

    def _of_bank(self, inner: str, word: int) -> frozenset[str]:
        if not re.fullmatch(r"U?RZ|0x[0-9a-f]+", inner):  # a parameter chosen by an index
            return frozenset(self.parameters.values())
        name = self.parameters.get((0 if inner.endswith("RZ") else int(inner, 16)) + 4 * word)
        return frozenset() if name is None else frozenset([name])


@dataclass(frozen=True)
class _Data:
    """The effect of an instruction on registers."""

    targets: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    banks: tuple[str, ...] = ()  # places in constant bank 0 that it reads
    words: bool = False  # it loads from there, one word per target
    loads: str = (
        ""  # "kept": loaded from shared or local memory; "global": loaded from global memory, or floating-point
    )
    stores: bool = False  # to shared or local memory
    predicates: tuple[str, ...] = ()  # those that it may change: all that it names


@functools.lru_cache(maxsize=100_000)
def _data(one: Instruction) -> _Data:
    name = one.opcode.split(".")[0]
    operands = [part.strip() for part in one.operands.split(",")]
    predicates = tuple(re.findall(r"\bU?P\d\b", one.operands)) if name != "R2P" else tuple(f"P{i}" for i in range(7))
    if name in ("STS", "STL", "STSM"):
        return _Data(sources=_registers(",".join(operands[1:])), stores=True, predicates=predicates)
    target, width = _target(one, operands)
    if target is None:
        return _Data(predicates=predicates)
    rest = ",".join(operands[1 + next(i for i, text in enumerate(operands) if BARE_REGISTER.match(text)) :])
    rest = ",".join(_addends(one.opcode.split("."), [text.strip() for text in rest.split(",")]))
    kind, number = REGISTER.match(target).groups()
    targets = tuple(f"{kind}{int(number) + word}" for word in range(width))
    if _kind(one) or ARITHMETIC.match(name):
        return _Data(targets, loads="global", predicates=predicates)
    if name in ("LDS", "LDL", "LDSM"):
        return _Data(targets, loads="kept", predicates=predicates)
    words = name in ("LDC", "LDCU", "ULDC")
    return _Data(targets, _registers(rest), tuple(BANK.findall(rest)), words, predicates=predicates)


def _addends(parts: list[str], sources: list[str]) -> list[str]:
    """Operands through which an address may pass: not those that are multiplied, shifted or scaled."""
    name = parts[0].removeprefix("U")
    sources = [text for text in sources if not re.match(r"^!?U?P(T|\d)", text)]
    if name == "SHF" or (name == "IMAD" and {"SHL", "HI"} & set(parts)):
        return []
    if name == "IMAD" and len(sources) == 3 and "0x1" not in sources[:2]:
        return sources[2:]
    if name == "LEA" and len(sources) >= 3 and sources[-1] != "0x0":
        return sources[1:2]
    return sources


def _union(state: State, registers: Iterable[str], guard: str) -> frozenset[str]:
    """Origins of registers as seen by an instruction under a predicate (``guard``: "@P0", or "")."""
    found = (state.get(r + guard, state.get(r)) if guard else state.get(r) for r in registers)
    return frozenset().union(*(names for names in found if names is not None))


def _written(state: State, register: str, names: frozenset[str], guard: str) -> State:
    before = state.get(register, frozenset())
    if not names and not before:
        return state  # most registers, most of the time
    opposite = guard.replace("@", "@!").replace("!!", "") if guard else ""
    after = {key: value for key, value in state.items() if key.split("@")[0] != register}
    if not guard:
        return {**after, register: names} if names else after
    after[register + guard] = names
    if register + opposite in state:  # written under both: the old value is gone
        before = after[register + opposite] = state[register + opposite]
    return {**after, register: before | names}


def _without_guards(state: State, predicates: tuple[str, ...]) -> State:
    """The state after an instruction that may have changed these predicates."""
    gone = [key for key in state if "@" in key and key.split("@")[1].lstrip("!") in predicates]
    return {key: names for key, names in state.items() if key not in gone} if gone else state


def _joined(a: State, b: State) -> State:
    """The union; ``a`` itself if ``b`` adds nothing. Entries under a predicate stay only if both states have them."""
    more = {
        r: names | a.get(r, frozenset())
        for r, names in b.items()
        if names - a.get(r, frozenset()) and (r in a or "@" not in r)
    }
    gone = [key for key in a if "@" in key and key not in b]
    if not more and not gone:
        return a
    return {key: names for key, names in {**a, **more}.items() if key not in gone}


def _registers(operands: str) -> tuple[str, ...]:
    return tuple(kind + number for kind, number in REGISTER.findall(operands))


def _target(one: Instruction, operands: list[str]) -> tuple[str | None, int]:
    """The first register that an instruction writes, and how many; None if it writes no data register."""
    name = one.opcode.split(".")[0]
    if not operands or name in NO_TARGET:
        return None, 0
    if name in BEHIND_PREDICATE and re.match(r"^U?P(T|\d)", operands[0]):
        operands = operands[1:]
    found = BARE_REGISTER.match(operands[0]) if operands else None
    if found is None or found[2] == "Z":
        return None, 0
    return f"{found[1]}{found[2]}", _width(one.opcode.split("."))


def _width(parts: list[str]) -> int:
    """Number of registers that an instruction with this opcode writes."""
    name = parts[0]
    if "128" in parts or (name.endswith("MMA") and name not in ("DMMA",)) or (name == "LDSM" and "4" in parts):
        return 4
    wide = {"64", "WIDE", "F64", "S64", "U64"} & set(parts) and name not in ("SHF", "USHF")
    if (
        wide
        or name in ("DADD", "DMUL", "DFMA")
        or (name == "CS2R" and "32" not in parts)
        or (name == "LDSM" and "2" in parts)
    ):
        return 2
    return 1


def _kind(one: Instruction) -> str | None:
    name = one.opcode.split(".")[0]
    if name == "EXIT":
        return "exit"
    if name in OTHERS:
        return None
    if name in READS:
        return "read-only read" if READ_ONLY in one.opcode else "read"
    if name in WRITES:
        return "write"
    if MEMORY.match(name):
        raise ValueError(f"an access to memory that is not known: {one}")
    return None
