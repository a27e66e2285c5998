"""Pages that are evicted from a GPU, in page-locked memory of the host: bytes are moved, so bits are the same.

Copies have a stream of their own. One to the host waits for the arithmetic that was queued before it, and arithmetic
that is queued later, which may write to the page, waits for the copy; back to the device it is the same. The host waits
for neither. On a CPU there is no such tier: the cache is in RAM already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from exl.cache.kv import KVCache
from exl.memory.copies import CopyEngine, Event, copy_engine
from exl.memory.device import device_tensor, pinned
from exl.memory.host import HostBuffer


def ram_tier(kv: KVCache, num_bytes: int, fence: Callable[[], None], stack: ExitStack) -> RamTier | None:
    """A tier of at most ``num_bytes``, None if that is less than a page. It takes a page's bytes on the device, too.
    ``fence``: ``Ops.fence``. ``stack`` gives the memory back; before that the device must have done its work. Raises
    ``MemoryBudgetError``."""
    num_slots = num_bytes // kv.page_bytes
    if num_slots == 0:
        return None
    device = kv.slab.device
    buffer = HostBuffer(num_slots * kv.page_bytes, "KV cache in RAM")
    stack.callback(buffer.close)
    if device.type == "cuda":
        stack.enter_context(pinned(buffer, device))
    return RamTier(kv, torch.from_numpy(buffer.array), copy_engine(device), fence)


class RamTier:
    """A ``Tier`` of a ``PagePool``: which page is in which slot is the pool's business."""

    def __init__(
        self, kv: KVCache, memory: torch.Tensor, engine: CopyEngine, fence: Callable[[], None] = lambda: None
    ) -> None:
        """``memory``: u8 on the host, a multiple of ``kv.page_bytes``. ``fence`` is called before each time that copies
        are queued: the next kernel must not begin before what is in front of it has ended."""
        self._kv, self._engine, self._fence = kv, engine, fence
        self._slots = memory.view(-1, kv.page_bytes)
        self.num_slots = len(self._slots)
        # A page's layers lie apart on the device. One copy over the bus is faster than one for each of them.
        self._staging = device_tensor(kv.page_bytes, kv.slab.device, "KV cache in RAM, copies")
        self._saved: Event | None = None

    def save(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        """Pages whose bytes no arithmetic changes that is queued already."""
        self._fence()
        event = self._engine.record()
        for page, slot in zip(pages, slots, strict=True):
            for part, words in self._staged(page):
                event = self._engine.copy(part, words, event)
            event = self._engine.copy(self._slots[slot], self._staging, None)
        self._engine.wait(event)
        self._saved = event

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        self._fence()
        event = self._engine.record()
        for slot, page in zip(slots, pages, strict=True):
            self._engine.copy(self._staging, self._slots[slot], None)
            for part, words in self._staged(page):
                event = self._engine.copy(words, part, event)
        self._engine.wait(event)

    def read(self, slot: int, out: torch.Tensor) -> None:
        """A page's bytes as ``KVCache.read_page`` gives them; waits until they have come."""
        if self._saved is not None:
            self._saved.synchronize()
        out.copy_(self._slots[slot])

    def _staged(self, page: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Parts of the staging memory, and the words of a page that belong there."""
        return list(zip(self._kv.split_words(self._staging), self._kv.page_words(page), strict=True))
