"""Runs examples/quickstart.ipynb in a fresh kernel and saves it with its outputs.

python scripts/run_notebook.py
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def execute(notebook: nbformat.NotebookNode, runtime: Path, timeout: int = 120) -> None:
    """Runs every cell of ``notebook`` in place, with this tree's exl, but outside of the repository: in ``runtime``, a
    folder where the kernel's own files are, too. Raises ``nbclient.exceptions.CellExecutionError``.
    """
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(runtime),
        "JUPYTER_RUNTIME_DIR": str(runtime),
        "OMP_NUM_THREADS": "1",  # sums of several threads may differ in their last bits
    }
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(runtime)}},
        record_timing=False,
    )
    client.execute(env=env)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    # Without the Python version, which could differ from run to run.
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Joins consecutive pieces of a printed stream into one output, because where the pieces end is arbitrary."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    with tempfile.TemporaryDirectory() as runtime:
        execute(notebook, Path(runtime))
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.relative_to(ROOT)}: {len(notebook.cells)} cells", file=sys.stderr)


if __name__ == "__main__":
    main()
