"""Measurement protocols over held-out records. They take functions, so that any model fits.

    measure_retrieval              every caption against every image, in both directions
    measure_composed_retrieval     queries of an image and the caption of another record
    measure_caption_cross_entropy  nats per token of captions after their own and a wrong image
    measure_captions               generated captions compared with the references

Every result keeps its values item by item, so that intervals and examples can be computed from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlduet.data.content_keys import text_key
from vlduet.data.records import ImageRef, Record
from vlduet.data.vectors import unit_rows
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
    paired_bootstrap,
    token_f1,
)

Vectors = NDArray[np.float32]

EmbedImage = Callable[[list[ImageRef]], Vectors]
"""Images -> float[N, D]."""
EmbedText = Callable[[list[str]], Vectors]
"""Texts -> float[N, D]."""
EmbedComposed = Callable[[list[tuple[ImageRef, str]]], Vectors]
"""(image, text) queries -> float[N, D]."""
CaptionNLL = Callable[[list[tuple[ImageRef, str]]], Sequence[tuple[float, int]]]
"""(image, caption) pairs -> (total nats of the caption, number of its tokens) each."""
GenerateCaptions = Callable[[list[ImageRef]], Sequence[str]]
"""Images -> one caption each."""

QUERIES_PER_BLOCK = 1024
"""Number of queries whose similarities are computed at once; limits memory."""


# ------------------------------------------------------------------ retrieval


@dataclass(frozen=True, slots=True)
class RetrievalDirection:
    """One direction of retrieval: Q queries against a gallery of G items."""

    similarity: Vectors
    """float32[Q, G], cosines."""
    relevant: Bools
    """bool[Q, G], at least one relevant item per query."""
    ranks: Ints
    """int[Q], rank of the best relevant item, 1 is best; see `metrics.first_hit_ranks`."""

    @property
    def num_queries(self) -> int:
        """Number of queries, Q."""
        return len(self.relevant)

    @property
    def num_gallery(self) -> int:
        """Number of gallery items, G."""
        return len(self.relevant[0])

    def hit_rates(self) -> dict[str, float]:
        """Return ``{"hit@1": fraction of queries, "hit@5": ..., "hit@10": ...}``."""
        return hit_rates(self.ranks)

    def hit_values(self, k: int) -> NDArray[np.float64]:
        """Return float[Q], 1 where a query has a relevant item among the first k, else 0."""
        return (self.ranks <= k).astype(np.float64)

    def hit_interval(self, k: int, seed: int = 0) -> Interval:
        """Return hit@k (a fraction) with its bootstrap interval over queries."""
        return bootstrap_interval(self.hit_values(k), seed)

    def hit_difference(self, other: RetrievalDirection, k: int, *, seed: int = 0) -> Interval:
        """Return hit@k minus the hit@k of `other`, with its paired bootstrap interval.

        `other` must be a result on the same queries in the same order.
        """
        return paired_bootstrap(self.hit_values(k), other.hit_values(k), seed=seed)

    def chance_hit_rates(self) -> dict[str, float]:
        """Return the exact hit rates of a random order, with the keys of `hit_rates`."""
        return chance_hit_at_k(self.relevant)

    def top_indices(self, query: int, k: int) -> list[int]:
        """Return the first k gallery indices of a query, best first.

        NaN comes last, and equal scores in the order of the gallery.
        """
        scores = np.nan_to_num(self.similarity[query], nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        return [int(i) for i in np.argsort(-scores, kind="stable")[:k]]


@dataclass(frozen=True, slots=True)
class RetrievalResult:
    """Retrieval of every distinct caption against every image, C captions and N images."""

    captions: tuple[str, ...]
    """Captions with distinct `text_key`, each in the form that comes first."""
    records: tuple[Record, ...]
    """Record of every image, in the order of the images."""
    text_to_image: RetrievalDirection
    """Captions as queries, images as gallery."""
    image_to_text: RetrievalDirection
    """Images as queries, captions as gallery."""

    def sample(self, indices: Sequence[int]) -> RetrievalResult:
        """Return the result of some images and the first caption of each, in this order.

        The similarities are those of this result, and ranks are computed anew within the sample.
        Captions that belong to several of these images occur several times. No indices raise
        ValueError.
        """
        images = list(indices)
        records = tuple(self.records[i] for i in images)
        caption_index = {text_key(caption): i for i, caption in enumerate(self.captions)}
        captions = [caption_index[text_key(record.short[0])] for record in records]
        grid = np.ix_(captions, images)
        similarity = self.text_to_image.similarity[grid]
        relevant = self.text_to_image.relevant[grid]
        return RetrievalResult(
            tuple(self.captions[i] for i in captions),
            records,
            _rank_direction(similarity, relevant),
            _rank_direction(similarity.T, relevant.T),
        )


def measure_retrieval(
    embed_image: EmbedImage, embed_text: EmbedText, *, records: Sequence[Record]
) -> RetrievalResult:
    """Retrieve among held-out records in both directions, with all short captions.

    Args:
        embed_image: images -> float[N, D]; called once with the images of all records.
        embed_text: captions -> float[C, D]; called once with all distinct captions, in the order
            of their first occurrence.
        records: pairs with an image and at least one short caption. A caption that several records
            carry is one query with several relevant images, and one gallery item.

    Raises:
        DataError: no records, or a record without an image or a short caption.
        AssertionError: a function returns another number of rows.
    """
    pairs = [image_and_captions(record) for record in records]
    if not pairs:
        raise DataError("no records to evaluate on", fix="Give a file with captioned images")
    captions: dict[str, str] = {}
    for _, short in pairs:
        for caption in short:
            captions.setdefault(text_key(caption), caption)
    caption_index = {key: i for i, key in enumerate(captions)}
    relevant = np.zeros((len(captions), len(pairs)), dtype=bool)  # [C, N]
    for n, (_, short) in enumerate(pairs):
        relevant[[caption_index[text_key(caption)] for caption in short], n] = True
    text_vectors = embed_text(list(captions.values()))
    image_vectors = embed_image([image for image, _ in pairs])
    similarity = cosine(text_vectors, image_vectors)  # [C, N]
    assert similarity.shape == relevant.shape, (similarity.shape, relevant.shape)
    return RetrievalResult(
        tuple(captions.values()),
        tuple(records),
        _rank_direction(similarity, relevant),
        _rank_direction(similarity.T, relevant.T),
    )


@dataclass(frozen=True, slots=True)
class ComposedRetrievalResult:
    """Retrieval with queries of an image and the caption of another record, one per record."""

    image_ranks: Ints
    """int[N], rank of the best image that has a caption of the query's image (itself included)."""
    text_ranks: Ints
    """int[N], rank of the best image that has the query's caption."""

    def hit_values(self, k: int) -> dict[str, NDArray[np.float64]]:
        """Return float[N] arrays with 1 for a hit among the first k, keyed by what must be there.

        The keys are ``image`` (the item of the query's image), ``text`` (that of its caption) and
        ``both``.
        """
        image = (self.image_ranks <= k).astype(np.float64)
        text = (self.text_ranks <= k).astype(np.float64)
        return {"image": image, "text": text, "both": image * text}

    def hit_intervals(self, k: int, seed: int = 0) -> dict[str, Interval]:
        """Return the means of `hit_values` with their bootstrap intervals, with the same keys."""
        return {key: bootstrap_interval(hits, seed) for key, hits in self.hit_values(k).items()}


