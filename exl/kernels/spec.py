"""What a kernel is before it is compiled: one flat source, its macros, its target, and a digest of all three.

Imports neither torch nor CuPy, so that plans, tests and CI can name every kernel without a GPU.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from exl.errors import KernelError

PACKAGE = Path(__file__).resolve().parents[1]
INCLUDE = re.compile(r"^\s*#\s*include\s*[<\"](exl/[^>\"]+)[>\"]\s*(?://.*)?$")
CONDITION_OPENS = re.compile(r"^\s*#\s*if")
CONDITION_CLOSES = re.compile(r"^\s*#\s*endif")
PRAGMA_ONCE = re.compile(r"^\s*#\s*pragma\s+once\b")
MACRO_NAME = re.compile(r"EXL_[A-Z0-9_]+")
MACRO_TEXT = re.compile(r"[A-Za-z0-9_]+")
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# One list for users and for CI. What is left out matters as much: no fast math and no flushing of subnormals (both
# break exactness), and no implicit fusing of a multiplication with an addition: the compiler would fuse differently in
# variants of one kernel, and a row's bits would depend on its batch. A kernel that wants an fma writes fmaf.
NVRTC_OPTIONS = ("--std=c++17", "--device-as-default-execution-space", "--fmad=false", "--dopt=on")


@dataclass(frozen=True)
class KernelSpec:
    """One kernel to compile: ``entry`` of ``source`` under ``macros`` for ``arch``.

    ``source`` is a file's name in the kernel folder (``"linear_q.cu"``), ``entry`` the ``extern "C"`` name, ``arch``
    the compute capability (86 for 8.6). ``macros`` may be given as a mapping; it is kept as a sorted tuple, so that
    equal specs are equal and hash alike. Raises ``KernelError`` for names and values that no kernel can have.
    """

    source: str
    entry: str
    macros: tuple[tuple[str, int | str], ...] | Mapping[str, int | str]
    arch: int

    def __post_init__(self) -> None:
        pairs = self.macros.items() if isinstance(self.macros, Mapping) else self.macros
        macros = tuple(sorted((name, int(value) if isinstance(value, bool) else value) for name, value in pairs))
        object.__setattr__(self, "macros", macros)
        if not IDENTIFIER.fullmatch(self.entry):
            raise KernelError(f"kernel entry {self.entry!r} is not a C identifier")
        for name, value in macros:
            if not MACRO_NAME.fullmatch(name):
                raise KernelError(f"macro {name!r} of kernel {self.entry}: expected a name like EXL_BITS")
            if not isinstance(value, int) and not (isinstance(value, str) and MACRO_TEXT.fullmatch(value)):
                raise KernelError(f"macro {name} of kernel {self.entry} is {value!r}: expected an integer or a word")
        if len({name for name, _ in macros}) != len(macros):
            raise KernelError(f"kernel {self.entry} names a macro twice: {macros}")

    def __str__(self) -> str:
        macros = " ".join(f"{name}={value}" for name, value in self.macros)
        return f"{self.entry}[{macros}] sm_{self.arch}" if macros else f"{self.entry} sm_{self.arch}"

    def defines(self) -> tuple[str, ...]:
        """``("-DEXL_BITS=4", ...)``: the same for every compiler."""
        return tuple(f"-D{name}={value}" for name, value in self.macros)


@dataclass(frozen=True)
class Variant:
    """A supported macro set, as a wrapper's ``variants(arch)`` lists them: what CI compiles and holds to a budget."""

    spec: KernelSpec
    may_spill: bool = False  # decode kernels keep everything in registers; one slow path may be let off


def kernel_folder() -> Path:
    """Where the ``.cu`` files lie: inside an installed package, else beside it in a checkout."""
    for folder in (PACKAGE / "_cuda", PACKAGE.parent / "cuda"):
        if (folder / "include" / "exl").is_dir():
            return folder
    raise KernelError(f"kernel sources not found: looked in {PACKAGE / '_cuda'} and {PACKAGE.parent / 'cuda'}")


def flatten(source: str, folder: Path | None = None, include: Path | None = None) -> str:
    """``source`` of ``folder`` with every ``#include <exl/...>`` replaced by that header's text, each header once.

    ``#line`` markers keep the compiler's messages at the file and line that a person wrote. Includes of exl's headers
    must stand outside of ``#if``: inside, "once" would depend on the condition. Other includes are left alone. Raises
    ``KernelError`` for a missing file, a cycle of includes or an include inside of a condition.
    """
    folder = kernel_folder() if folder is None else folder
    include = kernel_folder() / "include" if include is None else include
    seen: set[str] = set()

    def expand(name: str, path: Path, stack: tuple[str, ...]) -> list[str]:
        if name in stack:
            raise KernelError(f"cycle of includes: {' -> '.join((*stack, name))}")
        if name in seen:
            return []
        seen.add(name)
        lines = [f'#line 1 "{name}"']
        depth = 0
        for number, line in enumerate(_read(path, name, stack).splitlines(), start=1):
            depth += bool(CONDITION_OPENS.match(line)) - bool(CONDITION_CLOSES.match(line))
            found = INCLUDE.match(line)
            if found is None:
                lines.append("" if PRAGMA_ONCE.match(line) else line)
                continue
            if depth:
                raise KernelError(f"{name}:{number}: {found[1]} is included inside of #if, where it may be skipped")
            lines += expand(found[1], include / found[1], (*stack, name))
            lines.append(f'#line {number + 1} "{name}"')
        return lines

    return "\n".join(expand(source, folder / source, ())) + "\n"


def _read(path: Path, name: str, stack: tuple[str, ...]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        origin = f", included from {stack[-1]}" if stack else ""
        raise KernelError(f"kernel source {name}{origin}, cannot be read: {error}") from error


def flattened(spec: KernelSpec, folder: Path | None = None) -> str:
    """The flat source of ``spec``, read again only when a file has changed. ``folder``: where its ``.cu`` lies."""
    home = kernel_folder()
    folder = home if folder is None else folder
    files = [folder / spec.source, *sorted(home.glob("include/exl/*"))]
    stamp = tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file())
    return _flattened_once(spec.source, folder, home / "include", stamp)


@functools.lru_cache(maxsize=256)
def _flattened_once(source: str, folder: Path, include: Path, stamp: tuple[tuple[str, int, int], ...]) -> str:
    return flatten(source, folder, include)


def nvrtc_options(spec: KernelSpec, real: bool = True) -> tuple[str, ...]:
    """NVRTC's options for ``spec``: machine code for the architecture itself (``real``), or PTX for the driver."""
    return (*NVRTC_OPTIONS, f"--gpu-architecture={'sm' if real else 'compute'}_{spec.arch}", *spec.defines())


def digest(text: str, options: tuple[str, ...], compiler: str) -> str:
    """Names one compilation: every byte of the flat source, every option and the compiler's name and version.

    64 hexadecimal digits. Parts are length-prefixed, so that no two lists of parts read alike.
    """
    h = hashlib.sha256()
    for part in (compiler, text, *options):
        data = part.encode()
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()
