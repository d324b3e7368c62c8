"""Protocols: how a measurement is taken. They get functions, never models, so anything can be measured.

    retrieval              embed images and captions -> every caption against every image, both directions
    mixed_retrieval        embed an image and another one's caption as one query -> where the things of both are found
    caption_cross_entropy  nats a token of each caption after its own image, and after another one's
    captions               what is generated, beside the references

Every result keeps its values item by item, so that intervals and galleries can be made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlduet.data.content_keys import text_key
from vlduet.data.records import ImageRef, Record
from vlduet.errors import DataError
from vlduet.eval.metrics import (
    Bools,
    Interval,
    Ints,
    bootstrap_interval,
    chance_hit_at_k,
    exact_match,
    first_hit_ranks,
    hit_rates,
    token_f1,
)

Vectors = NDArray[np.float32]

EmbedImage = Callable[[list[ImageRef]], Vectors]
EmbedText = Callable[[list[str]], Vectors]
EmbedComposed = Callable[[list[tuple[ImageRef, str]]], Vectors]
CaptionNLL = Callable[[list[tuple[ImageRef, str]]], Sequence[tuple[float, int]]]
GenerateCaptions = Callable[[list[ImageRef]], Sequence[str]]

QUERIES_PER_BLOCK = 1024
"""Queries whose similarities are computed at a time."""


# ------------------------------------------------------------------ retrieval


@dataclass(frozen=True, slots=True)
class RetrievalDirection:
    """One direction of retrieval over a similarity matrix float32[Q, G]."""

    similarity: Vectors
    relevant: Bools
    ranks: Ints
    """int[Q], rank of the first hit, 1 is best; see `metrics.first_hit_ranks`."""

    @property
    def num_queries(self) -> int:
        """Q"""
        return len(self.relevant)

    @property
    def num_gallery(self) -> int:
        """G"""
        return len(self.relevant[0])

    def hit_rates(self) -> dict[str, float]:
        """``{"hit@1": fraction, "hit@5": ..., "hit@10": ...}``"""
        return hit_rates(self.ranks)

    def hit_values(self, k: int) -> NDArray[np.float64]:
        """float[Q], 1 where the query has a hit among the first k."""
        return (self.ranks <= k).astype(np.float64)

    def hit_interval(self, k: int, seed: int = 0) -> Interval:
        """hit@k with its bootstrap interval over queries."""
        return bootstrap_interval(self.hit_values(k), seed)

    def chance_hit_rates(self) -> dict[str, float]:
        """What a random order scores."""
        return chance_hit_at_k(self.relevant)

    def top_indices(self, query: int, k: int) -> list[int]:
        """The first k gallery items of a query, best first; NaN last, ties in gallery order."""
        scores = np.nan_to_num(self.similarity[query], nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        return [int(i) for i in np.argsort(-scores, kind="stable")[:k]]


@dataclass(frozen=True, slots=True)
class RetrievalResult:
    """Every distinct caption against every image."""

    captions: tuple[str, ...]
    """Distinct by `text_key`, in the form that comes first."""
    ids: tuple[str, ...]
    """Record of each image."""
    text_to_image: RetrievalDirection
    """Queries are the captions, the gallery is the images."""
    image_to_text: RetrievalDirection
    """Queries are the images, the gallery is the captions."""


def measure_retrieval(
    embed_image: EmbedImage, embed_text: EmbedText, *, records: Sequence[Record]
) -> RetrievalResult:
    """Retrieve among held-out records in both directions.

    Args:
        embed_image: images -> float[N, D].
        embed_text: captions -> float[N, D].
        records: pairs with an image and at least one short caption. A caption that several records carry is
            one query with several positives, and one gallery item.

    Raises:
        DataError: a record that is no such pair, or no record.
    """
    pairs = [image_and_captions(record) for record in records]
    if not pairs:
        raise DataError("no records to evaluate on", fix="Give a file with captioned images")
    captions: dict[str, str] = {}
    for _, short in pairs:
        for caption in short:
            captions.setdefault(text_key(caption), caption)
    column = {key: i for i, key in enumerate(captions)}
    relevant = np.zeros((len(captions), len(pairs)), dtype=bool)  # [C, N]
    for image, (_, short) in enumerate(pairs):
        relevant[[column[text_key(caption)] for caption in short], image] = True
    similarity = cosine(
        embed_text(list(captions.values())), embed_image([image for image, _ in pairs])
    )
    assert similarity.shape == relevant.shape, (similarity.shape, relevant.shape)
    directions = [_direction(s, r) for s, r in ((similarity, relevant), (similarity.T, relevant.T))]
    return RetrievalResult(
        tuple(captions.values()), tuple(record.id for record in records), *directions
    )


@dataclass(frozen=True, slots=True)
class ComposedRetrievalResult:
    """Queries of an image and the caption of another thing, one a record, against every image."""

    image_ranks: Ints
    """int[N], rank of the first image with a caption of the query's image (itself among them)."""
    text_ranks: Ints
    """int[N], rank of the first image with the query's caption."""

    def hit_values(self, k: int) -> dict[str, NDArray[np.float64]]:
        """float[N], 1 where the first k have the thing of the query's `image`, that of its `text`, or `both`."""
        image, text = (
            (ranks <= k).astype(np.float64) for ranks in (self.image_ranks, self.text_ranks)
        )
        return {"image": image, "text": text, "both": image * text}


