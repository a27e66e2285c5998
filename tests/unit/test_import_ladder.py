"""Imports go one way, up the ladder of wings, and in no circle. What stands on a lower rung never needs torch, CuPy or
a GPU. Each wing says what it is for and where to begin reading."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "exl"

# A wing is a folder of exl/; modules of exl/ itself stand here by themselves. Nothing imports from its own rung, other
# than from its own folder, or from a rung above. Words of the first rung are shared by all, and by each other.
LADDER = (
    (
        *("errors", "units", "keywords", "batch", "sampling", "sampling_params", "request_options", "saved_chat"),
        *("streams", "progress", "user_cache", "user_text", "replace_file", "forks", "threads", "control_groups"),
        *("token_html", "logarithm", "philox", "code_file", "http_client", "json_schema"),
    ),
    ("checkpoint", "memory", "layout"),
    ("families",),
    ("formats", "cache", "text", "conversation"),
    ("parse",),
    ("kernels", "cpu_kernels"),
    ("ops",),
    ("models",),
    ("adapters",),
    ("planning", "quantize"),
    ("weights",),
    ("engine",),
    ("completion", "embedding", "scoring", "load_test", "evaluation"),
    ("llm", "bench"),
    ("load_model",),
    ("chat", "remote_chat", "evaluate", "lm_eval"),
    ("server",),
    ("commands",),
    ("cli",),
)
# ``LLM.chat`` makes a Chat, which is built on LLM: the one import that waits until it is needed.
LATE = {("llm", "chat")}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def wing(module: str) -> str:
    return module.split(".")[0]


def rung(module: str) -> int:
    for height, names in enumerate(LADDER):
        if wing(module) in names:
            return height
    raise AssertionError(f"exl.{module} has no place on the ladder: give it one in LADDER and docs/architecture.md")


def imports(path: Path, types: bool = False) -> list[str]:
    """Modules of exl that a file imports, those inside functions too; those for type checking alone with ``types``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            found += [
                f"{base}.{alias.name}" if (ROOT / base[4:].replace(".", "/") / f"{alias.name}.py").exists() else base
                for alias in node.names
            ]
    found = [name.removeprefix("exl.") for name in found if name.startswith("exl.")]
    return [name for name in found if (module_name(path), name) not in LATE]


MODULES = [path for path in sorted(ROOT.rglob("*.py")) if module_name(path)]
WINGS = sorted(path.parent for path in ROOT.glob("*/__init__.py"))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_up_only(path):
    here = module_name(path)
    for name in imports(path):
        inside = wing(name) == wing(here) or rung(name) == rung(here) == 0
        assert inside or rung(name) < rung(here), f"exl.{here} imports exl.{name}, which is not below it"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Names along one circle of imports; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_circle_of_folders_or_of_modules():
    modules = {module_name(path): set(imports(path)) - {module_name(path)} for path in MODULES}
    assert circle(modules) == []
    folders: dict[str, set[str]] = {}
    for module, found in modules.items():
        folders.setdefault(wing(module), set()).update({wing(name) for name in found} - {wing(module)})
    assert circle(folders) == []


@pytest.mark.parametrize("folder", ["layout", "kernels", "ops"])
def test_types_make_no_circle_either(folder):
    """A type that two modules share has a module below both."""
    paths = [path for path in MODULES if wing(module_name(path)) == folder]
    assert circle({module_name(path): set(imports(path, types=True)) - {module_name(path)} for path in paths}) == []


def test_a_circle_would_be_found():
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


@pytest.mark.parametrize("folder", WINGS, ids=lambda path: path.name)
def test_a_wing_says_where_to_begin(folder):
    """Its docstring names a file of its own to read first."""
    doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    found = re.search(r"Begin with ``(\w+\.py)``", doc)
    assert found, f"exl/{folder.name}/__init__.py: expected a docstring with 'Begin with ``file.py``', found {doc!r}"
    assert (folder / found[1]).is_file()


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("exl", ("torch", "numpy", "cupy")),
        ("exl.cli", ("torch", "numpy", "cupy", "transformers", "huggingface_hub")),
        ("exl.layout.arena", ("torch", "cupy")),
        ("exl.layout.layers", ("torch", "cupy")),
        ("exl.batch", ("torch", "cupy")),
        ("exl.checkpoint.checkpoint", ("torch", "cupy")),
        ("exl.formats.load", ("torch", "cupy")),
        ("exl.kernels.spec", ("torch", "cupy")),
        ("exl.planning.from_headers", ("torch", "cupy", "huggingface_hub")),
        ("exl.llm", ("cupy", "transformers", "lm_eval")),
        ("exl.remote_chat", ("torch", "numpy", "huggingface_hub")),
        ("exl.commands.terminal", ("torch", "numpy", "huggingface_hub")),
    ],
)
def test_heavy_imports_stay_out(module, forbidden):
    code = f"import sys, {module}; print(' '.join(name for name in {forbidden!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_check_itself_sees_imports():
    assert "errors" in imports(ROOT / "families" / "config.py")
    assert "ops.base" in imports(ROOT / "weights" / "loader.py")
    assert rung("ops.torch_ops") > rung("kernels.launch") > rung("layout.tiles")


def test_nothing_warns_when_it_is_imported():
    modules = [f"exl.{module_name(path)}" for path in MODULES if path.name != "__main__.py"]
    code = f"import importlib, exl\nfor name in {modules}: importlib.import_module(name)\nexl.load().close()"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
