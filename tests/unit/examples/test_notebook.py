"""examples/quickstart.ipynb runs as it is, and its stored outputs are those of a run, on every kind of processor.

Processors round differently, so a cell's tag says which part of its output is equal on all of them. No tag: every
character; "story": everything except the model's own words; "rounded": numbers up to one unit of their last digit;
"varies": only the kinds of output (text, HTML, picture).
"""

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
import logging
import exl
from exl import progress

print(exl.__file__)
logging.getLogger("exl.cpu_kernels").setLevel(logging.ERROR)  # a slow processor tells that it compiles kernels
delay, progress._DELAY = progress._DELAY, 0.0
exl.load().close()
progress._DELAY = delay
"""


@pytest.fixture(scope="module")
def executed(committed, tmp_path_factory) -> nbformat.NotebookNode:
    """The notebook, run in a fresh kernel after an extra cell that sets which exl it uses and what a load shows."""
    notebook = copy.deepcopy(committed)
    for cell in code_cells(notebook):
        cell.outputs = []
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FIRST))
    run_notebook.execute(notebook, tmp_path_factory.mktemp("kernel"))  # raises if a cell raises
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: nbformat.NotebookNode) -> list[str]:
    """A cell's text output: what it printed, in one piece though slow loads may have shown bars between, and the value
    of its last line."""
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    return ([text] if text else []) + [
        output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"
    ]


def kinds(cell: nbformat.NotebookNode) -> set[str]:
    """Kinds of a cell's outputs: text, HTML, pictures."""
    return {kind for output in cell.outputs for kind in output.get("data", {"stream": output.get("text")})}


# What a cell with the tag "story" prints, with patterns for the model's words.
STORIES = {
    "cell-03": r"Once upon a time.{50,}\n",
    "cell-07": r"[^\n]{50,}",  # the stop string is a newline
    "cell-09": r"(seed 1: One day, a cat.{10,}\n)seed 2: One day, a cat.{10,}\n\1",  # the same seed, the same text
    "cell-11": (
        r"stories: this model has no chat template: [^\n]+\n"
        r"\n> Tim was sad\.\n.*\n  \(29 tokens in the prompt, 1 of them not computed again\)\n"
        r"\n> Then his mom came\.\n.*\n  \(\d+ tokens in the prompt, \d+ of them not computed again\)\n"
    ),
}
# What the cell with the tag "at hand" prints, without the model that talks or with it.
TALKS = r"there is no model here yet that talks: make chat-model\n|> What is [^\n]*\n.+\n\n> And what [^\n]*\n.+"
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def assert_same(saved: nbformat.NotebookNode, now: nbformat.NotebookNode) -> None:
    """A cell's outputs are equal, as far as its tag requires."""
    (tag,) = saved.metadata.get("tags", ["exact"])
    if tag == "exact":
        assert printed(saved) == printed(now), f"{saved.id}: run scripts/run_notebook.py"
    elif tag == "story":
        for cell in (saved, now):
            (text,) = printed(cell)
            assert re.fullmatch(STORIES[saved.id], text, re.DOTALL), f"{saved.id}: {text}"
    elif tag == "at hand":
        for cell in (saved, now):
            (text,) = printed(cell)
            assert re.fullmatch(TALKS, text, re.DOTALL), f"{saved.id}: {text}"
    elif tag == "rounded":
        (before,), (after,) = printed(saved), printed(now)
        assert NUMBER.sub("#", before) == NUMBER.sub("#", after), saved.id
        for a, b in zip(NUMBER.findall(before), NUMBER.findall(after), strict=True):
            unit = 10.0 ** -len(a.partition(".")[2])
            assert len(a.partition(".")[2]) == len(b.partition(".")[2])
            assert abs(float(a) - float(b)) < 1.5 * unit if "." in a else a == b, f"{saved.id}: {a} and {b}"
    else:
        assert tag == "varies"
        assert kinds(saved) == kinds(now), saved.id


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
        assert_same(saved, now)
        assert saved.outputs or not now.outputs, saved.id
    assert {saved.id for saved, _ in pairs if "story" in saved.metadata.get("tags", ())} == STORIES.keys()
    assert sum("image/png" in kinds(saved) for saved, _ in pairs) == 2
    assert sum(bool(printed(saved)) for saved, _ in pairs) >= 10


def test_completions_are_shown_by_the_probability_of_their_tokens(executed):
    cells = {cell.id: cell for cell in executed.cells}
    (output,) = cells["tokens"].outputs
    assert output.data["text/html"].count("title=") == 60


def test_nothing_but_exl_is_needed(committed):
    """It runs wherever exl is installed: no path into a clone."""
    for cell in committed.cells:
        assert not re.search(r"\.\./|sys\.path|benchmarks|Path\.cwd", cell.source), cell.id


def test_what_is_shown_holds_no_paths_of_a_machine(committed):
    text = nbformat.writes(committed)
    assert str(run_notebook.ROOT) not in text
    assert "/tmp/" not in text
