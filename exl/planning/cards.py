"""NVIDIA cards by name: memory, bandwidth, architecture and link, as their data sheets say.

The figures are those that NVIDIA publishes for each card; bandwidths of RTX 30, 40 and 50 were compared with a second
public table. Bandwidths are peaks, which no program reaches. Of a laptop's GPU the link is the chip's; what a laptop
connects may be half of it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from exl.checkpoint.header import shown
from exl.errors import ConfigError
from exl.planning.verdict import joined
from exl.units import format_bytes

# Bytes per second of one PCIe lane in one direction: transfers a second * the code's payload share / 8.
_LANE_BYTES = {
    1: 2.5e9 * 8 / 10 / 8,
    2: 5e9 * 8 / 10 / 8,
    3: 8e9 * 128 / 130 / 8,
    4: 16e9 * 128 / 130 / 8,
    5: 32e9 * 128 / 130 / 8,
}
# Assumed, not from a data sheet: what the driver keeps of the memory. The cards of which torch's total memory is known
# (6 to 80 GB) keep a little less.
DRIVER_BYTES, DRIVER_SHARE = 256 << 20, 0.01


def pcie_speed(generation: int, lanes: int) -> int:
    """Bytes per second in one direction, before the packets' headers. ``pcie_speed(3, 16)`` is 15.75 GB/s."""
    return int(_LANE_BYTES[generation] * lanes)


def parse_link(text: str) -> tuple[int, int] | None:
    """``parse_link("4.0 x16") == (4, 16)``; None if it is not written like that."""
    match = re.fullmatch(r"\s*(?:pcie\s*)?([1-5])(?:\.0)?\s*x\s*(1|2|4|8|16)\s*", text, re.IGNORECASE)
    return None if match is None else (int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Card:
    """``ecc_in_memory``: error correction is on as delivered and takes a sixteenth of the memory."""

    model: str
    memory_gib: int  # nominal: its "GB" are 2^30 bytes
    gb_per_second: float
    arch: int  # compute capability, 86 for 8.6
    pcie: tuple[int, int]  # generation, lanes
    variant: str = ""  # what tells cards of one model and size apart
    ecc_in_memory: bool = False

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.model, f"{self.memory_gib}GB", self.variant)))

    @property
    def visible_bytes(self) -> int:
        """What programs see of the memory: without error correction's share, and without what the driver is assumed to
        keep."""
        total = self.memory_gib << 30
        if self.ecc_in_memory:
            total -= total // 16
        return int(total * (1 - DRIVER_SHARE)) - DRIVER_BYTES

    @property
    def bandwidth(self) -> int:
        """Bytes per second."""
        return round(self.gb_per_second * 1e9)

    @property
    def link_speed(self) -> int:
        return pcie_speed(*self.pcie)


