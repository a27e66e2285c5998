"""What one token reads from each memory and over each link, and the least time that this takes: a bound, no forecast.

Generating a token reads all weights of layers and head, the keys and values of all earlier tokens, and one row of the
embedding. Its time is at least what the slowest of these needs:

- the arithmetic, which reads everything from the memory where it runs (GPUs of a plan take turns: a sum),
- the copies of streamed layers over PCIe, and the reads from the disk. Both run beside the arithmetic and beside each
  other, but only as far ahead as there are buffers (``exl/weights/device_stream.py``, ``reader.py``): while resident
  layers and the head are computed, no more than ``num_buffers`` layers can be fetched. The others are fetched while
  streamed layers are computed, so that the rest of the arithmetic and their transfer are a sum.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from exl.errors import ConfigError
from exl.planning.verdict import joined
from exl.units import format_bytes, parse_bytes, short_bytes

_LEAST_SPEED = 10**6  # less is a number whose unit was forgotten
_FEW = 1e-4  # of a token's bytes: a row of the embedding, whose link's speed need not be known
CPU = "cpu"


@dataclass(frozen=True)
class Speeds:
    """Bytes per second; None or missing: not known. ``from_data_sheet``: links whose figures nobody gave."""

    vram: Mapping[str, int] = field(default_factory=dict)  # by GPU: "cuda:0"
    pcie: Mapping[str, int] = field(default_factory=dict)
    disk: int | None = None
    ram: int | None = None
    from_data_sheet: tuple[str, ...] = ()  # "vram", "pcie"

    def memory(self, device: str) -> int | None:
        return self.ram if device == CPU else self.vram.get(device)


@dataclass(frozen=True)
class TokenBytes:
    """Bytes that one decode step of one sequence reads, with ``depth`` tokens in the cache."""

    depth: int
    memory: Mapping[str, int]  # read by arithmetic, by the device that computes: "cuda:0", or "cpu"
    ahead: Mapping[str, int]  # the part of it that is computed from weights that stay: copies wait meanwhile
    pcie: int  # copied to the last GPU
    pcie_late: int  # the part of it that cannot be copied before streamed layers are computed
    disk: int
    disk_late: int

    @property
    def last_gpu(self) -> str:
        """The one that layers are streamed to."""
        return list(self.memory)[-1]

    @property
    def on_gpu(self) -> bool:
        return CPU not in self.memory

    def links(self) -> dict[str, int]:
        """Bytes by link, for JSON and texts: vram or ram, pcie, disk."""
        found = {"vram" if self.on_gpu else "ram": sum(self.memory.values()), "pcie": self.pcie, "disk": self.disk}
        return {name: num_bytes for name, num_bytes in found.items() if num_bytes}

    @property
    def few(self) -> float:
        """So few bytes over a link, such as a row of the embedding, are not worth a word."""
        return _FEW * sum(self.memory.values())

    def unknown(self, speeds: Speeds) -> list[str]:
        """The options that would have to be given for a bound."""
        on_gpu, few = self.on_gpu, self.few
        missing = {
            "vram_speed" if on_gpu else "ram_speed": any(speeds.memory(device) is None for device in self.memory),
            "pcie": self.pcie > few and self.last_gpu not in speeds.pcie,
            "disk": self.disk > few and speeds.disk is None,
        }
        return [name for name, is_missing in missing.items() if is_missing]

    def seconds(self, speeds: Speeds) -> float | None:
        """The least time of one token; None if a speed that it depends on is not known."""
        if self.unknown(speeds):
            return None
        arithmetic = sum(num_bytes / speeds.memory(device) for device, num_bytes in self.memory.items())
        ahead = sum(num_bytes / speeds.memory(device) for device, num_bytes in self.ahead.items())
        times = [arithmetic]
        if self.last_gpu in speeds.pcie:
            pcie = speeds.pcie[self.last_gpu]
            pcie = pcie if speeds.ram is None else min(pcie, speeds.ram)  # copies read RAM
            times += [self.pcie / pcie, ahead + self.pcie_late / pcie]
        if speeds.disk is not None:
            times += [self.disk / speeds.disk, ahead + self.disk_late / speeds.disk]
        return max(times)

    def describe(self) -> str:
        """``"3.30 GB of VRAM and 1.00 GB over PCIe"``."""
        names = {"vram": "of VRAM", "ram": "of RAM", "pcie": "over PCIe", "disk": "from the disk"}
        return joined(
            [
                f"{format_bytes(num_bytes)} {names[link]}"
                for link, num_bytes in self.links().items()
                if num_bytes > self.few
            ]
        )


def speed_lines(tokens: Sequence[TokenBytes], speeds: Speeds) -> list[str]:
    """What a token reads at each depth, the bound if there is one, and how it comes about."""
    lines = []
    for token in tokens:
        depth = f"{token.depth} tokens in the cache" if token.depth else "an empty cache"
        text, seconds = f"a token reads {token.describe()} with {depth}", token.seconds(speeds)
        lines.append(text if seconds is None else f"{text}: at most about {_rate(1 / seconds)} tokens/s")
    if not tokens:
        return lines
    unknown = tokens[0].unknown(speeds)
    if not unknown:
        lines.append(_how(tokens[0], speeds))
    elif speeds != Speeds():
        lines.append(f"no bound of the speed without {joined([f'{name}=' for name in unknown])}")
    return lines


def _how(token: TokenBytes, speeds: Speeds) -> str:
    """By which figures, and what runs beside what."""
    several = len(token.memory) > 1
    sheet = {link: " by the data sheet" if link in speeds.from_data_sheet else "" for link in ("vram", "pcie")}
    figures = []
    for device in token.memory:
        name = "RAM" if device == CPU else device if several else "VRAM"
        figures.append(f"{name} {_speed(speeds.memory(device))}{sheet['vram']}")
    if token.pcie > token.few and token.last_gpu in speeds.pcie:
        figures.append(f"PCIe {_speed(speeds.pcie[token.last_gpu])}{sheet['pcie']}")
    if token.disk > token.few and speeds.disk is not None:
        figures.append(f"disk {_speed(speeds.disk)}")
    late = (("copies over PCIe", token.pcie_late), ("reads from the disk", token.disk_late))
    moved = [name for name, num_bytes in late if num_bytes]
    beside = f"; {joined(moved)} run beside the arithmetic, as far ahead as buffers reach" if moved else ""
    return f"a bound, not measured, from {joined(figures)}{beside}"


def tokens_json(tokens: Sequence[TokenBytes], speeds: Speeds) -> list[dict[str, object]]:
    found = []
    for token in tokens:
        seconds = token.seconds(speeds)
        bound = None if seconds is None else round(1 / seconds, 2)
        found.append({"depth": token.depth, "bytes": token.links(), "most_tokens_per_second": bound})
    return found


def parse_speed(speed: int | str, name: str) -> int:
    """Bytes per second: ``parse_speed("360GB/s", "disk") == parse_speed("360GB", "disk") == 360 * 10**9``. Raises
    ``ConfigError``, also for a number whose unit was forgotten."""
    text = re.sub(r"\s*(/|p)s\s*$", "", speed, flags=re.IGNORECASE) if isinstance(speed, str) else speed
    bare = str(text).strip()
    if re.fullmatch(r"\d+(\.\d+)?", bare) and not isinstance(speed, bool) and 0 < float(bare) < _LEAST_SPEED:
        raise ConfigError(f"{name}: found {speed!r}, expected a speed with a unit; did you mean '{bare}GB'?")
    try:
        return parse_bytes(text, name)
    except ConfigError:
        raise ConfigError(f"{name}: found {speed!r}, expected bytes per second such as '360GB' or '3.5GB/s'") from None


def _speed(num_bytes: int | None) -> str:
    return f"{short_bytes(num_bytes or 0)}/s"


def _rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
