"""Kernels for the CPU, built as LLVM IR and compiled when they are first needed: no compiler on the user's machine.

Begin with ``kernel.py`` (what a kernel is), then ``ir.py`` (what it is
written in), ``library.py`` (compiled and kept on disk) and ``pool.py`` (threads that run a list of stages in one call).
"""
