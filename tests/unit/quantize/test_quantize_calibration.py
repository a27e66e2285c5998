"""Calibration text -> sequences -> batches."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from exl.batch import PAGE_SIZE
from exl.errors import ConfigError
from exl.quantize.calibration import make_chunks, read_calibration
from exl.quantize.options import QuantizeOptions
from exl.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[2] / "data"
BOS = 1
LINES = ["Once upon a time there was a cat.", "", "Tom had a dog. " * 20, "  The end.  "]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DATA / "stories260K")


def read(tmp_path: Path, tokenizer: Tokenizer, documents: str, num_samples: int = 100, seq_len: int = 32):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return [ids.tolist() for ids in read_calibration(path, tokenizer, num_samples, seq_len, documents)]


def joined(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text.strip(), bos=False)


def test_lines_are_sequences_of_their_own(tmp_path, tokenizer):
    found = read(tmp_path, tokenizer, "lines")
    assert all(2 <= len(ids) <= 32 and ids[0] == BOS and BOS not in ids[1:] for ids in found)
    assert found[0] == [BOS, *plain(tokenizer, LINES[0])]
    assert found[-1] == [BOS, *plain(tokenizer, LINES[3])]
    assert joined(ids[1:] for ids in found[1:-1]) == plain(tokenizer, LINES[2])
    assert all(len(ids) == 32 for ids in found[1:-2])


def test_packed_sequences_are_full(tmp_path, tokenizer):
    found = read(tmp_path, tokenizer, "packed")
    assert all(len(ids) == 32 for ids in found[:-1])
    assert all(ids[0] == BOS for ids in found)
    without_bos = [token for ids in found for token in ids if token != BOS]
    assert without_bos == joined(plain(tokenizer, line) for line in LINES)
    assert any(BOS in ids[1:] for ids in found)


def test_the_whole_file_is_one_document(tmp_path, tokenizer):
    found = read(tmp_path, tokenizer, "whole")
    assert all(ids[0] == BOS and BOS not in ids[1:] for ids in found)
    assert joined(ids[1:] for ids in found) == plain(tokenizer, "\n".join(LINES))


def test_no_more_is_read_than_asked_for(tmp_path, tokenizer):
    found = read(tmp_path, tokenizer, "lines", num_samples=2)
    assert 2 * 32 <= sum(map(len, found)) < 3 * 32
    assert found == read(tmp_path, tokenizer, "lines")[: len(found)]


@pytest.mark.parametrize("documents", ["lines", "packed", "whole"])
def test_too_short(tmp_path, tokenizer, documents):
    with pytest.raises(ConfigError, match=r"text\.txt: found \d+ tokens, expected at least those of one sequence, 500"):
        read(tmp_path, tokenizer, documents, seq_len=500)


def test_chunks_hold_whole_sequences_on_pages_of_their_own():
    lengths = [100, 70, 64, 1, 200, 30]
    sequences = [np.full(length, i, dtype=np.int32) for i, length in enumerate(lengths)]
    chunks = make_chunks(sequences, 240)
    assert [chunk.context_len.tolist() for chunk in chunks] == [[100, 70, 64, 1], [200, 30]]
    for chunk in chunks:
        assert len(set(chunk.slots.tolist())) == chunk.num_rows
        for b, length in enumerate(chunk.context_len):
            rows = slice(chunk.query_start[b], chunk.query_start[b + 1])
            assert len(set(chunk.token_ids[rows].tolist())) == 1
            assert chunk.positions[rows].tolist() == list(range(length))
            pages = chunk.page_table[b][chunk.positions[rows] // PAGE_SIZE]
            assert (chunk.slots[rows] == pages * PAGE_SIZE + chunk.positions[rows] % PAGE_SIZE).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits: found 5, expected one of 2, 3, 4, 8"),
        ({"bits": True}, "bits: found True"),
        ({"group_size": 0}, "group_size: found 0, expected a whole number of at least 2 or -1"),
        ({"group_size": "128"}, "group_size: found '128'"),
        ({"damp": 0.0}, r"damp: found 0\.0"),
        ({"damp": float("nan")}, "damp: found nan"),
        ({"num_samples": 0}, "num_samples: found 0"),
        ({"seq_len": 4}, "seq_len: found 4, expected a whole number of at least 8"),
        ({"method": "awq"}, "method: found 'awq', expected one of gptq, rtn"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format: found 'marlin'"),
        ({"documents": "line"}, "documents: found 'line'"),
        ({"calibration": None}, "calibration: found nothing"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        QuantizeOptions(**{"calibration": "text.txt", **options})
