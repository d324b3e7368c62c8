"""Questions on the test split of the corpus `maps`: what a picture of a country, of a region or of a flag tells.

No question can be answered from its words: the options of all kinds are drawn from one map or one list, and what a model
scores without the picture is told beside what it scores with it (`Choices.blind`). Only `place` asks nothing but the
picture; the others ask for what an atlas knows of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlduet.corpora.maps import PLACE_GRID
from vlduet.data.records import Parts, Record
from vlduet.eval.benchmarks.builtin import optioned, records, score_captions
from vlduet.eval.benchmarks.knowledge import referred
from vlduet.eval.benchmarks.source import Source
from vlduet.eval.benchmarks.tasks import Choices, Fact, Question, Rag

ASKED = 40
"""Questions of one kind."""
NINTHS = tuple(place for row in PLACE_GRID for place in row)
"""Parts of a picture, as the corpus calls them."""
CAPITAL_OF_FLAG = "What is the capital of the country whose flag this is?"
CAPITAL_OF_REGION = "What is the capital of the region of {territory} that is shown in red?"


def _of_kind(found: list[Record], kind: str) -> list[Record]:
    return [record for record in found if record.metadata["kind"] == kind]


def _national(found: list[Record]) -> list[Record]:
    """Flags of countries."""
    return [record for record in _of_kind(found, "flag") if "territory" not in record.metadata]


def questions(source: Source) -> Choices:
    """Five kinds of questions about one picture, with four options each, ranked by likelihood."""
    random = np.random.default_rng(source.seed)
    found = records(source, "maps")
    regions = _of_kind(found, "region")
    maps, flags = _of_kind(found, "map"), _national(found)
    named = {record.id.removeprefix("map/"): record.metadata["regions"] for record in maps}
    items: list[Question] = []

    def ask(kind: str, told: Sequence[tuple[Record, str, str, Sequence[str]]]) -> None:
        """Of (record, question, right answer, what may be offered beside it)."""
        for n in sorted(random.permutation(len(told))[:ASKED]):
            record, text, right, others = told[n]
            options, at = optioned(random, right, others)
            if len(options) > 1:
                assert record.image is not None
                items.append(
                    Question(
                        f"{kind}/{record.id}", (record.image, text), at, {"kind": kind}, options
                    )
                )

    where = "In which part of the picture is the red region?"
    ask(
        "place", [(r, where, r.metadata["place"], NINTHS) for r in regions if "place" in r.metadata]
    )
    which = "Which of the {divisions} of {territory} is shown in red?"
    ask(
        "region",
        [
            (r, which.format(**r.metadata), r.metadata["name"], named[r.metadata["map"]])
            for r in regions
        ],
    )
    lands = sorted({record.metadata["territory"] for record in maps})
    ask("map", [(r, "What is this a map of?", r.metadata["territory"], lands) for r in maps])
    names = [record.metadata["name"] for record in flags]
    ask("flag", [(r, "Whose flag is this?", r.metadata["name"], names) for r in flags])
    capitals = [record.metadata["capital"] for record in flags if "capital" in record.metadata]
    ask(
        "capital",
        [
            (r, CAPITAL_OF_FLAG, r.metadata["capital"], capitals)
            for r in flags
            if "capital" in r.metadata
        ],
    )
    return Choices(tuple(items), "kind", blind=True)


def knowledge(source: Source) -> Rag:
    """Capitals of regions and of countries, asked of a picture; the knowledge base is every capital of the test split.

    A question has two equal views, its picture and its words; a fact is a sentence and is found by it. The picture says
    which country or region is meant, the sentence says what its capital is.
    """
    random = np.random.default_rng(source.seed)
    known = [record for record in records(source, "maps") if "capital" in record.metadata]
    facts: list[Fact] = []
    number: dict[str, int] = {}
    for record in known:
        text = sentence(record)
        if text not in number:  # a region of two maps has one capital
            number[text] = len(facts)
            facts.append(Fact(record.id, ((text,), (text,)), (text,)))
    items: list[Question] = []
    queries: list[tuple[Parts, ...]] = []
    positives: list[tuple[int, ...]] = []
    for kind, asked, text in (
        ("flag", _national(known), CAPITAL_OF_FLAG),
        ("region", _of_kind(known, "region"), CAPITAL_OF_REGION),
    ):
        for n in sorted(random.permutation(len(asked))[:ASKED]):
            record = asked[n]
            assert record.image is not None
            question = text.format(**record.metadata)
            prompt = (record.image, f"{question}\nAnswer with the name alone.")
            items.append(
                Question(
                    record.id,
                    prompt,
                    [record.metadata["capital"]],
                    {"kind": kind},
                    max_new_tokens=12,
                )
            )
            queries.append(((record.image,), (question,)))
            positives.append((number[sentence(record)],))
    return Rag(
        items=tuple(items),
        queries=tuple(queries),
        facts=tuple(facts),
        prompt=referred,
        score=score_captions,
        positives=tuple(positives),
        k=source.k or 1,
    )


def sentence(record: Record) -> str:
    """ "The capital of Ain in France is Bourg en Bresse." """
    facts = record.metadata
    place = f" in {facts['territory']}" if "territory" in facts else ""
    return f"The capital of {facts['name']}{place} is {facts['capital']}."
