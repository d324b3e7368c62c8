"""Retrieval-augmented generation (Sugar): FVQA, and VizWiz and ScienceQA with retrieval.

Every task is answered without retrieval, with the model's own retrieval, and with an independent
retriever where one is given. The paper tells its splits, prompts and metrics only partly; the
loaders state what is chosen here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlduet.data.images import image_key, read_bytes
from vlduet.data.records import ImageRef, Part, Parts
from vlduet.errors import DataError
from vlduet.eval.answers import LETTERS, evalai_accuracy, rouge_l
from vlduet.eval.benchmarks import multiple_choice, vqa
from vlduet.eval.benchmarks.official_files import OfficialFiles, OfficialObject
from vlduet.eval.benchmarks.scores import BenchmarkScore, average
from vlduet.eval.benchmarks.tasks import (
    AnswerScorer,
    AnswerTexts,
    KnowledgeEntry,
    Question,
    RagTask,
)

REFERENCE_INSTRUCTION = (
    "If the reference information is useful, please use it. "
    "Otherwise, please ignore the reference information. Reference information: "
)
"""Instruction of Sugar's prompts."""

ROUGE_DETAILS = {"rouge": "ROUGE-L of the package rouge, as DEMON's"}


def prepend_references(item: Question, entries: Sequence[KnowledgeEntry]) -> Parts:
    """Return `REFERENCE_INSTRUCTION`, the entries, a line end, and the question's own prompt.

    Without entries it is the question's prompt alone.
    """
    if not entries:
        return item.prompt
    references = [part for entry in entries for part in entry.prompt_parts]
    return (REFERENCE_INSTRUCTION, *references, "\n", *item.prompt)


def best_rouge_values(items: Sequence[Question], answers: AnswerTexts) -> list[float]:
    """Return ROUGE-L (0 to 1) of every answer with its best reference; a missing answer is empty.

    A question without references, or another number of answers, raises ValueError.
    """
    values = []
    for item, text in zip(items, answers, strict=True):
        values.append(max(rouge_l(text or "", reference) for reference in item.reference))
    return values


# ------------------------------------------------------------------ FVQA

FVQA_FOLDER = "fvqa/new_dataset_release"
FVQA_INSTRUCTION = "Please answer the questions based on the pictures. "


def load_fvqa(files: OfficialFiles) -> RagTask:
    """Return FVQA's questions whose answer comes from the knowledge base (`ans_source` KB).

    The views of a question are its image and its text; both views of an entry are the text of its
    fact. The facts of a question that the knowledge base has are its positives. Answers are scored
    by ROUGE-L; `files.k` entries are shown, 1 by default. File hashes are stored in `files.hashes`;
    a missing file or image raises DataError.
    """
    entries = []
    for key, row in files.read_named_objects(
        f"{FVQA_FOLDER}/all_fact_triples_release.json"
    ).items():
        text = re.sub(r"\[\[|\]\]", "", str(row["surface"])).strip()
        text = text or f"{row['e1_label']} {row['r']} {row['e2_label']}"
        entries.append(KnowledgeEntry(key, ((text,), (text,)), (text,)))
    index_of = {entry.id: i for i, entry in enumerate(entries)}
    items: list[Question] = []
    query_views: list[tuple[Parts, ...]] = []
    positives: list[tuple[int, ...]] = []
    for key, row in files.read_named_objects(f"{FVQA_FOLDER}/all_qs_dict_release.json").items():
        if _get_either_spelling(row, "ans_source") != "KB":
            continue
        image = files.find_image(f"{FVQA_FOLDER}/images/{_get_either_spelling(row, 'img_file')}")
        fact_ids = _get_either_spelling(row, "fact")
        if isinstance(fact_ids, str):
            fact_ids = [fact_ids]
        items.append(Question(key, (image, row["question"]), [str(row["answer"])]))
        query_views.append(((image,), (row["question"],)))
        positives.append(tuple(index_of[name] for name in fact_ids if name in index_of))
    return RagTask(
        items=tuple(items),
        query_views=tuple(query_views),
        entries=tuple(entries),
        build_prompt=build_fvqa_prompt,
        score=score_fvqa,
        positives=tuple(positives),
        k=files.k or 1,
        details=ROUGE_DETAILS,
    )


def build_fvqa_prompt(item: Question, entries: Sequence[KnowledgeEntry]) -> Parts:
    """Return Sugar's prompt for a question whose prompt is (image, text).

    It is an instruction, the texts of the entries (joined by blanks, after the instruction on
    reference information), the image, and the question followed by a period. Without entries, their
    part is left out.
    """
    image, question = item.prompt
    if not entries:
        return (FVQA_INSTRUCTION, image, f" {question}.")
    knowledge = " ".join(str(part) for entry in entries for part in entry.prompt_parts)
    return (f"{FVQA_INSTRUCTION}{REFERENCE_INSTRUCTION}{knowledge} ", image, f" {question}.")


def score_fvqa(items: Sequence[Question], answers: AnswerTexts) -> BenchmarkScore:
    """Score ROUGE-L with the answer."""
    return BenchmarkScore({"ROUGE-L": average(best_rouge_values(items, answers))})


