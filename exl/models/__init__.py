"""One decoder for all families, and which tensors of a checkpoint it takes.

Imports up to ops. Begin with ``decoder.py``; a family is a row in ``registry.py``.
"""
