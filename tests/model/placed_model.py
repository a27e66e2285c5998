"""A model whose layers are placed as a test asks. Imports little, because child processes start with it."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from exl.cache.kv import KVCache
from exl.cache.page_pool import PagePool
from exl.engine.generator import Generator
from exl.engine.runner import Runner
from exl.layout.kv import KVLayout
from exl.layout.steps import StepLimits
from exl.models.decoder import Decoder
from exl.ops.cpu_target import torch_target
from exl.ops.torch_ops import TorchOps
from exl.planning.from_headers import open_model
from exl.progress import Progress
from exl.sampling_params import SamplingParams
from exl.weights.loader import WeightPlaces, load_weights
from exl.weights.packed_store import list_packed

NUM_LAYERS = 4
CONTEXT = 64
IDS = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(3)).tolist()


class PlacedModel:
    """Weights in the requested places, and a generator that uses them."""

    def __init__(
        self,
        folder: Path,
        packed_folder: Path | None,
        resident=(),
        num_buffers: int = 2,
        progress: Progress | None = None,
    ):
        with open_model(folder) as files:
            config = files.config
            kv_layout = KVLayout("f32", config.num_layers, config.num_kv_heads, config.head_dim)
            limits = StepLimits(
                max_rows=16,
                window_rows=32,  # two chunks per window, two windows for the prompt
                max_logit_rows=16,
                max_context=CONTEXT,
                hidden_size=config.hidden_size,
                qkv_width=config.qkv_width,
                attn_width=config.attn_width,
                intermediate_size=config.intermediate_size,
                vocab_size=config.vocab_size,
                head_dim=config.head_dim,
            )
            ops = TorchOps(torch_target(), kv_layout, limits)
            places = WeightPlaces(resident, num_buffers=num_buffers, packed_folder=packed_folder)
            self.weights = load_weights(files, ops, places, progress)
            self.sizes = [layout.num_bytes for layout in files.manifest.layouts(ops.target).layers]
        weights, kv = self.weights, KVCache(kv_layout, CONTEXT // 64, ops.device)
        self.source = weights.source
        runner = Runner(Decoder(config, ops), weights, kv, limits)
        self.generator = Generator(runner, PagePool(CONTEXT // 64), CONTEXT, (), 1)

    def logits(self) -> torch.Tensor:
        return torch.cat([chunk.clone() for chunk in self.generator.logits(IDS)])

    def tokens(self, count: int = 6) -> list[int]:
        params = SamplingParams(max_tokens=count, temperature=1.0, seed=5)
        return [token.token_id for token in self.generator.stream(IDS[:10], params)]

    def outputs(self) -> tuple[bytes, list[int]]:
        return self.logits().numpy().tobytes(), self.tokens()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.weights.close()


def reader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("exl")]


def packed_file(folder: Path) -> Path:
    (info,) = list_packed(folder)
    return info.path
