"""The memory of tensors, whoever has them."""

from __future__ import annotations

import gc

import torch


def live_bytes() -> int:
    """Bytes of the storages of all tensors that the garbage collector tracks, each storage once."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor):  # isinstance also asks __class__, for which lazy objects warn
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
