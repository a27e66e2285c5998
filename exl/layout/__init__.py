"""Where every byte lies, as pure functions of shapes: layers, tiles, pages, the buffers of a step. No data, no device.

Imports the root's words alone, never torch. Begin with ``layers.py``, then ``tiles.py`` for how a GPU holds weights.
"""
