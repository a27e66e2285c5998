"""Quantizes dense models to GPTQ checkpoints, layer by layer, in little memory.

Imports up to models. Begin with ``run.py``; ``gptq.py`` is the solver.
"""
