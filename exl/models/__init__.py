"""One decoder for all model families, and which checkpoint tensors it needs.

Imports up to ops. Begin with ``decoder.py``; a family is a row in ``registry.py``.
"""
