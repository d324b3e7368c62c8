"""Questions with short answers: VQAv2, GQA, VizWiz, TextVQA. Prompts are LLaVA-1.5's, which VILA and Sugar share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from vlduet.errors import DataError
from vlduet.eval.answers import evalai, evalai_accuracy, vqa_accuracy
from vlduet.eval.benchmarks.source import UNCHANGED, Fields, Source
from vlduet.eval.benchmarks.tasks import (
    Answers,
    Export,
    Question,
    Questions,
    Score,
    Scorer,
    by_tag,
    sample,
)

SHORT = "\nAnswer the question using a single word or phrase."
UNSURE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def scored(metric: Callable[[str, Any], float], *tags: str) -> Scorer:
    """A scorer of one number an item, a missing answer being the empty text, broken down by tags."""

    def score(items: Sequence[Question], answers: Answers) -> Score:
        values = [
            metric(text or "", item.answer) for item, text in zip(items, answers, strict=True)
        ]
        samples = {"accuracy": sample(values)}
        for tag in tags:
            samples |= by_tag(values, [item.tags[tag] for item in items], prefix=f"accuracy/{tag}/")
        return Score(samples)

    return score


def exported(name: str, row: Callable[[Question, str], dict[str, Any]]) -> Export:
    """A submission file: a JSON list with one object an item; a missing answer is the empty text, as LLaVA submits it."""

    def export(items: Sequence[Question], answers: Answers) -> dict[str, bytes]:
        rows = [row(item, text or "") for item, text in zip(items, answers, strict=True)]
        return {name: json.dumps(rows).encode()}

    return export


# ------------------------------------------------------------------ VQAv2

VQAV2 = {
    "val": ("v2_OpenEnded_mscoco_val2014_questions.json", "val2014"),
    "testdev": ("v2_OpenEnded_mscoco_test-dev2015_questions.json", "test2015"),
    "test": ("v2_OpenEnded_mscoco_test2015_questions.json", "test2015"),
}
VQAV2_ANSWERS = "vqav2/v2_mscoco_val2014_annotations.json"


def vqav2(split: str) -> Callable[[Source], Questions]:
    """A loader of val (scored), testdev or test (exported for the server)."""
    file, images = VQAV2[split]

    def load(source: Source) -> Questions:
        known = _vqav2_answers(source) if split == "val" else {}
        items = []
        for row in source.object(f"vqav2/{file}").each("questions"):
            image = source.image(f"coco/{images}/COCO_{images}_{row['image_id']:012d}.jpg")
            answer, tags = None, {}
            if split == "val":
                if row["question_id"] not in known:
                    raise DataError(
                        f"question {row['question_id']} has no annotation",
                        place=row.place,
                        fix=UNCHANGED,
                    )
                told = known[row["question_id"]]
                answer = [one["answer"] for one in told.each("answers")]
                tags = {"answer_type": told["answer_type"], "question_type": told["question_type"]}
            items.append(
                Question(str(row["question_id"]), (image, row["question"] + SHORT), answer, tags)
            )
        export = exported(
            "vqav2.json", lambda item, text: {"question_id": int(item.id), "answer": evalai(text)}
        )
        score = (
            scored(vqa_accuracy_of_llava, "answer_type", "question_type")
            if split == "val"
            else None
        )
        return Questions(tuple(items), score, export)

    return load


def vqa_accuracy_of_llava(prediction: str, answers: Sequence[str]) -> float:
    """The official accuracy of what LLaVA submits: the answer after the EvalAI processor."""
    return vqa_accuracy(evalai(prediction), answers)


def _vqav2_answers(source: Source) -> dict[int, Fields]:
    return {row["question_id"]: row for row in source.object(VQAV2_ANSWERS).each("annotations")}


# ------------------------------------------------------------------ GQA


def gqa(source: Source) -> Questions:
    """testdev_balanced: 12,578 questions, exact match after LLaVA's rstrip of periods and lower case."""
    items = []
    for key, row in source.entries("gqa/testdev_balanced_questions.json").items():
        if row.get("isBalanced", True):
            image = source.image(f"gqa/images/{row['imageId']}.jpg")
            kind = "open" if row.within("types")["structural"] == "query" else "binary"
            items.append(
                Question(key, (image, row["question"] + SHORT), row["answer"], {"kind": kind})
            )
    export = exported(
        "gqa.json", lambda item, text: {"questionId": item.id, "prediction": gqa_prediction(text)}
    )
    return Questions(tuple(items), scored(gqa_match, "kind"), export)


def gqa_prediction(text: str) -> str:
    """LLaVA's: no period at the end, lower case; nothing else."""
    return text.rstrip(".").lower()


def gqa_match(prediction: str, answer: str) -> float:
    """1 where the prediction equals the answer."""
    return float(gqa_prediction(prediction) == answer)


# ------------------------------------------------------------------ VizWiz


def vizwiz(split: str) -> Callable[[Source], Questions]:
    """A loader of val (scored as TextVQA is) or test (exported for the server)."""

    def load(source: Source) -> Questions:
        items = []
        for row in source.items(f"vizwiz/Annotations/{split}.json"):
            image = source.image(f"vizwiz/{split}/{row['image']}")
            answers = [one["answer"] for one in row.each("answers")] if split == "val" else None
            tags = {"answer_type": row["answer_type"]} if split == "val" else {}
            items.append(
                Question(row["image"], (image, row["question"] + UNSURE + SHORT), answers, tags)
            )
        export = exported(
            "vizwiz.json", lambda item, text: {"image": item.id, "answer": evalai(text)}
        )
        return Questions(
            tuple(items), scored(evalai_accuracy, "answer_type") if split == "val" else None, export
        )

    return load


# ------------------------------------------------------------------ TextVQA


def textvqa(*, ocr: bool) -> Callable[[Source], Questions]:
    """A loader of val; the papers show the model the OCR tokens of Rosetta."""

    def load(source: Source) -> Questions:
        tokens: dict[str, list[str]] = {}
        if ocr:
            rows = source.object("textvqa/TextVQA_Rosetta_OCR_v0.2_val.json").each("data")
            tokens = {row["image_id"]: row["ocr_tokens"] for row in rows}
        items = []
        for row in source.object("textvqa/TextVQA_0.5.1_val.json").each("data"):
            image = source.image(
                *(f"textvqa/train_images/{row['image_id']}{s}" for s in (".jpg", ".png"))
            )
            if len(row["answers"]) != 10:
                raise DataError(
                    f"{len(row['answers'])} answers, 10 needed",
                    place=row.place.with_field("answers"),
                    fix=UNCHANGED,
                )
            reference = (
                f"\nReference OCR token: {', '.join(tokens.get(row['image_id'], []))}"
                if ocr
                else ""
            )
            items.append(
                Question(
                    str(row["question_id"]),
                    (image, row["question"] + reference + SHORT),
                    row["answers"],
                )
            )
        return Questions(tuple(items), scored(evalai_accuracy), facts={"ocr": ocr})

    return load
