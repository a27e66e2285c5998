"""A first run in a process of its own, on systems on which these kernels were never run by their makers.

LLVM ends the process if it cannot load code. So where that has not been seen to work, a child finds out, once for each
version of the kernels: ``python -m exl.cpu_kernels.probe`` loads and runs some, and says so.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from exl.cpu_kernels.object_cache import object_name, read_note, write_note
from exl.cpu_kernels.processor import usable_isas
from exl.cpu_kernels.quantize import ActivationForm, QuantizeRows

_SEEN = ("linux",)  # ``sys.platform`` of systems on which the tests have run
_SECONDS = 120
_SAID = "kernels run here"
_FORM = ActivationForm(128, 2, "eights")


def why_not(folder: Path | None = None) -> str | None:
    """Why kernels cannot be trusted to run on this system; None: they run. ``folder``: of the cache."""
    if sys.platform in _SEEN or not usable_isas():
        return None
    name = f"probe-{object_name((QuantizeRows(_FORM, False),), usable_isas()[0])}"
    if read_note(name, folder) == _SAID:
        return None
    try:
        done = subprocess.run(
            [sys.executable, "-m", "exl.cpu_kernels.probe"], capture_output=True, text=True, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"they could not be tried in a process of their own ({error})"
    if done.returncode or done.stdout.strip() != _SAID:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return f"a trial in a process of their own failed ({lines[-1]})"
    write_note(name, _SAID, folder)
    return None


def main() -> None:
    """Runs a kernel by itself, and a list of stages by two threads."""
    from exl.cpu_kernels.library import Library, slots
    from exl.cpu_kernels.pool import Pool, Program, Stage

    library = Library()
    x = np.random.default_rng(0).standard_normal(128).astype(np.float32)
    alone, together = (np.zeros(_FORM.num_bytes, np.uint8) for _ in range(2))
    arguments = (128, 1, 1, None, 1, 128)
    library.call(QuantizeRows(_FORM, False), slots(x, alone, *arguments))
    pool = Pool(library, 2)
    pool.run(Program(library, [Stage(QuantizeRows(_FORM, False), 1, (x, together, *arguments))], repeats=False))
    pool.close()
    step = alone[_FORM.step_offset :][:4].view(np.float32)[0]
    if not np.array_equal(alone, together) or step != np.abs(x).max() / np.float32(32512):
        raise SystemExit("a kernel gave a wrong result")
    print(_SAID)


if __name__ == "__main__":
    main()
