"""Prefixes go to a file and come back with the same bytes; a file that is damaged or of something else is refused."""

from __future__ import annotations

import errno
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exl.batch import PAGE_SIZE
from exl.cache import file as cache_file
from exl.cache.file import ENTRY, load_prefixes, save_prefixes
from exl.cache.kv import KVCache
from exl.cache.page_pool import PagePool
from exl.errors import CheckpointError, ConfigError, ExlError

from .slabs import LAYOUTS, SMALL, filled, page_bytes

KEY = {"model": "abc", "kv_cache": "q4", "prefill_chunk": 512}


def text(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1000, count).tolist()


def store(pool: PagePool, ids: list[int], num_exact: int | None = None) -> None:
    taken = pool.take_prefix(ids, lambda src, dst: None, num_pages=-(-len(ids) // PAGE_SIZE))
    pool.remember(ids, taken.pages, num_exact)
    pool.release(taken.pages)


def bytes_of(pool: PagePool, kv: KVCache, ids: list[int]) -> bytes:
    """Of the pages that hold a text; the last, which may be partly filled, too."""
    known = pool.known_pages()
    found, place = [], -1
    for start in range(0, len(ids), PAGE_SIZE):
        tokens = tuple(ids[start : start + PAGE_SIZE])
        place = next(i for i, page in enumerate(known) if (page.parent, page.tokens) == (place, tokens))
        found += [part.tobytes() for part in page_bytes(kv, known[place].page)]
    return b"".join(found)


SYSTEM = text(128, 9)
TEXTS = [SYSTEM + text(100, 1), SYSTEM + text(40, 2), text(30, 3)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    pool, kv = PagePool(9), filled(SMALL, 9)
    for ids in TEXTS:
        store(pool, ids, num_exact=128)
    path = tmp_path_factory.mktemp("saved") / "prefixes"
    assert save_prefixes(path, pool, kv, KEY) == 128 + 100 + 40 + 30
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefixes_come_back_with_their_bytes(layout, tmp_path):
    pool, kv = PagePool(9), filled(layout, 9)
    for ids in TEXTS:
        store(pool, ids, num_exact=128)
    num_tokens = save_prefixes(tmp_path / "saved", pool, kv, KEY)
    other, other_kv = PagePool(20, null=True), filled(layout, 20, seed=1)
    assert load_prefixes(tmp_path / "saved", other, other_kv, KEY) == num_tokens
    other.check([])
    for ids in TEXTS:
        assert other.find(ids) == pool.find(ids) or other.find(ids).num_tokens == len(ids)
        assert other.find(ids).num_exact == min(len(ids), 128)
        assert bytes_of(other, other_kv, ids) == bytes_of(pool, kv, ids)
    assert os.listdir(tmp_path) == ["saved"]


def test_what_was_used_last_comes_first_where_not_all_fits(saved):
    pool, kv = PagePool(4), filled(SMALL, 4)
    held = pool.allocate(1)
    assert load_prefixes(saved, pool, kv, KEY) == 30 + 128
    pool.check([held])
    assert [pool.find(ids).num_tokens for ids in TEXTS] == [128, 128, 30]
    assert pool.num_free == 3


def test_order_of_use_comes_back(saved):
    pool, kv = PagePool(7), filled(SMALL, 7)
    load_prefixes(saved, pool, kv, KEY)
    pool.release(pool.allocate(2))  # one is free, one evicted: the end of the text that was used first
    assert [pool.find(ids).num_tokens for ids in TEXTS] == [192, 168, 30]


def test_a_pool_that_knows_some_of_it_takes_the_rest(saved):
    pool, kv = PagePool(9), filled(SMALL, 9)
    store(pool, TEXTS[0])
    mine = bytes_of(pool, kv, TEXTS[0])
    assert load_prefixes(saved, pool, kv, KEY) == 298
    assert load_prefixes(saved, pool, kv, KEY) == 298
    pool.check([])
    assert bytes_of(pool, kv, TEXTS[0]) == mine
    assert [pool.find(ids).num_tokens for ids in TEXTS] == [len(ids) for ids in TEXTS]
    assert pool.num_kept == 6


def test_others_are_forgotten_for_it_but_never_what_is_held(saved):
    pool, kv = PagePool(6), filled(SMALL, 6)
    store(pool, text(192, 20))
    held = pool.take_prefix(text(64, 20), lambda src, dst: None).pages
    before = page_bytes(kv, held[0])
    assert load_prefixes(saved, pool, kv, KEY) == 30 + 128 + 40 + 64
    pool.check([held])
    assert all(map(np.array_equal, page_bytes(kv, held[0]), before))
    assert pool.find(text(192, 20)).num_tokens == 64


def test_an_empty_cache_is_a_file_too(tmp_path):
    pool, kv = PagePool(2), filled(SMALL, 2)
    assert save_prefixes(tmp_path / "a", pool, kv, KEY) == 0
    assert load_prefixes(tmp_path / "a", pool, kv, KEY) == 0


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(path: Path, kind: type[ExlError], match: str, layout=SMALL, key=KEY) -> None:
    """One error that names the file, and nothing of it is in the pool."""
    pool, kv = PagePool(9), filled(layout, 9)
    before = kv.slab.clone()
    with pytest.raises(kind, match=match) as caught:
        load_prefixes(path, pool, kv, key)
    assert path.name in str(caught.value)
    pool.check([])
    assert pool.num_kept == 0
    if kind is ConfigError:
        assert torch.equal(kv.slab, before)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": "xyz"}, "'model': found 'abc', expected 'xyz'"),
        ({"prefill_chunk": 128}, "'prefill_chunk': found 512, expected 128"),
        ({"kv_cache": "f16", "model": "x"}, "'kv_cache': found 'q4', expected 'f16'; 'model'"),
        ({"backend": "cuda"}, "'backend': found None, expected 'cuda'"),
    ],
)
def test_another_key_is_named(saved, change, match):
    refused(saved, ConfigError, match, key=KEY | change)


def test_pages_of_another_size_are_named(saved):
    refused(saved, ConfigError, "found pages of .* bytes, expected", layout=LAYOUTS[0].values[0])


def test_a_file_that_is_not_there_or_cannot_be_written(tmp_path, saved, monkeypatch):
    refused(tmp_path / "none", ConfigError, "cannot be read: No such file")
    refused(tmp_path, ConfigError, "cannot be read")
    pool, kv = PagePool(9), filled(SMALL, 9)
    with pytest.raises(ConfigError, match="cannot be written"):
        save_prefixes(tmp_path / "none" / "a", pool, kv, KEY)
    for name in ("a\0b",):
        with pytest.raises(ConfigError, match="cannot be written"):
            save_prefixes(name, pool, kv, KEY)
        with pytest.raises(ConfigError, match="cannot be read"):
            load_prefixes(name, pool, kv, KEY)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_an_earlier_file_stays_if_writing_fails(tmp_path, monkeypatch, error):
    path = tmp_path / "a"
    path.write_bytes(b"before")
    pool, kv = PagePool(9), filled(SMALL, 9)
    store(pool, TEXTS[0])

    def fail(*args) -> None:
        raise error

    monkeypatch.setattr(cache_file.os, "fsync", fail)
    with pytest.raises(ConfigError if isinstance(error, OSError) else KeyboardInterrupt):
        save_prefixes(path, pool, kv, KEY)
    assert os.listdir(tmp_path) == ["a"]
    assert path.read_bytes() == b"before"


def test_every_shorter_file_is_refused(saved, tmp_path):
    raw = saved.read_bytes()
    path = tmp_path / "cut"
    for length in [*range(64), *range(64, len(raw), 97), len(raw) - 1]:
        path.write_bytes(raw[:length])
        refused(path, CheckpointError, "cut")
    path.write_bytes(raw + b"\0")
    refused(path, CheckpointError, "cut off or damaged")


def test_every_flipped_bit_is_noticed(saved, tmp_path):
    """In the header and table at any place, in pages at some of them."""
    raw = bytearray(saved.read_bytes())
    path = tmp_path / "flipped"
    head = len(raw) - 6 * filled(SMALL, 1).page_bytes
    for place in [*range(0, head, 5), *range(head, len(raw), 211)]:
        raw[place] ^= 1 << place % 8
        path.write_bytes(raw)
        refused(path, CheckpointError, "flipped")
        raw[place] ^= 1 << place % 8


def rewrite(path: Path, saved: Path, header=None, table=None) -> None:
    """A file with right checksums whose header or table somebody has changed."""
    raw = saved.read_bytes()
    num_bytes = int.from_bytes(raw[8:12], "little")
    fields = json.loads(raw[16 : 16 + num_bytes])
    rows = np.frombuffer(raw[16 + num_bytes :], ENTRY, fields["num_pages"]).copy()
    pages = raw[16 + num_bytes + rows.nbytes :]
    if table is not None:
        table(rows)
    new = json.dumps(fields | (header or {})).encode() if not isinstance(header, bytes) else header
    head = new + rows.tobytes()
    path.write_bytes(
        b"exlpages" + len(new).to_bytes(4, "little") + zlib.crc32(head).to_bytes(4, "little") + head + pages
    )


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"version": 2}, "found version 2, this exl reads 1"),
        ({"format": "other"}, "found format 'other'"),
        ({"num_pages": -1}, "num_pages: found -1, expected a whole number"),
        ({"num_pages": True}, "num_pages: found True"),
        ({"num_pages": 6.0}, "num_pages: found 6.0"),
        ({"num_pages": 10**30}, "cut off or damaged"),
        ({"page_bytes": 0}, "cut off or damaged"),
        ({"key": [1]}, "key: found \\[1\\], expected an object"),
        (b"[" * 60000, "expected JSON"),
        (b"[]", "found format \\[\\]"),
        (b"\xff\xfe", "expected JSON"),
        (b" " * 70000, "expected at most 65536"),
        (b"1" * 60000, "JSON|format"),
    ],
)
def test_headers_that_somebody_wrote(saved, tmp_path, header, match):
    rewrite(tmp_path / "a", saved, header)
    refused(tmp_path / "a", CheckpointError, match)


