"""Reads model folders on disk or at the hub: safetensors headers as untrusted input, indices, configuration, bytes.

Imports only modules at the root of exl, never torch. Begin with ``checkpoint.py``; ``header.py`` validates its input.
"""
