"""The held-out splits of the corpora that packages bring: both sides of the bargain with nothing to download by hand.

Retrieval, next image of a document, minimal pairs, questions made by template, captions, and a probe of positions. Options
and distractors are drawn with the run's seed. Nobody else reports these numbers: they compare checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vlduet.data.images import image_key
from vlduet.data.records import ImageRef, Record, read_jsonl
from vlduet.errors import DataError
from vlduet.eval.benchmarks.compositional import winoground_rule
from vlduet.eval.benchmarks.retrieval import both_ways
from vlduet.eval.benchmarks.source import Source
from vlduet.eval.benchmarks.tasks import (
    Answers,
    Choices,
    Pair,
    Pairs,
    Question,
    Questions,
    Score,
    Search,
    sample,
)
from vlduet.eval.metrics import exact_match, normalized_words, token_f1

OPTIONS = 4
CONTEXT = 6
"""Parts of a document before the image that is looked for."""
PROBED, SHOWN = 8, 6
"""Prompts of the position probe, and images of one."""
ASKED = 60
"""Questions of one kind: the suite shall take minutes on a CPU."""


def records(source: Source, corpus: str, *, split: str = "test") -> list[Record]:
    """A split of a corpus, hashed. Raises DataError where it is not there or empty."""
    name = f"corpora/{corpus}/{split}.jsonl"
    source.bytes(name)
    found = list(read_jsonl(source.path(name)))
    if not found:
        raise DataError(
            "no records", place=source.path(name), fix=f"Run 'vlduet data fetch {corpus}' again"
        )
    return found


# ------------------------------------------------------------------ discriminative


def retrieval(*corpora: str, long: bool = False) -> Callable[[Source], Search]:
    """A loader: captions against images and back; equal captions are one query with several right images."""

    def load(source: Source) -> Search:
        images: list[ImageRef] = []
        texts: list[tuple[int, str]] = []
        for record in (record for corpus in corpora for record in records(source, corpus)):
            told = [record.long] if long else list(record.short)
            if record.image is not None and told and told[0]:
                texts += [(len(images), text) for text in told if text]
                images.append(record.image)
        return both_ways(images, texts, unique=True)

    return load


def next_image(*corpora: str) -> Callable[[Source], Search]:
    """A loader: the parts of a document before an image, against every image of the corpora.

    One query a document: its last image that has not been seen before in it. What the query shows may not be found.
    """

    def load(source: Source) -> Search:
        gallery: dict[str, int] = {}
        documents: list[ImageRef] = []
        queries, positives, excluded = [], [], []
        for record in (record for corpus in corpora for record in records(source, corpus)):
            keys = {n: image_key(p) for n, p in enumerate(record.parts) if isinstance(p, ImageRef)}
            for n, key in keys.items():
                if key not in gallery:
                    gallery[key] = len(documents)
                    documents.append(record.parts[n])  # type: ignore[arg-type]
            fresh = [
                n for n, key in keys.items() if n and key not in [keys[m] for m in keys if m < n]
            ]
            if fresh:
                begin = max(0, fresh[-1] - CONTEXT)
                queries.append(record.parts[begin : fresh[-1]])
                positives.append((gallery[keys[fresh[-1]]],))
                excluded.append(tuple({gallery[keys[n]] for n in keys if begin <= n < fresh[-1]}))
        if not queries:
            raise DataError(
                "no document with an image after its beginning",
                place=source.root,
                fix="Fetch the corpora",
            )
        return Search(
            tuple(queries), tuple((i,) for i in documents), tuple(positives), tuple(excluded)
        )

    return load


def minimal_pairs(corpus: str, group: str) -> Callable[[Source], Pairs]:
    """A loader: two items of one group (`metadata`) whose captions differ in one word, judged as Winoground is."""

    def load(source: Source) -> Pairs:
        items = one_word_apart(records(source, corpus), group)
        if not items:
            raise DataError(
                "no two captions differ in one word", place=source.root, fix=f"Fetch {corpus}"
            )
        return Pairs(tuple(items), winoground_rule)

    return load


def one_word_apart(found: Sequence[Record], group: str) -> list[Pair]:
    """Every two records of one group and vendor whose captions differ in one word.

    Names with a colon ("flag: Norway") are left out: what they share is their kind and not their words.
    """
    kept = [r for r in found if r.image is not None and r.short and ":" not in r.short[0]]
    told = [(record, normalized_words(record.short[0])) for record in kept]
    items = []
    for n, (one, words) in enumerate(told):
        for other, others in told[n + 1 :]:
            same = one.metadata.get(group) == other.metadata.get(group)
            vendor = one.metadata.get("vendor") == other.metadata.get("vendor")
            if same and vendor and differ_in_one(words, others):
                assert one.image is not None and other.image is not None
                texts, images = (one.short[0], other.short[0]), (one.image, other.image)
                items.append(Pair(f"{one.id}|{other.id}", texts, images))
    return items


def differ_in_one(words: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two captions of equal length differ in exactly one word, and share one."""
    return (
        len(words) == len(others) > 1
        and sum(a != b for a, b in zip(words, others, strict=True)) == 1
    )


# ------------------------------------------------------------------ generative


