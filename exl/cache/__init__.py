"""The KV cache: one slab of pages, which sequence holds which page, and what becomes of pages that nobody holds: found
again by their tokens, kept in RAM, written to a file.

Imports layout and memory; of checkpoint only how a value is shown in an error. Begin with ``kv.py``.
"""
