"""Questions with short answers: VQAv2, GQA, VizWiz, TextVQA.

The prompts are those of LLaVA-1.5, which VILA and Sugar share.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from vlduet.eval.answers import evalai_accuracy, normalize_evalai, vqa_accuracy
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.scores import BenchmarkScore, average, average_by_tag
from vlduet.eval.benchmarks.tasks import (
    AnswerScorer,
    AnswerTask,
    AnswerTexts,
    Question,
    SubmissionExport,
)

SHORT_ANSWER_INSTRUCTION = "\nAnswer the question using a single word or phrase."
UNANSWERABLE_INSTRUCTION = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
)


def make_accuracy_scorer(metric: Callable[[str, Any], float], *tags: str) -> AnswerScorer:
    """Return a scorer of the mean of a metric x 100, broken down by tags.

    In the scorer, no items raise AssertionError, and an item without one of the tags KeyError.

    Args:
        metric: (answer, reference) -> value between 0 and 1; a missing answer is the empty text.
        tags: tags of the questions; numbers are named ``accuracy`` and ``accuracy/TAG/VALUE``.
    """

    def score_answers(items: Sequence[Question], answers: AnswerTexts) -> BenchmarkScore:
        """Return the mean of the metric over all questions, and by every value of every tag."""
        pairs = zip(items, answers, strict=True)
        values = [metric(text or "", item.reference) for item, text in pairs]
        samples = {"accuracy": average(values)}
        for tag in tags:
            tag_values = [item.tags[tag] for item in items]
            samples |= average_by_tag(values, tag_values, prefix=f"accuracy/{tag}/")
        return BenchmarkScore(samples)

    return score_answers


def make_json_export(
    file_name: str, make_row: Callable[[Question, str], dict[str, Any]]
) -> SubmissionExport:
    """Return an export to one JSON list, `file_name`, with the `make_row` of every question.

    `make_row` receives the question and its answer. A missing answer is submitted as the empty
    text, as LLaVA does. The export returns the content and writes no file.
    """

    def export_answers(items: Sequence[Question], answers: AnswerTexts) -> dict[str, bytes]:
        pairs = zip(items, answers, strict=True)
        rows = [make_row(item, text or "") for item, text in pairs]
        return {file_name: json.dumps(rows).encode()}

    return export_answers


def load_vqav2(
    files: OfficialFiles, *, questions: str, images: str, annotations: str | None = None
) -> AnswerTask:
    """Return a split of VQAv2, scored by VQA accuracy and by ``answer_type`` and ``question_type``.

    Answers are exported as ``vqav2.json``, EvalAI-normalized. File hashes are stored in
    `files.hashes`.

    Args:
        files: data folder.
        questions: file of questions in ``vqav2/``.
        images: name of the COCO image set in ``coco/``, such as ``val2014``.
        annotations: file of answers in ``vqav2/``; None where only the server knows them, and the
            task has no score.

    Raises:
        DataError: a file or image is missing, or a question has no annotation.
    """
    answers_of: dict[int, list[str]] = {}
    tags_of: dict[int, dict[str, str]] = {}
    if annotations is not None:
        for row in files.read_object(f"vqav2/{annotations}").get_objects("annotations"):
            key = row["question_id"]
            answers_of[key] = [answer["answer"] for answer in row.get_objects("answers")]
            tags_of[key] = {tag: row[tag] for tag in ("answer_type", "question_type")}
    items = []
    for row in files.read_object(f"vqav2/{questions}").get_objects("questions"):
        key = row["question_id"]
        if annotations is not None and key not in answers_of:
            raise row.make_error(f"question {key} has no annotation")
        image = files.find_image(f"coco/{images}/COCO_{images}_{row['image_id']:012d}.jpg")
        prompt = (image, row["question"] + SHORT_ANSWER_INSTRUCTION)
        items.append(Question(str(key), prompt, answers_of.get(key), tags_of.get(key, {})))
    scorer = make_accuracy_scorer(llava_vqa_accuracy, "answer_type", "question_type")
    return AnswerTask(
        tuple(items),
        scorer if annotations is not None else None,
        make_json_export(
            "vqav2.json",
            lambda item, text: {"question_id": int(item.id), "answer": normalize_evalai(text)},
        ),
    )


def llava_vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the official VQA accuracy of what LLaVA submits: the EvalAI-normalized answer."""
    return vqa_accuracy(normalize_evalai(answer), references)


