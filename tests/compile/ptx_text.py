"""Evaluates straight-line PTX with NumPy, all threads at once, without a GPU.

Covers what a kernel of scalar instructions compiles to. Semantics are the PTX ISA's, written down independently of the
host shim: arithmetic on halves goes through ``numpy.float16``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

ENTRY = re.compile(r"\.entry (\w+)\((.*?)\)[^{]*\{(.*?)^\}", re.DOTALL | re.MULTILINE)
INSTRUCTION = re.compile(r"^(?:(@!?%p\d+)\s+)?([a-z][\w.:]*)\s*(.*);$")
MEMORY = re.compile(r"\[([%\w]+)(?:\+(-?\d+))?\]")
BUFFER_BITS = 40  # an address is a buffer's number and, in its low bits, a byte offset

U16, U32, U64, F32 = np.uint16, np.uint32, np.uint64, np.float32


def _halves(v: np.ndarray) -> np.ndarray:
    return v.astype(U32).view(np.float16).reshape(-1, 2)


def _pairs(v: np.ndarray) -> np.ndarray:
    """f16 [n, 2] -> u32 [n]; NaN becomes the canonical NaN."""
    bits = np.where(np.isnan(v), U16(0x7FFF), v.astype(np.float16).view(U16))
    return bits[:, 0].astype(U32) | (bits[:, 1].astype(U32) << U32(16))


def _f16(f: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(f), U16(0x7FFF), f.astype(np.float16).view(U16))


def _bf16(f: np.ndarray) -> np.ndarray:
    """f32 -> bf16, rounded to nearest even by choosing between the two neighbours."""
    low = f.view(U32) & U32(0xFFFF0000)
    rest = f.view(U32) & U32(0xFFFF)
    up = (rest > 0x8000) | ((rest == 0x8000) & ((low >> U32(16)) & U32(1) == 1))
    return np.where(np.isnan(f), U16(0x7FFF), ((low >> U32(16)) + up).astype(U16))


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    d = np.zeros_like(a)
    for i in range(32):
        index = ((a >> U32(i)) & 1) * 4 + ((b >> U32(i)) & 1) * 2 + ((c >> U32(i)) & 1)
        d |= ((U32(table) >> index.astype(U32)) & U32(1)) << U32(i)
    return d


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    source = np.stack([(word >> U32(8 * i)) & U32(255) for word in (a, b) for i in range(4)])  # [8, n]
    d = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> U32(4 * i)) & U32(15)
        byte = np.take_along_axis(source, (nibble & 7)[None].astype(np.int64), 0)[0]
        byte = np.where(nibble & 8, np.where(byte & 0x80, U32(255), U32(0)), byte)
        d |= byte.astype(U32) << U32(8 * i)
    return d


def _fma2(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    wide = [_halves(v).astype(np.float64) for v in (a, b, c)]
    return _pairs((wide[0] * wide[1] + wide[2]).astype(np.float16))


def _flushed_exp2(x: np.ndarray) -> np.ndarray:
    y = np.exp2(x.astype(np.float64))
    return np.where(y < 2.0**-126, 0.0, y).astype(F32)


def _signed(v: np.ndarray) -> np.ndarray:
    return v.astype(U32).view(np.int32).astype(np.int64)


OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "prmt.b32": _prmt,
    "add.rn.f16x2": lambda a, b: _pairs(_halves(a) + _halves(b)),
    "sub.rn.f16x2": lambda a, b: _pairs(_halves(a) - _halves(b)),
    "mul.rn.f16x2": lambda a, b: _pairs(_halves(a) * _halves(b)),
    "fma.rn.f16x2": _fma2,
    "min.NaN.f16x2": lambda a, b: _pairs(np.minimum(_halves(a), _halves(b))),
    "max.NaN.f16x2": lambda a, b: _pairs(np.maximum(_halves(a), _halves(b))),
    "cvt.f32.f16": lambda h: h.astype(U16).view(np.float16).astype(F32),
    "cvt.rn.f16.f32": _f16,
    "cvt.rn.f16x2.f32": lambda hi, lo: _f16(lo).astype(U32) | (_f16(hi).astype(U32) << U32(16)),
    "cvt.rn.bf16.f32": _bf16,
    "cvt.rn.bf16x2.f32": lambda hi, lo: _bf16(lo).astype(U32) | (_bf16(hi).astype(U32) << U32(16)),
    "ex2.approx.ftz.f32": _flushed_exp2,
    "cvt.u16.u32": lambda a: a.astype(U16),
    "cvt.u32.u16": lambda a: a.astype(U32),
    "mul.lo.s32": lambda a, b: a * b,
    "mul.wide.s32": lambda a, b: (_signed(a) * _signed(b)).view(U64),
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "add.s32": lambda a, b: a + b,
    "add.s64": lambda a, b: a + b,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "bfe.u32": lambda a, start, count: (a >> start) & ((U32(1) << count) - U32(1)),
    "sub.s32": lambda a, b: a - b,
    "setp.eq.s32": lambda a, b: a == b,
    "setp.gt.u32": lambda a, b: a > b,
    "selp.b32": lambda a, b, p: np.where(p, a, b),
    "cvta.to.global.u64": lambda a: a,
    "mov.u32": lambda a: a,
    "mov.u16": lambda a: a,
}


def evaluate(ptx: str, entry: str, num_threads: int, buffers: list[np.ndarray]) -> list[str]:
    """Runs ``entry`` for threads 0..n-1, in blocks of 32, on u32 buffers, in place. Returns the opcodes that occurred.

    Raises ``NotImplementedError`` for an instruction that it does not know.
    """
    body = next(found[3] for found in ENTRY.finditer(ptx) if found[1] == entry)
    thread = np.arange(num_threads, dtype=U32)
    registers: dict[str, np.ndarray] = {"%tid.x": thread % U32(32), "%ctaid.x": thread // U32(32)}
    met = []
    with np.errstate(all="ignore"):
        for line in body.splitlines():
            text = line.split("//")[0].strip()
            if not text or text.startswith("."):
                continue
            found = INSTRUCTION.match(text)
            if found is None or found[1]:
                raise NotImplementedError(text)
            met.append(found[2])
            if found[2] == "ret":
                break
            _step(found[2], found[3], registers, buffers, num_threads)
    return met


def _step(opcode: str, operands: str, registers: dict[str, np.ndarray], buffers: list[np.ndarray], n: int) -> None:
    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full(n, int(name) & 0xFFFFFFFF, U32)

    def index(text: str) -> tuple[np.ndarray, np.ndarray]:
        base, offset = MEMORY.fullmatch(text).groups()
        address = registers[base] + U64(int(offset or 0))
        return buffers[int(address[0] >> U64(BUFFER_BITS))], (address & U64((1 << BUFFER_BITS) - 1)) // U64(4)

    parts = [part.strip() for part in re.split(r",\s*(?![^{]*\})", operands)]
    if opcode == "ld.param.u64":
        number = int(re.search(r"param_(\d+)", parts[1])[1])
        registers[parts[0]] = np.full(n, number << BUFFER_BITS, U64)
    elif opcode.startswith("ld.global"):
        memory, at = index(parts[1])
        registers[parts[0]] = memory[at]
    elif opcode.startswith("st.global"):
        memory, at = index(parts[0])
        memory[at] = registers[parts[1]].view(U32) if registers[parts[1]].dtype == F32 else value(parts[1])
    elif opcode == "mov.b32" and parts[1].startswith("{"):
        lo, hi = (value(name.strip()).astype(U32) for name in parts[1][1:-1].split(","))
        registers[parts[0]] = lo | (hi << U32(16))
    elif opcode == "mov.b32":
        registers[parts[0]] = value(parts[1]).view(F32 if parts[0].startswith("%f") else U32)
    elif opcode == "lop3.b32":
        registers[parts[0]] = _lop3(*(value(p) for p in parts[1:4]), int(parts[4]))
    elif opcode in OPERATIONS:
        registers[parts[0]] = OPERATIONS[opcode](*(value(p) for p in parts[1:]))
    else:
        raise NotImplementedError(f"{opcode} {operands}")
