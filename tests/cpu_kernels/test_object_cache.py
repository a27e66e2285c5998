"""Compiled code is kept, and trusted only where nobody else could have put it."""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from exl.cpu_kernels import library as library_module
from exl.cpu_kernels import object_cache, processor
from exl.cpu_kernels.dense import dense_kernel
from exl.cpu_kernels.kernel import build_module
from exl.cpu_kernels.library import Library, slots
from exl.cpu_kernels.linear import linear
from exl.cpu_kernels.object_cache import cached_object
from exl.errors import KernelError
from exl.layout.columns import ColumnLayout
from tests.command_line import without_compiling
from tests.cpu_kernels.test_pool import Half

needs_kernels = pytest.mark.skipif(not processor.usable_isas(), reason="no kernels for this processor")


def test_code_is_compiled_once(tmp_path):
    made = []

    def compile_():
        made.append(1)
        return b"code"

    folder = tmp_path / "cache"
    assert [cached_object("a.o", compile_, folder) for _ in range(3)] == [b"code"] * 3
    assert len(made) == 1
    if os.name == "posix":
        assert folder.stat().st_mode & 0o777 == 0o700


@needs_kernels
def test_compiling_that_takes_its_time_is_told_in_one_line(tmp_path, caplog, monkeypatch):
    told = []
    for folder, untold_seconds in (("other", 1000.0), ("cache", 0.0), ("cache", 0.0)):
        monkeypatch.setattr(library_module, "_TOLD_SECONDS", untold_seconds)
        Library(folder=tmp_path / folder)
        told.append("".join(f"{record.getMessage()}\n" for record in caplog.records))
        caplog.clear()
    assert (told[0], told[1].count("\n"), told[2]) == ("", 1, "")  # the last one found it compiled
    assert told[1].startswith("compiled kernels for this processor in ")
    assert without_compiling(f"exl: a line\n{told[1]}another\n") == "exl: a line\nanother\n"


@pytest.mark.parametrize("damage", [b"", b"exl", b"exlobj01" + bytes(32) + b"other code"])
def test_damaged_code_is_compiled_again(tmp_path, caplog, damage):
    folder = tmp_path / "cache"
    cached_object("a.o", lambda: b"code", folder)
    (folder / "a.o").write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert cached_object("a.o", lambda: b"code", folder) == b"code"
    assert "a.o is damaged, compiling again" in caplog.text
    assert cached_object("a.o", lambda: b"never", folder) == b"code"  # it was mended


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_folder_that_others_can_write_to_is_not_used(tmp_path, caplog):
    folder = tmp_path / "cache"
    cached_object("a.o", lambda: b"code", folder)
    folder.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert cached_object("a.o", lambda: b"fresh", folder) == b"fresh"
    assert "nobody else can write to" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="owners are POSIX's")
@pytest.mark.parametrize("what", ["folder", "file"])
def test_another_users_code_is_not_run(tmp_path, monkeypatch, what):
    folder = tmp_path / "cache"
    cached_object("a.o", lambda: b"code", folder)
    real, mine = os.getuid(), os.getuid()
    owners = iter([mine, mine + 1] if what == "file" else [mine + 1] * 2)
    monkeypatch.setattr(object_cache.os, "getuid", lambda: next(owners, real))
    assert cached_object("a.o", lambda: b"fresh", folder) == b"fresh"


def test_a_link_in_the_folders_place_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    assert cached_object("a.o", lambda: b"code", tmp_path / "cache") == b"code"
    assert not list((tmp_path / "elsewhere").iterdir())


