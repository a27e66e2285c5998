"""A layer is in its place when its turn comes: packed files, streams from RAM and disk, the loader.

Imports up to planning. Begin with ``loader.py``; ``stream.py`` is what the engine sees of it.
"""
