"""``benchmarks/quality.py``: what llama-perplexity is given, what is read from it, and the table. The program itself is
replaced by one that reads its input by its own rules and prints what it was given."""

from __future__ import annotations

import json
import shutil
import stat
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file

import exl
from benchmarks import quality
from benchmarks.llama_cpp import perplexity
from benchmarks.llama_cpp.dense_gguf import write_dense_gguf
from benchmarks.llama_cpp.programs import ProgramError
from exl.errors import ConfigError, UnsupportedModelError
from exl.evaluate import Recording, record_predictions
from exl.evaluation.passages import cut_chunks
from scripts import fetch_smollm2

DATA = Path(__file__).parents[2] / "data"
STORIES = DATA / "stories260K"

# The end of what the program printed of stories2M in Q4_0, chunks of 128 tokens.
PRINTED = """
====== Perplexity statistics ======
Mean PPL(Q)                   :   5.963316 ±   0.126971
Mean PPL(base)                :   5.924855 ±   0.126912
Cor(ln(PPL(Q)), ln(PPL(base))):  99.81%
Mean ln(PPL(Q)/PPL(base))     :   0.006470 ±   0.001322
Mean PPL(Q)/PPL(base)         :   1.006491 ±   0.001331
Mean PPL(Q)-PPL(base)         :   0.038461 ±   0.007824

====== KL divergence statistics ======
Mean    KLD:   0.005814 ±   0.000088
Maximum KLD:   0.178889
99.9%   KLD:   0.085244
99.0%   KLD:   0.032657
95.0%   KLD:   0.017249
90.0%   KLD:   0.012581
Median  KLD:   0.003957
Minimum KLD:   0.000004

====== Token probability statistics ======
Mean    Δp: -0.349 ± 0.027 %
Maximum Δp: 17.755%
99.9%   Δp: 10.908%
Median  Δp: -0.053%
Minimum Δp: -26.639%
RMS Δp    :  2.397 ± 0.049 %
Same top p: 94.963 ± 0.251 %
"""


def test_what_the_program_prints():
    found = perplexity.parse(PRINTED)
    assert found.pop("loss") == pytest.approx(np.log(5.963316))
    assert found.pop("loss_error") == pytest.approx(0.126971 / 5.963316)
    assert found == pytest.approx(
        {
            "kl_mean": 0.005814, "kl_error": 0.000088,
            "kl_max": 0.178889, "kl_99_9th": 0.085244, "kl_99th": 0.032657, "kl_median": 0.003957,
            "delta_p_mean": -0.00349, "delta_p_error": 0.00027, "delta_p_rms": 0.02397,
            "top1_agreement": 0.94963, "top1_error": 0.00251,
        }
    )  # fmt: skip
    with pytest.raises(ProgramError, match="expected a line like Same top p"):
        perplexity.parse(PRINTED.partition("Same top")[0])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """Predictions of four chunks of 16 tokens."""
    path = tmp_path_factory.mktemp("quality") / "predictions"
    with exl.load(STORIES, device="cpu", kv_cache="f32", progress=False) as llm:
        ids = llm.encode((DATA / "tinystories-valid-30k.txt").read_text()[:300])
        record_predictions(llm, cut_chunks(ids, [1], 16)[:4], path)
    return path


def test_the_file_that_the_program_reads(recorded, tmp_path):
    """Read by its own rules: log-probability = lowest + scale * code."""
    with Recording(recorded) as found:
        perplexity.write_base(tmp_path / "base", found, 16)
        rows = torch.cat([rows for i in range(4) for rows in found.log_probs(i)]).numpy()
        ids = [list(passage.ids) for passage in found.passages]
        with pytest.raises(ValueError, match="expected chunks of 32 tokens"):
            perplexity.write_base(tmp_path / "other", found, 32)
    data = (tmp_path / "base").read_bytes()
    assert data[:8] == b"_logits_"
    assert struct.unpack("<3i", data[8:20]) == (16, 512, 4)
    assert list(struct.unpack("<64i", data[20:276])) == [token_id for chunk in ids for token_id in chunk]
    record_bytes = 8 + 2 * 512
    assert len(data) == 276 + 4 * 7 * record_bytes
    assert rows.min() < -16
    for i, row in enumerate(rows):
        at = 276 + i * record_bytes
        scale, lowest = struct.unpack("<2f", data[at : at + 8])
        codes = np.frombuffer(data, "<u2", 512, at + 8)
        back = lowest + scale * codes.astype(np.float64)
        assert np.abs(back - np.maximum(row, row.max() - 16)).max() < 16 / 65535


