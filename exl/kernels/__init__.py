"""CUDA kernels: sources in ``cuda/``, one wrapper module here for each.

A wrapper checks its arguments, picks a configuration by a pure function and launches. Imports layout and formats, and
CuPy in one file alone. Begin with ``launch.py``; ``linear.py`` is the largest wrapper.
"""