def template_questions(source: Source) -> Choices:
    """Questions about one image with four options, ranked by likelihood: what the metadata of a corpus knows."""
    random = np.random.default_rng(source.seed)
    asked: list[tuple[str, str, ImageRef, str, list[str]]] = []

    def ask(kind: str, text: str, told: list[tuple[Record, str]]) -> None:
        values = sorted({value for _, value in told})
        for n in sorted(random.permutation(len(told))[:ASKED]):
            record, value = told[n]
            assert record.image is not None
            asked.append((kind, text, record.image, value, values))

    units = records(source, "wesnoth")
    for key, text in (
        ("race", "Which race is this unit of?"),
        ("alignment", "Which alignment does this unit have?"),
    ):
        ask(f"wesnoth {key}", text, [(r, str(r.metadata[key])) for r in units if key in r.metadata])
    emoji = [
        record for record in records(source, "emoji") if record.metadata["vendor"] == "openmoji"
    ]
    ask("emoji group", "What kind of thing is this?", [(r, r.metadata["group"]) for r in emoji])
    stamps = records(source, "stamps")
    ask(
        "stamps category",
        "What kind of thing is this?",
        [(r, r.metadata["category"].split("/")[0]) for r in stamps],
    )
    items = []
    for n, (kind, text, image, value, others) in enumerate(asked):
        options, at = optioned(random, value, others)
        if len(options) > 1:
            items.append(Question(f"{kind}/{n}", (image, text), at, {"kind": kind}, options))
    return Choices(tuple(items), "kind", blind=True)


def optioned(
    random: np.random.Generator, right: str, others: Sequence[str]
) -> tuple[tuple[str, ...], int]:
    """(at most OPTIONS distinct options in a random order, where the right one stands)."""
    wrong = sorted(set(others) - {right})
    drawn = [wrong[i] for i in random.permutation(len(wrong))[: OPTIONS - 1]]
    at = int(random.integers(len(drawn) + 1))
    return (*drawn[:at], right, *drawn[at:]), at


def captions(corpus: str) -> Callable[[Source], Questions]:
    """A loader: captions, written as the model was trained to (an image alone), compared with the references."""

    def load(source: Source) -> Questions:
        kept = [
            record
            for record in records(source, corpus)
            if record.image is not None and record.short
        ]
        items = [
            Question(r.id, (r.image,), list(r.short), max_new_tokens=24) for r in kept if r.image
        ]
        return Questions(tuple(items), score_captions)

    return load


def score_captions(items: Sequence[Question], answers: Answers) -> Score:
    """Word F1 and exact match with the nearest reference; one caption for everything shows in `distinct`."""
    pairs = [(text or "", item.answer) for item, text in zip(items, answers, strict=True)]
    samples = {
        "token_F1": sample([token_f1(text, references) for text, references in pairs]),
        "exact": sample([exact_match(text, references) for text, references in pairs]),
    }
    return Score(
        samples, facts={"distinct": len({" ".join(normalized_words(text)) for text, _ in pairs})}
    )


def caption_choice(corpus: str) -> Callable[[Source], Choices]:
    """A loader: the own caption among three others, by likelihood after the image: what a captioner sees."""

    def load(source: Source) -> Choices:
        random = np.random.default_rng(source.seed)
        kept = [
            record
            for record in records(source, corpus)
            if record.image is not None and record.short
        ]
        every = sorted({record.short[0] for record in kept})
        items = []
        for record in kept:
            assert record.image is not None
            others = [
                caption
                for caption in every
                if normalized_words(caption) != normalized_words(record.short[0])
            ]
            options, at = optioned(random, record.short[0], others)
            items.append(Question(record.id, (record.image,), at, {}, options))
        return Choices(tuple(items))

    return load


def position_probe(source: Source) -> Choices:
    """`shown_again` on stamps; without the images, too: all that is left is a liking for a caption or for its place."""
    items = shown_again(
        records(source, "stamps"), prompts=PROBED, seed=source.seed, place=source.root
    )
    return Choices(tuple(items), "place", blind=True)


def shown_again(
    records: Sequence[Record], *, prompts: int, seed: int, place: Path
) -> list[Question]:
    """Six images with their captions, then one of them again: which of the six captions is it?

    All six of a prompt are asked of, so each place is right equally often. What accuracy loses by the place is what gets
    lost in the middle. Raises DataError at `place` where there are fewer captions.
    """
    random = np.random.default_rng(seed)
    kept = list({r.short[0]: r.image for r in records if r.image is not None and r.short}.items())
    if len(kept) < SHOWN:
        raise DataError(
            f"only {len(kept)} captions, {SHOWN} needed", place=place, fix="Fetch stamps"
        )
    items = []
    for n in range(prompts):
        told = [kept[i] for i in random.permutation(len(kept))[:SHOWN]]
        parts = [part for caption, image in told for part in (image, f"This is: {caption}\n")]
        captions = tuple(caption for caption, _ in told)
        for at, (_, image) in enumerate(told):
            asked = (*parts, image, "What is this?")
            items.append(Question(f"{n}/{at + 1}", asked, at, {"place": str(at + 1)}, captions))
    return items
