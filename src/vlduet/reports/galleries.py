"""From measurements to the pieces of the report: rows, gaps, curves, and galleries of examples.

Which examples are shown is decided by `evenly` before any result is known: they are spaced evenly over the held-out
records in the order of the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence, Set
from typing import TypeVar

from vlduet.data.content_keys import text_key
from vlduet.data.images import encode_thumbnail_data_url, load_image
from vlduet.data.records import ImageRef, Record
from vlduet.eval.metrics import HIT_CUTOFFS, Interval, bootstrap_interval, paired_bootstrap
from vlduet.eval.protocols import (
    CaptionCrossEntropy,
    CaptionResult,
    ComposedRetrievalResult,
    RetrievalDirection,
    RetrievalResult,
)
from vlduet.reports.charts import Series
from vlduet.reports.pages import (
    Captioned,
    CrossEntropy,
    Curve,
    Gallery,
    Gap,
    Heat,
    Hit,
    Mixed,
    Row,
    Scores,
    Search,
)

Item = TypeVar("Item")

Found = Sequence[tuple[str, float]]
"""(id of a record, score), best first."""

SHOWN = 5
"""Results that are shown of a search."""


def evenly_spaced_indices(count: int, wanted: int) -> list[int]:
    """`wanted` indices spaced evenly over range(count), the first in the middle of the first stretch; all if fewer."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def evenly_spaced(items: Sequence[Item], wanted: int) -> list[Item]:
    """`wanted` of them, spaced as `evenly` says."""
    return [items[i] for i in evenly_spaced_indices(len(items), wanted)]


class Album:
    """The held-out records by id, with their pictures as data URLs, each decoded once.

    Args:
        records: pairs with an image and a short caption.
        side: pixels of a thumbnail.
    """

    def __init__(self, records: Sequence[Record], *, side: int = 160):
        self.records = {record.id: record for record in records}
        self.side = side
        self._thumbnails: dict[tuple[str, int], str] = {}

    def picture(self, identity: str, side: int | None = None) -> str:
        """The thumbnail of a record's image, as a data URL."""
        key = (identity, side or self.side)
        if key not in self._thumbnails:
            self._thumbnails[key] = encode_thumbnail_data_url(
                load_image(self.image(identity)), key[1]
            )
        return self._thumbnails[key]

    def image(self, identity: str) -> ImageRef:
        """A record's image."""
        image = self.records[identity].image
        assert image is not None
        return image

    def captions(self, identity: str) -> tuple[str, ...]:
        """A record's short captions."""
        return self.records[identity].short

    def keys(self, identity: str) -> set[str]:
        """What its captions are compared by."""
        return {text_key(caption) for caption in self.captions(identity)}

    def hits(self, found: Found, wanted: Set[str] = frozenset()) -> tuple[Hit, ...]:
        """Search results with their pictures; right are those with a caption whose key is wanted."""
        return tuple(
            Hit(score, bool(wanted & self.keys(i)), text=self.captions(i)[0], image=self.picture(i))
            for i, score in found
        )


# ------------------------------------------------------------------ numbers


def row(name: str, note: str, *, result: RetrievalResult, seed: int) -> Row:
    """A competitor's hit rates with their intervals."""

    def scores(direction: RetrievalDirection) -> Scores:
        return {f"hit@{k}": direction.hit_interval(k, seed) for k in HIT_CUTOFFS}

    return Row(name, note, scores(result.text_to_image), scores(result.image_to_text))


def chance_row(result: RetrievalResult) -> Row:
    """What a random order scores, exactly."""

    def scores(direction: RetrievalDirection) -> Scores:
        return {
            name: Interval(value, value, value)
            for name, value in direction.chance_hit_rates().items()
        }

    return Row(
        "Chance",
        "a random order, computed exactly",
        scores(result.text_to_image),
        scores(result.image_to_text),
    )


def gaps(ours: RetrievalResult, theirs: RetrievalResult, *, seed: int) -> tuple[Gap, ...]:
    """Ours against theirs, query by query: both directions at 10 and at 1."""
    assert ours.captions == theirs.captions and ours.ids == theirs.ids, "a pair is of one query"
    directions = (
        ("text → image", ours.text_to_image, theirs.text_to_image),
        ("image → text", ours.image_to_text, theirs.image_to_text),
    )
    return tuple(
        Gap(name, f"hit@{k}", paired_bootstrap(a.hit_values(k), b.hit_values(k), seed=seed))
        for k in (10, 1)
        for name, a, b in directions
    )


def mixed(before: ComposedRetrievalResult, after: ComposedRetrievalResult, *, seed: int) -> Mixed:
    """Queries of an image and words about something else, before and after training: what is among the first ten."""
    k = max(HIT_CUTOFFS)
    start, now = before.hit_values(k), after.hit_values(k)
    found = {what: bootstrap_interval(values, seed) for what, values in now.items()}
    gap = Gap("both of them", f"hit@{k}", paired_bootstrap(now["both"], start["both"], seed=seed))
    return Mixed(len(after.image_ranks), found, bootstrap_interval(start["both"], seed), gap)


