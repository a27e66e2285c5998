"""What lies in real folders besides a model, and instead of one: ignored, or named with what to do about it."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file

import exl
from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.config_reader import read_json
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.errors import CheckpointError, ConfigError, ExlWarning
from tests.unit.checkpoint.hub_server import ORG
from tests.unit.checkpoint.test_checkpoint import shard

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
TENSORS = {"a": torch.ones(2), "b": torch.ones(3)}
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 1234567890\n"
)
APPLE_DOUBLE = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(4072)  # what macOS writes beside files


def whole(folder: Path, name: str = "model.safetensors", tensors=TENSORS) -> None:
    save_file(tensors, folder / name)


def assert_opens(path: Path, tensors=TENSORS) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Checkpoint.open(path) as checkpoint:
            assert set(checkpoint.tensors) == set(tensors)


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(path)
    assert "\n" not in str(caught.value)


# --- beside a model: ignored -----------------------------------------------------------------------------------------


def write_clutter(folder: Path) -> None:
    for name in os.listdir(folder):
        (folder / f"._{name}").write_bytes(APPLE_DOUBLE)
    for name in ("._other.safetensors", "._model.safetensors.index.json", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(APPLE_DOUBLE)
    for name in (".ipynb_checkpoints", ".git", "__MACOSX"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(APPLE_DOUBLE)
    (folder / "training_args.bin").write_bytes(b"x")
    (folder / "consolidated.safetensors").write_bytes(b"x")
    (folder / "consolidated-00001-of-00002.safetensors").write_bytes(b"x")
    (folder / "consolidated.safetensors.index.json").write_bytes(b"x")


@pytest.mark.parametrize("name", ["model.safetensors", "gptq_model-4bit-128g.safetensors"])
def test_a_whole_file_among_clutter(tmp_path, name):
    whole(tmp_path, name)
    write_clutter(tmp_path)
    assert_opens(tmp_path)


@pytest.mark.parametrize("index", [INDEX, "gptq_model.safetensors.index.json", None])
def test_shards_among_clutter(tmp_path, index):
    shard(tmp_path, TENSORS, 2, index or INDEX)
    if index is None:
        (tmp_path / INDEX).unlink()
    write_clutter(tmp_path)
    assert_opens(tmp_path)


def test_a_model_among_clutter_generates(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, folder)
    write_clutter(folder)
    with exl.load(folder) as llm, exl.load() as bundled:
        assert (
            llm.generate("Once", max_tokens=4, temperature=0).text
            == bundled.generate("Once", max_tokens=4, temperature=0).text
        )


def test_an_adapter_beside_a_model_is_said_not_to_be_applied(tmp_path):
    whole(tmp_path)
    whole(tmp_path, "adapter_model.safetensors", {"lora": torch.ones(1)})
    with pytest.warns(ExlWarning, match=r"adapter_model\.safetensors is not applied, only model\.safetensors is used"):
        checkpoint = Checkpoint.open(tmp_path)
    with checkpoint:
        assert set(checkpoint.tensors) == set(TENSORS)


# --- the index and what is there -------------------------------------------------------------------------------------


def test_a_stale_index_beside_one_whole_file(tmp_path):
    shard(tmp_path, TENSORS, 2)
    for name in SHARDS:
        (tmp_path / name).unlink()
    whole(tmp_path, "gptq_model-4bit-128g.safetensors", {"q": torch.ones(1)})
    message = rf"{INDEX} lists 2 shards \({SHARDS[0]}, {SHARDS[1]}\), none of which is there; going by gptq_model"
    with pytest.warns(ExlWarning, match=message):
        checkpoint = Checkpoint.open(tmp_path)
    with checkpoint:
        assert list(checkpoint.tensors) == ["q"]
    whole(tmp_path, "other.safetensors", {"q": torch.ones(1)})
    assert_refused(tmp_path, rf"{INDEX} lists 2 shards, and 2 are missing: .*; found gptq_model.*, other\.safetensors$")
    whole(tmp_path)
    assert_opens(tmp_path)


def test_an_index_with_some_of_its_shards(tmp_path):
    shard(tmp_path, TENSORS, 2)
    (tmp_path / SHARDS[1]).unlink()
    message = rf"^{re.escape(str(tmp_path))}: {INDEX} lists 2 shards, and 1 is missing: {SHARDS[1]}; found {SHARDS[0]}$"
    assert_refused(tmp_path, message)
    (tmp_path / SHARDS[0]).unlink()
    assert_refused(tmp_path, rf"2 are missing: {SHARDS[0]}, {SHARDS[1]}; found no safetensors file$")


def test_an_index_of_other_tensors(tmp_path):
    shard(tmp_path, TENSORS, 2)
    whole(tmp_path, SHARDS[0], {"z": torch.ones(1)})
    assert_refused(tmp_path, rf"{INDEX}: tensor 'a' is in no shard, expected in {SHARDS[0]}")


def test_numbered_shards_whose_index_is_lost(tmp_path):
    shard(tmp_path, TENSORS, 2)
    (tmp_path / INDEX).unlink()
    assert_opens(tmp_path)
    (tmp_path / SHARDS[0]).unlink()
    assert_refused(tmp_path, rf"1 of 2 shards are missing: {SHARDS[0]}; and so is {INDEX}")
    whole(tmp_path, "other-00001-of-00003.safetensors")
    assert_refused(tmp_path, r"shards of 2 models, model-\*-of-00002\.safetensors and other-\*-of-00003\.safetensors")


@pytest.mark.parametrize("name", [INDEX, *SHARDS])
def test_a_path_to_the_index_or_to_a_shard_means_the_whole(tmp_path, name):
    shard(tmp_path, TENSORS, 2)
    whole(tmp_path, "other.safetensors", {"z": torch.ones(1)})
    assert_opens(tmp_path / name)
    with Checkpoint.open(tmp_path / name) as checkpoint:
        assert (checkpoint.path, checkpoint.folder) == (tmp_path, tmp_path)
    if name != INDEX:
        (tmp_path / INDEX).unlink()
        assert_opens(tmp_path / name)
    (tmp_path / SHARDS[1]).unlink(missing_ok=True)
    if name != SHARDS[1]:
        assert_refused(tmp_path / name, rf"missing: {SHARDS[1]}")


def test_a_model_is_loaded_by_the_path_of_its_index(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, folder)
    shard(folder, load_file(folder / "model.safetensors"), 2)
    (folder / "model.safetensors").unlink()
    with exl.load() as llm:
        expected = llm.generate("Once", max_tokens=4, temperature=0).text
    for name in (INDEX, SHARDS[1]):
        with exl.load(folder / name) as llm:
            assert llm.generate("Once", max_tokens=4, temperature=0).text == expected


# --- instead of a file -----------------------------------------------------------------------------------------------

LFS = r": a Git LFS pointer instead of the file, whose 1\.23 GB are missing: install git-lfs, then run 'git lfs pull'"


@pytest.mark.parametrize("name", ["model.safetensors", "gptq_model-4bit.safetensors"])
def test_a_pointer_instead_of_weights(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    assert_refused(tmp_path, rf"^{name}{LFS}")
    assert_refused(tmp_path / name, rf"^{name}{LFS}")
    (tmp_path / name).write_bytes(POINTER.replace(b"\nsize 1234567890", b""))
    assert_refused(tmp_path, rf"^{name}: a Git LFS pointer instead of the file: install")


def test_a_pointer_instead_of_a_shard_or_an_index(tmp_path):
    shard(tmp_path, TENSORS, 2)
    (tmp_path / SHARDS[1]).write_bytes(POINTER)
    assert_refused(tmp_path, rf"^{SHARDS[1]}{LFS}")
    (tmp_path / INDEX).write_bytes(POINTER)
    assert_refused(tmp_path, rf"^{INDEX}{LFS}")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("config.json", ConfigError),
        ("generation_config.json", ConfigError),
        ("quantize_config.json", ConfigError),
        ("tokenizer_config.json", ConfigError),
        ("tokenizer.json", CheckpointError),
        ("model.safetensors", CheckpointError),
        ("tokenizer.model", CheckpointError),
    ],
)
def test_a_pointer_instead_of_any_file_of_a_model(tmp_path, name, error):
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, folder)
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(POINTER)
    with pytest.raises(error, match=rf"{name}{LFS}"):
        exl.load(folder)


def test_a_small_file_that_is_no_pointer(tmp_path):
    whole(tmp_path, tensors={"a": torch.ones(1)})
    assert (tmp_path / "model.safetensors").stat().st_size < 200
    assert_opens(tmp_path, {"a"})
    (tmp_path / "config.json").write_text('{"version": "https://git-lfs.github.com/spec/v1"}')
    assert read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"<!DOCTYPE html>\n<html>", r"a web page instead of weights"),
        (b"<html lang=en>", r"a web page"),
        (b"GGUF\x03\0\0\0", r"a GGUF file under another name"),
        (b"PK\x03\x04\0\0\x08\x08", r"a file of torch\.save or another archive"),
        (bytes(8), r"header: found the end at character 0"),
    ],
)
def test_other_files_instead_of_weights(tmp_path, start, message):
    (tmp_path / "model.safetensors").write_bytes(start + bytes(5000))
    assert_refused(tmp_path, rf"^model\.safetensors: {message}")


# --- instead of a model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"found nothing, expected model\.safetensors or .* shards$"),
        ([".DS_Store", "._model.safetensors"], r"found nothing, expected"),
        (["training_args.bin", "optimizer.pt"], r"found no weights among 2 files, expected"),
        (["training_args.bin", "pytorch_model.bin"], r"found only \.bin weights.*save_pretrained"),
        (["pytorch_model-00001-of-00002.bin"], r"found only \.bin weights"),
        (["adapter_config.json", "adapter_model.safetensors"], r"only a LoRA adapter, adapter_model\.s.*as lora="),
        (["adapter_model.bin"], r"found only a LoRA adapter, adapter_model\.bin"),
        (["consolidated.safetensors", "params.json"], r"found only consolidated\.safetensors, .* makers"),
        (["consolidated.00.pth"], r"found only consolidated\.00\.pth"),
        (["params.json"], r"found no weights.*params\.json belongs to the format of the model's makers"),
        (["model.safetensors.part"], r"no weights.*A download has not finished \(model\.safetensors\.part\): start it"),
        (["model.safetensors.incomplete"], r"has not finished \(model\.safetensors\.incomplete\)"),
        (["model.safetensors.crdownload"], r"has not finished \(model\.safetensors\.crdownload\)"),
        (["model.safetensors", "model.safetensors.aria2"], r"model\.safetensors: its download has not finished"),
        ([".cache/huggingface/download/abc.123.incomplete"], r"has not finished \(.*abc\.123\.incomplete\)"),
        (["deeper/model.safetensors"], r"Below it, deeper/ has safetensors files: give that path"),
        (["b/model.safetensors", "a/x.safetensors"], r"Below it, a/, b/ have safetensors files"),
        (["snapshots/0123/model.safetensors", "refs/main"], r"Below it, snapshots/0123/ has"),
        ([".hidden/model.safetensors"], r"found nothing, expected model\.safetensors or .* shards$"),
    ],
    ids=lambda value: "+".join(value)[:50] if isinstance(value, list) else "",
)
def test_what_is_there_instead_is_said(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert_refused(tmp_path, rf"^{re.escape(str(tmp_path))}: .*{message}")


def test_a_shard_that_is_still_on_its_way(tmp_path):
    shard(tmp_path, TENSORS, 2)
    (tmp_path / SHARDS[1]).rename(tmp_path / f"{SHARDS[1]}.incomplete")
    assert_refused(tmp_path, rf"1 is missing: {SHARDS[1]}; .*A download has not finished \({SHARDS[1]}\.incomplete\)")
    (tmp_path / INDEX).unlink()
    assert_refused(tmp_path, rf"1 of 2 shards are missing: {SHARDS[1]};.*A download has not finished")


# --- names of tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ("language_model.{}", r"found 'language_model\.model\.embed_tokens\.weight', expected names such as model\."
         r"embed_tokens\.weight: the names have the prefix 'language_model\.': .*images and text"),
        ("base_model.model.{}", r"the names have the prefix 'base_model\.model\.': peft's"),
        ("_orig_mod.{}", r"the names have the prefix '_orig_mod\.': torch\.compile's"),
        ("module.{}", r"the names have the prefix 'module\.': that of DataParallel"),
        ("whatever.{}", r"the names have the prefix 'whatever\.'$"),
    ],
)  # fmt: skip
def test_a_prefix_before_all_names(tmp_path, rename, message):
    folder = renamed(tmp_path, lambda name: rename.format(name))
    with pytest.raises(CheckpointError, match=message):
        exl.plan(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model.", "model.language_model.", r"'model\.language_model\.embed_tokens\.weight'.*prefix 'model\.language_"),
        ("model.", "", r"found 'embed_tokens\.weight'.*without the prefix 'model\.'.*AutoModelForCausalLM"),
        ("model.", "transformer.h.", r"found 'transformer\.h\.embed_tokens\.weight'.*prefix 'transformer\.h\.'"),
        ("model.embed_tokens", "model.tok", None),
        ("model.", "base_model.model.model.lora_A.", r"\.lora_A\..*' among \d+ tensors.*a LoRA adapter \(peft\)"),
    ],
)
def test_other_names(tmp_path, old, new, message):
    folder = renamed(tmp_path, lambda name: name.replace(old, new))
    message = message or r"model\.embed_tokens: found neither weight nor qweight"
    with pytest.raises(exl.ExlError, match=message):
        exl.plan(folder)


def test_names_of_nothing_that_is_known(tmp_path):
    folder = renamed(tmp_path, lambda name: f"x{abs(hash(name))}")
    with pytest.raises(CheckpointError, match=r"found 'x\d+' among \d+ tensors, expected names such as model\.embed"):
        exl.plan(folder)


def test_an_adapter_that_is_not_merged(tmp_path):
    folder = renamed(tmp_path, lambda name: name.replace("o_proj.", "o_proj.base_layer."))
    with pytest.raises(exl.UnsupportedModelError, match=r"o_proj\.base_layer\.qweight: .*not merged \(peft\)"):
        exl.plan(folder)


def renamed(tmp_path: Path, rename) -> Path:
    folder = tmp_path / "renamed"
    shutil.copytree(BUNDLED_MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


# --- downloads -------------------------------------------------------------------------------------------------------


def test_a_download_leaves_out_what_is_never_read(hub, tmp_path):
    folder = tmp_path / "mistral"
    shutil.copytree(BUNDLED_MODEL, folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    (folder / "consolidated-00001-of-00002.safetensors").write_bytes(b"x")
    (folder / "._model.safetensors").write_bytes(APPLE_DOUBLE)
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    hub.repos[f"{ORG}/mistral"] = folder
    with exl.load(f"{ORG}/mistral") as llm:
        found = sorted(path.name for path in llm.folder.iterdir() if path.suffix == ".safetensors")
    assert found == ["model.safetensors"]
    assert not {name for name in hub.sent if name.startswith(("consolidated", "._", "adapter"))}
    snapshot_download(f"{ORG}/mistral")  # by another program, with everything
    with pytest.warns(ExlWarning, match="not applied"), exl.load(f"{ORG}/mistral"):
        pass


def test_a_repository_of_the_makers_format_is_named_before_a_download(hub, tmp_path):
    folder = tmp_path / "native"
    folder.mkdir()
    for name in ("consolidated.safetensors", "params.json"):
        (folder / name).write_text(json.dumps({}))
    hub.repos[f"{ORG}/native"] = folder
    with pytest.raises(CheckpointError, match=r"^somebody/native: found only consolidated\.safetensors"):
        exl.plan(f"{ORG}/native")
    with pytest.raises(CheckpointError, match=r"params\.json belongs to the format of the model's makers"):
        exl.load(f"{ORG}/native")
