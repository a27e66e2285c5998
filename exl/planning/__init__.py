"""Every byte before it is spent: from a checkpoint's headers to a plan, in tables and pictures. Never torch.

Imports checkpoint, layout and the manifest of models. Begin with ``plan.py``; ``from_headers.py`` is what makes one,
``ask.py`` is ``exl.plan``.
"""
