"""Index files that do not match their shards, or that lead out of the folder."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from exl.checkpoint.checkpoint import Checkpoint
from exl.errors import CheckpointError

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WEIGHT_MAP = {"a": FIRST, "b": SECOND, "c": SECOND}
SETTINGS = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def folder(tmp_path):
    """Two shards with three tensors and a valid index."""
    save_file({"a": torch.ones(2)}, tmp_path / FIRST)
    save_file({"b": torch.ones(3), "c": torch.zeros(1)}, tmp_path / SECOND)
    write_index(tmp_path, {"metadata": {"total_size": 24}, "weight_map": WEIGHT_MAP})
    return tmp_path


def write_index(folder, index: object) -> None:
    raw = index if isinstance(index, bytes) else (index if isinstance(index, str) else json.dumps(index)).encode()
    (folder / INDEX).write_bytes(raw)


def assert_refused(folder, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert len(str(caught.value)) < 1000


def assert_loads(folder) -> None:
    with Checkpoint.open(folder) as checkpoint:
        assert {info.name: info.file for info in checkpoint.tensors.values()} == WEIGHT_MAP


def test_right_indices_load_whatever_else_they_say(folder):
    assert_loads(folder)
    for index in (
        {"weight_map": WEIGHT_MAP},
        {"weight_map": WEIGHT_MAP, "metadata": {"total_size": -1, "x": [1, {"y": None}], "z": 1e300}},
        {"metadata": None, "weight_map": dict(reversed(WEIGHT_MAP.items())), "other": "text"},
    ):
        write_index(folder, index)
        assert_loads(folder)
        text = json.dumps(index, indent=4) + "\n"
        for saved in (text, text.replace("\n", "\r\n"), "\ufeff" + text):
            write_index(folder, saved)
            assert_loads(folder)


# --- shards that a name leads to -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shard",
    [
        *("/etc/passwd", "/etc/passwd.safetensors", "../x.safetensors", "sub/../../x.safetensors", "..", "."),
        *(
            "C:\\x.safetensors",
            "C:x.safetensors",
            "..\\x.safetensors",
            "\\\\host\\share\\x.safetensors",
            "\\x.safetensors",
        ),
        *("", " ", "x.bin", "x.safetensors\0", "x\0.safetensors", "x\n.safetensors", "\x1b[2J.safetensors", "x/"),
        *("~/x.bin", "model.safetensors.index.json", "/", "x.safetensors/..", ".safetensors", "x" * 5000),
    ],
)
def test_names_that_are_no_shard_inside_the_folder(folder, shard):
    """Only the name is checked: no file outside the folder is accessed."""
    (folder.parent / "x.safetensors").write_bytes((folder / FIRST).read_bytes())
    write_index(folder, {"weight_map": WEIGHT_MAP | {"a": shard}})
    assert_refused(folder, rf"^{INDEX}: tensor 'a': found shard .*, expected the name of a \.safetensors file inside")


def test_a_shard_in_a_subfolder(folder):
    (folder / "sub").mkdir()
    (folder / FIRST).rename(folder / "sub" / FIRST)
    write_index(folder, {"weight_map": WEIGHT_MAP | {"a": f"sub/{FIRST}"}})
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.read("a").tolist() == [1, 1]


def test_a_missing_shard(folder):
    (folder / SECOND).unlink()
    assert_refused(folder, rf"{INDEX} lists 2 shards, and 1 is missing: {SECOND}; found {FIRST}$")


def test_a_shard_that_is_a_folder(folder):
    (folder / SECOND).unlink()
    (folder / SECOND).mkdir()
    assert_refused(folder, rf"{SECOND}: not a regular file")


def test_a_shard_of_an_endless_name(folder):
    write_index(folder, {"weight_map": WEIGHT_MAP | {"a": "x" * 300 + ".safetensors"}})
    assert_refused(folder, r"lists 2 shards, and 1 is missing: 'xxx.*xxx\.safetensors'; found")


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_a_shard_that_links_to_itself(folder):
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to(FIRST)
    assert_refused(folder, rf"{FIRST}: cannot be opened")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_pipes_do_not_block(folder):
    (folder / FIRST).unlink()
    os.mkfifo(folder / FIRST)
    assert_refused(folder, rf"{FIRST}: not a regular file")
    (folder / INDEX).unlink()
    os.mkfifo(folder / INDEX)
    assert_refused(folder, rf"{INDEX}: not a regular file")


@SETTINGS
@given(length=st.integers(0, 400), which=st.sampled_from([FIRST, SECOND]))
def test_a_shard_that_is_cut_off(folder, length, which):
    whole = (folder / which).read_bytes()
    length %= len(whole)
    try:
        (folder / which).write_bytes(whole[:length])
        assert_refused(folder, rf"^{which}: ")
    finally:
        (folder / which).write_bytes(whole)


# --- index and shards that do not agree ------------------------------------------------------------------------------


def test_a_tensor_that_is_in_no_shard(folder):
    write_index(folder, {"weight_map": WEIGHT_MAP | {"d": FIRST}})
    assert_refused(folder, rf"{INDEX}: tensor 'd' is in no shard, expected in {FIRST}")


def test_a_tensor_in_another_shard(folder):
    write_index(folder, {"weight_map": WEIGHT_MAP | {"b": FIRST}})
    assert_refused(folder, rf"{INDEX}: tensor 'b' is in {SECOND}, expected in {FIRST}")


def test_a_tensor_that_the_index_does_not_list(folder):
    write_index(folder, {"weight_map": {"a": FIRST, "b": SECOND}})
    assert_refused(folder, rf"{INDEX}: does not list tensor 'c', found in {SECOND}")


def test_a_tensor_in_two_shards(folder):
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / FIRST)
    assert_refused(folder, rf"tensor 'b' is in two shards: {FIRST} and {SECOND}")


def test_one_shard_under_two_names(folder):
    write_index(folder, {"weight_map": WEIGHT_MAP | {"c": f"./{SECOND}"}})
    assert_refused(folder, rf"tensor '[bc]' is in two shards: \./{SECOND} and {SECOND}")


# --- the text itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"found the end at character 0, expected an object"),
        ("[]", r"found '\[\]' at character 0, expected an object"),
        ("{}", r"no tensors in weight_map, expected \{tensor: shard\}"),
        ('{"weight_map": {}}', r"no tensors in weight_map"),
        ('{"weight_map": null}', r"'weight_map': found 'null.*, expected an object"),
        ('{"weight_map": [["a", "b"]]}', r"'weight_map': found .*, expected an object"),
        ('{"weight_map": {"a": 1}}', r"'weight_map': 'a': found '1.*, expected a string"),
        ('{"weight_map": {"a": ["x.safetensors"]}}', r"'weight_map': 'a': found .*, expected a string"),
        ('{"weight_map": {"a": "x", "a": "y"}}', r"'weight_map': 'a' occurs twice"),
        ('{"weight_map": {"a": "x"}, "weight_map": {}}', r"'weight_map' occurs twice"),
        ('{"metadata": NaN}', r"'metadata': found 'NaN.*, expected a JSON value"),
        ('{"metadata": -Infinity}', r"'metadata': found '-Inf.*, expected a JSON value"),
        ('{"metadata": ' + "[" * 70000, r"'metadata': found '\[\[.*, expected a JSON value of at most 65536"),
        ('{"metadata": ' + "[" * 60000 + "]" * 60000 + "}", r"'metadata': found '\[\[.*, expected a JSON value"),
        ('{"metadata": ' + "9" * 10000 + "}", r"'metadata': found '999.*, expected a JSON value"),
        ('{"metadata": "' + "x" * 70000 + '"}', r"'metadata': found .*, expected a JSON value of at most 65536"),
        ('{"weight_map": {"a": "x.safetensors"}} x', r"found 'x' at character \d+, expected nothing more"),
        ('{"weight_map": {"a\\ud800": "x.safetensors"}}', r"'weight_map': found .*\(Lone surrogate\)"),
        (b'{"weight_map": {"\xff": "x"}}', r"not UTF-8 at byte 17: found 0xff"),
    ],
)
def test_texts_that_are_no_index(folder, text, message):
    write_index(folder, text)
    assert_refused(folder, rf"^{INDEX}: {message}")


def test_every_index_that_is_cut_off(folder):
    text = json.dumps({"metadata": {"total_size": 24}, "weight_map": WEIGHT_MAP})
    for length in range(len(text)):
        write_index(folder, text[:length])
        assert_refused(folder, rf"^{INDEX}: ")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@SETTINGS
@given(values=st.dictionaries(st.sampled_from(["weight_map", "metadata", "x"]), VALUES, max_size=3))
def test_objects_of_anything(folder, values):
    write_index(folder, values)
    assert_refused(folder, rf"^{INDEX}: ")
    write_index(folder, {"weight_map": values})
    assert_refused(folder, rf"^{INDEX}: ")


def test_an_index_of_more_than_100_mb(folder):
    with open(folder / INDEX, "wb") as file:
        file.truncate(10**8 + 1)
    assert_refused(folder, rf"^{INDEX}: 100000001 bytes, expected at most 100000000")
