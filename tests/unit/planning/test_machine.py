"""Cards by name, architectures and speeds as people write them, and what a plan makes of them."""

from __future__ import annotations

import json
import re

import pytest

import exl
from exl.errors import ConfigError
from exl.layout.arch import ARCH_LIMITS
from exl.planning.cards import CARDS, Card, find_card, parse_link, pcie_speed
from exl.planning.machine import Links, describe_machine, parse_arch
from exl.planning.speed import parse_speed
from tests.command_line import run_exl

# What torch reports as total memory, in GiB, as its out-of-memory messages print it.
TOTAL_GIB = {
    "RTX 2060 6GB": 5.79, "GTX 1080 Ti": 10.91, "RTX 3070": 7.79, "RTX 3060 12GB": 11.76, "RTX 3090": 23.69,
    "RTX 4090": 23.65, "Tesla T4": 14.75, "V100 16GB": 15.78, "V100 32GB": 31.75, "P100 16GB": 15.90, "L4": 22.05,
    "A10": 22.06, "A40": 44.43, "RTX A6000": 47.54, "A100 40GB": 39.59, "A100 80GB PCIe": 79.15, "H100 PCIe": 79.11,
}  # fmt: skip


def test_visible_memory_is_what_programs_are_told():
    """Not more than a percent above, which is less than what exl leaves free, and at most 6 % below."""
    shares = {name: find_card(name).visible_bytes / (gib * 2**30) for name, gib in TOTAL_GIB.items()}
    assert {name: share for name, share in shares.items() if not 0.94 < share < 1.01} == {}


def test_links_are_as_fast_as_the_standard_says():
    """PCI-SIG's table, GB/s in one direction of 16 lanes."""
    expected = {1: 4.0, 2: 8.0, 3: 15.754, 4: 31.508, 5: 63.015}
    assert {generation: round(pcie_speed(generation, 16) / 1e9, 3) for generation in expected} == expected
    assert pcie_speed(4, 4) == pytest.approx(pcie_speed(4, 16) / 4, abs=4)
    assert [parse_link(text) for text in ("4.0 x16", "3x8", "PCIe 5.0 x4", " 2 X 1 ")] == [
        (4, 16), (3, 8), (5, 4), (2, 1)
    ]  # fmt: skip
    assert [parse_link(text) for text in ("4.0", "4.0 x3", "7.0 x16", "12GB", "")] == [None] * 5


def test_the_table_of_cards_is_in_order():
    names = [card.name for card in CARDS]
    assert len(set(names)) == len(names)
    assert {card.arch for card in CARDS} <= ARCH_LIMITS.keys()
    assert all(find_card(card.name) is card for card in CARDS)
    # A memory bus has 32 to 6144 lines, each of which moves 5 to 32 Gbit/s on these cards.
    assert all(2 <= card.memory_gib <= 141 and 100 <= card.gb_per_second <= 5000 for card in CARDS)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("RTX 3060 12GB", "RTX 3060 12GB"),
        ("rtx3060-12gb", "RTX 3060 12GB"),
        ("3060 12 GB", "RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "RTX 3060 Laptop 6GB"),
        ("RTX 3080 Mobile 16GB", "RTX 3080 Laptop 16GB"),
        ("4090", "RTX 4090 24GB"),
        ("RTX 3090Ti", "RTX 3090 Ti 24GB"),
        ("P40", "Tesla P40 24GB"),
        ("NVIDIA T4", "Tesla T4 16GB"),
        ("Tesla V100-SXM2-32GB", "Tesla V100 32GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB SXM"),
        ("NVIDIA H100 NVL", "H100 94GB NVL"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada 48GB"),
        ("L40s", "L40S 48GB"),
        ("RTX 3060 Ti GDDR6X", "RTX 3060 Ti 8GB GDDR6X"),
        ("RTX 3060 Ti 8GB GDDR6", "RTX 3060 Ti 8GB GDDR6"),
    ],
)
def test_cards_are_found_as_people_and_drivers_write_them(written, expected):
    assert find_card(written).name == expected


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("RTX 3060", r"^gpu: found 'RTX 3060', which is RTX 3060 8GB or RTX 3060 12GB: say which$"),
        ("RTX 3060 10GB", r"^gpu: found 'RTX 3060 10GB', expected RTX 3060 8GB or RTX 3060 12GB$"),
        ("A100", r"^gpu: found 'A100', which is A100 40GB, A100 80GB PCIe or A100 80GB SXM: say which$"),
        ("GTX 1650", r"which is GTX 1650 4GB GDDR5 or GTX 1650 4GB GDDR6: say which$"),
        ("RTX 3065", r"^gpu: found 'RTX 3065'; did you mean .*RTX 3060 12GB"),
        ("RTX PRO 6000", r"did you mean RTX PRO 6000 Blackwell 96GB\?$"),
        ("banana", r"^gpu: found 'banana', expected a card such as 'RTX 3060 12GB', or its memory by vram="),
        ("", r"^gpu: found '', expected a card such as"),
        ("RTX 3090,", r"^gpu: found '', expected a card such as"),
        (5, r"^gpu: found 5, expected the name of a card, or a list of names$"),
        ([], r"^gpu: found \[\], expected the name of a card"),
        ([5], r"^gpu: found 5, expected a card such as"),
    ],
)
def test_a_card_that_is_unknown_or_several_is_named(written, message):
    with pytest.raises(ConfigError, match=message):
        exl.plan(gpu=written)


@pytest.mark.parametrize("arch", [86, 8.6, "8.6", "86", "sm_86", "SM86", "compute_86", " 8.6 "])
def test_every_way_to_write_an_architecture(arch):
    assert parse_arch(arch) == 86


