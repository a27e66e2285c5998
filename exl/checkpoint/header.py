"""Parses a safetensors header, and the index of a sharded checkpoint, as untrusted input.

Format: 8 bytes of little-endian header length, that many bytes of JSON, then the data section. The JSON maps tensor
names to ``{"dtype", "shape", "data_offsets": [start, stop]}``, with offsets from the start of the data section, and
``"__metadata__"`` to an object of strings (https://github.com/huggingface/safetensors, README). As in the reference
library, tensors must cover the data section exactly: no overlap, no hole, nothing after the last one. Stricter than
the reference: a name that occurs twice and a key that the format does not have are errors.

The format allows so few forms that the JSON is scanned value by value and the scan stops at the first unexpected one.
So memory is proportional to the part that was valid. A general parser could build a gigabyte of empty lists before
anything was refused.
"""

from __future__ import annotations

import codecs
import json
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from json.decoder import scanstring
from pathlib import PureWindowsPath
from typing import Any

from exl.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the reference library's own limit
MAX_DIMS = 32  # every version of NumPy supports this many
MAX_SKIPPED_CHARS = 1 << 16  # longest value, in characters, of an index key that exl does not need

# safetensors' dtype -> bits per element. exl's names are the same in lower case.
DTYPE_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64},
    **{"F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, and the place of its bytes. Row-major, little-endian."""

    name: str
    file: str  # relative to the checkpoint's folder
    dtype: str  # "f32", "f16", "bf16", "i32", "u8", ...: safetensors' name in lower case
    shape: tuple[int, ...]
    start: int  # absolute byte offsets in the file
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def shown(value: object, limit: int = 100) -> str:
    """``repr`` for an error message: shortened in the middle if it is long, without building the whole ``repr``."""
    if isinstance(value, str) and len(value) > 3 * limit:
        value = value[: 2 * limit] + value[-limit:]
    text = repr(value) if isinstance(value, str) else _SHORT.repr(value)
    return text if len(text) <= limit else f"{text[: limit * 2 // 3]}...{text[-limit // 4 :]}"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 60, 60, 60


class _JsonError(ValueError):
    """Says what is wrong and at which character; callers prepend file and tensor."""


_ScanValue = Callable[[str, int, str], tuple[Any, int]]  # (text, at, key) -> (value, end)
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"[ \t\n\r]*")
_INTEGER = r"(?:0|[1-9][0-9]{0,18})"
_INTEGERS = re.compile(
    rf"\[[ \t\n\r]*(?:{_INTEGER}[ \t\n\r]*(?:,[ \t\n\r]*{_INTEGER}[ \t\n\r]*){{0,{MAX_DIMS - 1}}})?\]"
)


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()


def _wrong(text: str, at: int, expected: str) -> _JsonError:
    found = shown(text[at : at + 40]) if at < len(text) else "the end"
    return _JsonError(f"found {found} at character {at}, expected {expected}")


def _scan_string(text: str, at: int) -> tuple[str, int]:
    if text[at : at + 1] != '"':
        raise _wrong(text, at, "a string")
    try:
        value, end = scanstring(text, at + 1, True)
        if _SURROGATE.search(value):  # not valid Unicode; the reference library also refuses it
            raise ValueError("Lone surrogate")
    except ValueError as error:
        raise _wrong(text, at, f"a valid JSON string ({str(error).split(':')[0]})") from None
    return value, end


def _scan_integers(text: str, at: int) -> tuple[tuple[int, ...], int]:
    match = _INTEGERS.match(text, at)
    if match is None:
        raise _wrong(text, at, f"a list of at most {MAX_DIMS} whole numbers, none negative and none above 19 digits")
    return tuple(map(int, re.findall("[0-9]+", match.group()))), match.end()


def _scan_object(text: str, at: int, scan_value: _ScanValue) -> tuple[dict[str, Any], int]:
    """``{...}`` at ``at`` -> (values by key, end)."""
    if text[at : at + 1] != "{":
        raise _wrong(text, at, "an object")
    values: dict[str, Any] = {}
    at = _skip_space(text, at + 1)
    while text[at : at + 1] != "}":
        if values:
            if text[at : at + 1] != ",":
                raise _wrong(text, at, "',' or '}'")
            at = _skip_space(text, at + 1)
        key, end = _scan_string(text, at)
        if key in values:
            raise _JsonError(f"{shown(key)} occurs twice, again at character {at}")
        at = _skip_space(text, end)
        if text[at : at + 1] != ":":
            raise _wrong(text, at, "':'")
        try:
            values[key], at = scan_value(text, _skip_space(text, at + 1), key)
        except _JsonError as error:
            raise _JsonError(f"{shown(key)}: {error}") from None
        at = _skip_space(text, at)
    return values, at + 1


