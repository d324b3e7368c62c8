"""Stamps as two small knowledge bases, for retrieval-augmented generation.

    solved questions    "What kind of thing is this?" about a held-out image; the entries are
                        training images with the same question and its answer, found by image and
                        question, never by the answer
    documents           the same question about a named thing; the entries are one sentence about
                        every held-out thing, among them the one that answers

The four options are ranked by likelihood, so that the number shows what the reference is worth and
not how well a small model keeps to a form. Kinds of things are the folders of the corpus.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlduet.data.records import Record
from vlduet.errors import DataError
from vlduet.eval.benchmarks.builtin import captioned_images, draw_options, read_split
from vlduet.eval.benchmarks.knowledge import find_identical_images, prepend_references
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.tasks import KnowledgeEntry, Question, RagTask
from vlduet.eval.metrics import tokenize_answer

STAMPS_CORPUS = "stamps"
IMAGE_QUESTION = "What kind of thing is this?"
NUM_QUESTIONS = 60
"""Number of questions, drawn with the run's seed."""


def load_solved_questions(files: OfficialFiles) -> RagTask:
    """Read questions about the test split, with the training split as knowledge base."""
    return make_solved_question_task(
        read_split(files, STAMPS_CORPUS),
        read_split(files, STAMPS_CORPUS, split="train"),
        num_questions=NUM_QUESTIONS,
        seed=files.seed,
        k=files.k,
    )


def load_documents(files: OfficialFiles) -> RagTask:
    """Read questions about the test split, with sentences about the test split to retrieve."""
    records = read_split(files, STAMPS_CORPUS)
    return make_document_task(records, num_questions=NUM_QUESTIONS, seed=files.seed, k=files.k)


def make_solved_question_task(
    records: Sequence[Record],
    solved_records: Sequence[Record],
    *,
    num_questions: int,
    seed: int,
    k: int | None = None,
) -> RagTask:
    """Return multiple-choice questions for the kind of thing in an image, with retrieval.

    The knowledge base consists of such questions with their answers. Scores rank the options by
    likelihood. An entry is found by its image and question, and the prompt shows its question and
    answer as text. Entries with a question's correct kind are its positives; an entry with the same
    image is excluded for it.

    Args:
        records: stamps to ask about; one question per distinct first caption (see `_draw_records`).
        solved_records: stamps for the knowledge base; those without image or caption are left out.
        num_questions: maximum number of questions.
        seed: seed of the questions and their options.
        k: number of entries in a prompt; 1 for None.

    Raises:
        DataError: `records` have fewer than two kinds of things, or the knowledge base is empty.
    """
    chosen = _draw_records(records, num_questions=num_questions, seed=seed)
    solved_pairs = captioned_images(solved_records)
    if not solved_pairs:
        fix = "Put the training split beside the test split"
        raise DataError("an empty knowledge base", fix=fix)
    entries = []
    for record, image in solved_pairs:
        shown_text = f"Question: {IMAGE_QUESTION} Answer: {kind_of_thing(record)}"
        entries.append(KnowledgeEntry(record.id, ((image, IMAGE_QUESTION),), (shown_text,)))
    items = []
    positives = []
    for record, options, index in chosen:
        assert record.image is not None
        items.append(Question(record.id, (record.image, IMAGE_QUESTION), index, {}, options))
        kind = options[index]
        same_kind = [i for i, (other, _) in enumerate(solved_pairs) if kind_of_thing(other) == kind]
        positives.append(tuple(same_kind))
    images = [item.prompt[0] for item in items]
    return RagTask(
        items=tuple(items),
        query_views=tuple((item.prompt,) for item in items),
        entries=tuple(entries),
        build_prompt=prepend_references,
        score=None,
        excluded_entries=tuple(find_identical_images(images, [image for _, image in solved_pairs])),
        positives=tuple(positives),
        k=k or 1,
    )


def make_document_task(
    records: Sequence[Record], *, num_questions: int, seed: int, k: int | None = None
) -> RagTask:
    """Return multiple-choice questions for the kind of a named thing, without images.

    The knowledge base is one sentence about every distinct first caption of `records`, which names
    the thing and its kind; the sentence about the thing in question is its only positive. Options
    are ranked by likelihood.

    Args:
        records: stamps; questions are drawn among those with an image and a caption, entries need a
            caption only.
        num_questions: maximum number of questions.
        seed: seed of the questions and their options.
        k: number of entries in a prompt; 1 for None.

    Raises:
        DataError: records with an image and a caption have fewer than two kinds of things.
    """
    chosen = _draw_records(records, num_questions=num_questions, seed=seed)
    record_of = {normalized_caption(record): record for record in records if record.short}
    index_of = {caption: i for i, caption in enumerate(record_of)}
    entries = []
    for record in record_of.values():
        sentence = f"{name_of_thing(record)}: one of the {kind_of_thing(record)}."
        entries.append(KnowledgeEntry(record.id, ((sentence,),), (sentence,)))
    items = []
    for record, options, index in chosen:
        prompt = (f"What kind of thing is this: {name_of_thing(record)}?",)
        items.append(Question(record.id, prompt, index, {}, options))
    return RagTask(
        items=tuple(items),
        query_views=tuple((item.prompt,) for item in items),
        entries=tuple(entries),
        build_prompt=prepend_references,
        score=None,
        positives=tuple((index_of[normalized_caption(record)],) for record, _, _ in chosen),
        k=k or 1,
    )


def kind_of_thing(record: Record) -> str:
    """Return the kind of thing that a stamp shows: its top folder in the corpus."""
    return str(record.metadata["category"]).split("/")[0]


def name_of_thing(record: Record) -> str:
    """Return what a stamp shows: its first caption without the final punctuation."""
    return record.short[0].rstrip(".!? ")


def normalized_caption(record: Record) -> str:
    """Return the first caption in normalized words; equal ones mean the same thing."""
    return " ".join(tokenize_answer(record.short[0]))


def _draw_records(
    records: Sequence[Record], *, num_questions: int, seed: int
) -> list[tuple[Record, tuple[str, ...], int]]:
    """Draw records with an image and a caption, one per thing, and options for their kind.

    Things are the same if their `normalized_caption` is; the last record of a thing counts. At most
    `num_questions` are drawn, and returned in the order of the records.

    Returns:
        (record, up to four kinds of things as options, index of the record's own kind) triples.

    Raises:
        DataError: the records have fewer than two kinds of things.
    """
    random = np.random.default_rng(seed)
    usable = [record for record, _ in captioned_images(records)]
    distinct = list({normalized_caption(record): record for record in usable}.values())
    kinds = sorted({kind_of_thing(record) for record in distinct})
    if len(kinds) < 2:
        message = f"{len(distinct)} things of {len(kinds)} kinds"
        raise DataError(message, fix="Ask about records of two kinds or more")
    chosen = []
    for i in sorted(random.permutation(len(distinct))[:num_questions]):
        options, index = draw_options(random, kind_of_thing(distinct[i]), kinds)
        chosen.append((distinct[i], options, index))
    return chosen