def test_an_odd_vocabulary_is_padded():
    found = perplexity.base_rows(torch.log_softmax(torch.arange(5.0).double(), 0)[None])
    assert found.dtype.itemsize == 8 + 2 * 6
    assert found["codes"][0].tolist()[-2:] == [65535, 0]


def test_a_dense_model_as_gguf(tmp_path):
    """Read back by the reader of the chat model, which undoes the order of rows."""
    write_dense_gguf(STORIES, tmp_path / "model.gguf")
    reader = GGUFReader(tmp_path / "model.gguf")
    fetch_smollm2.write_weights(reader, tmp_path / "model.safetensors")
    back, original = load_file(tmp_path / "model.safetensors"), load_file(STORIES / "model.safetensors")
    assert set(back) == set(original)
    for name, values in original.items():
        assert np.array_equal(back[name], values.astype(np.float16)), name
    assert int(reader.get_field("llama.attention.head_count_kv").contents()) == 4
    with pytest.raises(UnsupportedModelError, match="expected a plain dense Llama"):
        write_dense_gguf(Path(exl.__file__).parent / "assets" / "stories", tmp_path / "quantized.gguf")


# ---- the whole command

FAKE_PERPLEXITY = f"""
import struct, sys
from pathlib import Path
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
data = Path(given["--kl-divergence-base"]).read_bytes()
assert sys.argv[1] == "--kl-divergence" and data[:8] == b"_logits_"
assert struct.unpack("<i", data[8:12])[0] == int(given["-c"]) == int(given["-b"])
assert Path(given["-m"]).read_bytes()[:4] == b"GGUF"
count = Path(sys.argv[0]).with_name("count")
count.write_text(count.read_text() + "x" if count.exists() else "x")
text = {PRINTED!r}
print(text if len(count.read_text()) > 1 else text.partition("Same top")[0])  # as the program does now and then
"""
FAKE_QUANTIZE = "import shutil, sys; assert sys.argv[3] == 'Q4_0'; shutil.copyfile(sys.argv[1], sys.argv[2])"


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def spec(tmp_path) -> Path:
    write_program(tmp_path / "llama-perplexity", FAKE_PERPLEXITY)
    write_program(tmp_path / "llama-quantize", FAKE_QUANTIZE)
    (tmp_path / "stories").symlink_to(STORIES)
    (tmp_path / "text.txt").write_text((DATA / "tinystories-valid-30k.txt").read_text()[:2000])
    options = {"kv_cache": "f32", "device": "cpu"}
    content = {
        "title": "stories", "reference": {"folder": "stories", "options": options}, "text": "text.txt", "window": 64,
        "limit": 4,
        "rows": [
            {"label": "q4 cache", "folder": "stories", "options": {"kv_cache": "q4", "device": "cpu"}},
            {"label": "Q4_0", "quantize": "Q4_0"},
        ],
    }  # fmt: skip
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(content))
    return path


def run(spec: Path, *args: str) -> None:
    quality.main([str(spec), "--work", str(spec.parent / "work"), "--llama", str(spec.parent), *args])


