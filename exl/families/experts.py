"""What families of mixtures of experts share: the names of experts' tensors, and how a mixture is read."""

from __future__ import annotations

from collections.abc import Mapping

from exl.checkpoint.config_reader import ConfigReader
from exl.families.common import read_mlp
from exl.families.specs import MoeShape, PartSpec, RouteShape, SharedShape
from exl.layout.specs import Rows, Stack

_MOST_EXPERTS = 4096


def read_mixture(
    read: ConfigReader, count: str, width: int, route: RouteShape, shared: SharedShape | None = None
) -> MoeShape:
    """``count``: the key of the number of experts."""
    experts = read.integer(count, high=_MOST_EXPERTS)
    per_token = read.integer("num_experts_per_tok", high=_MOST_EXPERTS)
    if per_token > experts:
        raise read.error("num_experts_per_tok", f"at most {count}, {experts}")
    if experts % route.groups:
        raise read.error("n_group", f"a divisor of {count}, {experts}")
    if route.groups > 1 and per_token > experts // route.groups * route.top_groups:
        raise read.error("num_experts_per_tok", "at most the experts of topk_group groups")
    return MoeShape(experts, per_token, width, read_mlp(read, width).activation, None, route, shared)


def expert_parts(
    hidden: int, width: int, module: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Mapping[str, tuple[PartSpec, ...]]:
    """Modules of their own for each expert: ``<module>.<number>.<name>``."""
    gate, up, down = (f"{module}.{{e}}.{name}" for name in names)
    return {
        "gate_up": (PartSpec(gate, hidden, width), PartSpec(up, hidden, width)),
        "down": (PartSpec(down, width, hidden),),
    }


def stacked_parts(
    hidden: int, width: int, module: str, *, transposed: bool = False, interleaved: bool = False, bias: bool = False
) -> Mapping[str, tuple[PartSpec, ...]]:
    """Those of all experts in one tensor: ``<module>.gate_up_proj`` [E, 2F, C], gate first, and ``<module>.down_proj``
    [E, C, F]; ``transposed``: [E, C, 2F] and [E, F, C]; ``interleaved``: gate and up take turns."""
    stack, step = Stack(transposed), 2 if interleaved else 1

    def half(first: int) -> PartSpec:
        rows = Rows(first if interleaved else first * width, width, 2 * width, step=step)
        return PartSpec(f"{module}.gate_up_proj", hidden, width, bias, rows, stack)

    return {"gate_up": (half(0), half(1)), "down": (PartSpec(f"{module}.down_proj", width, hidden, bias, None, stack),)}


def router_part(hidden: int, count: int, module: str, *, bias: bool = False) -> tuple[PartSpec, ...]:
    return (PartSpec(module, hidden, count, bias, exact=True),)


def shared_parts(
    hidden: int, shared: SharedShape, module: str, gate: str | None = None
) -> dict[str, tuple[PartSpec, ...]]:
    """Of a shared expert: ``<module>.gate_proj`` and so on; ``gate``: the module of its gate."""
    gate_up = tuple(PartSpec(f"{module}.{name}", hidden, shared.width) for name in ("gate_proj", "up_proj"))
    parts = {"shared_gate_up": gate_up, "shared_down": (PartSpec(f"{module}.down_proj", shared.width, hidden),)}
    if gate is not None:
        parts["shared_gate"] = (PartSpec(gate, hidden, 1, exact=True),)
    return parts


def with_mixture(
    linears: Mapping[str, tuple[PartSpec, ...]], more: Mapping[str, tuple[PartSpec, ...]]
) -> dict[str, tuple[PartSpec, ...]]:
    """A layer's linears with those of a mixture in the place of its MLP's."""
    return {name: linears[name] for name in ("qkv", "o")} | dict(more)