def test_no_folder_at_all(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert cached_object("a.o", lambda: b"code", tmp_path / "file" / "cache") == b"code"


@needs_kernels
def test_kernels_work_where_nothing_can_be_kept(tmp_path):
    (tmp_path / "file").write_text("in the way")
    x, out = np.array([3.0], np.float32), np.zeros(1, np.float32)
    Library(folder=tmp_path / "file" / "cache").call(Half(), slots(x, out))
    assert out[0] == 1.5


@needs_kernels
def test_kept_code_is_loaded_without_building_it(tmp_path, monkeypatch):
    Library(folder=tmp_path / "cache").address(Half())
    monkeypatch.setattr(library_module, "build_module", lambda *args: pytest.fail("built again"))
    x, out = np.array([3.0], np.float32), np.zeros(1, np.float32)
    Library(folder=tmp_path / "cache").call(Half(), slots(x, out))
    assert out[0] == 1.5


@needs_kernels
def test_code_stays_as_long_as_addresses_into_it_also_after_an_interrupt(tmp_path, monkeypatch):
    class Engine:
        addresses = iter((4096,))

        def get_function_address(self, name):
            for address in self.addresses:
                return address
            raise KeyboardInterrupt

    library, engine = Library(folder=tmp_path / "cache"), Engine()
    monkeypatch.setattr(library, "_engine", lambda data: engine)
    with pytest.raises(KeyboardInterrupt):
        library.load((Half(), dense_kernel("f32", 1, library.isa)))
    assert 4096 in library._addresses.values()
    assert engine in library._engines
    library._addresses.clear()


@needs_kernels
def test_names_depend_on_all_that_code_depends_on(monkeypatch):
    isa = processor.usable_isas()[0]
    names = {object_cache.object_name((Half(),), isa), object_cache.object_name((Half(),), "other")}
    monkeypatch.setattr(object_cache.llvm, "llvm_version_info", (1, 2, 3))
    names.add(object_cache.object_name((Half(),), isa))
    monkeypatch.setattr(object_cache, "_sources", lambda: b"other sources")
    names.add(object_cache.object_name((Half(),), isa))
    assert len(names) == 4


def test_all_that_kernels_take_constants_from_is_in_the_digest():
    """Modules outside of their own package, but those that no code depends on."""
    folder = Path(object_cache.__file__).parent
    found = {
        node.module
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("exl.")
    }
    elsewhere = {name for name in found if not name.startswith("exl.cpu_kernels")}
    assert elsewhere - {"exl.errors", "exl.code_file", "exl.user_cache"} == {
        "exl." + name.removesuffix(".py").replace("/", ".") for name in object_cache.OUTSIDE
    }


def test_an_unknown_processor_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(library_module, "usable_isas", lambda: ())
    with pytest.raises(KernelError, match="expected x86-64 with AVX2, FMA and F16C"):
        Library()


@needs_kernels
def test_an_instruction_set_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(KernelError, match=r"isa: found 'neon', this processor has avx"):
        Library("neon", tmp_path)


REFUSED = """
import ctypes, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN
    sys.exit(77)
from exl.cpu_kernels.library import Library
from exl.errors import KernelError
try:
    Library()
except KernelError as error:
    print(error)
"""


@needs_kernels
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux to forbid it")
def test_a_system_that_forbids_it_is_asked_before_llvm_finds_out(tmp_path):
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip("this kernel cannot forbid executable memory (before Linux 6.3)")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("the system forbids code that is made at run time (")


@needs_kernels
def test_where_the_system_forbids_code_made_at_run_time(tmp_path, monkeypatch):
    def refuse(*args):
        raise RuntimeError("Unable to allocate section memory!")

    monkeypatch.setattr(library_module.llvm, "create_mcjit_compiler", refuse)
    with pytest.raises(KernelError, match="cannot be loaded: Unable to allocate section memory"):
        Library(folder=tmp_path)


def test_features_and_sets_fit_this_machine():
    """The list is the one that the kernel of the operating system tells."""
    if not sys.platform.startswith("linux") or not processor.usable_isas():
        pytest.skip("reads Linux's list of an x86 processor's features")
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    for isa in processor.usable_isas():
        assert {name.replace("avx512vnni", "avx512_vnni").replace("avxvnni", "avx_vnni").replace("bmi", "bmi1")
                .replace("bmi12", "bmi2") for name in processor.ISAS[isa]} <= set(flags)  # fmt: skip


@needs_kernels
def test_code_calls_nothing_outside_but_the_systems_yield():
    """A loader would have to find it, and a library's own memset is chosen by the processor."""
    layout = ColumnLayout(4, 256, 64, 128)
    isa = processor.usable_isas()[0]
    specs = [linear(layout, 2, kind) for kind in ("row", "rows", "panel")]
    specs += [dense_kernel("f16", num_rows, isa) for num_rows in (1, 12)]
    code = library_module.compile_object(build_module(specs, isa), isa)
    assert [name for name in (b"memset", b"memcpy", b"memmove", b"expf", b"fma") if name in code] == []
