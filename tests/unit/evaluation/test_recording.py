"""Predictions on disk: what rounding does to them, interrupted writing, files that are something else."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import torch

from exl.errors import ConfigError, NotFiniteError
from exl.evaluation import recording
from exl.evaluation.passages import Passage
from exl.evaluation.recording import Recording, decode, encode, record

V = 300
PASSAGES = [Passage(tuple(range(10, 40))), Passage((5,)), Passage(tuple(range(50)), 26), Passage((7, 8))]
MODEL = {"folder": "some", "kv_cache": "f32"}


def log_probs(passage: Passage) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(passage.ids))
    logits = 5 * torch.randn(passage.num_predicted, V, generator=generator, dtype=torch.float64)
    return torch.log_softmax(logits, 1)


def in_slices(passage: Passage):
    return iter(log_probs(passage).split(7))


def test_what_rounding_does():
    """``t - r (c / 65535)**2`` with c rounded: off by at most the half step at c, which is sqrt(x r) / 65535 nats at a
    distance x below the likeliest token; then all are normalized again, and a token's own loss is exact."""
    exact = log_probs(Passage(tuple(range(200))))
    targets = torch.arange(len(exact))
    found = encode(exact, targets)
    assert np.array_equal(found["loss"], -exact.gather(1, targets[:, None])[:, 0].numpy())
    back = decode(found)
    assert torch.allclose(torch.logsumexp(back, 1), torch.zeros(len(exact), dtype=torch.float64), atol=1e-12)
    below = exact.amax(1, keepdim=True) - exact
    spread = below.amax(1, keepdim=True)
    half_step = (below * spread).sqrt() / 65535 + spread / 65535**2
    off = (back - back.amax(1, keepdim=True) + below).abs()
    assert bool((off <= half_step * (1 + 1e-9)).all())
    assert torch.equal(back.argmax(1), exact.argmax(1))
    shift = (back.amax(1) - exact.amax(1)).abs()
    assert float(shift.max()) < 5e-5  # what normalizing again moves: the mean of the errors, weighted by p


def test_one_token_certain_and_all_alike():
    certain = torch.tensor([[0.0, -800.0, -750.0]], dtype=torch.float64)
    alike = torch.full((1, 4), -np.log(4.0), dtype=torch.float64)
    for rows in (certain, alike):
        back = decode(encode(rows, torch.tensor([1])))
        assert torch.allclose(back, rows, atol=1e-2, rtol=1e-9)
    with pytest.raises(NotFiniteError, match="nan or inf"):
        encode(torch.tensor([[0.0, -torch.inf]], dtype=torch.float64), torch.tensor([0]))


def test_there_and_back(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "SLICE_VALUES", 4 * V)
    path, told = tmp_path / "some.pred", []
    record(path, PASSAGES, V, MODEL, in_slices, lambda done, total: told.append((done, total)))
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [item.name for item in tmp_path.iterdir()] == ["some.pred"]
    assert Recording.is_one(path)
    with Recording(path) as found:
        assert found.passages == tuple(PASSAGES)
        assert (found.vocab_size, found.model) == (V, MODEL)
        for i in (2, 0, 3):
            exact = log_probs(PASSAGES[i])
            slices = list(found.log_probs(i))
            assert max(map(len, slices)) <= 4
            assert torch.allclose(torch.cat(slices), exact, atol=1e-3)
            wanted = -exact.gather(1, torch.tensor(PASSAGES[i].ids[PASSAGES[i].first :])[:, None])[:, 0]
            assert np.array_equal(found.losses(i), wanted.numpy())
        assert list(found.log_probs(1)) == []


def test_losses_are_read_in_slices(tmp_path, monkeypatch):
    """A passage of a long context has gigabytes of codes."""
    monkeypatch.setattr(recording, "SLICE_VALUES", 4 * V)
    passage = Passage(tuple(range(200)))
    record(tmp_path / "some", [passage], V, MODEL, in_slices)
    with Recording(tmp_path / "some") as found:
        tracemalloc.start()
        losses = found.losses(0)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(losses) == 199
    assert peak < (tmp_path / "some").stat().st_size / 4


def test_an_interrupted_file_is_continued(tmp_path):
    whole, path = tmp_path / "whole", tmp_path / "some.pred"
    record(whole, PASSAGES, V, MODEL, in_slices)
    asked = []

    def interrupted(passage: Passage):
        asked.append(passage)
        slices = in_slices(passage)
        if passage == PASSAGES[2]:
            yield next(slices)
            raise KeyboardInterrupt
        yield from slices

    with pytest.raises(KeyboardInterrupt):
        record(path, PASSAGES, V, MODEL, interrupted)
    assert not path.exists()
    assert not Recording.is_one(path)
    asked.clear()

    def again(passage: Passage):
        asked.append(passage)
        return in_slices(passage)

    record(path, PASSAGES, V, MODEL, again)
    assert asked == PASSAGES[2:]
    assert path.read_bytes() == whole.read_bytes()
    record(path, PASSAGES, V, MODEL, again)  # nothing is left to do
    assert asked == PASSAGES[2:]
    part = tmp_path / "other.part"
    part.write_bytes(whole.read_bytes() + b"what a crash left")
    record(tmp_path / "other", PASSAGES, V, MODEL, again)
    assert (tmp_path / "other").read_bytes() == whole.read_bytes()


def test_another_model_or_text_is_not_overwritten(tmp_path):
    path = tmp_path / "some.pred"
    record(path, PASSAGES, V, MODEL, in_slices)
    before = path.read_bytes()
    for passages, model in ((PASSAGES[:2], MODEL), (PASSAGES, {**MODEL, "kv_cache": "q4"})):
        with pytest.raises(ConfigError, match=r"some.pred: found another file"):
            record(path, passages, V, model, in_slices)
    assert path.read_bytes() == before
    (tmp_path / "next.part").write_bytes(b"my own notes")
    with pytest.raises(ConfigError, match=r"next.part: found another file"):
        record(tmp_path / "next", PASSAGES, V, MODEL, in_slices)
    with pytest.raises(ConfigError, match="cannot be written"):
        record(tmp_path / "nowhere" / "some", PASSAGES, V, MODEL, in_slices)


def test_room_on_the_disk_is_asked_for_first(tmp_path, monkeypatch):
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ConfigError, match=r"needs .*, the disk has .* free"):
        record(tmp_path / "some", PASSAGES, V, MODEL, in_slices)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "some.pred"
    record(path, PASSAGES, V, MODEL, in_slices)
    data = path.read_bytes()
    length = int.from_bytes(data[8:16], "little")
    header = json.loads(data[16 : 16 + length])
    changed = json.dumps(header | {"lengths": [1, 2]}).encode()
    for damaged, words in (
        (b"exlpred2" + data[8:], "no file of predictions"),
        (data[:8] + (1 << 40).to_bytes(8, "little"), "no file of predictions"),
        (data[:-1], "found .* bytes, expected"),
        (data + b"x", "found .* bytes, expected"),
        (data[:16] + b"?" + data[17:], "damaged"),
        (data[: 16 + length] + b"\xff" + data[17 + length :], "token ids that are not those of the header"),
        (data[:8] + len(changed).to_bytes(8, "little") + changed + data[16 + length :], "damaged"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=rf"against: .*some.pred: .*{words}"):
            Recording(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Recording(tmp_path / "nowhere")
    assert not Recording.is_one(tmp_path)
