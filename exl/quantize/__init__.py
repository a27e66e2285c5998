"""Dense models -> GPTQ files, layer by layer, in little memory.

Imports up to models. Begin with ``run.py``; ``gptq.py`` is the solver.
"""
