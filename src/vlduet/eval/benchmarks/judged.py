"""Answers that another model reads: LLaVA-Bench-in-the-Wild and MM-Vet, asked and parsed as officially.

The judge is any function (prompt, temperature) -> text; its reviews are kept, and stored reviews are scored without one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from vlduet.data.records import Parts
from vlduet.eval.benchmarks.source import Source
from vlduet.eval.benchmarks.tasks import (
    Answers,
    Ask,
    Judged,
    Question,
    Sample,
    Score,
    by_tag,
    sample,
)

# ------------------------------------------------------------------ LLaVA-Bench

CATEGORIES = {
    "conv": "llava_bench_conv",
    "detail": "llava_bench_detail",
    "complex": "llava_bench_complex",
}
LLAVA_JUDGE = {
    "model": "gpt-4-0314",
    "max_tokens": 1024,
    "system": "You are a helpful and precise assistant for checking the quality of the answer.",
}


def llava_bench(source: Source) -> Judged:
    """60 questions on 24 images; the judge compares with GPT-4's text-only answers."""
    contexts = {row["image"]: row["caption"] for row in source.lines("llava_bench/context.jsonl")}
    references = {
        row["question_id"]: row["text"] for row in source.lines("llava_bench/answers_gpt4.jsonl")
    }
    rules = source.entries("llava_bench/rule.json")
    items = []
    for row in source.lines("llava_bench/questions.jsonl"):
        captions = contexts.get(row["image"], "")
        told = {
            "context": "\n".join(captions) if isinstance(captions, list) else captions,
            "reference": references[row["question_id"]],
            "rule": rules[CATEGORIES[row["category"]]]["prompt"],
        }
        parts: Parts = (source.image(f"llava_bench/images/{row['image']}"), row["text"])
        identity, tags = str(row["question_id"]), {"category": row["category"]}
        items.append(Question(identity, parts, told, tags, max_new_tokens=1024))
    return Judged(
        tuple(items), llava_review, score_llava_bench, {**LLAVA_JUDGE, "temperature": 0.2}
    )


def llava_prompt(item: Question, answer: str) -> str:
    """What the judge reads."""
    told = item.answer
    return (
        f"[Context]\n{told['context']}\n\n[Question]\n{item.parts[-1]}\n\n[Assistant 1]\n{told['reference']}\n\n"
        f"[End of Assistant 1]\n\n[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n[System]\n{told['rule']}\n\n"
    )


def llava_review(item: Question, answer: str, ask: Ask) -> str:
    """One request."""
    return ask(llava_prompt(item, answer), 0.2)


def llava_pair(review: str) -> tuple[float, float]:
    """(reference's, model's) score in the first line; (-1, -1) where there are not exactly two numbers."""
    words = review.split("\n", maxsplit=1)[0].replace(",", " ").split(" ")
    try:
        one, other = (float(word) for word in words)
    except ValueError:
        return -1.0, -1.0
    return one, other


def score_llava_bench(items: Sequence[Question], reviews: Sequence[str | None]) -> Score:
    """A category's score is 100 x mean(model) / mean(reference); a review that cannot be read stays in as (-1, -1).

    `relative/...` is that ratio, of all questions first; `model/...` and `reference/...` are the means x 10.
    """
    pairs = [llava_pair(text or "") for text in reviews]
    groups = {"all": list(range(len(items)))}
    for n, item in enumerate(items):
        groups.setdefault(item.tags["category"], []).append(n)
    samples: dict[str, Sample] = {}
    for name, members in groups.items():
        ours, theirs = (np.array([pairs[n][side] for n in members]) for side in (1, 0))
        # A ratio of means is a mean weighted by the reference's scores; those of 0 carry no weight and no value.
        safe = np.where(theirs == 0, 1e-9, theirs)
        samples[f"relative/{name}"] = sample(ours / safe, safe)
    for name, members in groups.items():
        samples[f"model/{name}"] = sample([pairs[n][1] for n in members], scale=10)
        samples[f"reference/{name}"] = sample([pairs[n][0] for n in members], scale=10)
    unparsed = sum(
        pair == (-1.0, -1.0) and text is not None for pair, text in zip(pairs, reviews, strict=True)
    )
    return Score(
        samples, unparsed=unparsed, facts={"reviews": sum(text is not None for text in reviews)}
    )


