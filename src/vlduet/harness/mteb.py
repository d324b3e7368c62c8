"""A model as an encoder of mteb: `mteb.evaluate(MTEBEncoder(folder), tasks=[...])`.

mteb gives one image and one text an item, so tasks on interleaved sequences cannot be expressed there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vlduet.data import images
from vlduet.data.records import ImageRef, Part, Parts
from vlduet.errors import MissingExtraError
from vlduet.model.duet import DuetModel

try:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta
except ImportError as error:
    raise MissingExtraError("mteb is not installed", fix="pip install 'vlduet[mteb]'") from error

MAX_ITEMS_IN_MEMORY = 1024
"""Items that are in memory at a time."""
PNG_MODES = ("RGB", "RGBA", "L", "LA", "P", "1")
"""Modes of images that PNG keeps."""


class MTEBEncoder(AbsEncoder):  # type: ignore[misc]
    """The encoder that mteb calls.

    Args:
        model: an open model, or its folder.
    """

    def __init__(self, model: DuetModel | Path | str):
        self.model = model if isinstance(model, DuetModel) else DuetModel.from_pretrained(model)
        facts = {
            "name": f"vlduet/{self.model.backbone.folder.name}",
            "revision": self.model.fingerprint,
            "embed_dim": self.model.dim,
            "modalities": ["image", "text"],
            "framework": ["PyTorch"],
        }
        self.mteb_model_meta = ModelMeta.create_empty(overwrites=facts)

    def encode(
        self,
        inputs: Iterable[dict[str, list[Any]]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
    ) -> np.ndarray:
        """Vectors float32[N, E] of every item of every batch; our own prompts, batched by length.

        A batch has the keys `text` and `image`, or one of them; mteb's own prompts, its batch size and its progress bar
        are not used.
        """
        asking = getattr(prompt_type, "value", prompt_type) == "query"
        items: list[Parts] = []
        found: list[np.ndarray] = []
        for batch in inputs:
            keys = [key for key in ("image", "text") if key in batch]
            for row in zip(*(batch[key] for key in keys), strict=True):
                parts = [_part(value) for value in row if value is not None and value != ""]
                items.append(tuple(parts) or (" ",))
            if len(items) >= MAX_ITEMS_IN_MEMORY:
                found.append(self.model.encode(items, is_query=asking))
                items = []
        if items or not found:
            found.append(self.model.encode(items, is_query=asking))
        return np.concatenate(found)


def _part(value: Any) -> Part:
    """A text, or an image that mteb has decoded, as bytes that our own image path reads."""
    if isinstance(value, str):
        return value
    picture = value if value.mode in PNG_MODES else value.convert("RGB")
    return ImageRef(data=images.encode_png(picture))
