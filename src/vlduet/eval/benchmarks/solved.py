"""Stamps as two small knowledge bases: does a model answer better with what it finds itself, or what another finds for it?

    solved questions    "What kind of thing is this?" of a held-out image; what may be found are training images with the
                        same question and its answer. The key is image and question, never the answer.
    documents           the same of a thing that is named in words; what may be found is a sentence about every held-out
                        thing, among them the one that answers.

Four options, ranked by likelihood, so that the number says what the reference is worth and not how well a small model keeps
to a form. Kinds are the corpus' own folders.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlduet.data.records import Record
from vlduet.errors import DataError
from vlduet.eval.benchmarks.builtin import OPTIONS, records
from vlduet.eval.benchmarks.knowledge import referred, same_images
from vlduet.eval.benchmarks.source import Source
from vlduet.eval.benchmarks.tasks import Fact, Question, Rag
from vlduet.eval.metrics import normalized_words

CORPUS = "stamps"
QUESTION = "What kind of thing is this?"
ASKED = 60
"""Questions, drawn with the run's seed."""


def kind(record: Record) -> str:
    """The kind of thing that a stamp shows, by its folder."""
    return str(record.metadata["category"]).split("/")[0]


def thing(record: Record) -> str:
    """What a stamp shows, in words that fit into a question."""
    return record.short[0].rstrip(".!? ")


def examples(
    asked: Sequence[Record],
    solved: Sequence[Record],
    *,
    count: int,
    seed: int,
    k: int | None = None,
) -> Rag:
    """Held-out images, with solved questions to find.

    Args:
        asked: stamps that are asked about; `count` of them are drawn with `seed`.
        solved: stamps whose kind is told. One with the image of a question is never found for it.
        k: how many are shown, 1 unless told.

    Raises:
        DataError: nothing to ask, or nothing to find.
    """
    items, chosen = _asked(asked, count=count, seed=seed)
    known = [record for record in solved if record.image is not None and record.short]
    if not known:
        raise DataError(
            "an empty knowledge base", fix="Put the training split beside the test split"
        )
    pictures = [record.image for record in chosen if record.image is not None]
    facts = tuple(
        Fact(
            record.id,
            ((record.image, QUESTION),),
            (f"Question: {QUESTION} Answer: {kind(record)}",),
        )
        for record in known
        if record.image is not None
    )
    prompts = tuple((picture, QUESTION) for picture in pictures)
    return Rag(
        items=tuple(
            Question(item.id, parts, item.answer, item.tags, item.options)
            for item, parts in zip(items, prompts, strict=True)
        ),
        queries=tuple((parts,) for parts in prompts),
        facts=facts,
        prompt=referred,
        score=None,
        excluded=tuple(same_images(pictures, [fact.keys[0][0] for fact in facts])),
        positives=tuple(
            tuple(i for i, other in enumerate(known) if kind(other) == item.options[item.answer])
            for item in items
        ),
        k=k or 1,
    )


def documents(asked: Sequence[Record], *, count: int, seed: int, k: int | None = None) -> Rag:
    """Things that are named, with a sentence about each of them to find. Arguments and errors as in `examples`."""
    items, chosen = _asked(asked, count=count, seed=seed)
    told = list({normalized_caption(record): record for record in asked if record.short}.items())
    facts = tuple(
        Fact(record.id, ((text,),), (text,)) for _, record in told for text in (_sentence(record),)
    )
    number = {caption: i for i, (caption, _) in enumerate(told)}
    prompts = tuple((f"What kind of thing is this: {thing(record)}?",) for record in chosen)
    return Rag(
        items=tuple(
            Question(item.id, parts, item.answer, item.tags, item.options)
            for item, parts in zip(items, prompts, strict=True)
        ),
        queries=tuple((parts,) for parts in prompts),
        facts=facts,
        prompt=referred,
        score=None,
        positives=tuple((number[normalized_caption(record)],) for record in chosen),
        k=k or 1,
    )


def normalized_caption(record: Record) -> str:
    """What decides whether two stamps name one thing."""
    return " ".join(normalized_words(record.short[0]))


def _sentence(record: Record) -> str:
    return f"{thing(record)}: one of the {kind(record)}."


def _asked(
    records: Sequence[Record], *, count: int, seed: int
) -> tuple[list[Question], list[Record]]:
    """Questions without prompts, and their records: one a thing, with the options of each."""
    random = np.random.default_rng(seed)
    usable = [record for record in records if record.image is not None and record.short]
    things = list({normalized_caption(record): record for record in usable}.values())
    kinds = sorted({kind(record) for record in things})
    if len(kinds) < 2:
        raise DataError(
            f"{len(things)} things of {len(kinds)} kinds",
            fix="Ask about records of two kinds or more",
        )
    chosen = [things[i] for i in sorted(random.permutation(len(things))[:count])]
    items = []
    for record in chosen:
        others = [each for each in kinds if each != kind(record)]
        drawn = [others[i] for i in random.permutation(len(others))[: OPTIONS - 1]]
        at = int(random.integers(len(drawn) + 1))
        items.append(Question(record.id, (), at, {}, (*drawn[:at], kind(record), *drawn[at:])))
    return items, chosen


def with_examples(source: Source) -> Rag:
    """The built-in suite's: the test split, with the training split to find."""
    return examples(
        records(source, CORPUS),
        records(source, CORPUS, split="train"),
        count=ASKED,
        seed=source.seed,
        k=source.k,
    )


def with_documents(source: Source) -> Rag:
    """The built-in suite's: the test split asks, and is found."""
    return documents(records(source, CORPUS), count=ASKED, seed=source.seed, k=source.k)
