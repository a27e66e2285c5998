"""A model on the Hugging Face hub, read for a plan: small files as a whole, of safetensors files only some bytes.

What the network returns is untrusted, like any file: sizes are bounded before anything is read, an answer that does
not match the request is an error, and headers go through the same checks as those of local files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.config_reader import MAX_JSON_BYTES, parse_json
from exl.checkpoint.header import MAX_HEADER_BYTES
from exl.checkpoint.hub_errors import Token, explain_hub_errors
from exl.errors import CheckpointError

_NUM_REQUESTS = 8  # concurrent requests: each mostly waits
_NUM_RETRIES = 2  # after an answer that asks to retry later; huggingface_hub waits in between
_MAX_ORDER_BYTES = 256 << 20  # limit for all g_idx together: ten times those of a 70B model
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")

T, R = TypeVar("T"), TypeVar("R")


@dataclass(frozen=True)
class RemoteFolder:
    """A repository at one commit, made by ``exl.checkpoint.hub.find_headers``. A thread-safe ``FileSource``."""

    is_remote: ClassVar[bool] = True
    repo_id: str
    commit: str
    sizes: Mapping[str, int | None]  # bytes of its top-level files by name; None: the hub does not tell
    token: Token = field(default=None, repr=False)
    opened: dict[str, RemoteFile] = field(default_factory=dict, repr=False)

    @property
    def path(self) -> Path:
        return Path(self.repo_id)

    def names(self) -> list[str]:
        return sorted(self.sizes)

    def names_in(self, subfolder: str) -> list[str]:
        return []  # the hub was asked for top-level files alone

    def read_json(self, name: str) -> dict[str, Any] | None:
        """None if there is no such file. Raises the errors of ``exl.checkpoint.config_reader.read_json``, and
        ``CheckpointError`` for those of the hub and the network."""
        if name not in self.sizes:
            return None
        return parse_json(self._read_whole(name, MAX_JSON_BYTES), f"{self.repo_id}/{name}")

    def read_small(self, name: str) -> bytearray:
        return self._read_whole(name, MAX_HEADER_BYTES)

    def open(self, name: str) -> RemoteFile:
        start, num_bytes = self.read_range(name, 0, 8, "the header's length")
        file = self.opened[name] = RemoteFile(self, name, num_bytes, {0: start})
        return file

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        with ThreadPoolExecutor(_NUM_REQUESTS, "exl remote reader") as executor:
            try:
                return iter(list(executor.map(function, items)))
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)  # calls not yet started
                raise

    def open_checkpoint(self) -> Checkpoint:
        """Reads the headers and, of the data, only ``g_idx``, which a plan needs. Raises ``CheckpointError``."""
        checkpoint = Checkpoint.open_from(self)
        orders = [info for name, info in checkpoint.tensors.items() if name.endswith(".g_idx")]
        num_bytes = sum(info.num_bytes for info in orders)
        if num_bytes > _MAX_ORDER_BYTES:
            raise CheckpointError(f"{self.repo_id}: {num_bytes} bytes of g_idx, expected at most {_MAX_ORDER_BYTES}")
        self.map(lambda info: self.opened[info.file].read_ahead(info.start, info.stop, info.name), orders)
        return checkpoint

    def read_range(self, name: str, start: int, stop: int, what: str) -> tuple[bytes, int]:
        """Bytes ``start`` to ``stop``, or to the file's end if that comes first; and the file's size."""
        where, asked = f"{self.repo_id}/{name}", f"asked for bytes {start} to {stop - 1} ({what})"

        def take(response: Any) -> tuple[bytes, int]:
            if response.status_code != 206:  # its body may be the whole file, and is not read
                raise CheckpointError(
                    f"{where}: {asked}, the server answered with status {response.status_code} instead of these bytes "
                    "alone: download the model to plan it"
                )
            found = response.headers.get("Content-Range", "")
            match = _CONTENT_RANGE.fullmatch(found)
            num_bytes = int(match[3]) if match else 0
            end = min(stop, num_bytes)
            if match is None or (int(match[1]), int(match[2]) + 1) != (start, end):
                raise CheckpointError(f"{where}: {asked}, found Content-Range {found[:60]!r}")
            raw = _body(response, where, end - start, what)
            if len(raw) != end - start:
                raise CheckpointError(f"{where}: the answer ended after {len(raw)} of {end - start} bytes of {what}")
            return bytes(raw), num_bytes

        return self._get(name, {"Range": f"bytes={start}-{stop - 1}"}, take)

    def _read_whole(self, name: str, limit: int) -> bytearray:
        where = f"{self.repo_id}/{name}"
        return self._get(name, {}, lambda response: _body(response, where, limit, "the file"))

    def _get(self, name: str, headers: dict[str, str], take: Callable[[Any], T]) -> T:
        """Calls ``take`` with the response before its body is read; the part of the body that it leaves is dropped."""
        with explain_hub_errors(f"{self.repo_id}/{name}"):
            # Imported here because importing it takes longer than starting exl's command line.
            from huggingface_hub import hf_hub_url
            from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
            from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

            url = hf_hub_url(self.repo_id, name, revision=self.commit)
            headers = build_hf_headers(token=self.token, library_name="exl") | {"Accept-Encoding": "identity"} | headers
            # Its own retries after lost connections would yield a second time, which a with statement does not allow.
            retries = {"max_retries": _NUM_RETRIES, "retry_on_exceptions": ()}
            with http_stream_backoff(
                "GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT, **retries
            ) as response:
                hf_raise_for_status(response)
                return take(response)


def _body(response: Any, where: str, limit: int, what: str) -> bytearray:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise CheckpointError(f"{where}: found Content-Encoding {encoding[:40]!r}, expected plain bytes")
    raw = bytearray()
    for piece in response.iter_raw():
        raw += piece
        if len(raw) > limit:
            raise CheckpointError(f"{where}: the server sent more than {limit} bytes of {what}")
    return raw


@dataclass(frozen=True)
class RemoteFile:
    """One safetensors file of a repository: one request per read, unless the bytes are already known."""

    folder: RemoteFolder
    name: str
    num_bytes: int
    known: dict[int, bytes]  # by offset

    def read_into(self, view: memoryview, offset: int, what: str) -> None:
        if len(self.known.get(offset, b"")) != len(view):
            self.read_ahead(offset, offset + len(view), what)
        view[:] = self.known[offset]

    def read_ahead(self, start: int, stop: int, what: str) -> None:
        raw, num_bytes = self.folder.read_range(self.name, start, stop, what) if stop > start else (b"", self.num_bytes)
        where = f"{self.folder.repo_id}/{self.name}"
        if num_bytes != self.num_bytes:
            raise CheckpointError(
                f"{where}: the file's size changed between requests: found {num_bytes} bytes, expected {self.num_bytes}"
            )
        if len(raw) != stop - start:
            raise CheckpointError(f"{where}: ended at byte {num_bytes} while reading {what}")
        self.known[start] = raw

    def modified_ns(self) -> int:
        return 0  # a commit's files do not change

    def close(self) -> None:
        pass
