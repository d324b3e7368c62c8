"""Composed queries: an image of one pair with a caption of another, to train such searches on.

    pair 1  (image 1, "a dog")        query [image 1, "a hat"]      positive  "a dog", image 1,
    pair 2  (image 2, "a hat")   ->                                           "a hat", image 2

Each half of the query has two positives: its counterpart in the other modality, which is what the
model is to learn, and the half itself, because in a batch that also holds its own pair the half
would otherwise count as a wrong answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from vlduet.data.content_keys import content_key
from vlduet.data.records import Record
from vlduet.errors import DataError


def compose_queries(
    pairs: Sequence[Record], *, queries_per_image: int = 1, seed: int = 0
) -> list[Record]:
    """Return retrieval records whose query is the image of one pair and a caption of another.

    Args:
        pairs: images with short captions.
        queries_per_image: number of queries with each image, each with another pair's caption;
            every pair also lends its caption this often.
        seed: seed of the random choice of pairs, and of one of several captions.

    Returns:
        At most ``queries_per_image * len(pairs)`` records, with the id ``ID1+ID2`` and both ids in
        ``metadata["mixed"]``. Fewer, because an ordered couple of pairs occurs only once, and never
        if both have an image or a caption in common; so [] for a single pair.

    Raises:
        DataError, ImageError: as `collect_content_keys`.
    """
    rng = random.Random(seed)
    keys = [collect_content_keys(record) for record in pairs]
    queries: dict[tuple[int, int], Record] = {}
    for _ in range(queries_per_image):
        partners = rng.sample(range(len(pairs)), len(pairs))
        for i, j in enumerate(partners):
            if (i, j) not in queries and not keys[i] & keys[j]:
                queries[i, j] = _compose(pairs[i], pairs[j], rng)
    return list(queries.values())


def collect_content_keys(record: Record) -> set[str]:
    """Return the content keys of a pair's image and of its short captions.

    Raises:
        DataError: the record has no image or no short caption.
        ImageError: the image cannot be read.
    """
    if record.image is None or not record.short:
        fix = (
            "Give pairs; vlduet caption MODEL FILE --to OUT.jsonl writes captions that are missing"
        )
        raise DataError("no image with a short caption", place=record.place, fix=fix)
    return {content_key((record.image,)), *(content_key((caption,)) for caption in record.short)}


def _compose(image_pair: Record, text_pair: Record, rng: random.Random) -> Record:
    assert image_pair.image is not None and text_pair.image is not None
    image_caption = rng.choice(image_pair.short)
    text = rng.choice(text_pair.short)
    return Record(
        f"{image_pair.id}+{text_pair.id}",
        query=(image_pair.image, text),
        positive=((image_caption,), (image_pair.image,), (text,), (text_pair.image,)),
        metadata={"mixed": [image_pair.id, text_pair.id]},
    )
