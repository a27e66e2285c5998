"""``benchmarks/compare_llama_cpp.py``: what is read from llama-bench, what is kept, and what is printed. No timings."""

from __future__ import annotations

import json
import stat
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from benchmarks import compare_llama_cpp, processor
from benchmarks.llama_cpp import tables
from benchmarks.llama_cpp.cases import Case, Comparison, Row, read, write
from benchmarks.llama_cpp.models import SHAPE, Subject
from benchmarks.llama_cpp.programs import ExlProcess, LlamaBench, ProgramError, parse
from benchmarks.llama_cpp.random_gguf import write_gguf
from exl.checkpoint.hub import BUNDLED_MODEL
from scripts import build_llama_bench

DECODE, PREFILL = Case("decode", 64, 1024), Case("prefill", 512)
# ``llama-bench -p 0 -n 64 -d 1024 -r 2 -o json``, without the fields that are not read.
OUTPUT = """[
  {
    "build_commit": "0c1e57098",
    "build_number": 0,
    "cpu_info": "AMD EPYC",
    "gpu_info": "",
    "backends": "CPU",
    "model_filename": "model.gguf",
    "model_size": 635990016,
    "n_threads": 2,
    "type_k": "f16",
    "type_v": "f16",
    "n_prompt": 0,
    "n_gen": 64,
    "n_depth": 1024,
    "avg_ts": 10.75,
    "samples_ns": [ 5818181818, 6095238095 ],
    "samples_ts": [ 11, 10.5 ]
  }
]
"""


def comparison() -> Comparison:
    rows = (
        Row("Llama 1.1B", DECODE, 0, (35.0, 36.5, 34.0), (10.5, 11.0, 10.0)),
        Row("Llama 1.1B", PREFILL, 0, (250.4,), (126.0,)),
        Row("Llama 1.1B", DECODE, 2, (2.0, 4.0), (4.0,)),
    )
    facts = {"machine": "AMD EPYC, 2 processors, AVX2", "threads": "2", "llama.cpp": "a build of commit 0c1e57098"}
    return Comparison(facts, {"Llama 1.1B": "GPTQ against Q4_0"}, rows)


# ---- llama-bench ----------------------------------------------------------------------------------------------------


def test_llama_bench_is_asked_for_the_case():
    bench = LlamaBench(Path("bench"), Path("model.gguf"), 2, ("-fa", "on"))
    common = ["-ngl", "0", "-o", "json", "-fa", "on"]
    decode = ["bench", "-m", "model.gguf", "-t", "2", "-p", "0", "-n", "64", "-d", "1024", "-r", "3", *common]
    prefill = ["bench", "-m", "model.gguf", "-t", "2", "-p", "512", "-n", "0", "-d", "0", "-r", "1", *common]
    assert bench.command(DECODE, 3) == decode
    assert bench.command(PREFILL, 1) == prefill


def test_its_output_is_read():
    found = parse(OUTPUT, DECODE)
    assert found.speeds == (11.0, 10.5)
    assert found.facts["build"] == "0c1e57098"
    assert found.facts["weights"] == "636 MB"


@pytest.mark.parametrize(
    "output",
    [
        "",
        "error: failed to load model",
        "[]",
        f"[{OUTPUT.strip()[1:-1]}, {OUTPUT.strip()[1:-1]}]",  # two tests
        OUTPUT.replace('"n_depth": 1024', '"n_depth": 0'),  # another test than the one asked for
        OUTPUT.replace("[ 11, 10.5 ]", "[ ]"),
        OUTPUT.replace("samples_ts", "samples"),
    ],
)
def test_what_is_no_result_of_the_case_is_refused(output):
    with pytest.raises(ProgramError, match="llama-bench: found"):
        parse(output, DECODE)


def test_a_failing_llama_bench_is_quoted(tmp_path):
    program = script(tmp_path, "import sys; print('warning'); sys.exit('main: error: unable to load model')")
    with pytest.raises(ProgramError, match="ended with status 1: main: error: unable to load model"):
        LlamaBench(program, Path("model.gguf"), 2).measure(DECODE, 1)


# ---- exl's process, and both programs -------------------------------------------------------------------------------


def script(folder: Path, text: str) -> Path:
    path = folder / "llama-bench"
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