# ------------------------------------------------------------------ MM-Vet

MMVET_JUDGE = {"model": "gpt-4-0613", "max_tokens": 3, "temperature": 0.0}
AGAIN = "\nPredict the correctness of the answer (digit): "
TRIES = 5

_MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and "
    "Greenland are misleading. Despite its name, Iceland is known for its beautiful green landscapes, while Greenland is "
    "mostly covered in ice and snow. The meme is saying that the person has trust issues because the names of these "
    "countries do not accurately represent their landscapes. | "
)
MMVET_PROMPT = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in the "
    "ground truth means it is totally right only when all elements in the ground truth are present in the prediction, and "
    "<OR> means it is totally right when any one element in the ground truth is present in the prediction. The correctness "
    "score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just complete the "
    "last space of the correctness score.\n\n"
    "Question | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n"
    "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0\n"
    + _MEME
    + "The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not very icy and "
    "Greenland isn't very green. | 0.4\n"
    + _MEME
    + "The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, despite its "
    "name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is why I have trust "
    "issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. The humor in this "
    "meme is derived from the unexpected contrast between the names of the countries and their actual physical "
    "characteristics. | 1.0\n"
)
"""The few-shot prompt of MM-Vet's mm-vet_evaluator.py (Apache-2.0): the judge must read it as it was."""


def mmvet(source: Source) -> Judged:
    """218 questions that need several abilities at once; the judge grades from 0 to 1."""
    items = []
    for key, row in source.entries("mmvet/mm-vet.json").items():
        image = source.image(f"mmvet/images/{row['imagename']}")
        tags = {"capabilities": "+".join(sorted(row["capability"])), "question": row["question"]}
        items.append(
            Question(key, (image, row["question"]), row["answer"], tags, max_new_tokens=1024)
        )
    return Judged(tuple(items), mmvet_review, score_mmvet, MMVET_JUDGE, export_mmvet)


def mmvet_prompt(item: Question, answer: str) -> str:
    """What the judge completes."""
    truth = item.answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return MMVET_PROMPT + "\n" + " | ".join([item.tags["question"], truth, answer, ""])


def mmvet_review(item: Question, answer: str, ask: Ask) -> str:
    """Up to five requests, warmer each time, until a number between 0 and 1 comes first; "0.0" after that."""
    prompt, temperature = mmvet_prompt(item, answer), 0.0
    said = ask(prompt, temperature)
    for _ in range(TRIES - 1):
        if mmvet_grade(said) is not None:
            return said
        said = ask(prompt + AGAIN, temperature)
        temperature += 0.5
    return said if mmvet_grade(said) is not None else "0.0"


def mmvet_grade(review: str) -> float | None:
    """The first word as a number from 0 to 1; None for anything else."""
    try:
        found = float(review.split(" ", maxsplit=1)[0].strip())
    except ValueError:
        return None
    return found if 0.0 <= found <= 1.0 else None


def score_mmvet(items: Sequence[Question], reviews: Sequence[str | None]) -> Score:
    """Mean grade x 100: total, by capability, and by the set of capabilities that a question needs."""
    grades = [mmvet_grade(text or "") for text in reviews]
    values = [grade or 0.0 for grade in grades]
    samples = {"total": sample(values)}
    for ability in ("rec", "ocr", "know", "gen", "spat", "math"):
        members = [
            n for n, item in enumerate(items) if ability in item.tags["capabilities"].split("+")
        ]
        if members:
            samples[ability] = sample([values[n] for n in members])
    samples |= by_tag(values, [item.tags["capabilities"] for item in items], prefix="needs/")
    unparsed = sum(
        grade is None and text is not None for grade, text in zip(grades, reviews, strict=True)
    )
    return Score(
        samples, unparsed=unparsed, facts={"reviews": sum(text is not None for text in reviews)}
    )


def export_mmvet(items: Sequence[Question], answers: Answers) -> dict[str, bytes]:
    """The results file of the official evaluator."""
    rows = {item.id: text or "" for item, text in zip(items, answers, strict=True)}
    return {"mmvet.json": json.dumps(rows, indent=1).encode()}
