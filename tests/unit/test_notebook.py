"""examples/quickstart.ipynb runs as it is, and what it shows is what it printed and drew."""

from __future__ import annotations

import copy
import re

import pytest

for module in ("nbclient", "ipykernel", "matplotlib"):
    pytest.importorskip(module, reason="the notebook wants more packages: pip install -e '.[notebook]'")
nbformat, run_notebook = (pytest.importorskip(module) for module in ("nbformat", "scripts.run_notebook"))


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    return nbformat.read(run_notebook.NOTEBOOK, 4)


FIRST = """
import exl
from exl import progress

print(exl.__file__)
delay, progress._DELAY = progress._DELAY, 0.0
exl.load().close()
progress._DELAY = delay
"""


@pytest.fixture(scope="module")
def executed(committed, tmp_path_factory) -> nbformat.NotebookNode:
    """Run anew in a kernel of its own, after a cell that tells which exl it has and what a load shows."""
    notebook = copy.deepcopy(committed)
    for cell in code_cells(notebook):
        cell.outputs = []
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FIRST))
    run_notebook.execute(notebook, tmp_path_factory.mktemp("kernel"))  # raises where a cell does
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: nbformat.NotebookNode) -> list[str]:
    """Text that a person reads: what was printed, and the value of the last line."""
    texts = [output.text for output in cell.outputs if output.output_type == "stream"]
    return texts + [output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"]


def kinds(cell: nbformat.NotebookNode) -> set[str]:
    """Of what is shown: text, HTML, pictures."""
    return {kind for output in cell.outputs for kind in output.get("data", {"stream": output.get("text")})}


def test_every_cell_runs_with_this_trees_exl(executed):
    first, *cells = code_cells(executed)
    assert printed(first) == [f"{run_notebook.ROOT / 'exl' / '__init__.py'}\n"]
    assert [cell.id for cell in cells if any(output.output_type == "error" for output in cell.outputs)] == []
    errors = [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert errors == []


def test_a_load_that_takes_its_time_is_shown(executed):
    shown = [output.data["text/html"] for output in executed.cells[0].outputs if output.output_type == "display_data"]
    assert len(shown) == 1
    assert re.fullmatch(r"<div>loading: [\d.]+ [KM]B in [\d.]+ s, [\d.]+ [KMG]?B/s</div>", shown[0])


def test_outputs_are_committed_and_true(committed, executed):
    pairs = list(zip(code_cells(committed), code_cells(executed)[1:], strict=True))
    for saved, now in pairs:
        assert saved.source == now.source
        if "varies" in saved.metadata.get("tags", ()):
            assert kinds(saved) == kinds(now), saved.id
        else:
            assert printed(saved) == printed(now), f"{saved.id}: run scripts/run_notebook.py"
        assert saved.outputs or not now.outputs, saved.id
    assert sum("image/png" in kinds(saved) for saved, _ in pairs) == 2
    assert sum(bool(printed(saved)) for saved, _ in pairs) >= 10


def test_what_is_shown_holds_no_paths_of_a_machine(committed):
    text = nbformat.writes(committed)
    assert str(run_notebook.ROOT) not in text
    assert "/tmp/" not in text
