"""Server: one process that chats and embeds with one copy of a model, over HTTP as OpenAI does.

The import of this package raises MissingExtraError without the libraries of the extra `serve`.
"""

from importlib.util import find_spec

from vlduet.errors import MissingExtraError

LIBRARIES = ("fastapi", "h11", "prometheus_client", "starlette", "uvicorn")
"""Modules of the extra that this package imports."""

_missing = [name for name in LIBRARIES if find_spec(name) is None]
if _missing:
    _message = f"serving needs {', '.join(_missing)}"
    raise MissingExtraError(_message, fix="pip install 'vlduet[serve]'")