FAKE_LLAMA_BENCH = """
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
told = {"build_commit": "c0ffee", "cpu_info": "x", "backends": "CPU", "model_size": 1}
told |= {"type_k": "f16", "type_v": "f16"}
told |= {"n_prompt": int(given["-p"]), "n_gen": int(given["-n"]), "n_depth": int(given["-d"])}
print(json.dumps([told | {"samples_ts": [2.5] * int(given["-r"])}]))
"""


def compare(folder: Path, monkeypatch: pytest.MonkeyPatch, *asked: str) -> Comparison:
    """What the command finds of the model in exl and a llama-bench that computes nothing."""
    subject = Subject("stories", BUNDLED_MODEL, folder / "model.gguf", "exl's file against another")
    monkeypatch.setattr(compare_llama_cpp, "prepare", lambda *args: subject)
    monkeypatch.setattr(compare_llama_cpp, "RESULTS", folder)
    both = ["--llama-bench", str(script(folder, FAKE_LLAMA_BENCH)), "--models", "1.1b", "--json", "found"]
    compare_llama_cpp.main([*both, "--busy", "0", "1", "--tokens", "4", "--threads", "1", *asked])
    return read(folder / "found.json")


def test_both_are_measured_in_turn_and_reported(tmp_path, monkeypatch, capsys):
    asked = ("--depths", "0", "20", "--prompts", "24", "--rounds", "2", "--repeats", "3", "--exl", "kv_cache=q8")
    found = compare(tmp_path, monkeypatch, *asked)
    cases = [Case("decode", 4, 0), Case("decode", 4, 20), Case("prefill", 24)]
    assert [(row.case, row.busy) for row in found.rows] == [(case, busy) for busy in (0, 1) for case in cases]
    for row in found.rows:
        assert len(row.exl) == len(row.llama_cpp) == 6
        assert min(row.exl) > 0
    assert found.facts["threads"] == "1"
    assert found.facts["llama.cpp"] == "a native Release build of commit c0ffee"
    assert capsys.readouterr().out == tables.report(found) + "\n"
    compare_llama_cpp.main(["--readme", str(tmp_path / "found.json")])
    assert capsys.readouterr().out == tables.readme_section(found) + "\n"


def test_a_file_keeps_what_was_measured(tmp_path):
    """To the last digit: what is printed of the file is what was printed of the runs."""
    row = Row("stories", Case("decode", 4), 0).with_runs([10000 / 3, 5868.74996], [2.0 / 3, 0.5674997])
    found = Comparison({"machine": "x"}, {"stories": "y"}, (row,))
    write(found, tmp_path / "found.json")
    assert read(tmp_path / "found.json") == found


def test_busy_processes_may_have_fewer_rounds(tmp_path, monkeypatch):
    asked = ("--quick", "--depths", "0", "--prompts", "--rounds", "3", "--busy-rounds", "2")
    found = compare(tmp_path, monkeypatch, *asked)
    assert {row.busy: len(row.llama_cpp) for row in found.rows} == {0: 3, 1: 2}
    assert found.facts["rounds"] == "3, beside busy processes 2"


def test_a_model_that_exl_cannot_load_is_an_error(tmp_path):
    with pytest.raises(ProgramError, match="exl's process ended with status 1"):
        ExlProcess(tmp_path / "none", {})


def test_long_prompts_are_measured_once_a_turn():
    assert [Case("prefill", tokens).repeats(3) for tokens in (1023, 1024)] == [3, 1]
    assert Case("decode", 64, 4096).repeats(3) == 3


# ---- what is kept and printed ---------------------------------------------------------------------------------------


def test_a_comparison_is_kept_with_its_medians(tmp_path):
    write(comparison(), tmp_path / "a" / "found.json")
    assert read(tmp_path / "a" / "found.json") == comparison()
    first = json.loads((tmp_path / "a" / "found.json").read_text())["tokens_per_second"][0]
    assert first["test"] == "decode at depth 1,024"
    assert (first["exl"]["median"], first["exl"]["least"], first["exl"]["most"]) == (35.0, 34.0, 36.5)
    assert first["ratio"] == 3.333


