"""The ``exl`` command, a module for each of its commands, and what only a terminal needs.

Each imports what it runs inside of its function, so that ``exl --help`` is quick. Begin with ``common.py``.
"""
