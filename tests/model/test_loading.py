"""Loading through the packed file: damage, interruptions, other processes, memory that is returned."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from exl.checkpoint import block_file
from exl.errors import CheckpointError
from exl.models import manifest
from exl.weights.packed import PackedFile
from tests.model import test_quantized
from tests.model.hf_models import CASES, build, save
from tests.model.placed_model import NUM_LAYERS, PlacedModel, packed_file, reader_threads

pytestmark = pytest.mark.usefixtures("no_thread_stays")


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 16]))


def blob_offset(model: PlacedModel, blob_idx: int) -> int:
    return model.source._reader.packed.header.offsets[blob_idx]


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_streamed_blob_with_a_flipped_bit(four_bit, tmp_path):
    with PlacedModel(four_bit, tmp_path) as model:
        expected = model.outputs()
        offset = blob_offset(model, 1 + 3) + 500
    path = packed_file(tmp_path)
    flip(path, offset)
    with PlacedModel(four_bit, tmp_path) as model:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=f"{path}: packed weights are damaged"):
                model.outputs()
    with PlacedModel(four_bit, tmp_path) as model:
        assert model.outputs() == expected


@pytest.mark.parametrize("blob_idx", [0, 2, NUM_LAYERS + 1])
def test_a_resident_blob_with_a_flipped_bit_is_packed_again(four_bit, tmp_path, blob_idx):
    with PlacedModel(four_bit, tmp_path, resident=(1,)) as model:
        expected = model.outputs()
        offset = blob_offset(model, blob_idx) + 700
    flip(packed_file(tmp_path), offset)
    with PlacedModel(four_bit, tmp_path, resident=(1,)) as model:
        assert model.outputs() == expected
    with PlacedModel(four_bit, tmp_path, resident=()) as model:
        assert model.outputs() == expected


@pytest.mark.parametrize("damage", ["header", "cut", "empty", "foreign", "other model"])
def test_other_damage_is_packed_again(four_bit, tmp_path, damage):
    with PlacedModel(four_bit, tmp_path) as model:
        expected = model.outputs()
    path = packed_file(tmp_path)
    if damage == "header":
        flip(path, 40)
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 4096)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        path.write_bytes(os.urandom(20000))
    else:
        other = tmp_path / "other"
        test_quantized.make(other, 4, 32, order="shared")
        PlacedModel(other, tmp_path / "packed").weights.close()
        os.replace(packed_file(tmp_path / "packed"), path)
    with PlacedModel(four_bit, tmp_path) as model:
        assert model.outputs() == expected


def test_a_model_that_is_changed_under_the_same_name(tmp_path):
    folder, packed_folder = tmp_path / "model", tmp_path / "packed"
    test_quantized.make(folder, 4, 32)
    with PlacedModel(folder, packed_folder) as model:
        first = model.outputs()
    test_quantized.make(folder, 4, 32, std=0.2)
    with PlacedModel(folder, None, resident=(0, 1)) as model:
        expected = model.outputs()
    assert expected != first
    with PlacedModel(folder, packed_folder) as model:
        assert model.outputs() == expected


def test_a_packed_file_of_other_transforms_is_not_read(four_bit, tmp_path, monkeypatch):
    """Norms that a family begins to multiply by 1 + w: the truth is a checkpoint that holds 1 + w."""
    packed_folder = tmp_path / "packed"
    with PlacedModel(four_bit, packed_folder) as model:
        first = model.outputs()
    shutil.copytree(four_bit, tmp_path / "with 1 + w")
    file = tmp_path / "with 1 + w" / "model.safetensors"
    tensors = {name: 1 + t.float() if "norm" in name else t for name, t in load_file(file).items()}
    save_file(tensors, file)
    with PlacedModel(file.parent, None, resident=range(NUM_LAYERS)) as model:
        expected = model.outputs()
    assert expected != first
    norm = manifest._ManifestReader._norm
    plus_one = lambda reader, prefix, spec: norm(reader, prefix, replace(spec, offset=1.0))  # noqa: E731
    monkeypatch.setattr(manifest._ManifestReader, "_norm", plus_one)
    for _ in range(2):  # packed, then read
        with PlacedModel(four_bit, packed_folder) as model:
            assert model.outputs() == expected


def test_a_file_cut_off_between_passes(four_bit, tmp_path):
    with PlacedModel(four_bit, tmp_path) as model:
        model.outputs()
        path = packed_file(tmp_path)
        os.truncate(path, 8192)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=f"{path}.*ended at byte"):
                model.outputs()


def test_a_disk_that_fails_for_a_while(four_bit, tmp_path, monkeypatch):
    with PlacedModel(four_bit, tmp_path) as model:
        expected = model.outputs()
        with monkeypatch.context() as patch:
            fail = OSError(5, "Input/output error")
            patch.setattr(block_file.BlockFile, "_read_some", lambda *args: (_ for _ in ()).throw(fail))
            with pytest.raises(CheckpointError, match=f"{packed_file(tmp_path)}.*Input/output error"):
                model.outputs()
            assert model.source.wait_until_idle()  # its second attempt has failed
        assert model.outputs() == expected


def test_a_bug_in_the_reader_is_an_error_too(four_bit, tmp_path, monkeypatch):
    with PlacedModel(four_bit, tmp_path) as model:
        model.outputs()
        monkeypatch.setattr(PackedFile, "read_blob", lambda *args: 1 // 0)
        with pytest.raises(CheckpointError, match=f"{packed_file(tmp_path)}.*ZeroDivisionError"):
            model.outputs()


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [(), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("num_calls", [1, 4, 12])
def test_an_interrupted_load_leaves_nothing_behind(four_bit, tmp_path, resident, num_calls):
    calls = itertools.count(1)

    def progress(done, total):
        if next(calls) == num_calls:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        PlacedModel(four_bit, tmp_path, resident, progress=progress)
    assert list(tmp_path.iterdir()) == []
    assert reader_threads() == []


def test_an_interrupted_load_from_the_packed_file(four_bit, tmp_path):
    PlacedModel(four_bit, tmp_path).weights.close()

    def progress(done, total):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        PlacedModel(four_bit, tmp_path, (0, 1, 2), progress=progress)
    assert list(tmp_path.iterdir()) == [packed_file(tmp_path)]
    assert reader_threads() == []


@pytest.mark.parametrize("resident", [(), (0, 2), (0, 1, 2, 3)], ids=str)
def test_progress_counts_up_to_the_total(four_bit, tmp_path, resident):
    for _ in range(2):  # packing, then reading the packed file
        seen: list[tuple[int, int]] = []
        PlacedModel(four_bit, tmp_path, resident, progress=lambda *args, seen=seen: seen.append(args)).weights.close()
        done, totals = zip(*seen, strict=True)
        assert len(set(totals)) == 1
        assert sorted(done) == list(done)
        assert done[-1] == totals[0] > 0


def test_a_checkpoint_that_shrinks_while_it_is_read(tmp_path):
    folder = tmp_path / "model"
    test_quantized.make(folder, 4, 32)
    file = folder / "model.safetensors"

    def progress(done, total):
        os.truncate(file, 3000)

    with pytest.raises(CheckpointError, match=r"model\.safetensors: ended at byte"):
        PlacedModel(folder, tmp_path / "packed", progress=progress)
    assert list((tmp_path / "packed").iterdir()) == []


def test_a_checkpoint_that_changes_while_it_is_packed(tmp_path):
    folder = tmp_path / "model"
    test_quantized.make(folder, 4, 32)
    with pytest.raises(CheckpointError, match="changed while they were being packed"):
        PlacedModel(
            folder, tmp_path / "packed", progress=lambda done, total: os.utime(folder / "model.safetensors", (5, 5))
        )
    assert list((tmp_path / "packed").iterdir()) == []


# In another process, so that it can be killed, and its memory measured alone.
_CHILD = """
import os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.model.placed_model import PlacedModel
what, folder, packed = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])

