"""A checkpoint's folder -> a generator that is ready to run: everything put together, no text."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from exl import forks
from exl.cache.kv import KVCache
from exl.cache.page_pool import PagePool
from exl.cache.tier import ram_tier
from exl.cache.window_pool import WindowPool
from exl.checkpoint.generation_config import GenerationDefaults
from exl.checkpoint.quant.base import QuantConfig
from exl.engine.draft_model import DraftModel
from exl.engine.draft_runner import BatchedDrafts
from exl.engine.generator import Generator
from exl.engine.runner import Runner
from exl.errors import ConfigError, KernelError, MemoryBudgetError, NoGpuError, warn_user
from exl.families.config import ModelConfig
from exl.kernels.device import open_backend
from exl.kernels.launch import Backend
from exl.layout.arena import arena_layout
from exl.layout.attention import MAX_NEW_TOKENS
from exl.layout.layers import LayerLayout
from exl.layout.specs import Target
from exl.memory.device import free_bytes
from exl.models.decoder import Decoder
from exl.ops.base import Ops
from exl.ops.cpu_target import cpu_target
from exl.ops.cuda_ops import CudaOps
from exl.ops.torch_ops import TorchOps
from exl.planning.devices import HOST, STARTED_LINES, usable_bytes
from exl.planning.draft import draft_context, draft_options
from exl.planning.from_headers import ModelFiles, open_model, plan_model
from exl.planning.options import EngineOptions
from exl.planning.plan import MemoryPlan, PlanInput, Tier
from exl.progress import Progress
from exl.threads import Threads, thread_limit, using
from exl.units import format_apart, format_bytes
from exl.weights.adapters import AdapterWeights, load_adapters
from exl.weights.loader import ModelWeights, WeightPlaces, load_weights

logger = logging.getLogger(__name__)

# 4-bit prompts up to this length are faster through a CPU's decode kernel than through dequantized panels.
_MAX_DECODE_PROMPT = 32


@dataclass(frozen=True)
class Engine:
    config: ModelConfig
    quant: QuantConfig | None
    plan: MemoryPlan
    model: PlanInput  # layouts and limits that the plan was made from
    generator: Generator
    weights: ModelWeights
    adapters: AdapterWeights
    owned: ExitStack

    @property
    def device(self) -> torch.device:
        return self.generator.runner.decoder.ops.device

    @property
    def decode_steps(self) -> str | None:
        """How decode steps run, see ``LLM.decode_steps``."""
        return self.generator.runner.decode_steps

    def synchronize(self) -> None:
        """Waits until the device has finished all queued work, for timing."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Frees the weights' memory and ends the thread that reads layers. Nothing may be run afterwards. A GPU's
        memory goes with the last reference to the engine, or with the process in a fork that cannot use it."""
        if self.generator.guard.lost_gpu:
            return
        try:
            self.synchronize()  # copies in flight still read the pages that are freed next
        finally:
            self.owned.close()


def load_engine(
    folder: Path,
    options: EngineOptions,
    progress: Progress | None = None,
    backend: Backend | None = None,
    *,
    dependent: bool = True,
    graphs: bool = True,
    cpu: Target | None = None,
) -> Engine:
    """Plans, then loads. ``backend``: where kernels run (default: what ``options`` ask for and the machine has).
    ``dependent``, ``graphs``: see ``build_engine``. ``cpu``: how weights lie on the CPU (default: as this torch's
    kernels take them). Raises ``ExlError``; ``MemoryBudgetError`` before anything is allocated."""
    if backend is None:
        options, backend = choose_device(options)
    with open_model(folder, options.reading) as files:

        def load(ops: Ops, plan: MemoryPlan) -> ModelWeights:
            placement = plan.placement
            places = WeightPlaces(
                resident=placement.resident if placement.num_streamed else None,
                in_host=placement.on_tier(Tier.PINNED),
                num_buffers=plan.num_buffers,
                embed=placement.embed,
                packed_folder=None if options.packed_folder is None else Path(options.packed_folder).expanduser(),
            )
            with using(thread_limit(options.threads)):
                return load_weights(files, ops, places, progress)

        engine = build_engine(files, options, backend, load, dependent=dependent, graphs=graphs, cpu=cpu)
    if options.draft is None:
        return engine
    try:
        return _with_draft(engine, options, backend, cpu)
    except BaseException:
        engine.close()
        raise


def _with_draft(engine: Engine, options: EngineOptions, backend: Backend | None, cpu: Target | None) -> Engine:
    """Loads the draft model, which the engine owns from here on."""
    with open_model(options.draft) as files:
        context = draft_context(options, engine.config, files.config)
    draft = load_engine(options.draft, draft_options(options, context), backend=backend, cpu=cpu)
    engine.owned.callback(draft.close)
    generator = engine.generator
    runner = BatchedDrafts(draft.generator.runner, draft.generator.pool)
    model = DraftModel(runner, draft.generator.context, generator.runner.vocab_size)
    generator.scheduler.drafts.add("draft", model)
    return engine


def build_engine(
    files: ModelFiles,
    options: EngineOptions,
    backend: Backend | None,
    load: Callable[[Ops, MemoryPlan], ModelWeights],
    *,
    cpu: Target | None = None,
    dependent: bool = True,
    graphs: bool = True,
) -> Engine:
    """Makes the plan and all parts as it says; ``load`` loads the weights. ``backend`` None: the CPU, ``cpu`` as for
    ``load_engine``. ``dependent``: see ``CudaOps``; ``graphs``: decode steps are captured and replayed, if the
    backend can."""
    with ExitStack() as stack:
        plan, model = plan_model(files, options, _target(backend, cpu))
        for text in plan.warnings:
            warn_user(text)
        if backend is not None:
            _check_device(plan, backend)
        ops = _make_ops(files, plan, model, backend, dependent, stack, options.threads)
        kv, windows = _caches(model, plan, ops.device)
        weights = load(ops, plan)
        stack.callback(weights.close)
        adapters = load_adapters(model.adapters, ops, stack)
        stack.callback(ops.fence)  # before: a thread may be late in the last step, and read weights
        decoder = Decoder(files.config, ops, adapters.loras)
        if model.target.compiled:
            from exl.engine.kernels_ahead import load_kernels

            load_kernels(decoder, weights, model, kv, windows)
        short = min(_decode_prompt(model, backend), model.limits.chunk_rows)
        runner = Runner(decoder, weights, kv, model.limits, windows=windows, graphs=graphs, max_decode_prompt=short)
        # Of the two configurations. The tokenizer knows more, and whoever has one gives the generator its own.
        eos_ids = (*files.config.eos_ids, *GenerationDefaults.from_folder(files.folder).eos_ids)
        tier = None
        if model.num_kept_pages:
            tier = ram_tier(kv, model.num_kept_pages * kv.page_bytes, ops.fence, stack)
        beside = None
        if plan.windows is not None:
            beside = WindowPool(plan.windows.num_pages, plan.windows.window, runner.zero_windows)
        pool = PagePool(plan.num_pages, null=plan.null_page, tier=tier, zero=runner.zero_pages, windows=beside)
        generator = Generator(
            *(runner, pool, plan.context, eos_ids, options.max_queue), window=model.window, adapters=adapters.names
        )
        return Engine(files.config, files.quant, plan, model, generator, weights, adapters, stack.pop_all())


def _caches(model: PlanInput, plan: MemoryPlan, device: torch.device) -> tuple[KVCache, KVCache | None]:
    """Of all layers; or of those that keep all tokens, and of those with a window."""
    layout = model.kv_layout
    if plan.windows is None:
        return KVCache(layout, plan.num_pages, device), None
    inside = sorted(plan.windows.layers)
    others = [i for i in range(layout.num_layers) if i not in plan.windows.layers]
    whole = KVCache(replace(layout, num_layers=len(others)), plan.num_pages, device, others)
    few = replace(layout, num_layers=len(inside))
    return whole, KVCache(few, plan.windows.num_pages, device, inside, windowed=True)


def plan_engine(folder: Path, options: EngineOptions) -> MemoryPlan:
    """The plan that ``load_engine`` would make now, from the headers alone. Raises as it does."""
    options, backend = choose_device(options)
    with open_model(folder, options.reading) as files:
        return plan_model(files, options, _target(backend))[0]


def _target(backend: Backend | None, cpu: Target | None = None) -> Target:
    if backend is not None:
        return Target("cuda", arch=backend.arch, num_multiprocessors=backend.num_multiprocessors)
    return cpu_target() if cpu is None else cpu


def choose_device(options: EngineOptions) -> tuple[EngineOptions, Backend | None]:
    """The GPU that was asked for or found, and the options with the VRAM that may be used; None is the CPU. Raises
    ``ConfigError`` if a GPU was asked for and there is none that exl can use."""
    if options.device == "cpu":
        return options, None
    if forks.lost_gpu():
        raise forks.gpu_error()
    try:
        backend = open_backend()
        free, _ = free_bytes(backend.device)  # also starts cuBLAS, for which a GPU that others fill has no room
    except KernelError as error:
        if options.on_gpu:
            asked = "device='cuda'" if options.vram is None else f"vram={options.vram!r}"
            raise ConfigError(f"{asked}: found no GPU that exl can use ({error})") from None
        if not isinstance(error, NoGpuError):  # whoever has a GPU wants to know why it is not used
            _say_once(f"computing on the CPU: {_one_line(error)}")
        return options, None
    if len(options.vram_bytes) > 1:
        raise ConfigError(
            f"vram: found {len(options.vram_bytes)} sizes; this version plans for several GPUs and computes on one"
        )
    if options.vram is None:
        options = replace(options, vram=usable_bytes(free, backend.arch))
        logger.info("computing on %s", torch.cuda.get_device_name(backend.device))
    return options, backend


@functools.cache
def _say_once(text: str) -> None:
    """Once per process, however many models it loads."""
    logger.warning("%s", text)


def _one_line(error: Exception) -> str:
    """Only the first line: the others are logs and tables."""
    return " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())


def _check_device(plan: MemoryPlan, backend: Backend) -> None:
    """The plan against the memory that is free now."""
    if backend.device.type != "cuda":
        return
    free, total = free_bytes(backend.device)
    lines = [line for line in plan.lines if line.device != HOST and line.purpose not in STARTED_LINES]
    needed = sum(line.num_bytes for line in lines)
    if needed > free:
        shown = format_apart(free, needed)
        raise MemoryBudgetError(
            f"{backend.device} has {shown[0]} of {format_bytes(total)} free, {shown[1]} are "
            f"needed: a smaller vram= keeps layers in RAM.\n{plan.table()}"
        )


def _make_ops(
    files: ModelFiles,
    plan: MemoryPlan,
    model: PlanInput,
    backend: Backend | None,
    dependent: bool,
    stack: ExitStack,
    threads: int | None,
) -> Ops:
    if backend is None:
        return _cpu_ops(model, stack, thread_limit(threads))
    embed = model.embed.linears["embed"][0]
    rows_of = embed if plan.placement.embed is Tier.DISK else None
    ops = CudaOps(
        backend,
        model.target,
        model.kv_layout,
        model.limits,
        arena_layout(model.limits, model.target, (*model.layers, model.head), rows_of),
        files.config.ropes,
        plan.num_pages,
        num_window_pages=0 if plan.windows is None else plan.windows.num_pages,
        act_dtype=torch.bfloat16 if embed.spec.dtype == "bf16" else torch.float16,
        dependent=dependent,
    )
    stack.callback(ops.close)
    return ops


def _cpu_ops(model: PlanInput, stack: ExitStack, num_threads: int) -> Ops:
    if not model.target.compiled:
        return TorchOps(model.target, model.kv_layout, model.limits, Threads(num_threads))
    from exl.cpu_kernels.library import shared_library
    from exl.cpu_kernels.pool import Pool
    from exl.ops.compiled_ops import CompiledOps

    pool = Pool(shared_library(), num_threads)
    ops = CompiledOps(pool, model.target, model.kv_layout, model.limits, model.compiled_sizes, model.arithmetic)
    stack.callback(ops.close)
    return ops


def _decode_prompt(model: PlanInput, backend: Backend | None) -> int:
    """Prompts up to this length run as decode rows, whose kernels are faster there."""
    if backend is not None:
        return MAX_NEW_TOKENS
    return _MAX_DECODE_PROMPT if all(map(_all_int4, model.layers)) else 1


def _all_int4(layer: LayerLayout) -> bool:
    return all(linear.kind == "int4pack" for segments in layer.linears.values() for linear in segments)
