"""Memory itself: of the host, of a device, and of the host as a device can reach it.

Imports the root's words and torch. Begin with ``host.py``.
"""