def killed(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

def both(done, total):
    (packed.parent / f"here-{os.getpid()}").touch()
    deadline = time.monotonic() + 60
    while len(list(packed.parent.glob("here-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)

def anonymous():
    text = Path("/proc/self/status").read_text()
    return sum(int(text.split(f"{name}:")[1].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024

if what == "unload":
    PlacedModel(folder, packed, resident=(0,)).weights.close()  # packs, and warms up
    model = PlacedModel(folder, packed, resident=(0, 1))
    slabs = model.weights.slabs
    assert model.source.wait_until_idle()
    loaded = anonymous()
    model.weights.close()
    print(sum(slabs.values()), loaded - anonymous())
else:
    with PlacedModel(folder, packed, progress={"killed": killed, "both": both}[what]) as model:
        print(model.tokens())
"""


def start(what: str, folder: Path, packed: Path) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, what, str(folder), str(packed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
    )


def test_a_writer_that_is_killed(four_bit, tmp_path):
    child = start("killed", four_bit, tmp_path)
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert [path.suffix for path in tmp_path.iterdir()] == [".exlpart"]
    with PlacedModel(four_bit, None, resident=range(NUM_LAYERS)) as model:
        expected = model.outputs()
    with PlacedModel(four_bit, tmp_path) as model:
        assert model.outputs() == expected
    assert list(tmp_path.iterdir()) == [packed_file(tmp_path)]


def test_two_processes_pack_at_once(four_bit, tmp_path):
    packed = tmp_path / "packed"
    children = [start("both", four_bit, packed) for _ in range(2)]
    found = [child.communicate(timeout=90) for child in children]
    assert [child.returncode for child in children] == [0, 0], found
    assert len(list(tmp_path.glob("here-*"))) == 2
    with PlacedModel(four_bit, None, resident=range(NUM_LAYERS)) as model:
        expected = str(model.tokens())
    assert [out.strip() for out, _ in found] == [expected] * 2
    assert list(packed.iterdir()) == [packed_file(packed)]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc/self/status")
def test_unloading_returns_the_memory(tmp_path):
    """Measured by the system's count, while the model's other parts still exist."""
    folder = tmp_path / "model"
    case = next(case for case in CASES if case.name == "llama")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": NUM_LAYERS}
    save(build(replace(case, options={**case.options, **sizes})), folder)
    child = start("unload", folder, tmp_path / "packed")
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    planned, returned = map(int, out.split())
    assert planned > 35e6
    assert abs(returned - planned) <= 0.03 * planned