def test_the_report_has_every_row_with_its_spread():
    assert tables.report(comparison()).splitlines() == [
        "- machine: AMD EPYC, 2 processors, AVX2",
        "- threads: 2",
        "- llama.cpp: a build of commit 0c1e57098",
        "- Llama 1.1B: GPTQ against Q4_0",
        "",
        "Tokens per second: median (least to most).",
        "",
        "| model | test | busy processes | exl | llama.cpp | exl / llama.cpp |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| Llama 1.1B | decode at depth 1,024 | 0 | 35.0 (34.0 to 36.5) | 10.5 (10.0 to 11.0) | 3.3x |",
        "| Llama 1.1B | prefill 512 | 0 | 250 (250 to 250) | 126 (126 to 126) | 2.0x |",
        "| Llama 1.1B | decode at depth 1,024 | 2 | 3.00 (2.00 to 4.00) | 4.00 (4.00 to 4.00) | 0.75x |",
    ]


def test_the_readme_has_a_column_for_each_load():
    assert tables.readme_section(comparison()).splitlines() == [
        "Tokens per second, exl / llama.cpp, medians of one run in which the two took turns, with 2 threads each, on "
        "AMD EPYC, 2 processors, AVX2. llama.cpp is a build of commit 0c1e57098.",
        "",
        "- Llama 1.1B: GPTQ against Q4_0.",
        "",
        "| | idle | beside two |",
        "| --- | ---: | ---: |",
        "| Llama 1.1B, decode at depth 1,024 | 35.0 / 10.5 (3.3x) | 3.00 / 4.00 (0.75x) |",
        "| Llama 1.1B, prefill 512 | 250 / 126 (2.0x) | - |",
    ]


def test_speeds_have_three_digits():
    assert [tables.speed(value) for value in (1234.5, 99.95, 99.94, 9.995, 9.994, 0.5)] == [
        "1234", "100", "99.9", "10.0", "9.99", "0.50"
    ]  # fmt: skip


# ---- files and machine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["q6_k", "f16"])
def test_a_random_model_is_read_by_gguf(tmp_path, head):
    shape = replace(
        SHAPE, hidden_size=256, intermediate_size=288, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=64
    )
    write_gguf(tmp_path / "a.gguf", shape, head=head)
    reader = GGUFReader(tmp_path / "a.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == 3 + 2 * 9
    assert found["output.weight"].tensor_type == GGMLQuantizationType[head.upper()]
    assert found["blk.1.ffn_down.weight"].tensor_type == GGMLQuantizationType.Q4_0
    assert list(found["blk.1.ffn_down.weight"].shape) == [288, 256]  # innermost first
    assert list(found["blk.0.attn_k.weight"].shape) == [256, 128]
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    assert reader.fields["llama.vocab_size"].contents() == 64
    for name, tensor in found.items():
        values = dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all()
        if "norm" not in name:
            assert 0.005 < values.std() < 0.05, name


def test_rows_that_no_block_divides_are_refused(tmp_path):
    shape = replace(SHAPE, hidden_size=256, intermediate_size=300, num_layers=1, vocab_size=64)
    with pytest.raises(ValueError, match="a row of 300 weights: expected a multiple of 32 for Q4_0"):
        write_gguf(tmp_path / "a.gguf", shape)


def test_the_processor_is_named_with_its_instructions(tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    text = "processor\t: 0\nmodel name\t: A CPU: 9\nflags\t\t: fpu avx avx2 avx512f avx512_vnni\n\nflags\t\t: fpu\n"
    (tmp_path / "cpuinfo").write_text(text)
    assert processor.processor_name() == "A CPU: 9"
    assert processor.instruction_sets() == "AVX2, AVX512, AVX512-VNNI"
    (tmp_path / "cpuinfo").write_text("flags: avx\n")
    assert processor.instruction_sets() == "no AVX2"


# ---- the build ------------------------------------------------------------------------------------------------------


def test_the_commit_is_the_newest_of_the_changelog(tmp_path):
    log = "## [2]\n- feat: update llama.cpp to ggml-org/llama.cpp@0c1e57098\n## [1]\n- to ggml-org/llama.cpp@4df2\n"
    (tmp_path / "CHANGELOG.md").write_text(log)
    assert build_llama_bench.commit(tmp_path) == "0c1e57098"


def test_a_source_package_that_was_changed_is_refused(tmp_path):
    (tmp_path / f"{build_llama_bench.UNPACKED}.tar.gz").write_bytes(b"another")
    with pytest.raises(SystemExit, match="expected 832db"):
        build_llama_bench.download(tmp_path)
