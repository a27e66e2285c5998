"""A checkpoint's folder -> a generator that is ready to run: everything put together, no text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exl.cache import KVCache
from exl.config import GenerationDefaults, ModelConfig
from exl.errors import ConfigError
from exl.generator import Generator
from exl.layout import LayerLayout
from exl.loader import ModelWeights, load_weights
from exl.memory import MemoryPlan
from exl.models.decoder import Decoder
from exl.ops.torch_ops import TorchOps, cpu_target
from exl.page_pool import PagePool
from exl.planning import EngineOptions, open_model, plan_model
from exl.progress import Progress
from exl.quant_config import QuantConfig
from exl.runner import Runner

# Up to so many tokens, a 4-bit prompt is quicker through the decode kernel than through dequantized panels.
_MAX_DECODE_PROMPT = 32


@dataclass(frozen=True)
class Engine:
    config: ModelConfig
    quant: QuantConfig | None
    plan: MemoryPlan
    generator: Generator
    weights: ModelWeights

    def close(self) -> None:
        """Gives the weights' memory back and ends the stream's thread. Nothing may be run afterwards."""
        self.weights.close()


def load_engine(folder: Path, options: EngineOptions, progress: Progress | None = None) -> Engine:
    """Plans, then loads. Raises ``ExlError``; ``MemoryBudgetError`` before anything is allocated."""
    if options.on_gpu:
        raise ConfigError("device: found a GPU, but this version of exl plans for GPUs and computes on the CPU only")
    with open_model(folder, options.head) as files:
        config = files.config
        plan, model = plan_model(files, options, cpu_target())
        ops = TorchOps(model.target, model.kv_layout, model.limits)
        kv = KVCache(model.kv_layout, plan.num_pages, ops.device)
        weights = load_weights(
            files.checkpoint,
            config,
            files.quant,
            files.manifest,
            ops,
            progress,
            resident=plan.placement.resident if plan.placement.num_streamed else None,
            num_slots=plan.num_slots,
            packed_folder=None if options.packed_folder is None else Path(options.packed_folder).expanduser(),
        )
        eos_ids = GenerationDefaults.from_folder(files.folder).eos_ids or config.eos_ids
    runner = Runner(
        decoder=Decoder(config, ops),
        weights=weights.source,
        embed=weights.embed,
        final_norm=weights.final_norm,
        head=weights.head,
        kv=kv,
        limits=model.limits,
    )
    short = min(_MAX_DECODE_PROMPT, model.limits.max_rows) if all(map(_all_int4, model.layers)) else 1
    generator = Generator(runner, PagePool(plan.num_pages), plan.context, eos_ids, short)
    return Engine(config, files.quant, plan, generator, weights)


def _all_int4(layer: LayerLayout) -> bool:
    return all(linear.kind == "int4pack" for segments in layer.linears.values() for linear in segments)
