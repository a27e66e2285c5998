"""The kernels compile for ARM with NEON and dot products. No such machine was at hand: there they are not used."""

from __future__ import annotations

import platform

import pytest

from exl.cpu_kernels import processor
from exl.cpu_kernels.append_kv import AppendKV
from exl.cpu_kernels.attention import DecodeAttention, PrefillAttention
from exl.cpu_kernels.dense import dense_kernel
from exl.cpu_kernels.embed import Embed
from exl.cpu_kernels.gated_mlp import GatedProduct
from exl.cpu_kernels.kernel import build_module
from exl.cpu_kernels.library import compile_object
from exl.cpu_kernels.linear import linear
from exl.cpu_kernels.linear_f32 import linear_f32
from exl.cpu_kernels.merge import MergeAttention
from exl.cpu_kernels.norm import RmsNorm
from exl.cpu_kernels.pool_kernels import Invoke, RunStages
from exl.cpu_kernels.quantize import QuantizeRows, form_of
from exl.cpu_kernels.rope_tables import RopeTables
from exl.layout.columns import ColumnLayout

ARM_ELF = b"\x7fELF"
MACHO = b"\xcf\xfa\xed\xfe"


def test_all_kernels_of_a_model_compile():
    layout = ColumnLayout(4, 256, 64, 128)
    specs = [linear(layout, parts, kind) for parts in (1, 2) for kind in ("row", "rows", "panel")]
    specs += [linear_f32(layout, kind) for kind in ("row", "rows", "panel")]
    specs += [dense_kernel("bf16", num_rows, "neon") for num_rows in (1, 12)]
    specs += [kernel("q8", 64) for kernel in (DecodeAttention, PrefillAttention, MergeAttention)]
    specs += [AppendKV("q8", 64, 32), RmsNorm(), Embed("f16"), GatedProduct("silu"), RopeTables()]
    specs += [QuantizeRows(form_of(layout, 2), False), Invoke(), RunStages()]
    code = compile_object(build_module(specs, "neon"), "neon")
    assert code.startswith((ARM_ELF, MACHO))


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "riscv64"])
def test_other_machines_than_x86_have_no_kernels_yet(monkeypatch, machine):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    processor.usable_isas.cache_clear()
    try:
        assert processor.usable_isas() == ()
    finally:
        monkeypatch.undo()
        processor.usable_isas.cache_clear()
