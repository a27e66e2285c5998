"""Damaged or malicious safetensors headers: each class of mutation with its expected result.

A header either loads exactly as in the reference library, or raises a ``CheckpointError`` that names the file and says
what is wrong. Nothing else is raised, nothing hangs, and exl never allocates memory just because a header claims it.
"""

from __future__ import annotations

import json
import os
import re
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from exl.checkpoint.checkpoint import Checkpoint
from exl.errors import CheckpointError

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U8": 1, "I64": 8, "F64": 8}
MANY = settings(
    max_examples=16,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def settings_of(max_examples: int) -> settings:
    return settings(MANY, max_examples=max_examples)


# --- files by hand ---------------------------------------------------------------------------------------------------


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """``header``: an object to dump, a text, or raw bytes. A list of pairs is an object that may repeat keys."""
    if isinstance(header, list):
        header = "{" + ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in header) + "}"
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


@st.composite
def layouts(draw, min_tensors: int = 1):
    """A valid header as pairs, and its data. Names, types, shapes and sizes vary; tensors may be empty."""
    names = draw(st.lists(st.text("abw.0_é", min_size=1, max_size=6), min_size=min_tensors, max_size=4, unique=True))
    pairs, offset = [], 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(SIZES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        num_bytes = int(np.prod(shape, dtype=int)) * SIZES[dtype]
        pairs.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + num_bytes]}))
        offset += num_bytes
    if draw(st.booleans()):
        pairs.insert(0, ("__metadata__", {"format": "pt"}))
    return pairs, draw(st.binary(min_size=offset, max_size=offset))


@st.composite
def full_layouts(draw):
    """Like ``layouts``, with a tensor "t" of at least two elements in the middle."""
    pairs, data = draw(layouts())
    pairs = [pair for pair in pairs if pair[0] != "__metadata__"]
    shape = draw(st.sampled_from([[2], [3, 2], [1, 5]]))
    dtype = draw(st.sampled_from(sorted(SIZES)))
    num_bytes = int(np.prod(shape)) * SIZES[dtype]
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + num_bytes]}
    last = {"dtype": "U8", "shape": [3], "data_offsets": [len(data) + num_bytes, len(data) + num_bytes + 3]}
    return [*pairs, ("t", entry), ("z", last)], data + bytes(num_bytes + 3)


def load(folder, raw: bytes) -> dict[str, tuple]:
    (folder / "model.safetensors").write_bytes(raw)
    with Checkpoint.open(folder) as checkpoint:
        return {
            name: (info.dtype.upper(), list(info.shape), checkpoint.read(name).tobytes())
            for name, info in checkpoint.tensors.items()
        }


def load_reference(folder, raw: bytes) -> dict[str, tuple] | None:
    """The tensors that the reference library loads; None: it refuses the file."""
    (folder / "model.safetensors").write_bytes(raw)
    try:
        with safe_open(folder / "model.safetensors", "numpy") as file:
            infos = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            found = {name: (info.get_dtype(), list(info.get_shape())) for name, info in infos.items()}
    except (SafetensorError, UnicodeDecodeError):
        return None
    return found


def assert_refused(folder, raw: bytes, message: str, slack: int = 1 << 18) -> None:
    """Checks that the file is refused with a message that names it, using at most three times its size in memory."""
    (folder / "model.safetensors").write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert re.search(message, text), text
    assert "model.safetensors" in text
    assert len(text) < 1500, "a message that a person can read"
    assert peak < 3 * len(raw) + slack


# --- valid -----------------------------------------------------------------------------------------------------------


@settings_of(60)
@given(layout=layouts(), indent=st.sampled_from([None, 1]), padding=st.sampled_from(["", "   ", "\n\t\r "]))
def test_valid_files_load_as_the_reference_loads_them(tmp_path, layout, indent, padding):
    pairs, data = layout
    raw = file_of(json.dumps(dict(pairs), indent=indent, ensure_ascii=bool(indent)) + padding, data)
    found = load(tmp_path, raw)
    assert {name: value[:2] for name, value in found.items()} == load_reference(tmp_path, raw)
    for name, entry in pairs:
        if name != "__metadata__":
            assert found[name][2] == data[slice(*entry["data_offsets"])]


def test_a_file_without_tensors(tmp_path):
    assert load(tmp_path, file_of({})) == load_reference(tmp_path, file_of({})) == {}
    assert load(tmp_path, file_of({"__metadata__": None})) == {}


# --- classes of mutation: (what is changed, what the message must say) -----------------------------------------------


