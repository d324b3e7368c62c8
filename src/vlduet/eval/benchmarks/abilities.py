"""Searches of the suite ``abilities`` on held-out records of the project's own corpora.

    detail          two pictures and two captions that differ in one word
    knowledge       a definition without the name, or a capital -> the picture or the flag
    fine_grained    a picture -> its name among the names of its own category alone
    composition     a picture and other words at once -> pictures of either
    arithmetic      picture + word - word -> the picture that the sum names
    dialog          kind, then narrower kind, then name -> the picture, after every turn
    places          what comes before the i-th image of a document -> that image
    classification  a picture -> its category

Items follow from the records by fixed rules that know no model, and what is drawn is drawn with
the run's seed. Questions with options are in `abilities_questions`. `control_runners` add the
chance level and a control without images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlduet.data.images import image_key
from vlduet.data.labels import TEMPLATES
from vlduet.data.records import ImageRef, Part, Parts, Record
from vlduet.errors import DataError
from vlduet.eval.benchmarks.builtin import (
    captioned_images,
    find_one_word_pairs,
    read_split,
    read_splits,
)
from vlduet.eval.benchmarks.compositional import decide_winoground
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.tasks import PairItem, PairTask, SearchTask, WeightedParts
from vlduet.eval.metrics import tokenize_answer

DEFINITIONS_FILE = Path(__file__).parent / "definitions.json"
"""Definitions of WordNet by name, written by `experiments/abilities/definitions.py`."""
CORPORA = ("stamps", "emoji")
MIN_NEIGHBOURS = 4
"""Number of distinct names that a category needs for fine-grained items."""
MAX_COMPOSED = 120
"""Maximum number of composed queries, drawn with the run's seed."""
MAX_PLACE = 5
"""Number of the last image of a document that is searched."""
MAX_PREFIX_PARTS = 8
MAX_PREFIX_WORDS = 16
"""Number of words, the last ones, of a text in a prefix."""

PictureGroups = dict[str, list[tuple[Record, ImageRef]]]


def single(*parts: Part) -> WeightedParts:
    """Return one content with weight 1."""
    return ((1.0, parts),)


def normalize_name(text: str) -> str:
    """Return a name in normalized words; equal ones mean the same thing."""
    return " ".join(tokenize_answer(text))


def name_of(record: Record) -> str:
    """Return the normalized first caption of a record."""
    return normalize_name(record.short[0])


def kinds_of(record: Record) -> tuple[str, str]:
    """Return the kind of thing in a picture and the narrower kind, in lower case, "" where unknown.

    They are group and subgroup of an emoji, and the first folder and the others of a stamp.
    """
    facts = record.metadata
    if "group" in facts:
        group, subgroup = str(facts["group"]), str(facts["subgroup"])
    else:
        group, _, subgroup = str(facts.get("category", "")).partition("/")
    narrower = subgroup.replace("-", " ").replace("/", " ").replace("_", " ")
    return group.lower(), narrower.lower()


def require_items(items: Sequence[object], files: OfficialFiles, *, missing: str) -> None:
    """Raise DataError that `missing` is not in the test splits where there are no items."""
    if not items:
        raise DataError(
            f"no {missing} in the test splits", place=files.root, fix="Fetch them again"
        )


# ------------------------------------------------------------------ detail


def load_detail(files: OfficialFiles) -> PairTask:
    """Return the one-word pairs of stamps and emoji, scored as Winoground's, ``group`` first.

    The pairs are those of `find_one_word_pairs` (emoji: of one subgroup); the group of an item is
    its corpus. File hashes are stored in `files.hashes`; a missing or empty split, or no pair,
    raises DataError.
    """
    items = []
    for corpus, group_key in (("emoji", "subgroup"), ("stamps", "")):
        for item in find_one_word_pairs(read_split(files, corpus), group_key):
            items.append(PairItem(item.id, item.texts, item.images, corpus))
    require_items(items, files, missing="captions that differ in one word")
    return PairTask(tuple(items), decide_detail)