@pytest.mark.parametrize(
    ("field", "place", "value", "match"),
    [
        ("parent", 2, 2, "page 2: expected one after the page before it"),
        ("parent", 2, 5, "page 2: expected one after the page before it"),
        ("parent", 2, -2, "page 2: expected one after the page before it"),
        ("parent", 2, 0, "page 2: expected one behind a full page"),  # the first has 30 tokens
        ("num_tokens", 1, 65, "page 1: expected one of 1 to 64 tokens"),
        ("num_tokens", 0, 0, "page 0: expected one of 1 to 64 tokens"),
        ("num_exact", 0, 31, "page 0: expected one with at most as many exact"),
        ("num_exact", 1, 10, "page 2: expected one exact only behind an exact page"),
        ("tokens", 1, -1, "page 1: expected one of token ids"),
        ("num_tokens", 3, 39, "page 3: expected one of token ids"),
    ],
)
def test_tables_that_somebody_wrote(saved, tmp_path, field, place, value, match):
    def change(table) -> None:
        if field == "tokens":
            table[field][place][3] = value
        else:
            table[field][place] = value

    rewrite(tmp_path / "a", saved, table=change)
    refused(tmp_path / "a", CheckpointError, match)


def test_a_text_that_occurs_twice_is_refused(saved, tmp_path):
    def change(table) -> None:
        table[5] = table[4]

    rewrite(tmp_path / "a", saved, table=change)
    refused(tmp_path / "a", CheckpointError, "two pages have the same text")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=400))
@example(b"exlpages" + b"\xff" * 8)
def test_bytes_that_are_no_such_file(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "noise"
    path.write_bytes(raw)
    refused(path, CheckpointError, "noise")
