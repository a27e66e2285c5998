"""Kernels for the CPU, built as LLVM IR and compiled when they are first needed: no compiler on the user's machine.

Begin with ``ir`` (what a kernel is written in), then ``kernel`` (what a kernel is), ``library`` (compiled and kept on
disk) and ``pool`` (threads that run a list of stages in one call). The other modules are kernels.
"""