def _scan_document(
    raw: bytes | bytearray, scan_value: Callable[[str, int, str], tuple[Any, int]], what: str
) -> dict[str, Any]:
    """Scans one object with nothing but white space around it."""
    try:
        text = raw.decode("utf-8")
        values, end = _scan_object(text, _skip_space(text, 0), scan_value)
        end = _skip_space(text, end)
        if end != len(text):
            raise _wrong(text, end, "nothing more")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what}: not UTF-8 at byte {error.start}: found {raw[error.start]:#04x}") from None
    except _JsonError as error:
        raise CheckpointError(f"{what}: {error}") from None
    return values


def _scan_text_value(text: str, at: int, key: str) -> tuple[str, int]:
    return _scan_string(text, at)


def _scan_tensor_field(text: str, at: int, key: str) -> tuple[Any, int]:
    if key == "dtype":
        return _scan_string(text, at)
    if key in ("shape", "data_offsets"):
        return _scan_integers(text, at)
    raise _JsonError("unknown key, expected dtype, shape and data_offsets")


def _scan_header_entry(text: str, at: int, key: str) -> tuple[Any, int]:
    if key != "__metadata__":
        return _scan_object(text, at, _scan_tensor_field)
    if text.startswith("null", at):  # the reference library reads it as "no metadata"
        return {}, at + 4
    return _scan_object(text, at, _scan_text_value)


def parse_header(raw: bytes | bytearray, num_data_bytes: int, file: str) -> tuple[list[TensorInfo], dict[str, str]]:
    """From the JSON ``raw`` and the data section's size: the tensors, ordered by offset, and the metadata.

    Raises ``CheckpointError`` that names ``file``, the tensor, what was found and what was expected.
    """
    entries = _scan_document(raw, _scan_header_entry, f"{file}: header")
    metadata = entries.pop("__metadata__", {})
    base = 8 + len(raw)
    infos = [_tensor_info(name, entry, base, num_data_bytes, file) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.start, info.stop))
    _check_coverage(infos, base, base + num_data_bytes, file)
    return infos, metadata


def _tensor_info(name: str, entry: dict[str, Any], base: int, num_data_bytes: int, file: str) -> TensorInfo:
    where = f"{file}: tensor {shown(name)}"
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            raise CheckpointError(f"{where}: no {key}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: unknown dtype {shown(dtype)}, expected one of {', '.join(DTYPE_BITS)}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {list(offsets)}, expected [start, stop] with start <= stop")
    start, stop = offsets
    if stop > num_data_bytes:
        raise CheckpointError(
            f"{where}: ends at byte {stop} of a data section of {num_data_bytes} bytes; the file is cut off or damaged"
        )
    num_bits, num_elements_if_none_is_zero = DTYPE_BITS[dtype], 1
    for size in shape:
        num_elements_if_none_is_zero *= size or 1
    if num_elements_if_none_is_zero * max(num_bits // 8, 1) >= 1 << 63:
        raise CheckpointError(f"{where}: shape {list(shape)} overflows 64 bits")
    num_elements = 0 if 0 in shape else num_elements_if_none_is_zero
    if num_elements * num_bits != (stop - start) * 8:
        raise CheckpointError(
            f"{where}: {dtype} {list(shape)} takes {num_elements * num_bits / 8:.16g} bytes, "
            f"but data_offsets [{start}, {stop}] span {stop - start}"
        )
    return TensorInfo(name, file, dtype.lower(), shape, base + start, base + stop)


def _check_coverage(infos: list[TensorInfo], start: int, stop: int, file: str) -> None:
    """Checks that every byte of the data section belongs to exactly one tensor. ``infos`` are sorted by offset."""
    previous = None
    for info in infos:
        if info.start != start:
            after = "the start of the data section" if previous is None else f"the end of {shown(previous.name)}"
            kind = "overlaps" if info.start < start else "leaves a hole after"
            raise CheckpointError(
                f"{file}: tensor {shown(info.name)}: {kind} {after}: begins at byte {info.start} of the file, "
                f"expected {start}"
            )
        start, previous = info.stop, info
    if start != stop:
        raise CheckpointError(f"{file}: found {stop - start} bytes that belong to no tensor, expected none")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_SKIPPING = json.JSONDecoder(parse_constant=_refuse_constant)


def _scan_index_entry(text: str, at: int, key: str) -> tuple[Any, int]:
    if key == "weight_map":
        return _scan_object(text, at, _scan_text_value)
    try:  # a bounded slice bounds the cost of deep nesting and of long numbers
        value, end = _SKIPPING.raw_decode(text[at : at + MAX_SKIPPED_CHARS])
    except (ValueError, RecursionError):
        raise _wrong(text, at, f"a JSON value of at most {MAX_SKIPPED_CHARS} characters") from None
    return value, at + end


def parse_index(raw: bytes | bytearray, file: str) -> dict[str, str]:
    """The ``weight_map``, {tensor: shard}, of a ``*.safetensors.index.json``. Shards must be names inside the folder.

    Only names are checked, not the targets of links: in a hub cache, files are links out of the folder.
    """
    document = raw.removeprefix(codecs.BOM_UTF8)  # an editor's mark of the encoding
    weight_map = _scan_document(document, _scan_index_entry, file).get("weight_map")
    if not weight_map:
        raise CheckpointError(f"{file}: no tensors in weight_map, expected {{tensor: shard}}")
    for shard in dict.fromkeys(weight_map.values()):
        path = PureWindowsPath(shard)  # handles both separators, and drives
        inside = shard.isprintable() and not path.drive and not path.root and ".." not in path.parts
        if not inside or path.suffix != ".safetensors":
            name = next(name for name, file_name in weight_map.items() if file_name == shard)
            raise CheckpointError(
                f"{file}: tensor {shown(name)}: found shard {shown(shard)}, "
                "expected the name of a .safetensors file inside the folder"
            )
    return weight_map
