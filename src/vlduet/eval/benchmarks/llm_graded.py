"""Benchmarks graded by a language model: LLaVA-Bench-in-the-Wild and MM-Vet.

The grader is any function (prompt, temperature) -> text. Prompts and parsing are the official ones.
Reviews are stored; stored reviews are scored without a grader.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlduet.config_files import read_yaml_mapping
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.scores import BenchmarkScore, MetricSample, average, average_by_tag
from vlduet.eval.benchmarks.tasks import AnswerTexts, AskGrader, LLMGradedTask, Question

# ------------------------------------------------------------------ LLaVA-Bench

LLAVA_TEMPERATURE = 0.2
LLAVA_GRADER: dict[str, Any] = {
    "model": "gpt-4-0314",
    "max_tokens": 1024,
    "system": "You are a helpful and precise assistant for checking the quality of the answer.",
    "temperature": LLAVA_TEMPERATURE,
}
UNREADABLE_SCORES = (-1.0, -1.0)
"""Official scores of a review that cannot be parsed."""


def load_llava_bench(files: OfficialFiles) -> LLMGradedTask:
    """Return 60 questions on 24 images; a grader compares answers with GPT-4's text-only answers.

    A reference contains the captions of the image (``context``), GPT-4's answer (``reference``) and
    the instruction of the category (``rule``). File hashes are stored in `files.hashes`; a missing
    file or image raises DataError. A question without GPT-4's answer, or whose category has no
    rule, raises KeyError.
    """
    contexts = {
        row["image"]: row["caption"] for row in files.read_json_lines("llava_bench/context.jsonl")
    }
    gpt4_rows = files.read_json_lines("llava_bench/answers_gpt4.jsonl")
    gpt4_answers = {row["question_id"]: row["text"] for row in gpt4_rows}
    rules = files.read_named_objects("llava_bench/rule.json")
    items = []
    for row in files.read_json_lines("llava_bench/questions.jsonl"):
        context = contexts.get(row["image"], "")
        reference = {
            "context": "\n".join(context) if isinstance(context, list) else context,
            "reference": gpt4_answers[row["question_id"]],
            "rule": rules[f"llava_bench_{row['category']}"]["prompt"],
        }
        question = Question(
            str(row["question_id"]),
            (files.find_image(f"llava_bench/images/{row['image']}"), row["text"]),
            reference,
            {"category": row["category"]},
            max_new_tokens=1024,
        )
        items.append(question)
    return LLMGradedTask(tuple(items), request_llava_review, score_llava_bench, LLAVA_GRADER)


def llava_grader_prompt(item: Question, answer: str) -> str:
    """Return the official prompt, in which GPT-4's answer is Assistant 1."""
    reference = item.reference
    return (
        f"[Context]\n{reference['context']}\n\n[Question]\n{item.prompt[-1]}\n\n"
        f"[Assistant 1]\n{reference['reference']}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n[System]\n{reference['rule']}\n\n"
    )


def request_llava_review(item: Question, answer: str, ask: AskGrader) -> str:
    """Return the grader's review of an answer, after one request."""
    return ask(llava_grader_prompt(item, answer), LLAVA_TEMPERATURE)


def parse_llava_scores(review: str) -> tuple[float, float]:
    """Return the scores of GPT-4's and of the model's answer from the first line of a review.

    `UNREADABLE_SCORES` is returned where the line is not exactly two numbers, separated by one
    blank or comma.
    """
    words = review.split("\n", maxsplit=1)[0].replace(",", " ").split(" ")
    try:
        reference_score, model_score = (float(word) for word in words)
    except ValueError:
        return UNREADABLE_SCORES
    return reference_score, model_score


def score_llava_bench(items: Sequence[Question], reviews: AnswerTexts) -> BenchmarkScore:
    """Return the ratio of mean scores, model to GPT-4, x 100: over all questions and by category.

    Numbers are ``relative/NAME``, the ratio, and ``model/NAME`` and ``reference/NAME``, mean scores
    x 10, where NAME is ``all`` or a category. As in the official code, a missing review or one that
    cannot be parsed takes part as (-1, -1); the latter are counted in `num_unparsed`. The detail
    ``reviews`` counts the reviews. No items raise AssertionError.
    """
    pairs = [parse_llava_scores(text or "") for text in reviews]
    groups = {"all": list(range(len(items)))}
    for n, item in enumerate(items):
        groups.setdefault(item.tags["category"], []).append(n)
    ratios: dict[str, MetricSample] = {}
    means: dict[str, MetricSample] = {}
    for name, members in groups.items():
        reference_scores = np.array([pairs[n][0] for n in members])
        model_scores = np.array([pairs[n][1] for n in members])
        # A ratio of means is the mean of ratios weighted by the reference's scores. A score of 0
        # would divide by zero; its tiny weight keeps the model's score in the sum.
        weights = np.where(reference_scores == 0, 1e-9, reference_scores)
        ratios[f"relative/{name}"] = average(model_scores / weights, weights)
        means[f"model/{name}"] = average(model_scores, scale=10)
        means[f"reference/{name}"] = average(reference_scores, scale=10)
    graded = [pair for pair, text in zip(pairs, reviews, strict=True) if text is not None]
    return BenchmarkScore(
        ratios | means,
        num_unparsed=graded.count(UNREADABLE_SCORES),
        details={"reviews": len(graded)},
    )


