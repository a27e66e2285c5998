"""Named arrays inside a blob of bytes: their types, sizes and alignment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"u8": 1, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4})
FIELD_ALIGN = 64  # a cache line, and what vector loads and int4pack want
BLOB_ALIGN = 4096  # a memory page and a disk sector: O_DIRECT needs both


def align_up(num_bytes: int, alignment: int) -> int:
    """``align_up(65, 64) == 128``."""
    return -(-num_bytes // alignment) * alignment


@dataclass(frozen=True)
class Field:
    """A named array inside a blob."""

    offset: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]

    def shifted(self, by: int) -> Field:
        return Field(self.offset + by, self.num_bytes, self.dtype, self.shape)


class FieldPacker:
    """Lays arrays one after another, each at a multiple of ``alignment``."""

    def __init__(self, alignment: int = FIELD_ALIGN) -> None:
        self.fields: dict[str, Field] = {}
        self.num_bytes = 0
        self._alignment = alignment

    def add(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
        offset = align_up(self.num_bytes, self._alignment)
        self.fields[name] = Field(offset, num_bytes, dtype, shape)
        self.num_bytes = offset + num_bytes
