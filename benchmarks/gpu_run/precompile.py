"""Compiles kernels ahead of time, without a GPU, into a cache folder that can be copied to a machine with one.

There an entry is found only if the sources and the version of NVRTC (``nvrtc 13.0``) equal those in use there, where
CuPy loads NVRTC. The *facts* stage reports how many entries were found.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu_run.worker import append
from benchmarks.guard import one_line

ROOT = Path(__file__).resolve().parents[2]
TEST_KERNELS, BENCHMARK_KERNELS = ROOT / "tests" / "host" / "kernels", ROOT / "benchmarks" / "cuda"
EXTRA_HEAD_DIMS = (8, 16, 64)  # head sizes of the tests, beyond those of real models


def test_specs(arch: int) -> list:
    """(spec, folder of its source) of the small kernels of tests and roofs."""
    from exl.kernels.spec import KernelSpec

    return [
        (KernelSpec(source, entry, {}, arch), folder)
        for folder, source in ((TEST_KERNELS, "gpu.cu"), (BENCHMARK_KERNELS, "bandwidth.cu"))
        for entry in re.findall(r"EXL_KERNEL\((\w+)", (folder / source).read_text())
    ]


def all_specs(arch: int) -> list:
    """(spec, folder of its source or None) of all kernels that the stages launch on ``arch``, models' kernels first."""
    from exl.kernels import append_kv, attention_decode, attention_prefill
    from exl.kernels.variants import variants
    from exl.layout.pages import KINDS, PageLayout

    found = {(variant.spec, None): None for variant in variants(arch)}
    found |= dict.fromkeys(test_specs(arch))
    for head_dim in EXTRA_HEAD_DIMS:
        for kind in KINDS:
            layout = PageLayout(kind, head_dim)
            found[append_kv._spec(layout, arch), None] = None
            for module in (attention_decode, attention_prefill):
                found[module._spec(layout, arch, {}), None] = None
    return list(found)


def cached_count(arch: int, folder: Path, compiler) -> tuple[int, int]:
    """(number of ``all_specs`` that are in ``folder``, number of all)."""
    specs = all_specs(arch)
    return sum(_path(spec, sources, folder, compiler).is_file() for spec, sources in specs), len(specs)


def _path(spec, sources: Path | None, folder: Path, compiler) -> Path:
    """The path at which ``compile_cached`` looks."""
    from exl.kernels.compiler import target_options
    from exl.kernels.spec import digest, flattened

    key = digest(flattened(spec, sources), target_options(spec, compiler), compiler.version())
    return folder / f"{spec.entry}-{key}.bin"


def installed_compiler(library: Path | None = None):
    """NVRTC by ctypes, from ``library`` or an installed wheel (CUDA 13's first); otherwise through CuPy."""
    from exl.errors import KernelError
    from exl.kernels.launch import CupyCompiler
    from tests.compile.nvrtc import Nvrtc, library_path

    path = library or library_path(13) or library_path(12)
    if path is not None:
        return Nvrtc(path)
    try:
        return CupyCompiler()
    except KernelError as error:
        raise SystemExit(f"no NVRTC: {error}; pip install nvidia-cuda-nvrtc brings CUDA 13's") from error


def cupys_compiler():
    """The compiler that exl uses on a GPU."""
    from exl.kernels.launch import CupyCompiler

    return CupyCompiler()


def precompile(
    specs: list, folder: Path, make_compiler: Callable, processes: int, deadline: float | None = None
) -> str:
    """Compiles the kernels that ``folder`` lacks, in several processes. Returns one line for the report."""
    compiler, began = make_compiler(), time.monotonic()
    todo = [(spec, sources) for spec, sources in specs if not _path(spec, sources, folder, compiler).is_file()]
    total, failed, done = len(specs), [], 0
    if todo:
        with multiprocessing.get_context("spawn").Pool(processes, _start, (make_compiler, folder)) as pool:
            results = pool.imap_unordered(_compile, todo)
            for _ in todo:
                try:
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    error = results.next(left)
                except multiprocessing.TimeoutError:
                    break
                done += error is None
                failed += [error] if error else []
    left_out = len(todo) - done - len(failed)
    text = f"{compiler.version()}, sm_{specs[0][0].arch}: {total - len(todo)} of {total} were there, {done} compiled"
    text += f", {left_out} left out" if left_out else ""
    text += f" in {time.monotonic() - began:.0f} s; {folder}"
    return text + "".join(f"\nfailed: {error}" for error in failed[:10])


def _start(make_compiler: Callable, folder: Path) -> None:
    global _compiler, _folder
    _compiler, _folder = make_compiler(), folder


def _compile(task: tuple) -> str | None:
    """Compiles one kernel. Returns the text of an error."""
    from exl.kernels.compiler import compile_cached

    spec, sources = task
    try:
        compile_cached(spec, _compiler, _folder, sources)
    except Exception as error:
        return f"{spec}: {one_line(error)}"
    return None


def command(arch: int, folder: Path, library: Path | None, processes: int) -> int:
    """``--precompile``."""
    make = functools.partial(installed_compiler, library)
    print(f"{make().version()}: entries are found by a CuPy with this very version", flush=True)
    text = precompile(all_specs(arch), folder, make, processes)
    size = sum(path.stat().st_size for path in folder.glob("*.bin"))
    print(f"{text}\n{size / 1e6:.1f} MB in all; --kernel-cache {folder} uses it")
    return int("\nfailed: " in text)


def _compile_for_this_gpu(folder: Path | None, processes: int, deadline: float) -> str:
    import torch

    from exl.kernels.compiler import default_cache_folder

    major, minor = torch.cuda.get_device_capability()
    specs = all_specs(10 * major + minor)
    return precompile(specs, folder or default_cache_folder(), cupys_compiler, processes, deadline)


def main() -> None:
    """The *compile* stage: compiles the kernels that the cache lacks, on all cores."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--kernel-cache", type=Path)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--dry-run", action="store_true", help="the tests' kernels, into a folder that is thrown away")
    arguments = parser.parse_args()
    deadline = time.monotonic() + max(1.0, arguments.seconds - 3)
    try:
        if arguments.dry_run:
            with tempfile.TemporaryDirectory() as folder:
                text = precompile(test_specs(90), Path(folder), installed_compiler, 1, deadline)
        else:
            text = _compile_for_this_gpu(arguments.kernel_cache, arguments.processes, deadline)
    except (Exception, SystemExit) as error:
        text = f"nothing was compiled ahead: {one_line(error)}"
    print(text)
    append(arguments.results, stage="compile", item=None, event="note", text=text)


if __name__ == "__main__":
    sys.exit(main())