def test_one_table_of_both_programs(spec, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    run(spec, "--json", "found")
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "found.md").read_text()
    head, _, reference, own, other = printed.splitlines()
    assert head.split("|")[5].strip() == "KL"
    assert reference.startswith("| stories, the reference | | ")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["reference"]["tokens"] == 4 * 31
    row = found["rows"]["q4 cache"]
    assert 0.0001 < row["kl_mean"] < row["kl_99_9th"] <= row["kl_max"]
    assert own.startswith(f"| q4 cache | {(STORIES / 'model.safetensors').stat().st_size / 1e6:.1f} | ")
    assert "| 0.00581 ± 9e-05 | 0.00396 | 0.0327 | 0.0852 | 94.96 % |" in other
    difference = np.log(5.963316) - found["reference"]["loss"]
    assert found["rows"]["Q4_0"]["loss_difference"] == pytest.approx(difference)
    assert f"| {difference:+.4f} |" in other
    assert (tmp_path / "count").read_text() == "xx"
    run(spec)  # what was recorded and made is used again
    assert capsys.readouterr().out == printed


def test_other_weights_of_one_title_are_made_anew(spec, tmp_path):
    run(spec)
    (tmp_path / "stories").unlink()
    shutil.copytree(STORIES, tmp_path / "stories")
    path = tmp_path / "stories" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] *= 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    (tmp_path / "work" / "stories.predictions").unlink()
    run(spec)
    first, second = (GGUFReader(path) for path in sorted((tmp_path / "work").glob("*-Q4_0.gguf")))
    norms = [next(x.data for x in some.tensors if x.name == "output_norm.weight") for some in (first, second)]
    assert not np.array_equal(*norms)


def test_chats_are_joined(spec, tmp_path, monkeypatch):
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    folder = tmp_path / "chat"
    folder.mkdir()
    for path in STORIES.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        "\n".join(json.dumps({"messages": [{"role": "user", "content": "One day " * 12}]}) for _ in "abcd")
    )
    values = quality.Spec("x", quality.Row("x", "chat"), "chats.jsonl", (), window=32)
    with exl.load(folder, device="cpu", progress=False) as llm:
        found = quality.passages(values, chats, llm)
        one = llm.chat_prompt([{"role": "user", "content": "One day " * 12}], add_generation_prompt=False)
    assert len(found) == 4 * len(one) // 32 > 2
    assert [*found[1].ids[1:]] == (one * 4)[33:64]


def test_windows_that_overlap_predict_all(tmp_path):
    """Windows of both kinds predict their second halves, in turn, less the first token of each half."""
    text = tmp_path / "text.txt"
    text.write_text((DATA / "tinystories-valid-30k.txt").read_text()[:600])
    with exl.load(STORIES, device="cpu", progress=False) as llm:
        plain = quality.passages(quality.Spec("x", quality.Row("x", "x"), "x", (), 32), text, llm)
        found = quality.passages(quality.Spec("x", quality.Row("x", "x"), "x", (), 32, overlap=True), text, llm)
        ids = llm.encode(text.read_text())
    assert found[: len(plain)] == plain
    assert len(found) == len(ids) // 32 + (len(ids) - 16) // 32 > len(plain) > 3
    shifted = found[len(plain)]
    assert shifted.ids == (ids[0], *ids[17:48])
    assert shifted.ids[shifted.first :] == tuple(ids[33:48])
    assert plain[0].ids[plain[0].first :] == tuple(ids[17:32])  # the token between begins the other's second half


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"label": "x"}, r"row 'x': found \[\], expected one of folder, quantize, gguf"),
        ({"label": "x", "folder": "a", "gguf": "b"}, r"found \['folder', 'gguf'\]"),
        ({"label": "x", "quantize": "Q4_0", "options": {"kv_cache": "q8"}}, "options of the other program"),
        ({"label": "x", "folder": "a", "llama_options": ["-ctk"]}, "options of the other program"),
        ({"folder": "a"}, "spec.json: .*label"),
    ],
)
def test_bad_rows(spec, row, words):
    content = json.loads(spec.read_text())
    spec.write_text(json.dumps({**content, "rows": [row]}))
    with pytest.raises(ConfigError, match=words):
        quality.Spec.read(spec)


def test_a_program_that_is_missing(spec, tmp_path, capsys):
    (tmp_path / "llama-perplexity").unlink()
    with pytest.raises(SystemExit, match=r"error: .*llama-perplexity: is not there: python -m scripts.build_llama"):
        run(spec)