def measure_composed_retrieval(
    embed_image: EmbedImage,
    embed_composed: EmbedComposed,
    records: Sequence[Record],
    *,
    seed: int = 0,
) -> ComposedRetrievalResult:
    """Search the images of all records with an image and a caption of something else at once.

    Args:
        embed_image: images -> float[N, D].
        embed_composed: (image, caption) queries -> float[N, D].
        records: pairs with an image and a short caption; the first caption goes into queries.
        seed: seed of `wrong_image_indices`, which says whose caption an image is joined with.

    Raises:
        DataError: a record without an image or a short caption, or a record that shares a caption
            with all others.
        ValueError: no records.
    """
    pairs = [image_and_captions(record) for record in records]
    images = [image for image, _ in pairs]
    keys = [_caption_keys(short) for _, short in pairs]
    shares_caption = np.zeros((len(keys), len(keys)), dtype=bool)  # [N, N]
    for i, query_keys in enumerate(keys):
        shares_caption[i] = [bool(query_keys & image_keys) for image_keys in keys]
    partners = wrong_image_indices([short for _, short in pairs], seed)
    queries = [(image, pairs[j][1][0]) for image, j in zip(images, partners, strict=True)]
    similarity = cosine(embed_composed(queries), embed_image(images))
    return ComposedRetrievalResult(
        image_ranks=first_hit_ranks(similarity, shares_caption),
        text_ranks=first_hit_ranks(similarity, shares_caption[partners]),
    )


