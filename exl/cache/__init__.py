"""The KV cache: one slab, and who uses which of its pages.

Imports layout and memory. Begin with ``kv.py``.
"""