def load_gqa(files: OfficialFiles) -> AnswerTask:
    """Return GQA testdev_balanced: 12,578 questions, exact match as LLaVA compares.

    Rows that say they are not balanced are left out. The tag ``kind`` is ``open`` or ``binary``.
    Answers are exported as ``gqa.json``. File hashes are stored in `files.hashes`; a missing file
    or image raises DataError.
    """
    items = []
    for key, row in files.read_named_objects("gqa/testdev_balanced_questions.json").items():
        if not row.get("isBalanced", True):
            continue
        image = files.find_image(f"gqa/images/{row['imageId']}.jpg")
        is_open = row.get_object("types")["structural"] == "query"
        prompt = (image, row["question"] + SHORT_ANSWER_INSTRUCTION)
        tags = {"kind": "open" if is_open else "binary"}
        items.append(Question(key, prompt, row["answer"], tags))
    export = make_json_export(
        "gqa.json",
        lambda item, text: {"questionId": item.id, "prediction": normalize_gqa(text)},
    )
    return AnswerTask(tuple(items), make_accuracy_scorer(gqa_exact_match, "kind"), export)


def normalize_gqa(text: str) -> str:
    """Return LLaVA's normalization: no periods at the end, lower case, nothing else."""
    return text.rstrip(".").lower()


def gqa_exact_match(answer: str, reference: str) -> float:
    """Return 1.0 where the normalized answer equals the reference, else 0.0."""
    return float(normalize_gqa(answer) == reference)


def load_vizwiz(files: OfficialFiles, *, split: str) -> AnswerTask:
    """Return a split of VizWiz: ``val`` (scored as TextVQA is) or any other, which has no score.

    Scores are broken down by ``answer_type``. Answers are exported as ``vizwiz.json``,
    EvalAI-normalized. File hashes are stored in `files.hashes`; a missing file or image raises
    DataError.
    """
    has_answers = split == "val"
    items = []
    for row in files.read_objects(f"vizwiz/Annotations/{split}.json"):
        image = files.find_image(f"vizwiz/{split}/{row['image']}")
        references, tags = None, {}
        if has_answers:
            references = [answer["answer"] for answer in row.get_objects("answers")]
            tags = {"answer_type": row["answer_type"]}
        text = row["question"] + UNANSWERABLE_INSTRUCTION + SHORT_ANSWER_INSTRUCTION
        items.append(Question(row["image"], (image, text), references, tags))
    scorer = make_accuracy_scorer(evalai_accuracy, "answer_type")
    export = make_json_export(
        "vizwiz.json", lambda item, text: {"image": item.id, "answer": normalize_evalai(text)}
    )
    return AnswerTask(tuple(items), scorer if has_answers else None, export)


def load_textvqa(files: OfficialFiles, *, with_ocr_tokens: bool) -> AnswerTask:
    """Return TextVQA val, scored by the accuracy of EvalAI-normalized answers.

    File hashes are stored in `files.hashes`.

    Args:
        files: data folder.
        with_ocr_tokens: add Rosetta's OCR tokens of the image to the prompt, as the papers do; none
            for an image that the file of tokens lacks.

    Raises:
        DataError: a file or image is missing, or a question does not have ten answers.
    """
    ocr_tokens: dict[str, list[str]] = {}
    if with_ocr_tokens:
        rows = files.read_object("textvqa/TextVQA_Rosetta_OCR_v0.2_val.json").get_objects("data")
        ocr_tokens = {row["image_id"]: row["ocr_tokens"] for row in rows}
    items = []
    for row in files.read_object("textvqa/TextVQA_0.5.1_val.json").get_objects("data"):
        stem = f"textvqa/train_images/{row['image_id']}"
        image = files.find_image(f"{stem}.jpg", f"{stem}.png")
        if len(row["answers"]) != 10:
            raise row.make_error(f"{len(row['answers'])} answers, 10 needed", "answers")
        text = row["question"]
        if with_ocr_tokens:
            text += f"\nReference OCR token: {', '.join(ocr_tokens.get(row['image_id'], []))}"
        prompt = (image, text + SHORT_ANSWER_INSTRUCTION)
        items.append(Question(str(row["question_id"]), prompt, row["answers"]))
    scorer = make_accuracy_scorer(evalai_accuracy)
    return AnswerTask(tuple(items), scorer, details={"ocr": with_ocr_tokens})
