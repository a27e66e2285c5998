"""Shapes in the source and in the output: which modules are quantized and how, and which are zero-padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd, lcm

import numpy as np
from numpy.typing import NDArray

from exl.errors import ConfigError, UnsupportedModelError, warn_user
from exl.families.config import ModelConfig
from exl.layout.specs import BlobSpec, MatrixSpec
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
class QuantizePlan:
    """``layers[i]``: the layer's linears by the names of ``LayerSpec.linears``."""

    intermediate_size: int  # in the output, padding included
    layers: tuple[Mapping[str, LinearPlan], ...]
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
        return [
            (module, i) for i, layer in enumerate(self.layers) for linear in layer.values() for module in linear.modules
        ]

    def layer_entries(self, layer_idx: int) -> list[Entry]:
        modules = [module for linear in self.layers[layer_idx].values() for module in linear.modules]
        return [entry for module in modules for entry in module.entries()]


def module_names(manifest: ModelManifest) -> list[str]:
    """Of the layers' linears, as the file has them."""
    parts = (part.name for blob in manifest.layers for _, linears in blob.linears for x in linears for part in x.parts)
    return list(dict.fromkeys(parts))


def make_plan(
    manifest: ModelManifest, config: ModelConfig, assignment: Assignment, choices: Sequence[int] = ()
) -> QuantizePlan:
    """``choices``: widths of which one will be chosen for modules whose bits no override says.

    Raises ``ConfigError`` that names the module that the bits do not fit, ``UnsupportedModelError`` for mixtures of
    experts; warns (``ExlWarning``) of groups that are shorter than the others.
    """
    if config.mixtures:
        raise UnsupportedModelError(
            f"mixtures of {config.mixtures[0].count} experts: found them in {len(config.mixtures)} layers, the "
            "quantizer takes dense ones: take a file whose experts are quantized already"
        )
    settings = assignment.settings
    if not any(settings.values()):
        raise ConfigError("override: all linears stay dense: nothing is left to quantize")
    padding = _Padding(config.intermediate_size, _padded_size(manifest, config, settings))
    layers = tuple(_plan_layer(blob, settings, padding) for blob in manifest.layers)
    embed_name = dict(manifest.embed.linears)["embed"][0].parts[0].name
    unused = manifest.names.head if manifest.tied and embed_name != manifest.names.head else None
    plan = QuantizePlan(padding.padded, layers, manifest.tied, unused, assignment)
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


def _padded_size(manifest: ModelManifest, config: ModelConfig, settings: Mapping[str, Settings | None]) -> int:
    """The MLP's width in the output: so many that codes fill words and groups divide it, which every loader reads. If
    some module of an MLP stays dense it is the source's, because only quantized modules are padded."""
    size = config.intermediate_size
    found = [
        (name, settings[part.name])
        for blob in manifest.layers
        for name, linears in blob.linears
        for x in linears
        for part in x.parts
        if name in ("gate_up", "down")
    ]
    if any(x is None for _, x in found) or any(layer.mlp.width != size for layer in config.layers):
        return size
    multiple = lcm(K_MULTIPLE, *(max(1, x.group_size) for name, x in found if name == "down"))
    return -(-size // multiple) * multiple


def _plan_layer(blob: BlobSpec, settings: Mapping[str, Settings | None], padding: _Padding) -> Mapping[str, LinearPlan]:
    layer = {}
    for name, linears in blob.linears:
        matrices = [part for linear in linears for part in linear.parts]
        modules: dict[str, ModulePlan] = {}
        column = 0
        for matrix in matrices:
            module = settings[matrix.name]
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
