"""VLDuet: one vision-language model that both generates text and embeds images and texts.

The public Python API. Names are imported on first use, so that ``import vlduet`` is fast:

    model = vlduet.DuetModel.from_pretrained("models/nano")
    index = vlduet.Index.open("my-index", model)
    hits = vlduet.search(index, model, "a red car", k=5)
    pieces = model.interleave([vlduet.Message("user", ("Tell a story.",))], index)
    answer = vlduet.ask(index, model, "Which animal can fly?")
    names = vlduet.classify(model, images, ["a cat", "a dog"]).predicted_labels

`train_model` runs a `RunConfig` (it is not called ``train``, because that is the sub-package).
Losses for other training loops are in `vlduet.objectives`. Errors that users can cause are
`VLDuetError`s.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlduet.config import RunConfig
    from vlduet.data.records import ImageRef, Message, Record
    from vlduet.errors import VLDuetError
    from vlduet.eval.classification import Classification, classify
    from vlduet.model.duet import DuetModel
    from vlduet.model.generation.interleave import ImageOptions, RetrievedImage, TextDelta
    from vlduet.retrieval.index import Index
    from vlduet.retrieval.rag import Answer, ask
    from vlduet.retrieval.search import search
    from vlduet.train.loop import train as train_model

__version__ = "0.2.0"

_SOURCE_BY_NAME = {
    "Answer": "vlduet.retrieval.rag:Answer",
    "Classification": "vlduet.eval.classification:Classification",
    "DuetModel": "vlduet.model.duet:DuetModel",
    "ImageOptions": "vlduet.model.generation.interleave:ImageOptions",
    "ImageRef": "vlduet.data.records:ImageRef",
    "Index": "vlduet.retrieval.index:Index",
    "Message": "vlduet.data.records:Message",
    "Record": "vlduet.data.records:Record",
    "RetrievedImage": "vlduet.model.generation.interleave:RetrievedImage",
    "RunConfig": "vlduet.config:RunConfig",
    "TextDelta": "vlduet.model.generation.interleave:TextDelta",
    "VLDuetError": "vlduet.errors:VLDuetError",
    "ask": "vlduet.retrieval.rag:ask",
    "classify": "vlduet.eval.classification:classify",
    "search": "vlduet.retrieval.search:search",
    "train_model": "vlduet.train.loop:train",
}
"""Module and object of each public name."""

__all__ = [
    "Answer",
    "Classification",
    "DuetModel",
    "ImageOptions",
    "ImageRef",
    "Index",
    "Message",
    "Record",
    "RetrievedImage",
    "RunConfig",
    "TextDelta",
    "VLDuetError",
    "__version__",
    "ask",
    "classify",
    "search",
    "train_model",
]


def __getattr__(name: str) -> Any:
    """Return the object of a public name, or the sub-package ``objectives``; import its module.

    Raises AttributeError for any other name, and whatever the import raises.
    """
    if name == "objectives":
        return import_module("vlduet.objectives")
    if name not in _SOURCE_BY_NAME:
        raise AttributeError(f"module 'vlduet' has no attribute '{name}'")
    module, _, attribute = _SOURCE_BY_NAME[name].partition(":")
    return getattr(import_module(module), attribute)