# ------------------------------------------------------------------ MM-Vet

MMVET_GRADER: dict[str, Any] = {"model": "gpt-4-0613", "max_tokens": 3, "temperature": 0.0}
MMVET_PROMPT: str = read_yaml_mapping(Path(__file__).parent / "mmvet_prompt.yaml")["prompt"]
"""Official few-shot prompt, a table of graded examples."""
MMVET_REPEAT_INSTRUCTION = "\nPredict the correctness of the answer (digit): "
MMVET_MAX_REQUESTS = 5
MMVET_CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


def load_mmvet(files: OfficialFiles) -> LLMGradedTask:
    """Return MM-Vet's 218 questions, which need several capabilities at once, graded from 0 to 1.

    The tag ``capabilities`` joins the sorted capabilities by ``+``; answers are exported by
    `export_mmvet`. File hashes are stored in `files.hashes`; a missing file or image raises
    DataError.
    """
    items = []
    for key, row in files.read_named_objects("mmvet/mm-vet.json").items():
        image = files.find_image(f"mmvet/images/{row['imagename']}")
        tags = {"capabilities": "+".join(sorted(row["capability"])), "question": row["question"]}
        prompt = (image, row["question"])
        items.append(Question(key, prompt, row["answer"], tags, max_new_tokens=1024))
    return LLMGradedTask(tuple(items), request_mmvet_grade, score_mmvet, MMVET_GRADER, export_mmvet)


def mmvet_grader_prompt(item: Question, answer: str) -> str:
    """Return the official few-shot table with a last row whose grade is left to the grader."""
    truth = item.reference.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    row = " | ".join([item.tags["question"], truth, answer, ""])
    return f"{MMVET_PROMPT}\n{row}"


def request_mmvet_grade(item: Question, answer: str, ask: AskGrader) -> str:
    """Return the first whole review that starts with a number from 0 to 1, or "0.0" if none does.

    The grader is asked at most five times. As in the official code, all requests after the first
    append `MMVET_REPEAT_INSTRUCTION` to the prompt, and the temperatures are 0, 0, 0.5, 1 and 1.5.
    """
    prompt = mmvet_grader_prompt(item, answer)
    review = ask(prompt, 0.0)
    for attempt in range(MMVET_MAX_REQUESTS - 1):
        if parse_mmvet_grade(review) is not None:
            return review
        review = ask(prompt + MMVET_REPEAT_INSTRUCTION, 0.5 * attempt)
    return review if parse_mmvet_grade(review) is not None else "0.0"


def parse_mmvet_grade(review: str) -> float | None:
    """Return the first word of a review as a number from 0 to 1; None for anything else."""
    try:
        grade = float(review.split(" ", maxsplit=1)[0].strip())
    except ValueError:
        return None
    return grade if 0.0 <= grade <= 1.0 else None


def score_mmvet(items: Sequence[Question], reviews: AnswerTexts) -> BenchmarkScore:
    """Return mean grades x 100: ``total``, by capability, and ``needs/SET`` by needed capabilities.

    An answer without a readable grade counts as 0; `num_unparsed` counts the reviews among them,
    and the detail ``reviews`` all reviews. A capability that no item needs has no number. No items
    raise AssertionError.
    """
    grades = [parse_mmvet_grade(text or "") for text in reviews]
    values = [grade or 0.0 for grade in grades]
    needed = [item.tags["capabilities"] for item in items]
    samples = {"total": average(values)}
    for capability in MMVET_CAPABILITIES:
        pairs = zip(values, needed, strict=True)
        members = [value for value, names in pairs if capability in names.split("+")]
        if members:
            samples[capability] = average(members)
    samples |= average_by_tag(values, needed, prefix="needs/")
    graded = [grade for grade, text in zip(grades, reviews, strict=True) if text is not None]
    return BenchmarkScore(
        samples, num_unparsed=graded.count(None), details={"reviews": len(graded)}
    )


def export_mmvet(items: Sequence[Question], answers: AnswerTexts) -> dict[str, bytes]:
    """Return the results file of the official evaluator: question id -> answer."""
    pairs = zip(items, answers, strict=True)
    rows = {item.id: text or "" for item, text in pairs}
    return {"mmvet.json": json.dumps(rows, indent=1).encode()}
