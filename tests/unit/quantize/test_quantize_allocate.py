"""Widths for an average: against all choices there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from exl.errors import ConfigError
from exl.quantize.allocate import Unit, allocate, average_bits
from exl.quantize.options import QuantizeOptions

WIDTHS = (2, 3, 4, 8)


def random_units(seed: int, count: int = 6) -> list[Unit]:
    """Errors fall by a factor of 2 to 8 a bit."""
    rng = np.random.default_rng(seed)
    units = []
    for i in range(count):
        errors = {2: float(10 ** rng.uniform(-2, 1))}
        for old, new in itertools.pairwise(WIDTHS):
            errors[new] = errors[old] / float(rng.uniform(2, 8)) ** (new - old)
        units.append(Unit(i, int(rng.integers(1, 9)) * 1024, errors))
    return units


def error_of(units: list[Unit], widths: dict) -> float:
    return sum(unit.errors[widths[unit.key]] for unit in units)


def best_of_all(units: list[Unit], target: float) -> float:
    found = []
    for widths in itertools.product(WIDTHS, repeat=len(units)):
        chosen = dict(zip((unit.key for unit in units), widths, strict=True))
        if average_bits(units, chosen) <= target + 1e-9:
            found.append(error_of(units, chosen))
    return min(found)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("target", [2.0, 2.7, 3.0, 3.5, 6.1])
def test_no_choice_is_much_better(seed, target):
    """Along the hulls no fractions of steps could be better (linear programming), and at the end a fraction of one step
    is missing: at most the error of the unit that wanted it."""
    units = random_units(seed)
    widths = allocate(units, target)
    average = average_bits(units, widths)
    assert average <= target + 1e-9
    missing = max(unit.errors[widths[unit.key]] for unit in units)
    assert error_of(units, widths) <= best_of_all(units, target) + missing
    total = sum(unit.num_weights for unit in units)
    for unit in units:  # nothing that still takes error away would fit
        for width in WIDTHS:
            more = unit.num_weights * (width - widths[unit.key]) / total
            assert width <= widths[unit.key] or average + more > target


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_better_than_a_price_for_bits(seed):
    """Each unit's best width at one price of a bit, whatever the price, is the best choice for its average."""
    units = random_units(seed, count=40)
    averages = set()
    for price in np.geomspace(1e-12, 1e-2, 100):
        best = {
            u.key: min(WIDTHS, key=lambda width, u=u: u.errors[width] + price * u.num_weights * width) for u in units
        }
        averages.add(average := average_bits(units, best))
        assert error_of(units, allocate(units, average)) == pytest.approx(error_of(units, best))
    assert len(averages) > 20


def test_steps_that_take_most_away_come_first():
    equal = {2: 8.0, 3: 2.0, 4: 0.5, 8: 0.0}
    units = [Unit("small", 100, equal), Unit("large", 200, equal), Unit("deaf", 100, dict.fromkeys(WIDTHS, 1.0))]
    assert allocate(units, 2.25) == {"small": 3, "large": 2, "deaf": 2}
    assert allocate(units, 2.75) == {"small": 3, "large": 3, "deaf": 2}
    assert allocate(units, 8) == {"small": 8, "large": 8, "deaf": 2}  # bits that change nothing are not spent


def test_units_with_one_width_count():
    units = [Unit("fixed", 300, {8: 0.0}), Unit("free", 700, {2: 1.0, 3: 0.5, 4: 0.1})]
    assert allocate(units, 4.5) == {"fixed": 8, "free": 3}
    with pytest.raises(ConfigError, match=r"target_bits: found 3.5, expected at least 3.8"):
        allocate(units, 3.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_bits": 3.5, "bits": 4}, "bits: found 4, expected none beside target_bits"),
        ({"target_bits": 9}, "target_bits: found 9, expected a number from 2 to 8"),
        ({"target_bits": 3.5, "bit_choices": (4, 8)}, "found 3.5, expected a number from 4 to 8"),
        ({"target_bits": float("nan")}, "target_bits: found nan"),
        ({"target_bits": 3.5, "bit_choices": (3, 5)}, "bit_choices: found 5, expected one of 2, 3, 4, 8"),
        ({"target_bits": 3.5, "bit_choices": (3, 3)}, "expected at least two different ones"),
        ({"target_bits": 3.5, "method": "rtn"}, "target_bits: found method 'rtn', expected gptq"),
        ({"bit_choices": (3, 4)}, "bit_choices: .* no meaning without target_bits"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ConfigError, match=message):
        QuantizeOptions(**{"calibration": "text.txt", **options})
