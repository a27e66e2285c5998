"""Runs the harness's tasks of ``tests/data/lm_eval`` for ``test_lm_eval.py``, in the folder of the tasks: their data
are named relative to it, and the harness's libraries are told by the environment to stay offline.

    python lm_eval_child.py DENSE MODEL FOLDER

Writes each sample's results of DENSE, by exl and by transformers, to FOLDER/compared.json. Then runs the harness's own
command line with MODEL, which writes its results to FOLDER, too. One process: the libraries take seconds to import.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

import exl.lm_eval

TASKS = ["stories_choices", "stories_endings", "stories_texts"]
MAX_LENGTH = 96


def compare(model: str) -> dict[str, dict]:
    from lm_eval.models.huggingface import HFLM

    models = {
        "exl": exl.lm_eval.ExlLM(model, kv_cache="f32", device="cpu", max_length=MAX_LENGTH, progress=False),
        "transformers": HFLM(model, dtype="float32", device="cpu", max_length=MAX_LENGTH),
    }
    found = {}
    for name, lm in models.items():
        tasks = TaskManager(include_path=".", include_defaults=False).load(TASKS)
        done = lm_eval.evaluate(lm, tasks, bootstrap_iters=0, log_samples=True)
        samples = {task: [sample["resps"] for sample in done["samples"][task]] for task in TASKS}
        found[name] = {"results": done["results"], "samples": samples}
    return found


def main() -> None:
    _, dense, model, folder = sys.argv
    (Path(folder) / "compared.json").write_text(json.dumps(compare(dense), default=float))
    sys.argv = ["lm_eval", "run", "--model", "exl", "--model_args", f"pretrained={model},progress=False"]
    sys.argv += ["--tasks", *TASKS, "--include_path", ".", "--limit", "2", "--output_path", folder]
    exl.lm_eval.main()


if __name__ == "__main__":
    main()
