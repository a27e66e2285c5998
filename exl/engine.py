"""A checkpoint's folder -> a generator that is ready to run: everything put together, no text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exl.batch import PAGE_SIZE
from exl.cache import KVCache
from exl.checkpoint import Checkpoint
from exl.config import GenerationDefaults, ModelConfig, read_json
from exl.errors import ConfigError
from exl.generator import Generator
from exl.layout import KV_BITS, KVLayout, LayerLayout, StepLimits
from exl.loader import Progress, load_weights
from exl.models.decoder import Decoder
from exl.models.manifest import read_manifest
from exl.ops.torch_ops import TorchOps, cpu_target
from exl.page_pool import PagePool
from exl.quant_config import QuantConfig, read_quant_config
from exl.runner import Runner
from exl.stream import ResidentWeights

_MAX_DEFAULT_CONTEXT = 8192  # a cache for 128k tokens that nobody asked for would not fit anywhere
_MAX_LOGITS_BYTES = 32 << 20
# Up to so many tokens, a 4-bit prompt is quicker through the decode kernel than through dequantized panels.
_MAX_DECODE_PROMPT = 32


@dataclass(frozen=True)
class EngineOptions:
    """Checked when made: ``ConfigError`` names the option, what was found and what was expected."""

    device: str = "auto"
    context: int | None = None  # tokens; None: the model's own maximum, 8192 at most
    kv_cache: str = "f16"
    prefill_chunk: int = 512  # rows computed at once
    prefill_window: int = 4096  # rows that go through a layer before the next layer's turn

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu"):
            raise ConfigError(
                f"device: found {self.device!r}, expected 'auto' or 'cpu': this version of exl runs on the CPU"
            )
        if self.kv_cache not in KV_BITS:
            raise ConfigError(f"kv_cache: found {self.kv_cache!r}, expected one of {', '.join(KV_BITS)}")
        for name in ("context", "prefill_chunk", "prefill_window"):
            value = getattr(self, name)
            if name == "context" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 30:
                raise ConfigError(f"{name}: found {value!r}, expected a whole number of tokens, 1 or more")
        if self.prefill_window < self.prefill_chunk:
            raise ConfigError(
                f"prefill_window: found {self.prefill_window}, expected prefill_chunk, {self.prefill_chunk}, or more"
            )


@dataclass(frozen=True)
class Engine:
    config: ModelConfig
    quant: QuantConfig | None
    generator: Generator


def load_engine(folder: Path, options: EngineOptions, progress: Progress | None = None) -> Engine:
    """``folder`` may also be a ``.safetensors`` file with its config.json beside it."""
    with Checkpoint.open(folder) as checkpoint:
        folder = checkpoint.folder
        config_json = read_json(folder / "config.json")
        config = ModelConfig.from_dict(config_json, str(folder / "config.json"))
        quant = read_quant_config(folder, config_json)
        manifest = read_manifest(checkpoint, config, quant)
        context = options.context or min(config.max_position, _MAX_DEFAULT_CONTEXT)
        limits = step_limits(config, context, options)
        target = cpu_target()
        kv_layout = KVLayout(options.kv_cache, config.num_layers, config.num_kv_heads, config.head_dim)
        ops = TorchOps(target, kv_layout, limits)
        weights = load_weights(checkpoint, config, quant, manifest, ops, progress)
    num_pages = -(-context // PAGE_SIZE)
    kv = KVCache(kv_layout, num_pages, ops.device)
    runner = Runner(
        decoder=Decoder(config, ops),
        weights=ResidentWeights(weights.layers),
        embed=weights.embed,
        final_norm=weights.final_norm,
        head=weights.head,
        kv=kv,
        limits=limits,
    )
    eos_ids = GenerationDefaults.from_folder(folder).eos_ids or config.eos_ids
    short = _MAX_DECODE_PROMPT if all(map(_all_int4, manifest.layouts(target).layers)) else 1
    generator = Generator(runner, PagePool(num_pages), context, eos_ids, min(short, limits.max_rows))
    return Engine(config, quant, generator)


def step_limits(config: ModelConfig, context: int, options: EngineOptions) -> StepLimits:
    """The largest step that the options allow for."""
    max_rows = min(options.prefill_chunk, context)
    return StepLimits(
        max_rows=max_rows,
        window_rows=max(max_rows, min(options.prefill_window, context)),
        max_logit_rows=max(1, min(max_rows, _MAX_LOGITS_BYTES // (4 * config.vocab_size))),
        max_context=context,
        hidden_size=config.hidden_size,
        qkv_width=config.qkv_width,
        attn_width=config.attn_width,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        head_dim=config.head_dim,
    )


def _all_int4(layer: LayerLayout) -> bool:
    return all(linear.kind == "int4pack" for segments in layer.linears.values() for linear in segments)
