"""Questions on the held-out split of the corpus ``maps``: countries, regions and flags.

No question can be answered from its text: the options of a kind come from one map or one list, and
the accuracy without images is reported beside the accuracy with them. Only the kind ``place`` needs
nothing but the image; the others need what an atlas knows of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlduet.corpora.maps import PLACE_GRID
from vlduet.data.records import Parts, Record
from vlduet.eval.benchmarks.builtin import draw_options, read_split, score_captions
from vlduet.eval.benchmarks.knowledge import prepend_references
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.tasks import ChoiceTask, KnowledgeEntry, Question, RagTask

QUESTIONS_PER_KIND = 40
"""Maximum number of questions of one kind."""
PLACES = tuple(place for row in PLACE_GRID for place in row)
"""Names of the nine parts of an image, as the corpus spells them."""
REGION_QUESTION = "Which of the {divisions} of {territory} is shown in red?"
FLAG_CAPITAL_QUESTION = "What is the capital of the country whose flag this is?"
REGION_CAPITAL_QUESTION = "What is the capital of the region of {territory} that is shown in red?"

AtlasQuestion = tuple[Record, str, str, Sequence[str]]
"""(record with the image, question, correct answer, candidates of the other options)."""


def load_map_questions(files: OfficialFiles) -> ChoiceTask:
    """Return the questions of `_list_questions` on the test split, with up to four options each.

    At most `QUESTIONS_PER_KIND` of a kind, and the wrong options, are drawn with `files.seed`; a
    question without any wrong option is left out. Scores are broken down by the tag ``kind``, and
    the questions are asked without images too. The file hash is stored in `files.hashes`.

    Raises:
        DataError: the split is missing, broken or empty.
        AssertionError: a drawn record has no image.
    """
    random = np.random.default_rng(files.seed)
    items = []
    for kind, questions in _list_questions(read_split(files, "maps")).items():
        for n in sorted(random.permutation(len(questions))[:QUESTIONS_PER_KIND]):
            record, question, correct, candidates = questions[n]
            options, index = draw_options(random, correct, candidates)
            if len(options) > 1:
                assert record.image is not None
                prompt = (record.image, question)
                key = f"{kind}/{record.id}"
                items.append(Question(key, prompt, index, {"kind": kind}, options))
    return ChoiceTask(tuple(items), "kind", without_images_too=True)


def _list_questions(records: Sequence[Record]) -> dict[str, list[AtlasQuestion]]:
    """Return all questions by kind: ``place``, ``region``, ``map``, ``flag`` and ``capital``.

    Regions give ``place`` (where the position in the image is known) and ``region``, maps give
    ``map``, and flags of countries give ``flag`` and, with a known capital, ``capital``. A kind
    without questions has an empty list. The candidates of a question may contain its correct
    answer. A region whose map is not among `records`, or a missing metadata key, raises KeyError.
    """
    regions = _records_of_kind(records, "region")
    maps = _records_of_kind(records, "map")
    flags = _national_flags(records)
    region_names = {record.id.removeprefix("map/"): record.metadata["regions"] for record in maps}
    countries = sorted({record.metadata["territory"] for record in maps})
    flag_names = [record.metadata["name"] for record in flags]
    with_capital = [record for record in flags if "capital" in record.metadata]
    capitals = [record.metadata["capital"] for record in with_capital]
    questions: dict[str, list[AtlasQuestion]] = {
        kind: [] for kind in ("place", "region", "map", "flag", "capital")
    }
    for record in regions:
        facts = record.metadata
        if "place" in facts:
            question = "In which part of the picture is the red region?"
            questions["place"].append((record, question, facts["place"], PLACES))
        question = REGION_QUESTION.format(**facts)
        questions["region"].append((record, question, facts["name"], region_names[facts["map"]]))
    for record in maps:
        country = record.metadata["territory"]
        questions["map"].append((record, "What is this a map of?", country, countries))
    for record in flags:
        name = record.metadata["name"]
        questions["flag"].append((record, "Whose flag is this?", name, flag_names))
    for record in with_capital:
        capital = record.metadata["capital"]
        questions["capital"].append((record, FLAG_CAPITAL_QUESTION, capital, capitals))
    return questions


def _records_of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    """Return the records of a kind: ``map``, ``region`` or ``flag``."""
    return [record for record in records if record.metadata["kind"] == kind]


def _national_flags(records: Sequence[Record]) -> list[Record]:
    """Return the flags of countries, without those of regions."""
    flags = _records_of_kind(records, "flag")
    return [record for record in flags if "territory" not in record.metadata]


def load_capitals(files: OfficialFiles) -> RagTask:
    """Return questions for the capital of a region or country that is shown in an image.

    The knowledge base is one sentence about every capital of the test split; the image says which
    region or country is meant, the sentence what its capital is. A question has two views, its
    image and its text; both views of an entry are its sentence. At most `QUESTIONS_PER_KIND` flags
    of countries and as many regions are drawn with `files.seed`. Answers are scored by
    `score_captions`; `files.k` entries are shown, 1 by default. The file hash is stored in
    `files.hashes`.

    Raises:
        DataError: the split is missing, broken or empty.
        AssertionError: a drawn record has no image.
    """
    random = np.random.default_rng(files.seed)
    records = [record for record in read_split(files, "maps") if "capital" in record.metadata]
    entries: list[KnowledgeEntry] = []
    index_of: dict[str, int] = {}
    for record in records:
        text = format_capital_sentence(record)
        if text not in index_of:  # a region of two maps has one capital
            index_of[text] = len(entries)
            entries.append(KnowledgeEntry(record.id, ((text,), (text,)), (text,)))
    items: list[Question] = []
    query_views: list[tuple[Parts, ...]] = []
    positives: list[tuple[int, ...]] = []
    for kind, candidates, template in (
        ("flag", _national_flags(records), FLAG_CAPITAL_QUESTION),
        ("region", _records_of_kind(records, "region"), REGION_CAPITAL_QUESTION),
    ):
        for n in sorted(random.permutation(len(candidates))[:QUESTIONS_PER_KIND]):
            record = candidates[n]
            assert record.image is not None
            question = template.format(**record.metadata)
            prompt = (record.image, f"{question}\nAnswer with the name alone.")
            references = [record.metadata["capital"]]
            items.append(Question(record.id, prompt, references, {"kind": kind}, max_new_tokens=12))
            query_views.append(((record.image,), (question,)))
            positives.append((index_of[format_capital_sentence(record)],))
    return RagTask(
        items=tuple(items),
        query_views=tuple(query_views),
        entries=tuple(entries),
        build_prompt=prepend_references,
        score=score_captions,
        positives=tuple(positives),
        k=files.k or 1,
    )


def format_capital_sentence(record: Record) -> str:
    """Return a sentence such as "The capital of Ain in France is Bourg en Bresse."."""
    facts = record.metadata
    territory = f" in {facts['territory']}" if "territory" in facts else ""
    return f"The capital of {facts['name']}{territory} is {facts['capital']}."
