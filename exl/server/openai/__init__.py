"""OpenAI's protocol: a module for each route. Begin with ``fields.py``, then ``chat.py``."""
