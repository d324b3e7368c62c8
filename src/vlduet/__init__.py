"""VLDuet: one vision-language model that generates and embeds, and so retrieves for its own generation."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlduet.data.records import ImageRef, Message, Record
    from vlduet.errors import VLDuetError
    from vlduet.model.duet import DuetModel
    from vlduet.retrieval.index import Index
    from vlduet.retrieval.rag import Answer, ask
    from vlduet.retrieval.search import search

__version__ = "0.1.0"

_HOMES = {
    "Answer": "vlduet.retrieval.rag",
    "DuetModel": "vlduet.model.duet",
    "ImageRef": "vlduet.data.records",
    "Index": "vlduet.retrieval.index",
    "Message": "vlduet.data.records",
    "Record": "vlduet.data.records",
    "VLDuetError": "vlduet.errors",
    "ask": "vlduet.retrieval.rag",
    "search": "vlduet.retrieval.search",
}

__all__ = [
    "Answer",
    "DuetModel",
    "ImageRef",
    "Index",
    "Message",
    "Record",
    "VLDuetError",
    "__version__",
    "ask",
    "search",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import vlduet` and `vlduet --help` do not load torch.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vlduet' has no attribute '{name}'")