def _get_either_spelling(row: OfficialObject, key: str) -> Any:
    """Return the value of a key as the files spell it, or with blanks, as the README does."""
    spaced = key.replace("_", " ")
    return row[spaced] if spaced in row else row[key]


# ------------------------------------------------------------------ solved questions to retrieve


def load_vizwiz_rag(files: OfficialFiles) -> RagTask:
    """Return VizWiz val, with the solved questions of the training set as knowledge base.

    The answer of an entry is the most frequent one of its annotators; the first wins a tie.
    Questions are those of `vqa.load_vizwiz`, scored by accuracy alone. `files.k` entries are shown,
    1 by default. File hashes are stored in `files.hashes`; a missing file or image raises
    DataError.
    """
    items = vqa.load_vizwiz(files, split="val").items
    instructions = vqa.UNANSWERABLE_INSTRUCTION + vqa.SHORT_ANSWER_INSTRUCTION
    questions = [str(item.prompt[1]).removesuffix(instructions) for item in items]
    entries = []
    for row in files.read_objects("vizwiz/Annotations/train.json"):
        image = files.find_image(f"vizwiz/train/{row['image']}")
        answers = Counter(answer["answer"] for answer in row.get_objects("answers"))
        answer = answers.most_common(1)[0][0]
        entries.append(_solved_question(row["image"], image, row["question"], answer))
    scorer = vqa.make_accuracy_scorer(evalai_accuracy)
    return _make_solved_question_task(items, questions, entries, score=scorer, k=files.k)


def load_scienceqa_rag(files: OfficialFiles) -> RagTask:
    """Return ScienceQA-IMG, with the solved training questions that have an image to retrieve.

    Questions and scores are those of `multiple_choice.load_scienceqa`. An entry is answered by
    letter and option. `files.k` entries are shown, 1 by default. File hashes are stored in
    `files.hashes`; a missing file or image raises DataError.
    """
    problems = files.read_named_objects("scienceqa/problems.json")
    items = multiple_choice.load_scienceqa(files).items
    questions = [multiple_choice.format_scienceqa(problems[item.id]) for item in items]
    entries = []
    for key in files.read_object("scienceqa/pid_splits.json")["train"]:
        row = problems[key]
        if row.get("image"):
            image = files.find_image(f"scienceqa/images/train/{key}/image.png")
            question = multiple_choice.format_scienceqa(row)
            answer = f"{LETTERS[row['answer']]}. {row['choices'][row['answer']]}"
            entries.append(_solved_question(key, image, question, answer))
    scorer = multiple_choice.score_scienceqa
    return _make_solved_question_task(items, questions, entries, score=scorer, k=files.k)


def _solved_question(key: str, image: ImageRef, question: str, answer: str) -> KnowledgeEntry:
    """Return an entry that is found by its image and question, never by its answer.

    The prompt shows question and answer, without the image.
    """
    shown_text = f"Question: {question} Answer: {answer}"
    return KnowledgeEntry(key, ((image,), (question,)), (shown_text,))


def _make_solved_question_task(
    items: Sequence[Question],
    questions: Sequence[str],
    entries: Sequence[KnowledgeEntry],
    *,
    score: AnswerScorer,
    k: int | None,
) -> RagTask:
    """Return the task of answering questions with solved questions as knowledge base.

    The views of a question are its image and its text. An entry with the image of a question is
    excluded for it. The correct entries are unknown, so that retrieval is not scored.

    Args:
        items: questions whose prompt starts with an image.
        questions: their bare texts, by which they search beside the image.
        entries: solved questions, whose first view is an image.
        score: scorer of the answers.
        k: number of entries in a prompt; 1 for None.

    Raises:
        DataError: there are no entries.
    """
    if not entries:
        fix = "Put the training set beside the test set"
        raise DataError("an empty knowledge base", fix=fix)
    images = [item.prompt[0] for item in items]
    query_views = [((image,), (text,)) for image, text in zip(images, questions, strict=True)]
    entry_images = [entry.search_views[0][0] for entry in entries]
    return RagTask(
        items=tuple(items),
        query_views=tuple(query_views),
        entries=tuple(entries),
        build_prompt=prepend_references,
        score=score,
        excluded_entries=tuple(find_identical_images(images, entry_images)),
        k=k or 1,
    )


def find_identical_images(
    images: Sequence[Part], candidates: Sequence[Part]
) -> list[tuple[int, ...]]:
    """Return for each image the indices of the candidates with equal bytes, () for none.

    Only images of equal size are hashed. A text among the arguments raises AssertionError, a
    missing file FileNotFoundError.
    """
    candidates_by_size: dict[int, list[int]] = {}
    for i, candidate in enumerate(candidates):
        candidates_by_size.setdefault(_size_in_bytes(candidate), []).append(i)
    matches = []
    for image in images:
        nearby = candidates_by_size.get(_size_in_bytes(image), [])
        key = _content_key(image) if nearby else ""
        matches.append(tuple(i for i in nearby if _content_key(candidates[i]) == key))
    return matches


def _size_in_bytes(image: Part) -> int:
    """Return the size of an encoded image."""
    assert isinstance(image, ImageRef)
    return Path(image.path).stat().st_size if image.path else len(read_bytes(image))


def _content_key(image: Part) -> str:
    """Return the hash of an image's bytes."""
    assert isinstance(image, ImageRef)
    return image_key(image)
