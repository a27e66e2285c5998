"""Imports go one way, up the ladder. What stands on a lower rung never needs torch, CuPy or a GPU."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "exl"

# Modules of one rung may import each other; nobody imports from a rung above. Packages stand for all they hold,
# except for modules that are named by themselves.
LADDER = (
    ("errors",),
    ("config", "json_reader"),
    (
        *(
            "layout",
            "batch",
            "rope",
            "keywords",
            "hub",
            "remote",
            "user_cache",
            "host_memory",
            "virtual_memory",
            "replace_file",
            "device_memory",
            "gpu_environment",
            "checkpoint",
            "safetensors_header",
            "safetensors_writer",
        ),
        *(
            "module_pattern",
            "quant_config",
            "formats",
            "kernels.spec",
            "kernels.tile_layout",
            "kernels.linear_config",
            "kernels.attention_layout",
            "kernels.sample_layout",
        ),
        *("control_tokens", "chat_template"),
        *("tokenizer_files", "token_bytes", "tokenizer", "text_stream"),
    ),
    ("memory", "plan_html", "progress", "device_arena", "device_plan", "cache", "page_pool", "sampling", "logprobs"),
    ("kernels",),
    ("ops",),
    ("models",),
    (
        "block_file",
        "packed",
        "packed_store",
        "read_ahead",
        "stream",
        "device_stream",
        "weight_memory",
        "loader",
        "planning",
    ),
    ("step_graph", "runner"),
    ("generator",),
    ("engine",),
    ("llm", "chat", "evaluate", "bench"),
    ("quantize", "system_info", "chat_session"),
    ("terminal",),
    ("commands",),
    ("cli",),
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rung(module: str) -> int:
    for name in (module, module.split(".")[0]):
        for height, names in enumerate(LADDER):
            if name in names:
                return height
    raise AssertionError(f"exl.{module} has no place on the ladder: give it one in LADDER and docs/architecture.md")


def imports(path: Path) -> list[str]:
    """Modules of exl that a file imports, those inside functions too, those for type checking alone not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
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
    return [name.removeprefix("exl.") for name in found if name.startswith("exl.")]


MODULES = [path for path in sorted(ROOT.rglob("*.py")) if module_name(path)]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_up_only(path):
    here = rung(module_name(path))
    for name in imports(path):
        assert rung(name) <= here, f"exl.{module_name(path)} imports exl.{name} from a rung above"


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("exl", ("torch", "numpy", "cupy")),
        ("exl.cli", ("torch", "numpy", "cupy", "transformers", "huggingface_hub")),
        ("exl.layout", ("torch", "cupy")),
        ("exl.batch", ("torch", "cupy")),
        ("exl.checkpoint", ("torch", "cupy")),
        ("exl.formats", ("torch", "cupy")),
        ("exl.kernels.spec", ("torch", "cupy")),
        ("exl.planning", ("torch", "cupy", "huggingface_hub")),
        ("exl.llm", ("cupy", "transformers")),
    ],
)
def test_heavy_imports_stay_out(module, forbidden):
    code = f"import sys, {module}; print(' '.join(name for name in {forbidden!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_check_itself_sees_imports():
    assert "errors" in imports(ROOT / "config.py")
    assert "ops.base" in imports(ROOT / "loader.py")
    assert rung("ops.torch_ops") > rung("kernels.launch") > rung("kernels.spec")
