"""The boundary between the decoder and the hardware, and its two backends: torch on the CPU, kernels on a GPU.

Imports up to kernels. Begin with ``base.py``, the boundary; ``torch_ops.py`` and ``cuda_ops.py`` are behind it.
"""
