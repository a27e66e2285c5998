"""Overrides of single modules: read, refused, and as another reader of ``dynamic`` takes them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from exl.errors import ConfigError
from exl.quantize.options import QuantizeOptions
from exl.quantize.overrides import Assignment, Override, Settings, dynamic, settings_of

NAMES = [f"model.layers.{i}.{tail}" for i in range(12) for tail in ("self_attn.q_proj", "mlp.down_proj")]
BASE = Settings(4, 128, False)


def first_match(entries: dict, name: str) -> dict | None:
    """As GPTQModel reads ``dynamic``: patterns in the order of the file, the first that matches decides. {}: none;
    None: excluded."""
    for key, values in entries.items():
        excludes, pattern = key.startswith("-:"), key[2:] if key[:2] in ("+:", "-:") else key
        if re.match(pattern, name):
            return None if excludes else values
    return {}


@pytest.mark.parametrize(
    "texts",
    [
        [r".*down_proj=bits:8,group_size:32"],
        [r"model\.layers\.1\..*=bits:3", r"model\.layers\.1.*=sym:true,group_size:-1"],
        [r".*down_proj=bits:8", r"model\.layers\.(0|11)\.=dense"],
        [r"model\.layers\.[0-3]\.(?!mlp)=dense", r".*=bits:2"],
    ],
    ids=str,
)
def test_settings_are_those_that_other_readers_find(texts):
    overrides = [Override.parse(text) for text in texts]
    found = settings_of(NAMES, BASE, overrides)
    entries = dynamic(overrides)
    for name in NAMES:
        values = first_match(entries, name)
        expected = None if values is None else Settings(**{**vars(BASE), **values})
        assert found[name] == expected, name
    assert len({*found.values()}) > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mlp", r"override: 'mlp': expected PATTERN=bits:8"),
        ("=bits:8", r"expected PATTERN=bits:8"),
        ("(=bits:8", r"not a regular expression"),
        ("x=bits:5", r"bits: found '5', expected one of 2, 3, 4, 8"),
        ("x=bits", r"bits: found '', expected one of"),
        ("x=group_size:0", r"group_size: found '0', expected a whole number of at least 2, or -1"),
        ("x=sym:1", r"sym: found '1', expected true or false"),
        ("x=desc_act:true", r"found 'desc_act'; expected PATTERN"),
        ("x=bits:4,bits:8", r"bits is there twice"),
        ("x=Dense", r"found 'Dense'"),
    ],
)
def test_what_is_no_override_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        QuantizeOptions(method="rtn", overrides=[text])


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"'down_proj' matches the name of no linear .*; one is model\.layers\.0\."):
        settings_of(NAMES, BASE, [Override.parse("down_proj=bits:8")])


@pytest.mark.parametrize("num_layers", [12, 200])
def test_chosen_bits_are_what_readers_find(num_layers):
    """Settings of one's own, group sizes that a user asked for and modules that stay dense, in layers of any number."""
    tails = ("self_attn.q_proj", "mlp.down_proj", "mlp.experts.1.up_proj", "mlp.experts.11.up_proj")
    names = [f"model.layers.{i}.{tail}" for i in range(num_layers) for tail in tails]
    asked = Assignment.make(
        names, BASE, [Override.parse(text) for text in (r".*\.1\.mlp\.experts=dense", r".*down_proj=group_size:32")]
    )
    rng = np.random.default_rng(0)
    bits = {name: int(rng.choice([3, 4, 8])) for name, found in asked.settings.items() if found}
    chosen = asked.with_bits(bits)
    assert settings_of(names, chosen.base, chosen.overrides) == chosen.settings
    entries = dynamic(chosen.overrides)
    for name in names:
        values = first_match(entries, name)
        found = chosen.settings[name]
        assert found == (None if values is None else Settings(**{**vars(chosen.base), **values})), name
        assert found is None or (found.bits, found.group_size) == (bits[name], 32 if "down" in name else 128)
    assert len(entries) < 12 * -(-num_layers // 64) + 2


def test_modules_whose_bits_nobody_says():
    asked = Assignment.make(
        NAMES, BASE, [Override.parse(r".*down_proj=bits:4"), Override.parse(r".*\.0\.self_attn=sym:true")]
    )
    assert asked.without_bits() == {name for name in NAMES if "q_proj" in name}


def test_a_pattern_is_said_once():
    """As an entry of ``dynamic`` it would have the settings of the second, in the first one's place."""
    with pytest.raises(ConfigError, match=r"overrides: found 'mlp' 2 times, expected it once"):
        QuantizeOptions(method="rtn", overrides=["mlp=bits:8", "attn=bits:2", "mlp=group_size:32"])


def test_overrides_are_a_sequence():
    with pytest.raises(ConfigError, match="overrides: found 'x=bits:8', expected a sequence of strings"):
        QuantizeOptions(method="rtn", overrides="x=bits:8")
