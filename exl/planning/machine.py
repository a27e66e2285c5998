"""The machine that a plan is for, which need not be there: GPUs by size or by name, and the speeds of its links."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from exl.errors import ConfigError
from exl.layout.specs import Target
from exl.ops.cpu_target import cpu_target
from exl.planning.cards import Card, describe_card, parse_cards, parse_link, pcie_speed
from exl.planning.devices import started_bytes, usable_bytes
from exl.planning.speed import Speeds, parse_speed
from exl.planning.verdict import Note
from exl.units import one_each

_MIN_ARCH, _MAX_ARCH = 60, 199  # the kernels need at least 60; no GPU has more than two digits before the point
_DEFAULT_ARCH = 86

Speed = int | str
PerGpu = Speed | Sequence[Speed]


@dataclass(frozen=True)
class Links:
    """Speeds as they are given, in bytes per second: ``"360GB"``. Of several GPUs a list, or one for all."""

    vram_speed: PerGpu | None = None
    pcie: PerGpu | None = None  # or as "4.0 x16"
    disk: Speed | None = None
    ram_speed: Speed | None = None


@dataclass(frozen=True)
class Machine:
    """``vram``: bytes of each GPU that programs may use; None: a CPU, or a GPU without a given budget."""

    target: Target
    vram: tuple[int | str, ...] | None = None
    speeds: Speeds = field(default_factory=Speeds)
    notes: tuple[Note, ...] = ()


def describe_machine(
    gpu: str | Sequence[str] | None,
    vram: int | str | Sequence[int | str] | None,
    arch: int | float | str | None,
    links: Links,
) -> Machine:
    """A GPU if a card or a size is given, else this machine's CPU. Raises ``ConfigError`` for what makes no sense
    together."""
    given_arch = None if arch is None else parse_arch(arch)
    cards = () if gpu is None else parse_cards(gpu)
    sizes = None if vram is None else one_each(vram)
    if cards and sizes is not None and len(sizes) != len(cards):
        raise ConfigError(f"vram: found {len(sizes)} sizes for {len(cards)} cards, expected one for each, or none")
    num_gpus = len(cards) or (0 if sizes is None else len(sizes))
    if not num_gpus:
        _refuse_without_gpu(arch=arch, vram_speed=links.vram_speed, pcie=links.pcie)
        return Machine(cpu_target(), None, _speeds((), 0, links))
    found_arch, notes = _arch(cards, given_arch)
    if cards and sizes is None:
        sizes = tuple(usable_bytes(card.visible_bytes - started_bytes(card.arch), card.arch, "linux") for card in cards)
        notes += tuple(Note("assumption", f"{describe_card(card)}, 512 MiB left free") for card in dict.fromkeys(cards))
    return Machine(Target("cuda", arch=found_arch), sizes, _speeds(cards, num_gpus, links), notes)


def _refuse_without_gpu(**options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name}: found {value!r} in a plan for the CPU; expected vram= or gpu= with it")


def _arch(cards: Sequence[Card], given: int | None) -> tuple[int, tuple[Note, ...]]:
    archs = sorted({card.arch for card in cards})
    if given is not None and archs and archs != [given]:
        raise ConfigError(
            f"arch: found {given / 10}, but {', '.join(card.name for card in cards)} has "
            f"{' and '.join(str(arch / 10) for arch in archs)}: expected one of arch= and gpu="
        )
    if len(archs) > 1:
        told = f"weights are laid out for compute capability {archs[0] / 10}, the lowest of these cards"
        return archs[0], (Note("assumption", told),)
    return archs[0] if archs else given or _DEFAULT_ARCH, ()


def parse_arch(arch: int | float | str) -> int:
    """A compute capability as 86, 8.6, "8.6", "86" or "sm_86" -> 86. Raises ``ConfigError``."""
    text = "" if isinstance(arch, bool) else str(arch).strip().lower()
    match = re.fullmatch(r"(?:sm_?|compute_?)?(\d{1,2})\.?(\d)", text)
    found = int(match[1] + match[2]) if match else 0
    if not _MIN_ARCH <= found <= _MAX_ARCH:
        raise ConfigError(
            f"arch: found {arch!r}, expected a compute capability of 6.0 or higher, such as 8.6, 86 or sm_86"
        )
    return found


def _speeds(cards: Sequence[Card], num_gpus: int, links: Links) -> Speeds:
    """Given figures, and those of cards for what is not given."""
    names = [f"cuda:{i}" for i in range(num_gpus)]
    vram = _per_gpu(links.vram_speed, "vram_speed", num_gpus, parse_speed)
    pcie = _per_gpu(links.pcie, "pcie", num_gpus, _parse_pcie)
    known = [name for name, given in (("vram", vram), ("pcie", pcie)) if cards and given is None]
    if cards:
        vram = [card.bandwidth for card in cards] if vram is None else vram
        pcie = [card.link_speed for card in cards] if pcie is None else pcie
    return Speeds(
        vram=dict(zip(names, vram or (), strict=False)),
        pcie=dict(zip(names, pcie or (), strict=False)),
        disk=None if links.disk is None else parse_speed(links.disk, "disk"),
        ram=None if links.ram_speed is None else parse_speed(links.ram_speed, "ram_speed"),
        from_data_sheet=tuple(known),
    )


def _per_gpu(given: PerGpu | None, name: str, num_gpus: int, parse: Callable[[Speed, str], int]) -> list[int] | None:
    """One for all GPUs, or one for each."""
    if given is None:
        return None
    found = one_each(given)
    found = found * num_gpus if len(found) == 1 else found
    if len(found) != num_gpus:
        raise ConfigError(
            f"{name}: found {len(found)} speeds for {num_gpus} GPUs, expected one for all or one for each"
        )
    return [parse(speed, name) for speed in found]


def _parse_pcie(speed: Speed, name: str) -> int:
    link = parse_link(speed) if isinstance(speed, str) else None
    return parse_speed(speed, name) if link is None else pcie_speed(*link)