def _cards() -> list[Card]:
    x8, x16 = 8, 16
    found: list[Card] = []

    def add(arch: int, generation: int, rows: Sequence[tuple], ecc: bool = False) -> None:
        """Rows: model, GiB, GB/s, lanes, variant if there is one."""
        for model, memory, speed, lanes, *variant in rows:
            found.append(Card(model, memory, speed, arch, (generation, lanes), *variant, ecc_in_memory=ecc))

    add(
        61,
        3,
        [
            ("GTX 1050", 2, 112, x16),
            ("GTX 1050 Ti", 4, 112, x16),
            ("GTX 1060", 3, 192, x16),
            ("GTX 1060", 6, 192, x16),
            ("GTX 1070", 8, 256, x16),
            ("GTX 1070 Ti", 8, 256, x16),
            ("GTX 1080", 8, 320, x16),
            ("GTX 1080 Ti", 11, 484, x16),
            ("Titan Xp", 12, 547.7, x16),
            ("Quadro P6000", 24, 432, x16),
        ],
    )
    add(61, 3, [("Tesla P4", 8, 192, x16), ("Tesla P40", 24, 346, x16)], ecc=True)
    add(60, 3, [("Tesla P100", 12, 549, x16), ("Tesla P100", 16, 732, x16)])
    add(70, 3, [("Tesla V100", 16, 900, x16), ("Tesla V100", 32, 900, x16), ("Titan V", 12, 652.8, x16)])
    add(
        75,
        3,
        [
            ("GTX 1650", 4, 128, x16, "GDDR5"),
            ("GTX 1650", 4, 192, x16, "GDDR6"),
            ("GTX 1650 Super", 4, 192, x16),
            ("GTX 1660", 6, 192, x16),
            ("GTX 1660 Super", 6, 336, x16),
            ("GTX 1660 Ti", 6, 288, x16),
            ("RTX 2060", 6, 336, x16),
            ("RTX 2060", 12, 336, x16),
            ("RTX 2060 Super", 8, 448, x16),
            ("RTX 2070", 8, 448, x16),
            ("RTX 2070 Super", 8, 448, x16),
            ("RTX 2080", 8, 448, x16),
            ("RTX 2080 Super", 8, 496, x16),
            ("RTX 2080 Ti", 11, 616, x16),
            ("Titan RTX", 24, 672, x16),
            ("Quadro RTX 4000", 8, 416, x16),
            ("Quadro RTX 5000", 16, 448, x16),
            ("Quadro RTX 6000", 24, 672, x16),
            ("Quadro RTX 8000", 48, 672, x16),
        ],
    )
    add(75, 3, [("Tesla T4", 16, 320, x16)], ecc=True)
    add(
        86,
        4,
        [
            ("RTX 3050", 6, 168, x8),
            ("RTX 3050", 8, 224, x8),
            ("RTX 3060", 8, 240, x16),
            ("RTX 3060", 12, 360, x16),
            ("RTX 3060 Ti", 8, 448, x16, "GDDR6"),
            ("RTX 3060 Ti", 8, 608, x16, "GDDR6X"),
            ("RTX 3070", 8, 448, x16),
            ("RTX 3070 Ti", 8, 608, x16),
            ("RTX 3080", 10, 760, x16),
            ("RTX 3080", 12, 912, x16),
            ("RTX 3080 Ti", 12, 912, x16),
            ("RTX 3090", 24, 936, x16),
            ("RTX 3090 Ti", 24, 1008, x16),
            ("RTX 3050 Laptop", 4, 192, x8),
            ("RTX 3050 Ti Laptop", 4, 192, x8),
            ("RTX 3060 Laptop", 6, 336, x16),
            ("RTX 3070 Laptop", 8, 448, x16),
            ("RTX 3070 Ti Laptop", 8, 448, x16),
            ("RTX 3080 Laptop", 8, 448, x16),
            ("RTX 3080 Laptop", 16, 448, x16),
            ("RTX 3080 Ti Laptop", 16, 512, x16),
            ("RTX A2000", 6, 288, x16),
            ("RTX A2000", 12, 288, x16),
            ("RTX A4000", 16, 448, x16),
            ("RTX A4500", 20, 640, x16),
            ("RTX A5000", 24, 768, x16),
            ("RTX A5500", 24, 768, x16),
            ("RTX A6000", 48, 768, x16),
        ],
    )
    add(86, 4, [("A2", 16, 200, x8), ("A10", 24, 600, x16), ("A40", 48, 696, x16)], ecc=True)
    add(
        80,
        4,
        [
            ("A30", 24, 933, x16),
            ("A100", 40, 1555, x16),
            ("A100", 80, 1935, x16, "PCIe"),
            ("A100", 80, 2039, x16, "SXM"),
        ],
    )
    add(
        89,
        4,
        [
            ("RTX 4060", 8, 272, x8),
            ("RTX 4060 Ti", 8, 288, x8),
            ("RTX 4060 Ti", 16, 288, x8),
            ("RTX 4070", 12, 504, x16),
            ("RTX 4070 Super", 12, 504, x16),
            ("RTX 4070 Ti", 12, 504, x16),
            ("RTX 4070 Ti Super", 16, 672, x16),
            ("RTX 4080", 16, 717, x16),
            ("RTX 4080 Super", 16, 736, x16),
            ("RTX 4090", 24, 1008, x16),
            ("RTX 4090 D", 24, 1008, x16),
            ("RTX 4050 Laptop", 6, 192, x8),
            ("RTX 4060 Laptop", 8, 256, x8),
            ("RTX 4070 Laptop", 8, 256, x8),
            ("RTX 4080 Laptop", 12, 432, x16),
            ("RTX 4090 Laptop", 16, 576, x16),
            ("RTX 2000 Ada", 16, 224, x8),
            ("RTX 4000 Ada", 20, 360, x16),
            ("RTX 4500 Ada", 24, 432, x16),
            ("RTX 5000 Ada", 32, 576, x16),
            ("RTX 6000 Ada", 48, 960, x16),
        ],
    )
    add(89, 4, [("L4", 24, 300, x16), ("L40", 48, 864, x16), ("L40S", 48, 864, x16)], ecc=True)
    add(
        90,
        5,
        [
            ("H100", 80, 2000, x16, "PCIe"),
            ("H100", 80, 3350, x16, "SXM"),
            ("H100", 94, 3900, x16, "NVL"),
            ("H200", 141, 4800, x16),
        ],
    )
    add(
        120,
        5,
        [
            ("RTX 5050", 8, 320, x8),
            ("RTX 5060", 8, 448, x8),
            ("RTX 5060 Ti", 8, 448, x8),
            ("RTX 5060 Ti", 16, 448, x8),
            ("RTX 5070", 12, 672, x16),
            ("RTX 5070 Ti", 16, 896, x16),
            ("RTX 5080", 16, 960, x16),
            ("RTX 5090", 32, 1792, x16),
            ("RTX 5060 Laptop", 8, 384, x8),
            ("RTX 5070 Laptop", 8, 384, x8),
            ("RTX 5070 Ti Laptop", 12, 672, x16),
            ("RTX 5080 Laptop", 16, 896, x16),
            ("RTX 5090 Laptop", 24, 896, x16),
            ("RTX PRO 6000 Blackwell", 96, 1792, x16),
        ],
    )
    return found