def measure_composed_retrieval(
    embed_image: EmbedImage,
    embed_composed: EmbedComposed,
    records: Sequence[Record],
    *,
    seed: int = 0,
) -> ComposedRetrievalResult:
    """Search with two things at once; which caption an image is joined with, `wrong_images` says.

    Args:
        embed_image: images -> float[N, D].
        embed_mixed: (image, caption) queries -> float[N, D].
        records: pairs with an image and a short caption; the first caption is asked with.

    Raises:
        DataError: as `caption_cross_entropy`.
    """
    pairs = [image_and_captions(record) for record in records]
    images = [image for image, _ in pairs]
    keys = [{text_key(caption) for caption in short} for _, short in pairs]
    same = np.array([[bool(one & other) for other in keys] for one in keys])  # [N, N]
    other = wrong_image_indices([short for _, short in pairs], seed)
    asked = [(image, pairs[j][1][0]) for image, j in zip(images, other, strict=True)]
    similarity = cosine(embed_composed(asked), embed_image(images))
    return ComposedRetrievalResult(
        first_hit_ranks(similarity, same), first_hit_ranks(similarity, same[other])
    )


def cosine(queries: Vectors, documents: Vectors) -> Vectors:
    """Cosine similarities float32[Q, G]; a row of zeros or with NaN gives NaN, which no metric rewards.

    Multiplied in float64 and rounded: equal vectors get equal scores whatever blocks the matrix product is
    cut into.
    """
    documents_64 = unit_rows(documents)
    blocks = [
        (unit_rows(queries[begin : begin + QUERIES_PER_BLOCK]) @ documents_64.T).astype(np.float32)
        for begin in range(0, len(queries), QUERIES_PER_BLOCK)
    ]
    return np.concatenate(blocks)


def unit_rows(vectors: Vectors) -> NDArray[np.float64]:
    """Rows of unit length, float64; a row of zeros becomes NaN, which no metric rewards."""
    rows = np.asarray(vectors, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)  # type: ignore[no-any-return]


def _direction(similarity: Vectors, relevant: Bools) -> RetrievalDirection:
    return RetrievalDirection(similarity, relevant, first_hit_ranks(similarity, relevant))


def image_and_captions(record: Record) -> tuple[ImageRef, tuple[str, ...]]:
    """(image, short captions) of a record that has both; raises DataError for another one."""
    if record.image is None or not record.short:
        fix = "Evaluate on pairs with an image and a short caption"
        raise DataError(
            f"record '{record.id}' has no image or no short caption", place=record.place, fix=fix
        )
    return record.image, record.short


# ------------------------------------------------------------------ captions


@dataclass(frozen=True, slots=True)
class CaptionCrossEntropy:
    """Negative log likelihood of each record's first caption."""

    ids: tuple[str, ...]
    total_nats_right_image: NDArray[np.float64]
    """nats[N], after the record's own image."""
    total_nats_wrong_image: NDArray[np.float64]
    """nats[N], the same caption after the image of another record with other captions."""
    num_tokens: NDArray[np.float64]
    """[N], predicted tokens of the caption."""

    def nats_right_image(self, seed: int = 0) -> Interval:
        """Nats a token with the right image."""
        return bootstrap_interval(
            self.total_nats_right_image / self.num_tokens, seed, weights=self.num_tokens
        )

    def nats_wrong_image(self, seed: int = 0) -> Interval:
        """Nats a token with a wrong image."""
        return bootstrap_interval(
            self.total_nats_wrong_image / self.num_tokens, seed, weights=self.num_tokens
        )

    def nats_gap(self, seed: int = 0) -> Interval:
        """Nats a token by which the right image helps: wrong - right, 0 for a model that does not look."""
        return bootstrap_interval(
            (self.total_nats_wrong_image - self.total_nats_right_image) / self.num_tokens,
            seed,
            weights=self.num_tokens,
        )