def decide_detail(
    similarity: NDArray[np.floating], text_similarity: NDArray[np.floating]
) -> dict[str, bool]:
    """Return `decide_winoground` in the order ``group``, ``text``, ``image``."""
    decisions = decide_winoground(similarity, text_similarity)
    return {name: decisions[name] for name in ("group", "text", "image")}


# ------------------------------------------------------------------ world knowledge


def load_knowledge(files: OfficialFiles) -> SearchTask:
    """Return the task of finding pictures by what must be known of them, by R@10.

    ``definition``: WordNet's definition of a name, which does not contain it, among all test images
    of stamps and emoji; those with this name are correct. ``capital``: "The flag of the country
    whose capital is X." among the flags of countries of the test split of maps. File hashes are
    stored in `files.hashes`; a missing or empty split, or no query, raises DataError.
    """
    definitions = read_definitions()
    pictures = captioned_images(read_splits(files, CORPORA))
    flags = []
    for record, image in captioned_images(read_split(files, "maps")):
        facts = record.metadata
        if facts["kind"] == "flag" and "territory" not in facts and "capital" in facts:
            flags.append((record, image))
    num_pictures, num_flags = len(pictures), len(flags)
    documents = tuple(single(image) for _, image in (*pictures, *flags))
    queries: list[WeightedParts] = []
    positives: list[tuple[tuple[int, ...], ...]] = []
    excluded: list[tuple[int, ...]] = []
    tags: list[str] = []
    images_of = index_names([record for record, _ in pictures])
    for name, indices in images_of.items():
        if name in definitions:
            queries.append(single(definitions[name]))
            positives.append((tuple(indices),))
            excluded.append(tuple(range(num_pictures, num_pictures + num_flags)))
            tags.append("definition")
    capitals = [normalize_name(record.metadata["capital"]) for record, _ in flags]
    for n, (record, _) in enumerate(flags):
        text = f"The flag of the country whose capital is {record.metadata['capital']}."
        same_capital = [i for i, capital in enumerate(capitals) if capital == capitals[n]]
        queries.append(single(text))
        positives.append((tuple(num_pictures + i for i in same_capital),))
        excluded.append(tuple(range(num_pictures)))
        tags.append("capital")
    require_items(queries, files, missing="pictures with a definition or capital")
    return SearchTask(
        {"query": tuple(queries)}, documents, tuple(positives), tuple(excluded), tags=tuple(tags)
    )


def read_definitions() -> dict[str, str]:
    """Return the definitions that the package has, by normalized name."""
    content = json.loads(DEFINITIONS_FILE.read_text(encoding="utf-8"))
    definitions: dict[str, str] = content["definitions"]
    return definitions


def index_names(records: Sequence[Record]) -> dict[str, list[int]]:
    """Return the indices of the records with each first caption, by its normalized words."""
    indices: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        indices.setdefault(name_of(record), []).append(i)
    return indices


# ------------------------------------------------------------------ fine-grained discrimination


def load_fine_grained(files: OfficialFiles) -> SearchTask:
    """Return the task of naming a picture among the names of its own category, by R@1.

    The category is the whole folder of a stamp and the subgroup of an emoji. Those with at least
    `MIN_NEIGHBOURS` distinct names are used. File hashes are stored in `files.hashes`; a missing
    or empty split, or no such category, raises DataError.
    """
    names: dict[str, str] = {}  # normalized name -> caption
    queries: list[WeightedParts] = []
    targets: list[tuple[str, frozenset[str]]] = []
    tags: list[str] = []
    for corpus in CORPORA:
        for members in _group_by_category(read_split(files, corpus)).values():
            group_names = frozenset(name_of(record) for record, _ in members)
            if len(group_names) < MIN_NEIGHBOURS:
                continue
            for record, image in members:
                names.setdefault(name_of(record), record.short[0])
                queries.append(single(image))
                targets.append((name_of(record), group_names))
                tags.append(corpus)
    require_items(queries, files, missing=f"categories of {MIN_NEIGHBOURS} names")
    index_of = {name: i for i, name in enumerate(names)}
    excluded = []
    for _, group_names in targets:
        excluded.append(tuple(i for name, i in index_of.items() if name not in group_names))
    return SearchTask(
        {"image": tuple(queries)},
        tuple(single(caption) for caption in names.values()),
        tuple(((index_of[name],),) for name, _ in targets),
        tuple(excluded),
        k=1,
        tags=tuple(tags),
    )