@pytest.mark.parametrize(("arch", "expected"), [(12.0, 120), ("12.0", 120), (120, 120), ("sm_120", 120), (9.0, 90)])
def test_architectures_of_two_digits(arch, expected):
    assert parse_arch(arch) == expected


def test_the_command_takes_an_architecture_as_the_function_does():
    expected = exl.plan(shape="llama-2-7b", vram="8GB", arch=89).table() + "\n"
    for arch in ("8.9", "89", "sm_89"):
        done = run_exl("plan", "--shape", "llama-2-7b", "--vram", "8GB", "--arch", arch)
        assert (done.returncode, done.stdout) == (0, expected), done.stderr


def test_a_card_gives_memory_architecture_and_speeds():
    machine = describe_machine("RTX 3090, RTX 4060", None, None, Links())
    assert machine.target.arch == 86  # the lowest
    visible = [find_card(name).visible_bytes for name in ("RTX 3090", "RTX 4060")]
    assert machine.vram == tuple(num_bytes - (512 << 20) for num_bytes in visible)
    assert machine.speeds.vram == {"cuda:0": 936 * 10**9, "cuda:1": 272 * 10**9}
    assert machine.speeds.pcie == {"cuda:0": pcie_speed(4, 16), "cuda:1": pcie_speed(4, 8)}
    told = [note.text for note in machine.notes]
    assert any("8.6, the lowest of these cards" in text for text in told)
    assert any(re.search("RTX 4060 8GB: compute capability 8.9, 272 GB/s, PCIe 4.0 x8; .* assumed", t) for t in told)
    # What is given counts more.
    machine = describe_machine(["RTX 3090"], "10GB", "8.6", Links("800GB", "3.0 x4", "2GB", 5 * 10**10))
    assert (machine.vram, machine.notes) == (("10GB",), ())
    assert machine.speeds.vram == {"cuda:0": 800 * 10**9}
    assert machine.speeds.pcie == {"cuda:0": pcie_speed(3, 4)}
    assert (machine.speeds.disk, machine.speeds.ram) == (2 * 10**9, 50 * 10**9)


def test_error_correction_takes_a_sixteenth():
    plain, checked = (Card("X", 16, 320, 75, (3, 16), ecc_in_memory=ecc).visible_bytes for ecc in (False, True))
    assert abs(plain - checked - (1 << 30) * 0.99) < 2


def test_no_speed_is_invented():
    """Without figures there is no bound, and no speed is named."""
    found = exl.plan(shape="llama-2-7b", vram="8GB")
    assert not found.speeds.vram
    assert [token["most_tokens_per_second"] for token in found.to_json()["tokens"]] == [None, None]
    assert "/s" not in found.table()
    only_disk = exl.plan(shape="llama-2-7b", vram="8GB", disk="2GB")
    assert "no bound of the speed without vram_speed=" in only_disk.table()


@pytest.mark.parametrize(
    ("speed", "expected"), [("360GB", 360e9), ("3.5 GB/s", 3.5e9), ("2GiBps", 2 << 30), (10**9, 1e9), ("5000000", 5e6)]
)
def test_speeds(speed, expected):
    assert parse_speed(speed, "disk") == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vram": "8GB", "vram_speed": "360"}, r"^vram_speed: found '360', .*did you mean '360GB'\?$"),
        ({"vram": "8GB", "vram_speed": 360}, r"^vram_speed: found 360, .*did you mean '360GB'\?$"),
        ({"disk": "fast"}, r"^disk: found 'fast', expected bytes per second such as '360GB' or '3\.5GB/s'$"),
        ({"disk": True}, r"^disk: found True, expected bytes per second"),
        ({"ram_speed": -1}, r"^ram_speed: found -1, expected bytes per second"),
        ({"vram": "8GB", "pcie": "4.0 x3"}, r"^pcie: found '4.0 x3', expected bytes per second"),
        ({"vram": ["8GB", "8GB", "8GB"], "pcie": ["1GB", "2GB"]}, r"^pcie: found 2 speeds for 3 GPUs"),
        ({"vram_speed": "360GB"}, r"^vram_speed: found '360GB' in a plan for the CPU; expected vram= or gpu="),
        ({"pcie": "12GB"}, r"^pcie: found '12GB' in a plan for the CPU"),
        ({"arch": 89}, r"^arch: found 89 in a plan for the CPU"),
        ({"gpu": "RTX 3090", "arch": 89}, r"^arch: found 8\.9, but RTX 3090 24GB has 8\.6"),
        ({"gpu": "RTX 3090", "vram": ["8GB", "8GB"]}, r"^vram: found 2 sizes for 1 cards"),
        ({"depth": -1}, r"^depth: found -1, expected a number of tokens from 0 to the context, 512$"),
        ({"depth": 513}, r"^depth: found 513"),
    ],
)
def test_what_makes_no_sense_is_named(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        exl.plan(**options)
    assert "\n" not in str(caught.value)


def test_the_command_plans_for_cards():
    done = run_exl("plan", "--shape", "llama-2-7b", "--gpu", "RTX 3090, RTX 3060 12GB", "--json", "--depth", "100")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == exl.plan(shape="llama-2-7b", gpu="RTX 3090, RTX 3060 12GB", depth=100).to_json()
    assert found["verdict"].startswith("all 32 layers in VRAM; needs ")
    (token,) = found["tokens"]
    assert token["depth"] == 100
    assert 936e9 / token["bytes"]["vram"] == pytest.approx(token["most_tokens_per_second"], abs=0.01)
