"""What stands on disk or at the hub: headers as hostile input, indices, configuration, bytes in blocks.

Imports the root's words alone, never torch. Begin with ``checkpoint.py``; ``header.py`` is what it trusts in.
"""
