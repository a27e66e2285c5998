"""What a model computes, layer by layer, and which tensors it is made of: from its ``config.json`` alone.

Knows no tensors' bytes, no device and no torch. Begin with ``specs.py``, the vocabulary in which a family is described;
``llama.py`` is the plainest family, ``config.py`` finds the family of a file and reads what all share.
"""
