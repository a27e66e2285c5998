"""Predictions on disk, so that a reference and what is compared with it need not be in memory together.

A file: 8 bytes ``exlpred1``; the header's length, u64; the header, JSON; all passages' ids, i32; then a record for each
predicted token, in order. Little-endian, no padding. A record is the token's own -ln p (f64, exact), the range r of the
log-probabilities (f64), and a code c (u16) for each token of the vocabulary: with t the largest log-probability,

    ln p = t - r (c / 65535)**2        decoded, these are normalized again (log_softmax in f64)

so that steps are finest where the probability is: with a range of 40 nats, ln p is off by at most 1e-4 one nat below
the likeliest token and 4e-4 sixteen nats below. Measured on SmolLM2-135M (V = 49152) against itself with another type
of cache, by ``scripts/recording_error.py``, this is how far the divergence's mean and 99.9th percentile move; beside
it, what log-probabilities in f16, of the same size, would do:

    cache   KL, mean   99.9th      mean      99.9th       f16: mean     99.9th
    q4      5.8e-2     7.9e-1   -0.0001 %   0.0013 %       0.0016 %   -0.0210 %
    q8      2.0e-4     2.0e-3   -0.0056 %  -0.0072 %       0.0982 %    0.2340 %
    f16     6.0e-7     1.1e-5    0.2397 %   1.4779 %      32.3388 %   -0.0884 %

A file of n predicted tokens has about 2 n V bytes: 300 MB per 1,000 tokens for a vocabulary of 152,000.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from exl.errors import ConfigError, NotFiniteError
from exl.evaluation.passages import Passage
from exl.replace_file import replace_file, sync_folder
from exl.units import format_bytes

MAGIC = b"exlpred1"
_MAX_HEADER = 1 << 28
_STEPS = 65535
SLICE_VALUES = 1 << 21  # log-probabilities that are worked on at once: 16 MiB in f64

# Log-probabilities f64 [rows, V] of one passage's predicted tokens, in slices.
Predict = Callable[[Passage], Iterable[torch.Tensor]]


def record(
    path: str | Path,
    passages: Sequence[Passage],
    vocab_size: int,
    model: Mapping[str, Any],
    predict: Predict,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the predictions of all ``passages``. ``model``: what made them, plain JSON.

    The file has its name only when it is whole; until then it is ``path`` with ``.part``, and a second call with the
    same passages and model goes on after the last whole passage. If ``path`` is whole and of the same, nothing is
    done. ``progress``: called with the passages that are done, and all. Raises ``ConfigError`` if ``path`` or its part
    is something else, if the disk has too little room, or if it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    head = _head(passages, vocab_size, model)
    row_bytes = _row_type(vocab_size).itemsize
    try:
        if path.exists():
            _check_same(path, head)
            return
        with open(part, "r+b" if part.exists() else "w+b") as file:
            if os.fstat(file.fileno()).st_size:
                _check_same(part, head)
            else:
                file.write(head)
            done, stop = _whole_passages(file, passages, len(head), row_bytes)
            file.truncate(stop)
            file.seek(stop)
            _check_room(path, sum(p.num_predicted for p in passages[done:]) * row_bytes)
            for i, passage in enumerate(passages[done:], done):
                if progress is not None:
                    progress(i, len(passages))
                _write_passage(file, passage, predict(passage))
            file.flush()
            os.fsync(file.fileno())
        replace_file(part, path)
        sync_folder(path.parent)
    except OSError as error:
        raise ConfigError(f"record: {path}: cannot be written: {error.strerror or error}") from None


def _head(passages: Sequence[Passage], vocab_size: int, model: Mapping[str, Any]) -> bytes:
    ids = np.array([i for passage in passages for i in passage.ids], "<i4").tobytes()
    header = {
        "vocab_size": vocab_size,
        "lengths": [len(passage.ids) for passage in passages],
        "first": [passage.first for passage in passages],
        "ids_sha256": hashlib.sha256(ids).hexdigest(),
        "model": dict(model),
    }
    text = json.dumps(header, sort_keys=True).encode()
    return MAGIC + len(text).to_bytes(8, "little") + text + ids


def _check_same(path: Path, head: bytes) -> None:
    with open(path, "rb") as file:
        if file.read(len(head)) != head:
            raise ConfigError(
                f"record: {path}: found another file, expected predictions of the same model, options and text: "
                "remove it or give another name"
            )


def _whole_passages(file: BinaryIO, passages: Sequence[Passage], start: int, row_bytes: int) -> tuple[int, int]:
    """How many are in the file, and where they end in it."""
    size, done = os.fstat(file.fileno()).st_size, 0
    while done < len(passages) and start + passages[done].num_predicted * row_bytes <= size:
        start += passages[done].num_predicted * row_bytes
        done += 1
    return done, start


def _check_room(path: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        raise ConfigError(f"record: {path}: needs {format_bytes(num_bytes)}, the disk has {format_bytes(free)} free")


def _write_passage(file: BinaryIO, passage: Passage, slices: Iterable[torch.Tensor]) -> None:
    targets = torch.tensor(passage.ids[passage.first :])
    start = 0
    for rows in slices:
        file.write(encode(rows, targets[start : start + len(rows)]).tobytes())
        start += len(rows)
    if start != passage.num_predicted:
        raise ValueError(f"found predictions of {start} tokens, expected {passage.num_predicted}")


def _row_type(vocab_size: int) -> np.dtype:
    return np.dtype([("loss", "<f8"), ("range", "<f8"), ("codes", "<u2", (vocab_size,))])


def encode(log_probs: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """Records [n] of log-probabilities f64 [n, V], each row of which predicts the token ``targets[i]``. Raises
    ``NotFiniteError``."""
    below = log_probs.amax(1, keepdim=True) - log_probs
    spread = below.amax(1)
    if not bool(torch.isfinite(spread).all()):
        raise NotFiniteError("record: found a log-probability of nan or inf, expected finite numbers")
    spread.clamp_(min=torch.finfo(torch.float64).tiny)  # all alike: codes of 0, whatever the range
    found = np.empty(len(log_probs), _row_type(log_probs.shape[1]))
    found["loss"] = -log_probs.gather(1, targets[:, None])[:, 0].numpy()
    found["range"] = spread.numpy()
    found["codes"] = below.div_(spread[:, None]).sqrt_().mul_(_STEPS).round_().numpy()
    return found


def decode(records: np.ndarray) -> torch.Tensor:
    """The log-probabilities of records [n]: f64 [n, V]."""
    shares = torch.from_numpy(records["codes"].astype(np.float64)).div_(_STEPS).square_()
    return torch.log_softmax(shares.mul_(-torch.from_numpy(records["range"].copy())[:, None]), 1)


class Recording(contextlib.AbstractContextManager["Recording"]):
    """A file that ``record`` has finished, open for reading."""

    passages: tuple[Passage, ...]
    vocab_size: int
    model: dict[str, Any]  # what made it

    def __init__(self, path: str | Path) -> None:
        """Raises ``ConfigError`` if the file cannot be read, or is none of these or damaged."""
        self.path = Path(path)
        try:
            self._file = open(path, "rb")  # noqa: SIM115  closed by ``__exit__``
        except OSError as error:
            raise ConfigError(f"against: {path}: cannot be read: {error.strerror or error}") from None
        try:
            self._read_head()
        except BaseException:
            self._file.close()
            raise

    @staticmethod
    def is_one(path: str | Path) -> bool:
        """Whether a file begins like one of these."""
        try:
            with open(path, "rb") as file:
                return file.read(len(MAGIC)) == MAGIC
        except OSError:
            return False

    def losses(self, idx: int) -> np.ndarray:
        """-ln p of each predicted token of passage ``idx``, exact: f64 [num_predicted]."""
        # A view would keep its records, with all their codes, until the last one is read.
        return np.concatenate([records["loss"].copy() for records in self._records(idx)])

    def log_probs(self, idx: int) -> Iterator[torch.Tensor]:
        """Of each predicted token of passage ``idx``: f64 [rows, V], in slices; the rounding is the module's."""
        return map(decode, self._records(idx))

    def _records(self, idx: int) -> Iterator[np.ndarray]:
        row, num_rows = _row_type(self.vocab_size), self.passages[idx].num_predicted
        most = max(1, SLICE_VALUES // self.vocab_size)
        at = self._starts[idx]
        for start in range(0, num_rows, most):
            count = min(most, num_rows - start)
            self._file.seek(at + start * row.itemsize)
            yield np.frombuffer(self._file.read(count * row.itemsize), row)

    def _read_head(self) -> None:
        found = self._file.read(len(MAGIC) + 8)
        length = int.from_bytes(found[len(MAGIC) :], "little")
        if found[: len(MAGIC)] != MAGIC or length > _MAX_HEADER:
            raise ConfigError(f"against: {self.path}: found no file of predictions, as exl eval --record writes them")
        try:
            header = json.loads(self._file.read(length))
            self.vocab_size, self.model = int(header["vocab_size"]), dict(header["model"])
            lengths, firsts = list(map(int, header["lengths"])), list(map(int, header["first"]))
            if self.vocab_size < 1 or min(lengths, default=0) < 0:
                raise ValueError("sizes below 0")
            ids = self._file.read(4 * sum(lengths))
            if hashlib.sha256(ids).hexdigest() != header["ids_sha256"]:
                raise ValueError("token ids that are not those of the header")
            tokens = np.frombuffer(ids, "<i4").tolist()
            ends = np.cumsum(lengths).tolist()
            self.passages = tuple(
                Passage(tuple(tokens[end - length : end]), first)
                for end, length, first in zip(ends, lengths, firsts, strict=True)
            )
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            raise ConfigError(f"against: {self.path}: damaged: {error}") from None
        sizes = [passage.num_predicted * _row_type(self.vocab_size).itemsize for passage in self.passages]
        stops = np.cumsum([self._file.tell(), *sizes]).tolist()
        self._starts = stops[:-1]
        size = os.fstat(self._file.fileno()).st_size
        if size != stops[-1]:
            raise ConfigError(f"against: {self.path}: damaged: found {size} bytes, expected {stops[-1]}")

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()