def change(key, value):
    """A mutation that sets one key of tensor "t"."""

    def mutate(draw, pairs, data):
        entry = dict(pairs)["t"]
        new = value(draw, entry, data) if callable(value) else value
        return [(name, old | {key: new} if name == "t" else old) for name, old in pairs], data

    return mutate


def drop(key):
    def mutate(draw, pairs, data):
        return [(n, {k: v for k, v in e.items() if k != key} if n == "t" else e) for n, e in pairs], data

    return mutate


def offsets(function):
    return change("data_offsets", lambda draw, entry, data: function(draw, *entry["data_offsets"], len(data)))


def replace_entry(value):
    def mutate(draw, pairs, data):
        return [(name, value if name == "t" else entry) for name, entry in pairs], data

    return mutate


def add(name, entry):
    def mutate(draw, pairs, data):
        return [*pairs, (name, entry)], data

    return mutate


def some(strategy):
    return lambda draw, entry, data: draw(strategy)


def reordered(draw, pairs, data):
    return draw(st.permutations(pairs)), data


def extra_data(draw, pairs, data):
    return pairs, data + draw(st.binary(min_size=1, max_size=9))


def missing_data(draw, pairs, data):
    return pairs, data[: len(data) - draw(st.integers(1, 3))]


def duplicated(draw, pairs, data):
    return [*pairs, draw(st.sampled_from(pairs))], data


def hole(draw, pairs, data):
    gap = draw(st.integers(1, 9))
    moved = [o + gap for o in dict(pairs)["z"]["data_offsets"]]
    return [(n, e | {"data_offsets": moved} if n == "z" else e) for n, e in pairs], data + bytes(gap)


def overlap(draw, pairs, data):
    start, stop = dict(pairs)["z"]["data_offsets"]
    by = draw(st.integers(1, 2))
    moved = [start - by, stop - by]
    return [(n, e | {"data_offsets": moved} if n == "z" else e) for n, e in pairs], data[:-by]


