"""Compiled once, kept on disk by digest. Knows no GPU and no CuPy: ``launch.py`` brings the compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from exl.code_file import read_sealed, sealed, write_file
from exl.errors import KernelError
from exl.kernels.spec import KernelSpec, digest, flattened, nvrtc_options
from exl.user_cache import user_cache_folder

MAGIC = b"exlcode1"
LOG_LINES = 40  # of a compiler's log, in an error's text; the file beside the source holds all


class CompileFailed(Exception):
    """What a ``Compiler`` raises: the compiler's log."""


class Compiler(Protocol):
    """NVRTC, however it is reached."""

    def version(self) -> str:
        """Name and version, part of every digest: ``"nvrtc 12.9"``."""

    def archs(self) -> tuple[int, ...]:
        """Compute capabilities that it can compile for: ``(60, ..., 120)``."""

    def compile(self, text: str, name: str, options: tuple[str, ...]) -> tuple[bytes, str]:
        """Code (cubin, or PTX for a ``compute_`` target) and log. Raises ``CompileFailed``."""


def default_cache_folder() -> Path:
    return user_cache_folder("kernels")


def target_options(spec: KernelSpec, compiler: Compiler) -> tuple[str, ...]:
    """Machine code where the compiler knows the architecture; else PTX for its newest, which the driver translates.

    Raises ``KernelError`` for an architecture older than all that the compiler knows.
    """
    known = compiler.archs()
    if spec.arch in known:
        return nvrtc_options(spec)
    older = [arch for arch in known if arch < spec.arch]
    if not older:
        raise KernelError(
            f"{compiler.version()} cannot compile for compute capability {spec.arch / 10}: it knows {known}; "
            "CUDA 12 is the last that knows 6.x and 7.0"
        )
    return nvrtc_options(KernelSpec(spec.source, spec.entry, spec.macros, max(older)), real=False)


def compile_cached(
    spec: KernelSpec, compiler: Compiler, folder: Path | None = None, sources: Path | None = None
) -> bytes:
    """Code of ``spec``, from ``folder`` (default: the user's cache) or compiled and put there.

    Any number of processes may do so at once: a file appears whole or not at all, and one that was damaged later is
    compiled again. A folder that cannot be written costs time, no more. ``sources`` is where the ``.cu`` file lies
    (default: exl's own kernels). Raises ``KernelError`` with the compiler's log
    and the path of the flat source if the kernel does not compile.
    """
    folder = default_cache_folder() if folder is None else folder
    text = flattened(spec, sources)
    options = target_options(spec, compiler)
    key = digest(text, options, compiler.version())
    path = folder / f"{spec.entry}-{key}.bin"
    code = read_entry(path)
    if code is not None:
        return code
    try:
        code, _ = compiler.compile(text, spec.source, options)
    except CompileFailed as error:
        raise KernelError(_failure(spec, str(error), text, folder / f"{spec.entry}-{key}")) from error
    write_file(path, sealed(MAGIC, code))
    return code


def read_entry(path: Path) -> bytes | None:
    """The code in a cache file, or None if there is none that can be trusted."""
    return read_sealed(path, MAGIC)


def _failure(spec: KernelSpec, log: str, text: str, stem: Path) -> str:
    source, full_log = stem.with_suffix(".cu"), stem.with_suffix(".log")
    kept = write_file(source, text.encode()) and write_file(full_log, log.encode())
    lines = log.strip().splitlines()
    shown = "\n".join(lines[:LOG_LINES])
    more = f"\n... {len(lines) - LOG_LINES} more lines" if len(lines) > LOG_LINES else ""
    where = f"flattened source: {source}" if kept else f"the flattened source could not be written to {source}"
    return f"kernel {spec} does not compile; {where}\n{shown}{more}"