CARDS: tuple[Card, ...] = tuple(_cards())
_VARIANTS = {
    "sxm": "SXM",
    "hbm3": "SXM",
    "pcie": "PCIe",
    "nvl": "NVL",
    "gddr5": "GDDR5",
    "gddr6": "GDDR6",
    "gddr6x": "GDDR6X",
}
# Words that names have in one place and lack in another.
_LEFT_OUT = re.compile(r"\b(nvidia|geforce|tesla|quadro|graphics|gpu|card|generation)\b|\((r|tm)\)")


def _key(text: str) -> str:
    """``_key("NVIDIA GeForce RTX 3060") == "rtx3060"``."""
    return re.sub(r"[^a-z0-9]", "", _LEFT_OUT.sub(" ", text.lower()).replace("mobile", "laptop"))


def find_card(name: str) -> Card:
    """By name as sellers, drivers or people write it: ``"RTX 3060 12GB"``, ``"rtx3060-12gb"``, ``"NVIDIA A100 80GB
    PCIe"``. Raises ``ConfigError`` for a name that is no card's, with the nearest, or that is several cards'."""
    text = name.lower() if isinstance(name, str) else ""
    size = re.search(r"\b(\d+)[\s-]*gi?b\b", text)
    variant = re.search(r"\b(sxm|hbm3|pcie|nvl|gddr6x|gddr[56])[2-5]?\b", text)
    rest = text
    for match in (size, variant):
        rest = rest if match is None else rest.replace(match[0], " ", 1)
    key = _key(rest)
    same = [card for card in CARDS if key and key in (_key(card.model), _without_line(card))]
    found = [card for card in same if size is None or card.memory_gib == int(size[1])]
    if variant is not None and any(card.variant for card in found):
        found = [card for card in found if card.variant == _VARIANTS[variant[1]]]
    if len(found) == 1:
        return found[0]
    if len(found) > 1:
        raise ConfigError(f"gpu: found {name!r}, which is {_listed(found)}: say which")
    if same:
        raise ConfigError(f"gpu: found {name!r}, expected {_listed(same)}")
    raise ConfigError(f"gpu: found {shown(name)}{_nearest(key)}")


def _without_line(card: Card) -> str:
    """``"3060ti"``, for who leaves out RTX or GTX."""
    return re.sub(r"^[rg]tx(?=\d{4})", "", _key(card.model))


def _listed(cards: Sequence[Card]) -> str:
    return joined([card.name for card in cards], "or")


def _nearest(key: str) -> str:
    by_key: dict[str, list[Card]] = {}
    for card in CARDS:
        by_key.setdefault(_key(card.model), []).append(card)
    longer = [known for known in by_key if key and known.startswith(key)]
    close = longer or difflib.get_close_matches(key, by_key, n=3, cutoff=0.7)
    if not close:
        return ", expected a card such as 'RTX 3060 12GB', or its memory by vram= and its compute capability by arch="
    return f"; did you mean {_listed([card for match in close for card in by_key[match]])}?"


def parse_cards(gpu: str | Sequence[str]) -> tuple[Card, ...]:
    """``"RTX 3090, RTX 3060 12GB"`` or a list of names. Raises ``ConfigError``."""
    names = gpu.split(",") if isinstance(gpu, str) else gpu
    if not isinstance(names, Sequence) or not names:
        raise ConfigError(f"gpu: found {gpu!r}, expected the name of a card, or a list of names")
    return tuple(find_card(name.strip() if isinstance(name, str) else name) for name in names)


def describe_card(card: Card) -> str:
    """What a plan assumes of it, in one line."""
    generation, lanes = card.pcie
    kept = "256 MiB, 1 % and error correction's share" if card.ecc_in_memory else "256 MiB and 1 %"
    return (
        f"{card.name}: compute capability {card.arch / 10}, {card.gb_per_second:g} GB/s, PCIe {generation}.0 x{lanes}; "
        f"{format_bytes(card.visible_bytes)} assumed to be visible (less {kept})"
    )
