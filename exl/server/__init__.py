"""HTTP in front of the engine: OpenAI's, Anthropic's, TGI's and llama-server's protocols, several models, metrics.

``generation.py`` is the one way from a request to the engine; each protocol is a module that turns its clients' JSON
into that and back, and knows nothing of the engine. Needs the extra ``server``. Begin with ``app.py``.
"""