def _group_by_category(records: Sequence[Record]) -> PictureGroups:
    """Return the captioned images by their narrowest category, in the order of the records."""
    groups: PictureGroups = {}
    for record, image in captioned_images(records):
        facts = record.metadata
        category = str(facts.get("subgroup", facts.get("category", "")))
        groups.setdefault(category, []).append((record, image))
    return groups


# ------------------------------------------------------------------ composition


def load_composition(files: OfficialFiles) -> SearchTask:
    """Return the task of finding both things that a picture and other words name, by R@10.

    A query is an OpenMoji drawing and the name of another emoji. The gallery are the drawings of
    the other vendor, so that no picture finds itself; a hit needs one of each name among the first
    ten. Up to `MAX_COMPOSED` queries, and the other names, are drawn with `files.seed`. Forms:
    ``together`` in one input, ``sum`` of two embeddings, ``image alone``. The file hash is stored
    in `files.hashes`; a missing or empty split, or too few emoji, raises DataError.
    """
    drawings: list[tuple[Record, ImageRef]] = []
    gallery: list[tuple[Record, ImageRef]] = []
    for pair in captioned_images(read_split(files, "emoji")):
        is_drawing = pair[0].metadata["vendor"] == "openmoji"
        (drawings if is_drawing else gallery).append(pair)
    images_of = index_names([record for record, _ in gallery])
    by_name = {name_of(record): (record, image) for record, image in drawings}
    usable = [(name, pair) for name, pair in by_name.items() if name in images_of]
    if len(usable) < 2:  # a query needs the name of another emoji
        usable = []
    require_items(usable, files, missing="emoji of two vendors")
    order = np.random.default_rng(files.seed).permutation(len(usable))
    together, summed, alone = [], [], []
    positives = []
    for n in range(min(MAX_COMPOSED, len(usable))):
        name, (_, image) = usable[order[n]]
        # Half a round further on, so that every name is joined with another one.
        other_name, (other, _) = usable[order[(n + len(usable) // 2) % len(usable)]]
        text = other.short[0]
        together.append(single(image, text))
        summed.append((*single(image), *single(text)))
        alone.append(single(image))
        positives.append((tuple(images_of[name]), tuple(images_of[other_name])))
    return SearchTask(
        {"together": tuple(together), "sum": tuple(summed), "image alone": tuple(alone)},
        tuple(single(image) for _, image in gallery),
        tuple(positives),
        partial_forms=("image alone",),
    )


def load_arithmetic(files: OfficialFiles) -> SearchTask:
    """Return the task of finding a picture by picture + word - word, by R@1.

    Emoji of one vendor and subgroup whose names differ in one word give two queries: the image of
    the first, plus the second one's word, minus the first one's; and the reverse. The gallery are
    the images of the vendor without that of the query. Forms: ``A + B - C``, ``A + B`` and ``A``.
    The file hash is stored in `files.hashes`; a missing or empty split, or no pair, raises
    DataError.
    """
    records = read_split(files, "emoji")
    pictures = captioned_images(records)
    position_of = {record.id: i for i, (record, _) in enumerate(pictures)}
    vendors = [record.metadata["vendor"] for record, _ in pictures]
    names = [name_of(record) for record, _ in pictures]
    forms: dict[str, list[WeightedParts]] = {"A + B - C": [], "A + B": [], "A": []}
    positives: list[tuple[tuple[int, ...], ...]] = []
    excluded: list[tuple[int, ...]] = []
    for item in find_one_word_pairs(records, "subgroup"):
        ids = item.id.split("|")
        for source, target in (ids, ids[::-1]):
            a, b = position_of[source], position_of[target]
            added, removed = find_difference(names[b], names[a])
            image = (pictures[a][1],)
            forms["A + B - C"].append(((1.0, image), (1.0, (added,)), (-1.0, (removed,))))
            forms["A + B"].append(((1.0, image), (1.0, (added,))))
            forms["A"].append(((1.0, image),))
            gallery = [i for i, vendor in enumerate(vendors) if vendor == vendors[a] and i != a]
            positives.append((tuple(i for i in gallery if names[i] == names[b]),))
            excluded.append(tuple(sorted(set(range(len(pictures))) - set(gallery))))
    require_items(positives, files, missing="emoji whose names differ in one word")
    return SearchTask(
        {form: tuple(queries) for form, queries in forms.items()},
        tuple(single(image) for _, image in pictures),
        tuple(positives),
        tuple(excluded),
        k=1,
        partial_forms=("A",),
    )


def find_difference(name: str, other_name: str) -> tuple[str, str]:
    """Return the words of two equally long names in which they differ: (of the first, other)."""
    pairs = zip(name.split(), other_name.split(), strict=True)
    return next((word, other) for word, other in pairs if word != other)


# ------------------------------------------------------------------ dialog and documents


def load_dialog(files: OfficialFiles) -> SearchTask:
    """Return the task of finding a picture by three turns: kind, narrower kind, name, by R@10.

    A distinct name of a corpus with both kinds is one query; all test images of stamps and emoji
    are the gallery, and those of the corpus with this name are correct. Forms: ``all turns`` in one
    input, ``turn 1``, ``turns 1 and 2``, and ``last turn alone``. File hashes are stored in
    `files.hashes`; a missing or empty split, or no query, raises DataError.
    """
    images: list[ImageRef] = []
    forms: dict[str, list[WeightedParts]] = {
        form: [] for form in ("all turns", "turn 1", "turns 1 and 2", "last turn alone")
    }
    positives: list[tuple[tuple[int, ...], ...]] = []
    for corpus in CORPORA:
        pictures = captioned_images(read_split(files, corpus))
        for indices in index_names([record for record, _ in pictures]).values():
            record = pictures[indices[0]][0]
            kind, narrower_kind = kinds_of(record)
            if not (kind and narrower_kind):
                continue
            turns = (kind, narrower_kind, record.short[0])
            forms["all turns"].append(single(*turns))
            forms["turn 1"].append(single(*turns[:1]))
            forms["turns 1 and 2"].append(single(*turns[:2]))
            forms["last turn alone"].append(single(*turns[2:]))
            positives.append((tuple(len(images) + i for i in indices),))
        images += [image for _, image in pictures]
    require_items(positives, files, missing="pictures of a kind")
    return SearchTask(
        {form: tuple(queries) for form, queries in forms.items()},
        tuple(single(image) for image in images),
        tuple(positives),
        partial_forms=("last turn alone",),
    )


def load_places(files: OfficialFiles) -> SearchTask:
    """Return the task of finding the i-th image of a document by what comes before it, by R@10.

    The first `MAX_PLACE` distinct images of every test document of campaigns and gimp-help are
    searched, if anything comes before them, among all images of these documents by content; images
    that occur before it are excluded. A query is at most `MAX_PREFIX_PARTS` parts, of texts the
    last `MAX_PREFIX_WORDS` words. The tag is ``image I``. File hashes are stored in `files.hashes`.

    Raises:
        DataError: a split is missing, broken or empty, or there is no such image.
        ImageError: an image cannot be read.
    """
    gallery: dict[str, ImageRef] = {}
    records = read_splits(files, ("campaigns", "gimp-help"))
    keys_by_image: dict[ImageRef, str] = {}
    for record in records:
        for part in record.parts:
            if isinstance(part, ImageRef):
                keys_by_image[part] = image_key(part)
                gallery.setdefault(keys_by_image[part], part)
    index_of = {key: i for i, key in enumerate(gallery)}
    queries: list[WeightedParts] = []
    positives: list[tuple[tuple[int, ...], ...]] = []
    excluded: list[tuple[int, ...]] = []
    tags: list[str] = []
    for record in records:
        for position, earlier in find_new_images(record.parts, keys_by_image):
            place = len(earlier) + 1
            if position == 0 or place > MAX_PLACE:
                continue
            target = keys_by_image[record.parts[position]]  # type: ignore[index]
            queries.append(single(*shorten_prefix(record.parts[:position])))
            positives.append(((index_of[target],),))
            excluded.append(tuple(index_of[key] for key in earlier))
            tags.append(f"image {place}")
    require_items(queries, files, missing="images after the beginning of a document")
    return SearchTask(
        {"prefix": tuple(queries)},
        tuple(single(image) for image in gallery.values()),
        tuple(positives),
        tuple(excluded),
        tags=tuple(tags),
    )


def find_new_images(
    parts: Parts, keys_by_image: Mapping[ImageRef, str]
) -> list[tuple[int, tuple[str, ...]]]:
    """Return (position, keys of all earlier images) of every image that did not occur earlier."""
    new_images = []
    keys: list[str] = []
    for position, part in enumerate(parts):
        if isinstance(part, ImageRef) and keys_by_image[part] not in keys:
            new_images.append((position, tuple(keys)))
            keys.append(keys_by_image[part])
    return new_images


def shorten_prefix(parts: Parts) -> Parts:
    """Return the last `MAX_PREFIX_PARTS` parts, of texts the last `MAX_PREFIX_WORDS` words."""
    shortened: list[Part] = []
    for part in parts[-MAX_PREFIX_PARTS:]:
        if isinstance(part, str):
            shortened.append(" ".join(part.split()[-MAX_PREFIX_WORDS:]))
        else:
            shortened.append(part)
    return tuple(shortened)


# ------------------------------------------------------------------ classification


def load_classification(files: OfficialFiles) -> SearchTask:
    """Return the task of finding the kind of a picture, as `vlduet.classify` does, by R@1.

    The labels are the kinds of `kinds_of` in the corpus of the picture; their prompts are averaged
    over `TEMPLATES`. File hashes are stored in `files.hashes`; a missing or empty split, or no kind
    at all, raises DataError.
    """
    queries: list[WeightedParts] = []
    labels: list[str] = []
    targets: list[int] = []
    ranges: list[range] = []
    tags: list[str] = []
    for corpus in CORPORA:
        pictures = captioned_images(read_split(files, corpus))
        kinds = sorted({kinds_of(record)[0] for record, _ in pictures} - {""})
        corpus_labels = range(len(labels), len(labels) + len(kinds))
        for record, image in pictures:
            kind = kinds_of(record)[0]
            if kind:
                queries.append(single(image))
                targets.append(corpus_labels.start + kinds.index(kind))
                ranges.append(corpus_labels)
                tags.append(corpus)
        labels += kinds
    require_items(queries, files, missing="pictures of a kind")
    weight = 1 / len(TEMPLATES)
    documents = []
    for label in labels:
        documents.append(tuple((weight, (template.format(label),)) for template in TEMPLATES))
    all_labels = set(range(len(labels)))
    return SearchTask(
        {"image": tuple(queries)},
        tuple(documents),
        tuple(((target,),) for target in targets),
        tuple(tuple(sorted(all_labels - set(label_range))) for label_range in ranges),
        k=1,
        tags=tuple(tags),
    )
