"""Which tensors of a checkpoint are packed together: those of a layer without its experts, or those of one expert."""

from __future__ import annotations

from dataclasses import dataclass

from exl.checkpoint.checkpoint import Checkpoint
from exl.formats.stacked import stacked_tensors
from exl.layout.specs import ExpertSpec
from exl.models.manifest import ModelManifest


@dataclass(frozen=True)
class TensorPart:
    """Bytes ``start:stop`` of a tensor."""

    name: str
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class PackingOrder:
    """``layers[i]``: of layer i without its experts. ``experts``: of each expert, in the order of their blobs."""

    layers: tuple[tuple[TensorPart, ...], ...]
    experts: tuple[tuple[TensorPart, ...], ...]

    @property
    def largest(self) -> int:
        """Bytes of what is packed together, at most."""
        return max((sum(part.num_bytes for part in some) for some in (*self.layers, *self.experts)), default=0)


def packing_order(checkpoint: Checkpoint, manifest: ModelManifest) -> PackingOrder:
    modules: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    experts, of_experts = [], set()
    for spec in manifest.experts:
        for expert in range(0 if spec is None else spec.count):
            experts.append(_expert_parts(checkpoint, modules, spec, expert))
            of_experts.update(part.name for part in experts[-1])
    head = manifest.names.layers + "."
    layers: list[list[TensorPart]] = [[] for _ in manifest.layers]
    for name, info in checkpoint.tensors.items():
        number = name[len(head) :].split(".")[0] if name.startswith(head) else ""
        if name in of_experts or name.endswith(manifest.names.ignored) or not number.isdigit():
            continue
        if int(number) < len(layers):
            layers[int(number)].append(TensorPart(name, 0, info.num_bytes))
    return PackingOrder(tuple(map(tuple, layers)), tuple(experts))


def _expert_parts(
    checkpoint: Checkpoint, modules: dict[str, list[str]], spec: ExpertSpec, expert: int
) -> tuple[TensorPart, ...]:
    found: dict[str, TensorPart] = {}
    matrices = (part for _, linears in spec.blob.linears for linear in linears for part in linear.parts)
    for matrix in matrices:
        if matrix.stack is None:
            names = modules[spec.part(matrix, expert).name]
            found |= {name: TensorPart(name, 0, checkpoint.info(name).num_bytes) for name in names}
            continue
        for name in sorted(stacked_tensors(checkpoint, matrix.name)):
            size = checkpoint.info(name).num_bytes // spec.count
            found[name] = TensorPart(name, expert * size, (expert + 1) * size)
    return tuple(found.values())
