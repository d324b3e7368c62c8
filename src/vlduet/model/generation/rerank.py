"""Which of several texts becomes an image's caption: the half that discriminates helps the half that writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np


def select_nearest_drafts(
    drafts: Sequence[Sequence[str]],
    *,
    embed_images: Callable[[], np.ndarray],
    embed_texts: Callable[[list[str]], np.ndarray],
    known: Mapping[str, np.ndarray],
) -> list[str]:
    """For every image the nearest of its drafts, or of the known texts if one is nearer still; of equals the first.

    Args:
        written: the drafts of N images. An empty one is nothing to choose, and is kept only where there is nothing else.
        images: makes their unit vectors, float[N, D]. Not asked where there is nothing to choose, and nor is `embed`.
        embed: distinct texts -> float[texts, D].
        known: unit vectors of the known texts.
    """
    texts = list(dict.fromkeys(text for some in drafts for text in some if text))
    if not drafts or not (known or (texts and any(len(some) > 1 for some in drafts))):
        return [some[0] for some in drafts]
    vectors = dict(zip(texts, embed_texts(texts), strict=True)) if texts else {}
    names, bank = list(known), np.stack(list(known.values())) if known else None
    found = []
    for image, some in zip(embed_images(), drafts, strict=True):
        scores = {text: float(vectors[text] @ image) for text in some if text}
        if bank is not None:
            cosines = bank @ image
            scores.setdefault(names[int(cosines.argmax())], float(cosines.max()))
        found.append(max(scores, key=scores.__getitem__, default=some[0]))
    return found