def measure_caption_cross_entropy(
    nll: CaptionNLL, records: Sequence[Record], *, seed: int = 0
) -> CaptionCrossEntropy:
    """Cross entropy of captions after the right and after a wrong image.

    Args:
        nll: (image, caption) pairs -> (sum of nats, number of tokens) each.
        records: pairs with an image and a short caption; the first caption is scored.
        seed: chooses the wrong images.

    Raises:
        DataError: as `retrieval`, and where all records share one caption.
    """
    pairs = [image_and_captions(record) for record in records]
    other = wrong_image_indices([short for _, short in pairs], seed)
    right = nll([(image, short[0]) for image, short in pairs])
    wrong = nll([(pairs[j][0], short[0]) for (_, short), j in zip(pairs, other, strict=True)])
    assert [n for _, n in right] == [n for _, n in wrong], (
        "a caption's tokens do not depend on its image"
    )
    return CaptionCrossEntropy(
        tuple(record.id for record in records),
        total_nats_right_image=np.array([nats for nats, _ in right], dtype=np.float64),
        total_nats_wrong_image=np.array([nats for nats, _ in wrong], dtype=np.float64),
        num_tokens=np.array([n for _, n in right], dtype=np.float64),
    )


def wrong_image_indices(captions: Sequence[Sequence[str]], seed: int = 0) -> list[int]:
    """For each item the index of another one that shares no caption with it; deterministic.

    Items in a shuffled order, equal first captions side by side, are turned by half a round: every image is
    then used once (a derangement) unless more than half of the items share a caption or items have several
    captions in common; there the next item that fits is taken.

    Raises:
        DataError: an item that shares a caption with all others.
    """
    keys = [{text_key(c) for c in group} for group in captions]
    random = np.random.default_rng(seed)
    names = sorted({text_key(group[0]) for group in captions})
    place = {names[i]: at for at, i in enumerate(random.permutation(len(names)))}
    order = sorted(range(len(captions)), key=lambda i: (place[text_key(captions[i][0])], i))
    found = [0] * len(order)
    for at, item in enumerate(order):
        turned = (order[(at + len(order) // 2 + step) % len(order)] for step in range(len(order)))
        other = next((j for j in turned if not keys[j] & keys[item]), None)
        if other is None:
            raise DataError(
                "all records share a caption, so no image is wrong", fix="Evaluate on more records"
            )
        found[item] = other
    return found


@dataclass(frozen=True, slots=True)
class GeneratedCaption:
    """One generated caption and how it compares with the references."""

    id: str
    generated: str
    references: tuple[str, ...]
    exact_match: float
    token_f1: float


@dataclass(frozen=True, slots=True)
class CaptionResult:
    """Generated captions, in the order of the records."""

    items: tuple[GeneratedCaption, ...]

    def token_f1(self, seed: int = 0) -> Interval:
        """Mean word F1."""
        return bootstrap_interval([item.token_f1 for item in self.items], seed)

    def exact_match(self, seed: int = 0) -> Interval:
        """Fraction equal to a reference but for case, punctuation and articles."""
        return bootstrap_interval([item.exact_match for item in self.items], seed)

    @property
    def num_distinct(self) -> int:
        """Distinct captions: one caption for everything is 1, however low its cross entropy."""
        return len({text_key(item.generated) for item in self.items})


def measure_captions(generate: GenerateCaptions, records: Sequence[Record]) -> CaptionResult:
    """Caption the image of every record. Raises DataError as `retrieval`."""
    pairs = [image_and_captions(record) for record in records]
    texts = generate([image for image, _ in pairs])
    assert len(texts) == len(pairs), (len(texts), len(pairs))
    items = [
        GeneratedCaption(record.id, text, short, exact_match(text, short), token_f1(text, short))
        for record, (_, short), text in zip(records, pairs, texts, strict=True)
    ]
    return CaptionResult(tuple(items))
