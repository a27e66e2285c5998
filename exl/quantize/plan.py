"""Shapes in the source and in the output: which modules are quantized and how, and which are zero-padded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd, lcm

import numpy as np
from numpy.typing import NDArray

from exl.errors import ConfigError, UnsupportedModelError, warn_user
from exl.families.config import ModelConfig
from exl.families.specs import MoeShape, PartSpec
from exl.layout.specs import BlobSpec, LinearSpec, MatrixSpec
from exl.models.manifest import ModelManifest
from exl.quantize.overrides import Assignment, Settings

K_MULTIPLE = 32  # this many codes fill whole words of qweight at every number of bits
Entry = tuple[str, str, tuple[int, ...]]  # a tensor's name, dtype and shape


@dataclass(frozen=True)
class PartPlan:
    """Outputs of a module that are columns of a linear, side by side from ``column`` on."""

    column: int
    sources: NDArray[np.int64]  # the module's output in the source that is each column
    outputs: NDArray[np.int64]  # and in the file that is written


@dataclass(frozen=True, eq=False)
class ModulePlan:
    """One module of the file: its inputs K and outputs N in the source, out_K and out_N in the file that is written."""

    name: str
    K: int
    N: int
    out_K: int
    out_N: int
    has_bias: bool
    settings: Settings
    parts: tuple[PartPlan, ...]

    @property
    def bits(self) -> int:
        return self.settings.bits

    @property
    def group_size(self) -> int:
        """out_K if there is one group. If it does not divide out_K, the last group is shorter."""
        return self.out_K if self.settings.group_size == -1 else min(self.settings.group_size, self.out_K)

    @cached_property
    def columns(self) -> NDArray[np.int64]:
        """The linear's column that is each output of the file, i64 [out_N]; -1: padding."""
        found = np.full(self.out_N, -1)
        for part in self.parts:
            found[part.outputs] = part.column + np.arange(len(part.outputs))
        return found

    def places(self, columns: NDArray[np.int64]) -> NDArray[np.int64]:
        """As ``columns``, among those of the linear's columns, in ascending order."""
        return np.where(self.columns < 0, -1, np.searchsorted(columns, self.columns))

    def place_bias(self, bias: NDArray) -> NDArray:
        """The source's [N] -> the file's [out_N]."""
        placed = np.zeros(self.out_N, bias.dtype)
        for part in self.parts:
            placed[part.outputs] = bias[part.sources]
        return placed

    def entries(self) -> list[Entry]:
        """The tensors that are written for this module, in order."""
        G = -(-self.out_K // self.group_size)
        entries = [
            (f"{self.name}.qweight", "i32", (self.out_K // 32 * self.bits, self.out_N)),
            (f"{self.name}.qzeros", "i32", (G, self.out_N * self.bits // 32)),
            (f"{self.name}.scales", "f16", (G, self.out_N)),
            (f"{self.name}.g_idx", "i32", (self.out_K,)),
        ]
        return [*entries, (f"{self.name}.bias", "f16", (self.out_N,))] if self.has_bias else entries


@dataclass(frozen=True)
class LinearPlan:
    """A linear of a layer: K inputs, N columns in exl's order, and the modules of it that are quantized."""

    K: int
    N: int
    modules: tuple[ModulePlan, ...]

    def columns(self, modules: Sequence[ModulePlan]) -> NDArray[np.int64]:
        """The linear's columns that these modules are, in ascending order."""
        return np.sort(np.concatenate([module.columns[module.columns >= 0] for module in modules]))

    def solves(self) -> list[tuple[ModulePlan, ...]]:
        """Modules with the same settings, which are rounded together."""
        found: dict[Settings, list[ModulePlan]] = {}
        for module in self.modules:
            found.setdefault(module.settings, []).append(module)
        return [tuple(modules) for modules in found.values()]


@dataclass(frozen=True)
class ExpertsPlan:
    """The experts of a layer, of one kind. ``first``: the linears of the first one, "gate_up" and "down"."""

    count: int
    first: Mapping[str, LinearPlan]
    names: Mapping[str, str]  # of the first one's modules, with "{e}" for the number of the expert
    stacks: tuple[str, ...]  # the source's tensors that have all experts' matrices; (): each has modules of its own

    @property
    def quantized(self) -> bool:
        return any(linear.modules for linear in self.first.values())

    def linears(self, expert: int) -> Mapping[str, LinearPlan]:
        return {
            name: replace(linear, modules=tuple(self._named(module, expert) for module in linear.modules))
            for name, linear in self.first.items()
        }

    def modules(self) -> Iterator[ModulePlan]:
        """Of all experts, one expert after another."""
        modules = [module for linear in self.first.values() for module in linear.modules]
        return (self._named(module, expert) for expert in range(self.count) for module in modules)

    def _named(self, module: ModulePlan, expert: int) -> ModulePlan:
        return replace(module, name=self.names[module.name].format(e=expert))


@dataclass(frozen=True)
class QuantizePlan:
    """``layers[i]``: the layer's linears by the names of ``LayerSpec.linears``."""

    intermediate_size: int | None  # in the output, padding included; None: a model with mixtures, as in the source
    layers: tuple[Mapping[str, LinearPlan], ...]
    experts: tuple[ExpertsPlan | None, ...]  # by layer
    tied: bool  # the embedding is also the head
    unused: str | None  # module of the source that is left out: a head that is a copy of the embedding
    assignment: Assignment

    @property
    def average_bits(self) -> float:
        """Of the codes, over all quantized weights of the source."""
        sizes = [(module.K * module.N, module.bits) for module, _ in self.modules()]
        return sum(size * bits for size, bits in sizes) / sum(size for size, _ in sizes)

    def modules(self) -> list[tuple[ModulePlan, int]]:
        """All quantized ones, with the layer's index."""
        return [(module, i) for i in range(len(self.layers)) for module in self._of_layer(i)]

    def layer_entries(self, layer_idx: int) -> list[Entry]:
        return [entry for module in self._of_layer(layer_idx) for entry in module.entries()]

    def _of_layer(self, layer_idx: int) -> list[ModulePlan]:
        """Those of experts come last, one expert after another."""
        modules = [module for linear in self.layers[layer_idx].values() for module in linear.modules]
        experts = self.experts[layer_idx]
        return modules if experts is None else [*modules, *experts.modules()]


def module_names(manifest: ModelManifest, config: ModelConfig) -> list[str]:
    """Of the layers' linears, as the file that is written has them; without routers, which are never rounded. Raises
    ``UnsupportedModelError`` for experts that have no modules of their own in any file."""
    names: dict[str, None] = {}
    for layer_idx, blob in enumerate(manifest.layers):
        parts = (part for _, linears in blob.linears for x in linears for part in x.parts)
        names |= dict.fromkeys(part.name for part in parts if not part.exact)
        experts = manifest.experts[layer_idx]
        if experts is not None:
            own = [part for some in _expert_parts(manifest, config, layer_idx).values() for part in some]
            names |= dict.fromkeys(part.module.format(e=e) for e in range(experts.count) for part in own)
    return list(names)


def _expert_parts(manifest: ModelManifest, config: ModelConfig, layer_idx: int) -> Mapping[str, tuple[PartSpec, ...]]:
    """Of a mixture, where each expert has modules of its own; with their whole names."""
    prefix = f"{manifest.names.layers}.{layer_idx}."
    for found in config.layers[layer_idx].experts:
        if all(part.stack is None for some in found.values() for part in some):
            return {
                name: tuple(replace(part, module=prefix + part.module) for part in some) for name, some in found.items()
            }
    raise UnsupportedModelError(
        f"{config.family}: found experts that its files have in one tensor for all, expected modules of each expert's "
        "own, which is what GPTQ files name: take a file whose experts are quantized already"
    )


def make_plan(
    manifest: ModelManifest, config: ModelConfig, assignment: Assignment, choices: Sequence[int] = ()
) -> QuantizePlan:
    """``choices``: widths of which one will be chosen for modules whose bits no override says.

    Raises ``ConfigError`` that names the module that the bits do not fit, and for choices in a model with mixtures of
    experts; ``UnsupportedModelError`` for experts that files do not name one by one; warns (``ExlWarning``) of groups
    that are shorter than the others.
    """
    if choices and config.mixtures:
        raise ConfigError(
            f"target_bits: found a model with mixtures of {config.mixtures[0].count} experts, expected one without: "
            "the harm of rounding is measured for linears that all tokens take; give bits and overrides instead"
        )
    settings = assignment.settings
    if not any(settings.values()):
        raise ConfigError("override: all linears stay dense: nothing is left to quantize")
    padded = _padded_size(manifest, config, settings)
    # Padding is a matter of all layers: without it, each has a width of its own.
    widths = [padded or layer.mlp.width for layer in config.layers]
    layers = tuple(
        _plan_layer(blob, settings, _Padding(layer.mlp.width, width))
        for blob, layer, width in zip(manifest.layers, config.layers, widths, strict=True)
    )
    experts = tuple(_plan_experts(manifest, config, i, settings) for i in range(config.num_layers))
    embed_name = dict(manifest.embed.linears)["embed"][0].parts[0].name
    unused = manifest.names.head if manifest.tied and embed_name != manifest.names.head else None
    size = None if config.mixtures else padded or config.intermediate_size
    plan = QuantizePlan(size, layers, experts, manifest.tied, unused, assignment)
    _check(plan, choices)
    return plan


@dataclass(frozen=True)
class _Padding:
    size: int  # of the MLP in the source
    padded: int

    def outputs(self, part: MatrixSpec) -> tuple[NDArray[np.int64], int]:
        """Where outputs of gate or up, or of a module that is both, go in the file, and how many it has."""
        sources = part.rows.indices() if part.rows is not None else np.arange(part.N)
        total = part.N if part.rows is None else part.rows.total
        which, within = np.divmod(sources, self.size)
        return which * self.padded + within, total // self.size * self.padded


def _padded_size(manifest: ModelManifest, config: ModelConfig, settings: Mapping[str, Settings | None]) -> int | None:
    """The MLP's width in the output: so many that codes fill words and groups divide it, which every loader reads. If
    some module of an MLP stays dense it is the source's (None), because only quantized modules are padded; so it is in
    a model with mixtures of experts, whose config has several widths that depend on each other."""
    size = config.intermediate_size
    if config.mixtures or any(layer.mlp.width != size for layer in config.layers):
        return None
    found = [
        (name, settings[part.name])
        for blob in manifest.layers
        for name, linears in blob.linears
        for x in linears
        for part in x.parts
        if name in ("gate_up", "down")
    ]
    if any(x is None for _, x in found):
        return None
    multiple = lcm(K_MULTIPLE, *(max(1, x.group_size) for name, x in found if name == "down"))
    return -(-size // multiple) * multiple


def _plan_layer(blob: BlobSpec, settings: Mapping[str, Settings | None], padding: _Padding) -> Mapping[str, LinearPlan]:
    layer = {}
    for name, linears in blob.linears:
        matrices = [part for linear in linears for part in linear.parts]
        modules: dict[str, ModulePlan] = {}
        column = 0
        for matrix in matrices:
            module = None if matrix.exact else settings[matrix.name]
            if module is not None:
                _add_part(modules, name, matrix, column, module, padding)
            column += matrix.N
        layer[name] = LinearPlan(matrices[0].K, column, tuple(modules.values()))
    return layer


def _add_part(
    modules: dict[str, ModulePlan], linear: str, matrix: MatrixSpec, column: int, settings: Settings, padding: _Padding
) -> None:
    N = matrix.N if matrix.rows is None else matrix.rows.total
    sources = np.arange(N) if matrix.rows is None else matrix.rows.indices()
    outputs, out_N = padding.outputs(matrix) if linear == "gate_up" else (sources, N)
    part = PartPlan(column, sources, outputs)
    if matrix.name in modules:
        earlier = modules[matrix.name]
        modules[matrix.name] = replace(earlier, parts=(*earlier.parts, part))
        return
    out_K = padding.padded if linear == "down" else matrix.K
    modules[matrix.name] = ModulePlan(matrix.name, matrix.K, N, out_K, out_N, matrix.has_bias, settings, (part,))


def _plan_experts(
    manifest: ModelManifest, config: ModelConfig, layer_idx: int, settings: Mapping[str, Settings | None]
) -> ExpertsPlan | None:
    moe, source = config.layers[layer_idx].mlp, manifest.experts[layer_idx]
    if not isinstance(moe, MoeShape):
        return None
    found = {part.name: part for _, linears in source.blob.linears for x in linears for part in x.parts}
    stacks = tuple(name for name, part in found.items() if part.stack is not None)
    names: dict[str, str] = {}

    def first(part: PartSpec) -> MatrixSpec:
        name = part.module.format(e=0)
        names[name] = part.module
        _expect_one_kind(part.module, moe.count, settings)
        has_bias = any(found[stack].has_bias for stack in stacks) if stacks else found[name].has_bias
        if stacks and has_bias:
            raise UnsupportedModelError(
                f"{', '.join(stacks)}: found experts with biases in one tensor for all, expected none"
            )
        return MatrixSpec(name, part.K, part.N, 32, "f32", has_bias=has_bias)

    linears = tuple(
        (name, (LinearSpec(tuple(map(first, parts))),))
        for name, parts in _expert_parts(manifest, config, layer_idx).items()
    )
    plan = _plan_layer(BlobSpec((), linears), settings, _Padding(moe.width, moe.width))
    dense = [name for name in names if settings[name] is None]
    if stacks and 0 < len(dense) < len(names):
        raise ConfigError(
            f"override: found {dense[0]} left dense, expected all linears of experts or none: "
            f"the source has the experts of a layer in one tensor, {stacks[0]}"
        )
    return ExpertsPlan(moe.count, plan, names, stacks)


def _expect_one_kind(template: str, count: int, settings: Mapping[str, Settings | None]) -> None:
    first = template.format(e=0)
    for expert in range(1, count):
        name = template.format(e=expert)
        if settings[name] != settings[first]:
            raise ConfigError(
                f"override: {name}: found {_shown(settings[name])}, expected {_shown(settings[first])} as for {first}: "
                "experts of a layer are of one kind"
            )


def _shown(settings: Settings | None) -> str:
    if settings is None:
        return "dense"
    return f"bits:{settings.bits},group_size:{settings.group_size},sym:{str(settings.sym).lower()}"


def fitting_widths(modules: Sequence[ModulePlan], widths: Sequence[int]) -> list[int]:
    """Those at which the zeros of each module's outputs fill whole words."""
    return [bits for bits in widths if all(module.out_N % _outputs_per_word(bits) == 0 for module in modules)]


def _outputs_per_word(bits: int) -> int:
    return 32 // gcd(bits, 32)


def _check(plan: QuantizePlan, choices: Sequence[int]) -> None:
    free = plan.assignment.without_bits() if choices else set()
    shorter: list[ModulePlan] = []
    for module, _ in plan.modules():
        if module.out_K % K_MULTIPLE:
            raise ConfigError(
                f"{module.name}: found {module.out_K} inputs, expected a multiple of {K_MULTIPLE}: "
                "GPTQ packs inputs by 32; leave it dense"
            )
        widths = choices if module.name in free else (module.bits,)
        if not fitting_widths([module], widths):
            bits = min(widths, key=_outputs_per_word)
            raise ConfigError(
                f"{module.name}: found {module.out_N} outputs, expected a multiple of {_outputs_per_word(bits)}: "
                f"{bits}-bit zeros fill whole words; leave it dense, or take other bits"
            )
        if module.settings.group_size != -1 and module.out_K % module.settings.group_size:
            shorter.append(module)
    if shorter:
        warn_user(_about_groups(shorter))


def _about_groups(shorter: Sequence[ModulePlan]) -> str:
    module = shorter[0]
    asked, K = module.settings.group_size, module.out_K
    sizes = [size for size in range(16, K + 1, 16) if all(other.out_K % size == 0 for other in shorter)]
    nearest = sorted(sizes, key=lambda size: abs(np.log2(size / asked)))[:3]
    good = f"; {', '.join(map(str, nearest))} or -1 would divide it" if nearest else ""
    return (
        f"group_size: found {asked}, which does not divide the {K} inputs of {module.name}: the last group is "
        f"shorter, which exl and GPTQModel read and vLLM refuses{good}"
    )
