"""The KV cache: one slab of pages, and which sequence holds which page.

Imports layout and memory. Begin with ``kv.py``.
"""
