"""Example searches and answers for the demo's report, chosen before any result is known.

Examples are spaced evenly over the held-out records in the order of the corpus, so that nobody can
pick the flattering ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vlduet.data.content_keys import text_key
from vlduet.data.records import ImageRef, Record
from vlduet.eval.protocols import RetrievalResult

Item = TypeVar("Item")

ScoredIds = Sequence[tuple[str, float]]
"""(record id, cosine) pairs of a search, best first."""

HITS_PER_EXAMPLE = 5
"""Number of hits that an example shows."""


def evenly_spaced_indices(count: int, num: int) -> list[int]:
    """Return `num` rising indices below `count`, or all of them where `count` is smaller.

    The range is cut into `num` stretches and the middle index of each is taken, so 4 of 100 are
    [12, 37, 62, 87]. Three times as many indices always include these.
    """
    num = min(count, num)
    return [(2 * i + 1) * count // (2 * num) for i in range(num)]


def evenly_spaced(items: Sequence[Item], num: int) -> list[Item]:
    """Return `num` evenly spaced items (see `evenly_spaced_indices`), or all if there are fewer."""
    return [items[i] for i in evenly_spaced_indices(len(items), num)]


@dataclass(frozen=True, slots=True)
class ExampleHit:
    """One hit of an example search."""

    score: float
    """Cosine of query and hit."""
    is_relevant: bool
    text: str
    image: ImageRef | None = None


@dataclass(frozen=True, slots=True)
class ExampleSearch:
    """A query, which is a text, an image or both, with its first hits."""

    hits: tuple[ExampleHit, ...]
    text: str = ""
    image: ImageRef | None = None
    first_hit_rank: int | None = None
    """Rank of the best relevant item in the whole gallery (1 is best); None where not measured."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Example searches of one kind."""

    title: str
    note: str
    """Sentence that says what the queries and the gallery are."""
    searches: tuple[ExampleSearch, ...]


@dataclass(frozen=True, slots=True)
class AnsweredQuestion:
    """A question about an image, with the answers without and with retrieval."""

    question: str
    image: ImageRef
    reference: str
    """The right answer."""
    answer_alone: str
    """Generated answer without retrieval."""
    answer: str
    """Generated answer with `sources` in the prompt."""
    sources: tuple[ExampleHit, ...]


def example_hits(
    hits: ScoredIds, records: Sequence[Record], *, relevant_keys: frozenset[str] = frozenset()
) -> tuple[ExampleHit, ...]:
    """Return every hit, in order, with the first short caption and the image of its record.

    Args:
        hits: ids of `records` with their scores; an unknown id raises KeyError.
        records: pairs with an image and a short caption; a hit without caption raises IndexError.
        relevant_keys: `text_key` of captions; a hit with one of these captions is relevant, and
            none is by default.
    """
    by_id = {record.id: record for record in records}
    examples = []
    for identity, score in hits:
        record = by_id[identity]
        is_relevant = bool(relevant_keys & _caption_keys(record))
        examples.append(ExampleHit(score, is_relevant, record.short[0], record.image))
    return tuple(examples)


def text_to_image_examples(
    result: RetrievalResult, *, search: Callable[[str], ScoredIds], num: int = 6
) -> Gallery:
    """Return evenly spaced captions with the images that `search` finds for them.

    Args:
        result: its captions are the queries and its records the gallery. It also gives the rank of
            each caption's best image, and hits with this caption are relevant.
        search: caption -> (record id, cosine) pairs, best first, of which `HITS_PER_EXAMPLE` are
            shown; an id that `result` lacks raises KeyError.
        num: number of captions; all are taken if there are fewer.
    """
    searches = []
    for query in evenly_spaced_indices(len(result.captions), num):
        caption = result.captions[query]
        hits = example_hits(
            list(search(caption))[:HITS_PER_EXAMPLE],
            result.records,
            relevant_keys=frozenset([text_key(caption)]),
        )
        rank = int(result.text_to_image.ranks[query])
        searches.append(ExampleSearch(hits, text=caption, first_hit_rank=rank))
    note = (
        f"{len(searches)} held-out captions, evenly spaced; "
        f"the gallery is all {len(result.records)} held-out images."
    )
    return Gallery("Text → image", note, tuple(searches))


def image_to_text_examples(result: RetrievalResult, *, num: int = 6) -> Gallery:
    """Return evenly spaced images with the `HITS_PER_EXAMPLE` captions ranked first for them.

    Scores, relevance and the rank of the best caption are those of `result`. If there are fewer
    than `num` images, all are taken.
    """
    direction = result.image_to_text
    searches = []
    for query in evenly_spaced_indices(len(result.records), num):
        hits = [
            ExampleHit(
                float(direction.similarity[query, i]),
                bool(direction.relevant[query, i]),
                result.captions[i],
            )
            for i in direction.top_indices(query, HITS_PER_EXAMPLE)
        ]
        rank = int(direction.ranks[query])
        image = result.records[query].image
        searches.append(ExampleSearch(tuple(hits), image=image, first_hit_rank=rank))
    note = (
        f"{len(searches)} held-out images, evenly spaced; "
        f"the gallery is all {len(result.captions)} distinct captions."
    )
    return Gallery("Image → text", note, tuple(searches))


def composed_query_examples(
    result: RetrievalResult, *, search: Callable[[ImageRef, str], ScoredIds], num: int = 4
) -> Gallery:
    """Return evenly spaced queries of an image and another record's caption, with their hits.

    The caption is the first one of the record half the corpus away. Relevant are hits that have
    this caption, or any caption of the image's record. Every record needs an image and a caption.

    Args:
        result: its records are queried and searched.
        search: (image, caption) -> (record id, cosine) pairs, best first. Without the image's own
            record, the first `HITS_PER_EXAMPLE` are shown; an unknown id raises KeyError.
        num: number of queries; all records are taken if there are fewer.
    """
    searches = []
    num_records = len(result.records)
    for query in evenly_spaced_indices(num_records, num):
        record = result.records[query]
        text = result.records[(query + num_records // 2) % num_records].short[0]
        assert record.image is not None, "retrieval is measured on pairs"
        hits = [hit for hit in search(record.image, text) if hit[0] != record.id]
        relevant_keys = _caption_keys(record) | {text_key(text)}
        examples = example_hits(
            hits[:HITS_PER_EXAMPLE], result.records, relevant_keys=relevant_keys
        )
        searches.append(ExampleSearch(examples, text=text, image=record.image))
    note = (
        "One query made of an image and a text that names something else, half the corpus away. "
        "Outlined hits carry the text's caption or the image's; the image itself is left out."
    )
    return Gallery("Image and text together", note, tuple(searches))


def _caption_keys(record: Record) -> frozenset[str]:
    """Return the keys by which the short captions of a record are compared."""
    return frozenset(text_key(caption) for caption in record.short)