def cosine(queries: Vectors, documents: Vectors) -> Vectors:
    """Return the cosines of float[Q, D] and float[G, D] as float32[Q, G].

    A row of zeros or with NaN gives NaN, which no metric rewards. Products are computed in float64
    and rounded to float32, so that equal vectors get equal scores however the matrix product is
    blocked. Q or G may be 0.
    """
    unit_documents = unit_rows(documents)
    cosines = np.empty((len(queries), len(documents)), dtype=np.float32)
    for begin in range(0, len(queries), QUERIES_PER_BLOCK):
        block = slice(begin, begin + QUERIES_PER_BLOCK)
        cosines[block] = unit_rows(queries[block]) @ unit_documents.T
    return cosines


def _rank_direction(similarity: Vectors, relevant: Bools) -> RetrievalDirection:
    """Return the direction of float[Q, G] similarities with the rank of every query's first hit."""
    return RetrievalDirection(similarity, relevant, first_hit_ranks(similarity, relevant))


def image_and_captions(record: Record) -> tuple[ImageRef, tuple[str, ...]]:
    """Return the image and the short captions of a pair.

    Raises:
        DataError: the record has no image or no short caption.
    """
    if record.image is None or not record.short:
        raise DataError(
            f"record '{record.id}' has no image or no short caption",
            place=record.place,
            fix="Evaluate on pairs with an image and a short caption",
        )
    return record.image, record.short


# ------------------------------------------------------------------ captions


@dataclass(frozen=True, slots=True)
class CaptionCrossEntropy:
    """Negative log likelihood of the first caption of every record."""

    ids: tuple[str, ...]
    """Record ids."""
    total_nats_right_image: NDArray[np.float64]
    """float[N], nats of the whole caption after the record's own image."""
    total_nats_wrong_image: NDArray[np.float64]
    """float[N], nats of the same caption after the image of a record with other captions."""
    num_tokens: NDArray[np.float64]
    """float[N], number of predicted tokens of the caption."""

    def nats_right_image(self, seed: int = 0) -> Interval:
        """Return the nats per token after the right image, with the bootstrap interval."""
        return self._nats_per_token(self.total_nats_right_image, seed)

    def nats_wrong_image(self, seed: int = 0) -> Interval:
        """Return the nats per token after a wrong image, with the bootstrap interval."""
        return self._nats_per_token(self.total_nats_wrong_image, seed)

    def nats_gap(self, seed: int = 0) -> Interval:
        """Return the nats per token by which the right image helps: wrong minus right.

        It is 0 for a model that does not look at the image.
        """
        return self._nats_per_token(self.total_nats_wrong_image - self.total_nats_right_image, seed)

    def nats_differences(self, other: CaptionCrossEntropy, seed: int = 0) -> dict[str, Interval]:
        """Return what this model has above `other`, in nats per token, paired over captions.

        Keys are ``right image``, ``wrong image`` and ``gap``. Both must have scored the same
        captions with the same wrong images.
        """
        right = self.total_nats_right_image - other.total_nats_right_image
        wrong = self.total_nats_wrong_image - other.total_nats_wrong_image
        differences = {"right image": right, "wrong image": wrong, "gap": wrong - right}
        return {name: self._nats_per_token(nats, seed) for name, nats in differences.items()}

    def _nats_per_token(self, total_nats: NDArray[np.float64], seed: int) -> Interval:
        """Return the mean of total nats (float[N]) over all tokens, resampled by caption."""
        return bootstrap_interval(total_nats / self.num_tokens, seed, weights=self.num_tokens)


@dataclass(frozen=True, slots=True)
class AnswerCrossEntropy:
    """Negative log likelihood of N answers to questions."""

    total_nats: NDArray[np.float64]
    """float[N], nats of the whole answer."""
    num_tokens: NDArray[np.float64]
    """float[N], number of predicted tokens of the answer."""

    def nats(self, seed: int = 0) -> Interval:
        """Return the nats per token with the bootstrap interval over answers."""
        return bootstrap_interval(self.total_nats / self.num_tokens, seed, weights=self.num_tokens)

    def nats_difference(self, other: AnswerCrossEntropy, seed: int = 0) -> Interval:
        """Return nats per token minus those of `other`, which scored the same answers."""
        difference = AnswerCrossEntropy(self.total_nats - other.total_nats, self.num_tokens)
        return difference.nats(seed)


