"""Which packed file belongs to a model, and the folder that holds them: never one that was packed for another."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.quant_config import parse_quant_config
from exl.cpu_kernels.library import Library
from exl.cpu_kernels.processor import usable_isas
from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.kernels.blob import pack_linear as pack_tiles
from exl.layout.layers import layer_layout, linear_layout
from exl.layout.specs import BlobSpec, LinearSpec, MatrixSpec, NormSpec, Target
from exl.ops.compiled_pack import pack_linear as pack_columns
from exl.ops.torch_linear import pack_linear
from exl.weights import packed_store
from exl.weights.packed import PackedFile, PackedWriter
from exl.weights.packed_store import (
    clear_packed,
    default_packed_folder,
    list_packed,
    packed_key,
    packed_path,
    source_name,
)
from tests.unit.weights.packed_files import KEY, SIZES, flip, write

_SPEC = BlobSpec((NormSpec("attn_norm", 8),), (("o", (LinearSpec((MatrixSpec("o", 64, 32, 4, "u8", 32),)),)),))
_CPU = Target("cpu", "split64")
_QUANT = {"bits": 4, "group_size": 32}


def _key(folder, quant=_QUANT, spec=_SPEC, target=_CPU, packer="torch 1"):
    with Checkpoint.open(folder) as checkpoint:
        config = parse_quant_config(quant, "test")
        return packed_key(checkpoint, config, [layer_layout(spec, target)], target, packer)


def _save(folder, changes=()):
    folder.mkdir(exist_ok=True)
    weight = np.zeros((100, 100), np.float32)
    for at in changes:
        weight.reshape(-1)[at] = 1.0
    save_file({"a": weight, "b": np.ones(3, np.float32)}, folder / "model.safetensors")
    os.utime(folder / "model.safetensors", ns=(1, 1_000_000_007))
    return folder


def test_the_key_follows_all_that_the_bytes_depend_on(tmp_path):
    folder = _save(tmp_path / "a")
    key = _key(folder)
    assert len(key) == 32
    for_one_module = _QUANT | {"dynamic": {"o": {"sym": False}}}  # all of the model's modules
    assert _key(folder, quant=for_one_module) == _key(folder, quant=_QUANT | {"sym": False})
    others = [
        _key(folder, quant=_QUANT | {"sym": False}),
        _key(folder, quant=_QUANT | {"checkpoint_format": "gptq_v2"}),
        _key(folder, spec=BlobSpec((NormSpec("attn_norm", 16),), _SPEC.linears)),
        _key(folder, spec=BlobSpec((NormSpec("attn_norm", 8, offset=1.0),), _SPEC.linears)),
        _key(folder, spec=BlobSpec((NormSpec("attn_norm", 8, scale=0.5),), _SPEC.linears)),
        _key(folder, target=Target("cpu", "split32")),
        _key(folder, target=Target("cpu", None)),
        _key(folder, packer="torch 2"),
    ]
    os.utime(folder / "model.safetensors", ns=(1, 1_000_000_008))
    others.append(_key(folder))
    save_file({"a": np.zeros((100, 99), np.float32), "b": np.ones(103, np.float32)}, folder / "model.safetensors")
    os.utime(folder / "model.safetensors", ns=(1, 1_000_000_007))
    others.append(_key(folder))
    assert len({key, *others}) == 1 + len(others)


def test_the_key_follows_what_any_method_says(tmp_path):
    """Bytes of one module that mean something else under another configuration, also of a dense matrix."""
    folder = _save(tmp_path / "a")
    dense = BlobSpec((), (("o", (LinearSpec((MatrixSpec("o", 64, 32, 32, "f32"),)),)),))
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}

    def packed(**changes):
        group = {"targets": ["Linear"], "weights": weights | changes}
        return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": group}}

    keys = [
        _key(folder),
        _key(folder, quant=_QUANT | {"meta": {"quantizer": ["gptqmodel:5"]}}),
        _key(folder, quant=_QUANT | {"checkpoint_format": "gptq_p"}),
        _key(folder, quant=_QUANT | {"quant_method": "awq", "version": "gemm"}),
        _key(folder, quant=_QUANT | {"quant_method": "awq", "version": "gemv"}),
        _key(folder, quant=_QUANT | {"quant_method": "auto-round", "packing_format": "auto_round"}),
        _key(folder, quant=packed()),
        _key(folder, quant=packed(symmetric=False)),
        _key(folder, quant={"quant_method": "fp8"}, spec=dense),
        _key(folder, quant={"quant_method": "fp8", "weight_block_size": [16, 32]}, spec=dense),
        _key(folder, quant={"quant_method": "fp8", "weight_block_size": [32, 16]}, spec=dense),
    ]
    assert len(set(keys)) == len(keys)
    as_gptqmodel = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    assert _key(folder, quant=_QUANT | as_gptqmodel) == keys[1]  # the same bytes, and the same meaning


def test_a_copy_has_the_same_key(tmp_path):
    folder = _save(tmp_path / "a")
    shutil.copytree(folder, tmp_path / "b")
    assert _key(folder) == _key(tmp_path / "b")


def test_equal_times_do_not_hide_other_weights(tmp_path):
    assert _key(_save(tmp_path / "a")) != _key(_save(tmp_path / "b", changes=[5000]))


def test_changed_packing_needs_a_new_layout_version(tmp_path):
    """Files of an older packing must not be read as the present one. If this fails, increase LAYOUT_VERSION too."""
    rng = np.random.default_rng(1)
    digest, columns = hashlib.sha256(), hashlib.sha256()  # columns: not on every processor

    def update(layout, out):
        digest.update(repr([(name, field) for name, field in layout.fields.items()]).encode())
        digest.update(out.tobytes())

    for bits, order in ((2, None), (3, None), (4, None), (8, None), (4, "split64"), (4, "split32"), (4, "pairs32")):
        spec = LinearSpec((MatrixSpec("m", 64, 96, bits, "u8", 32, True, "order"),))
        codes = rng.integers(0, 2**bits, (64, 96), dtype=np.uint8)
        matrix = QuantizedMatrix(
            bits,
            32,
            64,
            96,
            rng.random((2, 96)).astype(np.float16),
            rng.integers(0, 2**bits, (2, 96), dtype=np.uint8),
            rng.permutation(64).astype(np.int32),
            rng.random(96).astype(np.float16),
            lambda start, stop, codes=codes: codes[:, start:stop],
        )
        target = Target("cpu", order)
        layout = linear_layout(spec, target)
        out = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        pack_linear([matrix], layout, target, out)
        update(layout, out.numpy())
        layout = linear_layout(spec, Target("cuda", arch=86))
        out = np.zeros(layout.num_bytes, np.uint8)
        pack_tiles([matrix], layout, out)
        update(layout, out)
        if usable_isas():
            layout = linear_layout(spec, Target("cpu", compiled=True))
            out = np.zeros(layout.num_bytes, np.uint8)
            pack_columns([matrix], layout, out, Library(folder=tmp_path))
            columns.update(out.tobytes())
    weight = rng.integers(0, 2**16, (8, 16), dtype=np.uint16)
    dense = DenseMatrix("bf16", 16, 8, None, None, lambda start, stop: weight[start:stop])
    layout = linear_layout(LinearSpec((MatrixSpec("m", 16, 8, 16, "bf16"),)), _CPU)
    out = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    pack_linear([dense], layout, _CPU, out)
    update(layout, out.numpy())
    assert (packed_store.LAYOUT_VERSION, digest.hexdigest()[:16]) == (4, "0976054a0eb4aca4")
    if usable_isas():
        assert columns.hexdigest()[:16] == "4e9d5d14f71bffe5"


@pytest.mark.parametrize("target", [_CPU, Target("cuda", arch=86)], ids=["cpu", "cuda"])
def test_a_file_of_another_layout_version_is_not_opened(tmp_path, blobs, monkeypatch, target):
    """It is not found under the new key, and is refused if it has the new key's name."""
    folder = _save(tmp_path / "model")
    monkeypatch.setattr(packed_store, "LAYOUT_VERSION", packed_store.LAYOUT_VERSION - 1)
    old = _key(folder, target=target)
    monkeypatch.undo()
    new = _key(folder, target=target)
    assert packed_path(tmp_path, folder, old) != packed_path(tmp_path, folder, new)
    path = write(packed_path(tmp_path, folder, new), blobs, old)
    assert PackedFile.open(path, new, SIZES) is None
    PackedFile.open(path, old, SIZES).close()  # it is complete


