"""How integer linears take codes out of a record's words: bytes, four inputs of a column to a lane.

Codes come in units of some inputs; a unit has steps, and a step of one vector of columns is one or two vectors of bytes
(``Plane``): two where the machine's dot product of bytes takes no more than 127, and codes have 8 bits. Step s meets
the activations at byte 4 s of the unit (``exl.cpu_kernels.quantize``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llvmlite import ir

from exl.cpu_kernels.ir import I32, Kernel, vec
from exl.formats.matrix import FP4_VALUES
from exl.layout.columns import COLUMNS

FP4_ZERO = 12  # what is added to FP4_VALUES, so that they are not below 0
_LINE = 64  # bytes that a prefetch asks for
_ROW = 4 * COLUMNS  # bytes of one word, or of one step's bytes, of all columns of a record


@dataclass(frozen=True)
class CodeForm:
    """``bits`` of a code; ``halves``: codes of 8 bits as two of 4, the high one worth 16. ``kind`` "fp4": codes of 4
    bits become numbers, ``FP4_ZERO`` above what they stand for."""

    bits: int
    halves: bool = False
    kind: str = "int"

    @property
    def inputs(self) -> int:
        """Of a word; at 3 bits of three words together."""
        return 32 if self.bits == 3 else 32 // self.bits

    @property
    def words(self) -> int:
        return 3 if self.bits == 3 else 1

    @property
    def weights(self) -> tuple[int, ...]:
        """What each plane is worth."""
        return (1, 16) if self.halves else (1,)


def code_form(bits: int, isa: str, kind: str = "int") -> CodeForm:
    return CodeForm(bits, halves=bits == 8 and isa not in ("avx512vnni", "avxvnni"), kind=kind)


def fp4_numbers(k: Kernel, codes: ir.Value) -> ir.Value:
    """i32 lanes of four bytes each: a code of 4 bits -> the number that it stands for, plus ``FP4_ZERO``; a byte of 128
    or more -> 0."""
    return k.look_up(codes, [FP4_ZERO + value for value in FP4_VALUES])


def unpacked_bytes(k: Kernel, words: list[ir.Value], form: CodeForm) -> Iterator[list[ir.Value]]:
    """Steps of ``form.inputs`` inputs, each a vector for each plane, from ``form.words`` vectors of words."""
    b, type_ = k.b, words[0].type

    def masked(value: ir.Value, right: int, mask: int) -> ir.Value:
        if right:
            shift = b.lshr if right > 0 else b.shl
            value = shift(value, k.splat(abs(right), type_))
        return b.and_(value, k.splat(mask * 0x01010101, type_))

    if form.bits == 3:  # two bits as at 2 bits, the third from a plane of its own: bit 8 b + 4 a + j
        for a in (0, 1):
            for j in range(4):
                yield [b.or_(masked(words[a], 2 * j, 3), masked(words[2], 4 * a + j - 2, 4))]
    elif form.halves:
        yield [masked(words[0], 0, 15), masked(words[0], 4, 15)]
    elif form.bits == 8:
        yield [words[0]]
    else:
        for step in range(8 // form.bits):
            codes = masked(words[0], form.bits * step, (1 << form.bits) - 1)
            yield [fp4_numbers(k, codes) if form.kind == "fp4" else codes]


@dataclass(frozen=True)
class WordSource:
    """Codes of a record as they lie in memory. ``ahead``: how many bytes behind each word are asked for, 0: none."""

    form: CodeForm
    record: ir.Value
    ahead: int

    def steps(self, k: Kernel, start: ir.Value, inputs: int, columns: list[int], lanes: int) -> Iterator[_Step]:
        """``inputs`` inputs (whole words) from ``start`` (i64) on, of ``lanes`` columns from each of ``columns``."""
        form = self.form
        first = k.at(self.record, k.mul(_ROW * form.words, k.b.sdiv(start, k.n(form.inputs))))
        for word in range(0, inputs // form.inputs * form.words, form.words):
            vectors = []
            for column in columns:
                places = [_ROW * (word + i) + 4 * column for i in range(form.words)]
                vectors.append([k.load(vec(I32, lanes), first, place) for place in places])
                if self.ahead and (4 * column) % _LINE == 0:
                    for place in places:
                        k.prefetch(first, place + self.ahead)
            for step in zip(*(unpacked_bytes(k, words, form) for words in vectors), strict=True):
                yield [list(plane) for plane in zip(*step, strict=True)]


@dataclass(frozen=True)
class ByteSource:
    """Codes that lie as bytes: [steps][planes][64 columns] of four inputs."""

    form: CodeForm
    codes: ir.Value

    def steps(self, k: Kernel, start: ir.Value, inputs: int, columns: list[int], lanes: int) -> Iterator[_Step]:
        planes = len(self.form.weights)
        first = k.at(self.codes, k.mul(start, _ROW * planes // 4))
        for step in range(inputs // 4):
            yield [
                [k.load(vec(I32, lanes), first, _ROW * (step * planes + p) + 4 * column) for column in columns]
                for p in range(planes)
            ]


_Step = list[list[ir.Value]]  # [planes][vectors of columns]