def cross_entropy(
    before: CaptionCrossEntropy, after: CaptionCrossEntropy, *, seed: int
) -> CrossEntropy:
    """The captions' cross entropy before and after training."""
    return CrossEntropy(
        before=before.nats_right_image(seed),
        after=after.nats_right_image(seed),
        wrong_image=after.nats_wrong_image(seed),
        gap=after.nats_gap(seed),
    )


def curves(rows: Sequence[Mapping[str, float]]) -> tuple[Curve, ...]:
    """The training curves of a run, from the rows of its ``metrics.jsonl``, over minutes."""

    def series(name: str, key: str) -> Series:
        return Series(
            name, tuple((r["seconds"] / 60, r[key]) for r in rows if key in r and "seconds" in r)
        )

    return (
        Curve(
            "Training losses",
            "Of the batches, as a moving average.",
            (series("language", "language"), series("contrastive", "contrastive")),
        ),
        Curve(
            "Validation hit@10",
            "Share of queries with a right result among the first ten.",
            (
                series("text → image", "validation/text_to_image/hit@10"),
                series("image → text", "validation/image_to_text/hit@10"),
            ),
            percent=True,
        ),
        Curve(
            "Validation caption cross entropy",
            "Nats a token. What lies between the two lines is what the image tells.",
            (
                series("right image", "validation/caption_cross_entropy"),
                series("wrong image", "validation/caption_cross_entropy_wrong_image"),
            ),
        ),
    )


# ------------------------------------------------------------------ examples


def text_to_image_examples(
    result: RetrievalResult, album: Album, *, find: Callable[[str], Found], wanted: int = 6
) -> Gallery:
    """Captions as queries; `find` searches the images."""
    searches = []
    for query in evenly_spaced_indices(len(result.captions), wanted):
        caption = result.captions[query]
        hits = album.hits(list(find(caption))[:SHOWN], {text_key(caption)})
        searches.append(
            Search(hits, text=caption, first_hit=int(result.text_to_image.ranks[query]))
        )
    note = f"{len(searches)} held-out captions, evenly spaced; the gallery is all {len(result.ids)} held-out images."
    return Gallery("Text → image", note, tuple(searches))


def image_to_text_examples(result: RetrievalResult, album: Album, *, wanted: int = 6) -> Gallery:
    """Images as queries, ranked captions as results."""
    direction, searches = result.image_to_text, []
    for query in evenly_spaced_indices(len(result.ids), wanted):
        hits = tuple(
            Hit(
                float(direction.similarity[query, i]),
                bool(direction.relevant[query, i]),
                text=result.captions[i],
            )
            for i in direction.top_indices(query, SHOWN)
        )
        picture = album.picture(result.ids[query])
        searches.append(Search(hits, image=picture, first_hit=int(direction.ranks[query])))
    note = f"{len(searches)} held-out images, evenly spaced; the gallery is all {len(result.captions)} distinct captions."
    return Gallery("Image → text", note, tuple(searches))


def composed_query_examples(
    result: RetrievalResult,
    album: Album,
    *,
    find: Callable[[ImageRef, str], Found],
    wanted: int = 4,
) -> Gallery:
    """An image and another item's caption as one query; the image itself is left out of the results."""
    count, searches = len(result.ids), []
    for query in evenly_spaced_indices(count, wanted):
        one, other = result.ids[query], result.ids[(query + count // 2) % count]
        text = album.captions(other)[0]
        found = [hit for hit in find(album.image(one), text) if hit[0] != one][:SHOWN]
        hits = album.hits(found, {text_key(text)} | album.keys(one))
        searches.append(Search(hits, text=text, image=album.picture(one)))
    note = (
        "One query made of an image and a text that names something else, half the corpus away. Outlined is what carries "
        "the text's caption or the image's; the image itself is left out."
    )
    return Gallery("Image and text together", note, tuple(searches))


def heat(result: RetrievalResult, album: Album, *, wanted: int = 24) -> Heat:
    """A square piece of the similarity matrix: evenly spaced images, and the first caption of each."""
    images = evenly_spaced_indices(len(result.ids), wanted)
    row_of = {text_key(caption): i for i, caption in enumerate(result.captions)}
    rows = [row_of[text_key(album.captions(result.ids[i])[0])] for i in images]
    matrix = result.text_to_image
    return Heat(
        captions=tuple(result.captions[r] for r in rows),
        images=tuple(album.picture(result.ids[i], side=48) for i in images),
        similarity=tuple(tuple(float(matrix.similarity[r, i]) for i in images) for r in rows),
        relevant=tuple(tuple(bool(matrix.relevant[r, i]) for i in images) for r in rows),
    )


def captioned(
    before: CaptionResult, after: CaptionResult, *, known: Container[str], album: Album
) -> tuple[Captioned, ...]:
    """Captions of the items that were captioned both before and after training."""
    now = {item.id: item for item in after.items}
    pairs = [(item, now[item.id]) for item in before.items if item.id in now]
    return tuple(
        Captioned(
            album.picture(a.id), a.references[0], b.generated, a.generated, a.generated in known
        )
        for b, a in pairs
    )
