"""Where exl's own CPU kernels cannot run, torch computes: the same story, one line that says why, and no option that
only the kernels have. Where nothing can be kept on disk, they run all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.cpu_targets import needs_kernels

ROOT = Path(__file__).parents[2]
WITHOUT_LLVMLITE = "import sys; sys.modules['llvmlite'] = None"
# PR_SET_MDWE with PR_MDWE_REFUSE_EXEC_GAIN, as systemd's MemoryDenyWriteExecute sets it
WITHOUT_EXEC = "import ctypes, sys; ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) and sys.exit(77)"
CHILD = """
import json, sys
import exl
from exl.commands.system_info import describe_system

def story():
    with exl.load(device="cpu") as llm:
        told["plans"].append(str(llm.plan))
        return llm.generate("Once upon a time", max_tokens=60, temperature=0).text, llm.decode_steps

told = {"plans": [str(exl.plan())]}
told |= {"stories": [story() for _ in range(2)], "info": describe_system()["cpu kernels"]}
try:
    exl.load(device="cpu", arithmetic="int8").close()
except exl.ConfigError as error:
    told["refusal"] = str(error)
print(json.dumps(told))
"""


def run(before: str = "", **environment: str) -> tuple[dict, list[str]]:
    """What a process tells that runs ``before`` first, and the lines of its log."""
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\n{CHILD}"],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env=os.environ | environment,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip("this system cannot be made to forbid executable memory (Linux before 6.3)")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr.splitlines()


@pytest.fixture(scope="module")
def plain() -> dict:
    return run()[0]


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        pytest.param(WITHOUT_LLVMLITE, "llvmlite cannot be imported (", id="no llvmlite"),
        pytest.param(
            WITHOUT_EXEC,
            "the system forbids code that is made at run time (",
            id="no code made at run time",
            marks=[needs_kernels, pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to forbid it")],
        ),
    ],
)
def test_torch_computes_and_one_line_says_why(before, reason, plain):
    told, log = run(before)
    assert len(log) == 1, log
    assert log[0].startswith("computing through torch, slower and less exact: exl's own CPU kernels cannot run: ")
    assert reason in log[0]
    assert told["info"].startswith("torch's, 4 bits by ")
    assert told["info"].endswith(log[0].split("cannot run: ")[1])
    assert told["refusal"].startswith(
        "arithmetic: found 'int8', which is for exl's own kernels on a CPU; they cannot run"
    )
    (text, steps), again = told["stories"]
    assert [text, steps] == again
    assert steps is None
    assert told["plans"][1:] == told["plans"][:1] * 2
    # bf16 decode rows may choose another word in the end, where two are almost as likely.
    assert text[:40] == plain["stories"][0][0][:40]


@needs_kernels
def test_kernels_run_where_nothing_can_be_kept(tmp_path, plain):
    (tmp_path / "file").write_text("in the way")
    told, log = run(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert [line for line in log if not line.startswith("compiled ")] == []  # said where it takes long
    assert told == plain
    assert told["info"].startswith("exl's own for avx")
    assert "refusal" not in told