def measure_caption_cross_entropy(
    nll: CaptionNLL, records: Sequence[Record], *, seed: int = 0
) -> CaptionCrossEntropy:
    """Compute the cross entropy of captions after the right and after a wrong image.

    No records give a result without items.

    Args:
        nll: (image, caption) pairs -> (total nats, number of tokens) each; called once with all
            right and once with all wrong images, also with [] for no records.
        records: pairs with an image and a short caption; the first caption is scored.
        seed: seed of `wrong_image_indices`, which chooses another record's image.

    Raises:
        DataError: a record without an image or a short caption, or a record that shares a caption
            with all others.
        AssertionError: `nll` counts other tokens after a wrong image than after the right one.
    """
    pairs = [image_and_captions(record) for record in records]
    wrong_images = wrong_image_indices([short for _, short in pairs], seed)
    captions = [short[0] for _, short in pairs]
    right = nll([(image, caption) for (image, _), caption in zip(pairs, captions, strict=True)])
    wrong = nll([(pairs[j][0], caption) for j, caption in zip(wrong_images, captions, strict=True)])
    num_tokens = [n for _, n in right]
    assert num_tokens == [n for _, n in wrong], "a caption's tokens do not depend on its image"
    return CaptionCrossEntropy(
        tuple(record.id for record in records),
        total_nats_right_image=np.array([nats for nats, _ in right], dtype=np.float64),
        total_nats_wrong_image=np.array([nats for nats, _ in wrong], dtype=np.float64),
        num_tokens=np.array(num_tokens, dtype=np.float64),
    )


def wrong_image_indices(captions: Sequence[Sequence[str]], seed: int = 0) -> list[int]:
    """Return for every item the index of another item that shares no caption with it.

    Items stand in a shuffled order with equal first captions side by side, and each takes the image
    half a round further on. Every image is then used once (a derangement), unless more than half of
    the items share a caption or items have several captions in common; there the next item that
    fits is taken.

    Args:
        captions: the captions of every item, at least one each; no items give [].
        seed: seed of the shuffled order; equal seeds give equal indices.

    Raises:
        DataError: an item shares a caption with all others, as a single item does.
    """
    keys = [_caption_keys(group) for group in captions]
    first_keys = [text_key(group[0]) for group in captions]
    names = sorted(set(first_keys))
    shuffled = np.random.default_rng(seed).permutation(len(names))
    position = {names[i]: n for n, i in enumerate(shuffled)}
    order = sorted(range(len(captions)), key=lambda i: (position[first_keys[i]], i))
    num_items = len(order)
    wrong = [0] * num_items
    for n, item in enumerate(order):
        candidates = (order[(n + num_items // 2 + step) % num_items] for step in range(num_items))
        other = next((j for j in candidates if not keys[j] & keys[item]), None)
        if other is None:
            raise DataError(
                "all records share a caption, so no image is wrong", fix="Evaluate on more records"
            )
        wrong[item] = other
    return wrong


def _caption_keys(captions: Sequence[str]) -> set[str]:
    """Return the keys by which captions are compared."""
    return {text_key(caption) for caption in captions}


@dataclass(frozen=True, slots=True)
class GeneratedCaption:
    """One generated caption and its scores against the references."""

    id: str
    """Record id."""
    image: ImageRef
    generated: str
    references: tuple[str, ...]
    """Short captions of the record."""
    exact_match: float
    """1 for a caption equal to a reference but for case, punctuation and articles, else 0."""
    token_f1: float
    """Harmonic mean of word precision and recall, the best over references."""


@dataclass(frozen=True, slots=True)
class CaptionResult:
    """Generated captions, in the order of the records."""

    items: tuple[GeneratedCaption, ...]

    def token_f1(self, seed: int = 0) -> Interval:
        """Return the mean word F1 with its bootstrap interval over captions."""
        return bootstrap_interval([item.token_f1 for item in self.items], seed)

    def exact_match(self, seed: int = 0) -> Interval:
        """Return the fraction of exact matches with its bootstrap interval over captions."""
        return bootstrap_interval([item.exact_match for item in self.items], seed)

    @property
    def num_distinct(self) -> int:
        """Number of distinct generated captions.

        A model that gives every image the same caption has 1, however low its cross entropy.
        """
        return len({text_key(item.generated) for item in self.items})


def measure_captions(generate: GenerateCaptions, records: Sequence[Record]) -> CaptionResult:
    """Generate a caption for the image of every record and compare it with the short captions.

    Args:
        generate: images -> one caption each; called once with all images.
        records: pairs with an image and at least one short caption; none give a result without
            items.

    Raises:
        DataError: a record without an image or a short caption.
        AssertionError: `generate` returns another number of captions.
    """
    pairs = [image_and_captions(record) for record in records]
    texts = generate([image for image, _ in pairs])
    assert len(texts) == len(pairs), (len(texts), len(pairs))
    items = []
    for record, (image, references), text in zip(records, pairs, texts, strict=True):
        items.append(
            GeneratedCaption(
                record.id,
                image,
                text,
                references,
                exact_match=exact_match(text, references),
                token_f1=token_f1(text, references),
            )
        )
    return CaptionResult(tuple(items))
