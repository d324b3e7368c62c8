"""Adapter of a model to mteb: ``mteb.evaluate(MTEBEncoder(folder), tasks=[...])``.

mteb gives every item at most one image and one text, so tasks on interleaved sequences cannot be
expressed there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vlduet.data.images import encode_png
from vlduet.data.records import ImageRef, Part, Parts
from vlduet.errors import MissingExtraError
from vlduet.model.duet import DuetModel
from vlduet.model.limits import log_truncation

try:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta
except ImportError as error:
    raise MissingExtraError("mteb is not installed", fix="pip install 'vlduet[mteb]'") from error

MAX_ITEMS_IN_MEMORY = 1024
"""Number of items that are embedded at once."""
PNG_MODES = ("RGB", "RGBA", "L", "LA", "P", "1")
"""Image modes that PNG can store; others are converted to RGB."""


class MTEBEncoder(AbsEncoder):  # type: ignore[misc]
    """Encoder as mteb calls it.

    Args:
        model: an open model, or its folder.

    Raises:
        ModelError: the folder has no model that can be opened.
    """

    def __init__(self, model: DuetModel | Path | str):
        self.model = model if isinstance(model, DuetModel) else DuetModel.from_pretrained(model)
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": f"vlduet/{self.model.backbone.folder.name}",
                "revision": self.model.fingerprint,
                "embed_dim": self.model.dim,
                "modalities": ["image", "text"],
                "framework": ["PyTorch"],
            }
        )

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
        """Return the embeddings of every item of every batch in order, float32[N, E], unit length.

        The model's own prompts are used, and batches are formed by length; the other arguments of
        mteb are not used. Without items the result has no rows.

        Args:
            inputs: batches with the keys ``text`` and ``image``, or one of them. The image of an
                item comes before its text; an image that is None and an empty text are left out.
            prompt_type: mteb's query or document, which selects the prompt.

        Raises:
            DataError: an item has neither an image nor a text.
        """
        is_query = getattr(prompt_type, "value", prompt_type) == "query"
        items: list[Parts] = []
        blocks: list[np.ndarray] = []
        for batch in inputs:
            keys = [key for key in ("image", "text") if key in batch]
            for values in zip(*(batch[key] for key in keys), strict=True):
                parts = [_to_part(v) for v in values if v is not None and v != ""]
                # A blank text, which `encode` refuses, so that the error names the item.
                items.append(tuple(parts) or (" ",))
            if len(items) >= MAX_ITEMS_IN_MEMORY:
                blocks.append(self._encode(items, is_query=is_query))
                items = []
        if items or not blocks:
            blocks.append(self._encode(items, is_query=is_query))
        return np.concatenate(blocks)

    def _encode(self, items: list[Parts], *, is_query: bool) -> np.ndarray:
        """Return the embeddings of items, whose texts are cut as in every measurement of MTEB.

        The number of texts that were cut is logged.
        """
        with log_truncation("MTEB") as on_truncate:
            return self.model.encode(items, is_query=is_query, on_truncate=on_truncate)


def _to_part(value: Any) -> Part:
    """Return a text as it is, and a decoded image as PNG bytes, which `data.images` checks."""
    if isinstance(value, str):
        return value
    image = value if value.mode in PNG_MODES else value.convert("RGB")
    return ImageRef(data=encode_png(image))
