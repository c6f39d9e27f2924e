"""An OpenAI-compatible server (extra `server`): `engine` takes turns with many conversations, `app` speaks
HTTP.
"""