NOT_STRINGS = st.sampled_from([None, 1, 1.5, True, [], {}, ["F32"]])
NOT_WHOLE = st.sampled_from([-1, 1.0, 1.5, None, True, False, "2", [2], {}, 10**20, -(10**400), 1e300])
LIST = r"expected a list of at most 32 whole numbers"
MUTATIONS = {
    "unknown dtype": (
        change("dtype", some(st.sampled_from(["F31", "f32", "", "FLOAT", "I4", "\0", "F32 ", "C128"]))),
        r"tensor 't': unknown dtype '.*', expected one of .*BF16",
    ),
    "a dtype as long as the file": (change("dtype", "F" * 5000), r"tensor 't': unknown dtype 'FFF.*\.\.\.FFF"),
    "dtype is no string": (change("dtype", some(NOT_STRINGS)), r"'t': 'dtype': found .*, expected a string"),
    "no dtype": (drop("dtype"), r"tensor 't': no dtype"),
    "no shape": (drop("shape"), r"tensor 't': no shape"),
    "no offsets": (drop("data_offsets"), r"tensor 't': no data_offsets"),
    "unknown key": (change("strides", [1]), r"'t': 'strides': unknown key"),
    "entry is no object": (replace_entry([1, 2]), r"'t': found '\[1, 2\].*, expected an object"),
    "entry is null": (replace_entry(None), r"'t': found 'null.*, expected an object"),
    "shape is no list": (change("shape", some(st.sampled_from([None, 6, "6", {}]))), rf"'t': 'shape': .*{LIST}"),
    "a size that is no whole number": (
        change(
            "shape", some(st.lists(st.integers(0, 3), max_size=2).flatmap(lambda s: NOT_WHOLE.map(lambda x: [*s, x])))
        ),
        rf"'t': 'shape': found .*{LIST}",
    ),
    "33 dimensions": (change("shape", [1] * 33), rf"'t': 'shape': .*{LIST}"),
    "a nested bomb for a shape": (change("shape", [[[[[[]]]]]] * 50), rf"'t': 'shape': .*{LIST}"),
    "a shape that is too large": (
        change("shape", some(st.sampled_from([[1 << 20], [1 << 40], [5, 1 << 30], [1 << 59]]))),
        r"tensor 't': \w+ \[.*\] takes [0-9.e+]+ bytes, but data_offsets \[\d+, \d+\] span \d+",
    ),
    "a shape that overflows": (
        change("shape", some(st.sampled_from([[1 << 62, 4], [1 << 62] * 30, [10**18, 10**18], [0, 1 << 62, 1 << 62]]))),
        r"tensor 't': shape \[.*\] overflows 64 bits",
    ),
    "a shape that wraps to the right size": (change("shape", [1 << 63, 2]), r"tensor 't': shape .* overflows 64 bits"),
    "an empty shape with bytes": (change("shape", [0]), r"tensor 't': \w+ \[0\] takes 0 bytes, but"),
    "offsets are no list": (
        change("data_offsets", some(st.sampled_from([None, 8, "0,8", {}]))),
        r"'data_offsets': .*list",
    ),
    "one or three offsets": (
        change("data_offsets", some(st.sampled_from([[], [0], [0, 4, 8]]))),
        r"tensor 't': data_offsets \[.*\], expected \[start, stop\]",
    ),
    "an offset that is no whole number": (
        change("data_offsets", some(NOT_WHOLE.map(lambda x: [0, x]))),
        rf"'t': 'data_offsets': found .*{LIST}",
    ),
    "offsets the wrong way round": (
        offsets(lambda draw, start, stop, size: [stop, start]),
        r"tensor 't': data_offsets \[\d+, \d+\], expected \[start, stop\] with start <= stop",
    ),
    "offsets beyond the data": (
        offsets(lambda draw, start, stop, size: [start, draw(st.sampled_from([size + 1, 1 << 40, 10**19 - 1]))]),
        r"tensor 't': ends at byte \d+ of a data section of \d+ bytes; the file is cut off or damaged",
    ),
    "a span of another size": (
        offsets(lambda draw, start, stop, size: [start, stop + draw(st.sampled_from([-1, 1, 2]))]),
        r"tensor 't': \w+ \[.*\] takes \d+ bytes, but data_offsets \[\d+, \d+\] span \d+",
    ),
    "a hole": (hole, r"tensor 'z': leaves a hole after the end of 't': begins at byte \d+ of the file, expected \d+"),
    "an overlap": (overlap, r"tensor 'z': overlaps the end of 't': begins at byte \d+ of the file, expected \d+"),
    "two tensors of the same bytes": (
        lambda draw, pairs, data: ([*pairs, ("twin", dict(pairs)["t"])], data),
        r"tensor '(twin|t)': overlaps the end of '(t|twin)'",
    ),
    "bytes of no tensor": (extra_data, r"found \d bytes that belong to no tensor, expected none"),
    "data cut off": (
        missing_data,
        r"tensor '.*': ends at byte \d+ of a data section of \d+ bytes; the file is cut off",
    ),
    "a name twice": (duplicated, r"'.*' occurs twice, again at character \d+"),
    "metadata of numbers": (add("__metadata__", {"a": 1}), r"'__metadata__': 'a': found '1.*, expected a string"),
    "metadata as a list": (add("__metadata__", ["a"]), r"'__metadata__': found .*, expected an object"),
    "metadata that nests": (add("__metadata__", {"a": {"b": "c"}}), r"'__metadata__': 'a': found .* expected a string"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@MANY
@given(layout=full_layouts(), draws=st.data())
def test_mutated_headers_are_refused(tmp_path, mutation, layout, draws):
    mutate, message = MUTATIONS[mutation]
    pairs, data = mutate(draws.draw, *layout)
    assert_refused(tmp_path, file_of(pairs, data), message)


@settings_of(30)
@given(layout=full_layouts(), draws=st.data())
def test_the_order_of_names_means_nothing(tmp_path, layout, draws):
    pairs, data = reordered(draws.draw, *layout)
    assert load(tmp_path, file_of(pairs, data)) == load(tmp_path, file_of(layout[0], layout[1]))


@MANY
@given(layout=full_layouts(), draws=st.data())
def test_a_repeated_key_inside_an_entry(tmp_path, layout, draws):
    pairs, data = layout
    key = draws.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    entry = dict(pairs)["t"]
    twice = json.dumps(entry)[:-1] + f", {json.dumps(key)}: {json.dumps(entry[key])}}}"
    text = json.dumps(dict(pairs)).replace(json.dumps(entry), twice)
    assert_refused(tmp_path, file_of(text, data), rf"'t': '{key}' occurs twice")


# --- the text itself -------------------------------------------------------------------------------------------------

ENTRY = '{"dtype":"U8","shape":[],"data_offsets":[0,1]}'


def with_entry(old: str, new: str) -> bytes:
    return f'{{"a":{ENTRY.replace(old, new)}}}'.encode()


TEXTS = {
    "nothing": (b"", r"header: found the end at character 0, expected an object"),
    "spaces only": (b"    ", r"header: found the end at character 4, expected an object"),
    "a list": (b"[]", r"header: found '\[\]' at character 0, expected an object"),
    "a string": (b'"abc"', r"expected an object"),
    "null": (b"null", r"expected an object"),
    "NaN": (b"NaN", r"expected an object"),
    "a byte order mark": (b"\xef\xbb\xbf{}", r"header: found '\\ufeff\{\}' at character 0"),
    "no end": (b"{", r"found the end at character 1, expected a string"),
    "no end of an entry": (f'{{"a":{ENTRY}'.encode(), r"found the end at character \d+, expected ',' or '\}'"),
    "a comma too many": (f'{{"a":{ENTRY},}}'.encode(), r"found '\}' at character \d+, expected a string"),
    "a comma first": (b"{,}", r"found ',\}' at character 1, expected a string"),
    "no colon": (b'{"a" 1}', r"found '1\}' at character 5, expected ':'"),
    "single quotes": (b"{'a':1}", r"expected a string"),
    "a comment": (b"{/* */}", r"expected a string"),
    "two objects": (b"{}{}", r"header: found '\{\}' at character 2, expected nothing more"),
    "zero bytes after the end": (b"{}\0\0", r"found '\\x00\\x00' at character 2, expected nothing more"),
    "not UTF-8": (b'{"a\xff":1}', r"header: not UTF-8 at byte 3: found 0xff"),
    "a surrogate in UTF-8": (b'{"\xed\xa0\x80":1}', r"header: not UTF-8 at byte 2"),
    "a lone surrogate": (f'{{"\\ud800":{ENTRY}}}'.encode(), r"expected a valid JSON string"),
    "an escape that is none": (b'{"\\x41":1}', r"expected a valid JSON string \(Invalid \\escape"),
    "half an escape": (b'{"\\u12', r"expected a valid JSON string \(Invalid \\uXXXX escape"),
    "a line break in a name": (b'{"a\nb":1}', r"expected a valid JSON string \(Invalid control character"),
    "no end of a name": (b'{"abc', r"expected a valid JSON string \(Unterminated string"),
    "UTF-16": ('{"a":1}'.encode("utf-16-le"), r"found '\\x00.*expected a string"),
    "leading zeros": (with_entry("[0,1]", "[00,1]"), r"'data_offsets': found .*list"),
    "a number in hexadecimal": (
        with_entry("[0,1]", "[0x0,1]"),
        r"'data_offsets': found .*list",
    ),
    "a Python literal": (with_entry("[]", "()"), r"'shape': found .*list"),
    "digits of another script": (
        with_entry("[0,1]", "[0,\u0661]"),
        r"'data_offsets': found .*list",
    ),
}


@pytest.mark.parametrize("text", TEXTS)
def test_texts_that_are_no_header(tmp_path, text):
    raw, message = TEXTS[text]
    assert_refused(tmp_path, file_of(raw, b"\0"), message)


REPEAT = 1 << 20
BOMBS = {
    "lists in lists": (b"[" * REPEAT, r"expected an object"),
    "objects in objects": (b'{"a":' * (REPEAT // 5), r"'a': 'a': unknown key"),
    "lists in an entry": (b'{"a":{"shape":' + b"[" * REPEAT, r"'a': 'shape': found '\[\[\["),
    "millions of empty lists": (b'{"a":{"shape":[' + b"[]," * (REPEAT // 3) + b"[]]}}", r"'a': 'shape': found"),
    "millions of dimensions": (
        b'{"a":{"shape":[' + b"1," * (REPEAT // 2) + b"1]}}",
        r"'a': 'shape': found .*at most 32",
    ),
    "lists as metadata": (b'{"__metadata__":' + b"[]," * (REPEAT // 3) + b"}", r"'__metadata__': found .*an object"),
    "lists in metadata": (b'{"__metadata__":{"a":[' + b"[]," * (REPEAT // 3) + b"[]]}}", r"expected a string"),
    "a number of a million digits": (b'{"a":{"shape":[' + b"9" * REPEAT + b"]}}", r"'a': 'shape': .*above 19 digits"),
    "a name of a million characters": (b'{"' + b"n" * REPEAT + b'":1}', r"'nnn.*\.\.\.nnn.*expected an object"),
    "a million spaces in front of nothing": (b"{" + b" " * REPEAT, r"found the end at character 1048577"),
    "a million commas": (b"{" + b"," * REPEAT, r"expected a string"),
    "a million escapes": (b'{"' + b"\\u0041" * (REPEAT // 6) + b'":1}', r"expected an object"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_cost_no_more_than_the_file(tmp_path, bomb):
    raw, message = BOMBS[bomb]
    assert_refused(tmp_path, file_of(raw), message)


@pytest.mark.parametrize(
    "length", [3, 7, 100, 1 << 20, 99_999_999, 10**8, 10**8 + 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
)
def test_header_lengths_that_lie(tmp_path, length):
    """A length beyond the file is refused before anything is allocated. If it is too short, the rest would be data."""
    raw = file_of({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"\0", length)
    message = (
        rf"the header says it has {length} bytes, expected at most \d+ in a file of \d+" if length > 60 else "header"
    )
    assert_refused(tmp_path, raw, message)


def test_a_header_above_the_limit_in_a_file_that_has_it(tmp_path):
    """A sparse file: a header of 100 MB that takes no space on disk. The limit is the reference library's own."""
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 10**8 + 1))
        file.truncate(10**8 + 100)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"says it has 100000001 bytes, expected at most 100000000"):
        Checkpoint.open(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 18
    tracemalloc.stop()


def test_every_file_that_is_cut_off(tmp_path):
    pairs = [
        ("a", {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}),
        ("b", {"dtype": "U8", "shape": [5], "data_offsets": [24, 29]}),
    ]
    raw = file_of(pairs, bytes(29))
    load(tmp_path, raw)
    for length in range(len(raw)):
        if length < 8:
            message = rf"model\.safetensors: {length} bytes, expected at least the 8 of the header's length"
        elif length < len(raw) - 29:
            message = r"the header says it has \d+ bytes, expected at most \d+ in a file of \d+; the file is cut off"
        else:
            message = r"tensor '[ab]': ends at byte \d+ of a data section of \d+ bytes; the file is cut off"
        assert_refused(tmp_path, raw[:length], message)


# --- bytes at random: the reference library has the last word --------------------------------------------------------

# Errors of exl for headers that the reference library accepts.
STRICTER = r"occurs twice|unknown key|expected an object|at most 32 whole numbers|overflows 64 bits"


@st.composite
def damaged_files(draw):
    pairs, data = draw(layouts())
    raw = bytearray(file_of(json.dumps(dict(pairs), ensure_ascii=False), data))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(raw) - 1))
        action = draw(st.sampled_from(["byte", "digit", "letter", "structure", "delete", "insert", "repeat", "swap"]))
        other = draw(st.integers(0, len(raw) - 1))
        if action == "byte":
            raw[at] = draw(st.integers(0, 255))
        elif action == "letter" and chr(raw[at]).isalpha():  # mostly gives another valid name
            raw[at] = draw(st.sampled_from(b"abIFU"))
        elif action == "digit" and chr(raw[at]).isdigit():
            raw[at] = draw(st.sampled_from(b"0123456789"))
        elif action == "structure":
            raw[at] = draw(st.sampled_from(b'{}[]",: '))
        elif action == "delete" and len(raw) > 1:
            del raw[at]
        elif action == "insert":
            raw.insert(at, draw(st.integers(0, 255)))
        elif action == "repeat":
            raw[at:at] = raw[min(at, other) : max(at, other)]
        else:
            raw[at], raw[other] = raw[other], raw[at]
    if draw(st.booleans()) and len(raw) >= 8:  # corrects the length, so that only the text is damaged
        raw[:8] = struct.pack("<Q", max(0, len(raw) - 8 - len(data)))
    return bytes(raw)


@settings_of(500)
@given(raw=damaged_files())
def test_damaged_files_get_the_verdict_of_the_reference_library(tmp_path, raw):
    expected = load_reference(tmp_path, raw)
    try:
        found = load(tmp_path, raw)
    except CheckpointError as error:
        text = str(error)
        assert "model.safetensors" in text
        assert expected is None or re.search(STRICTER, text), (text, expected)
    else:
        assert {name: value[:2] for name, value in found.items()} == expected


@settings_of(120)
@given(raw=st.binary(max_size=200))
def test_noise(tmp_path, raw):
    (tmp_path / "model.safetensors").write_bytes(raw)
    assert load_reference(tmp_path, raw) is None
    with pytest.raises(CheckpointError, match=r"^model\.safetensors: "):
        Checkpoint.open(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_a_link_to_itself(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be opened"):
        Checkpoint.open(tmp_path)
