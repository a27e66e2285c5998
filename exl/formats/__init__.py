"""A tensor's bytes on disk -> one meaning: what comes after knows ``QuantizedMatrix`` and ``DenseMatrix`` alone.

Imports checkpoint and layout, never torch. Begin with ``matrix.py``, the meaning; ``load.py`` picks the format.
"""