# --- the folder --------------------------------------------------------------------------------------------------


def test_the_default_folder_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_packed_folder() == tmp_path / "exl" / "packed"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_packed_folder() == tmp_path / ".cache" / "exl" / "packed"


def test_listing_and_clearing_touch_only_ours(tmp_path, blobs):
    folder = tmp_path / "packed"
    assert list_packed(folder) == clear_packed(folder) == []
    model, other = tmp_path / "my model", tmp_path / "other"
    ours = packed_path(folder, model, KEY)
    with PackedWriter(ours, KEY, source_name(model), SIZES) as writer:
        for blob in blobs:
            writer.write(blob)
        writer.commit()
    second = packed_path(folder, other, bytes(32))
    shutil.copy(ours, second)
    flip(second, 20)
    os.utime(second, (1, 1))
    kept = [folder / "notes.txt", folder / "x.exlpacked", folder / ("link-" + "0" * 32 + ".exlpacked")]
    for path in kept[:2]:
        path.write_text("mine")
    kept[2].symlink_to(kept[0])
    (folder / ("folder-" + "0" * 32 + ".exlpacked")).mkdir()
    found = list_packed(folder)
    assert [(info.path, info.source) for info in found] == [(ours, str(model)), (second, None)]
    assert found[0].num_bytes == ours.stat().st_size
    assert found[1].last_used == 1
    assert clear_packed(folder, model=other) == []
    assert [info.path for info in clear_packed(folder, model=model)] == [ours]
    assert [info.path for info in clear_packed(folder)] == [second]
    assert all(path.exists() for path in kept)
    assert len(list(folder.iterdir())) == 4


def test_opening_marks_a_file_as_used(path):
    os.utime(path, (1, 1))
    PackedFile.open(path, KEY, SIZES).close()
    assert path.stat().st_mtime > 1e9


@pytest.mark.parametrize("name", ["..", "a/b", "", "model: größe?", "x" * 300])
def test_names_of_models_are_no_paths(tmp_path, name):
    path = packed_path(tmp_path, tmp_path / name if name else type(tmp_path)(), KEY)
    assert path.parent == tmp_path
    assert path.name.endswith(f"-{KEY.hex()[:32]}.exlpacked")
    assert len(path.name) < 200
