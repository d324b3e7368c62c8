"""Queries that join a picture with words about another thing, made of pairs: what a search with both is trained on.

    pair 1  (image 1, "a dog")        query [image 1, "a hat"]      positive  "a dog", image 1, "a hat", image 2
    pair 2  (image 2, "a hat")   ->

What either half stands for is a right answer in both forms: in the other one, which is what there is to learn, and as it
stands, because a batch that holds its own pair would else tell the model that it is wrong.
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
    """Retrieval records whose query is the image of one pair and a short caption of another.

    Args:
        pairs: images with short captions.
        times: how often each image asks, with another pair's words each time, and how often each pair lends its own. Pairs
            that have an image or a caption in common are not joined, nor two of them twice, so there may be fewer.
        seed: decides who is joined, and which of several captions is used.

    Returns:
        At most ``times * len(pairs)`` records, named by both pairs.

    Raises:
        DataError, ImageError: as `contents` does.
    """
    draw = random.Random(seed)
    things = [collect_content_keys(record) for record in pairs]
    found: dict[tuple[int, int], Record] = {}
    for _ in range(queries_per_image):
        others = draw.sample(range(len(pairs)), len(pairs))
        for one, other in enumerate(others):
            if (one, other) not in found and not things[one] & things[other]:
                found[one, other] = _joined(pairs[one], pairs[other], draw)
    return list(found.values())


def collect_content_keys(record: Record) -> set[str]:
    """The keys of a pair's image and short captions.

    Raises:
        DataError: no image with a short caption. ImageError: the image cannot be read.
    """
    if record.image is None or not record.short:
        fix = (
            "Give pairs; vlduet caption MODEL FILE --to OUT.jsonl writes captions that are missing"
        )
        raise DataError("no image with a short caption", place=record.place, fix=fix)
    return {content_key((record.image,)), *(content_key((caption,)) for caption in record.short)}


def _joined(one: Record, other: Record, draw: random.Random) -> Record:
    assert one.image is not None and other.image is not None
    seen, said = draw.choice(one.short), draw.choice(other.short)
    return Record(
        f"{one.id}+{other.id}",
        query=(one.image, said),
        positive=((seen,), (one.image,), (said,), (other.image,)),
        metadata={"mixed": [one.id, other.id]},
    )
