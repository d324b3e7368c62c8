"""DEMON: 29 tasks in 7 categories whose instructions interleave many images (Cheetah's core set)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from vlduet.data.records import Part
from vlduet.errors import DataError
from vlduet.eval.answers import demon_process, image_letter_match, rouge_l, tfidf_choice
from vlduet.eval.benchmarks.source import UNCHANGED, Fields, Source
from vlduet.eval.benchmarks.tasks import Answers, Question, Questions, Sample, Score, joined, sample

TASKS: dict[str, tuple[str, ...]] = {
    "MMD": ("MMCoQA", "ALFRED"),
    "VST": ("AESOP", "DiDeMoSV", "FlintstonesSV", "PororoSV", "VIST"),
    "VRI": ("IEdit", "Spot-the-Diff", "Birds-to-Words", "CLEVR-Change"),
    "MMC": ("COMICS_Dialogue", "COMICS_Panel", "RecipeQA_VisualCloze", "RecipeQA_TextCloze"),
    "KGQA": ("WebQA", "TQA", "MultiModalQA"),
    "TRQA": ("SlideVQA", "OCR-VQA", "DocVQA"),
    "MMR": (
        "Fashion200K",
        "NLVR2",
        "nuscenes",
        "VizWiz",
        "MIT-States_StateCoherence",
        "MIT-States_PropertyCoherence",
        "VISION",
        "RecipeQA_ImageCoherence",
    ),
}
"""Category (as in Sugar's table) -> folders."""

OPEN = ("MMD", "VST", "VRI")
"""Categories that are scored by ROUGE-L; the others by accuracy."""

IMAGE_CHOICES = ("COMICS_Panel", "RecipeQA_ImageCoherence")
"""Officially RecipeQA_VisualCloze is meant to be here too, under a name that never matches its folder, so that it is
matched by TF-IDF; `repaired` puts it here."""

_PLACE = re.compile(r"\{(?:image|table)#(\d+)\}")


def demon(*names: str, repaired: bool = False) -> Callable[[Source], Questions]:
    """A loader of some tasks, all of them by default."""
    category = {name: key for key, members in TASKS.items() for name in members}
    wanted = names or tuple(category)

    def load(source: Source) -> Questions:
        items: list[Question] = []
        for name in wanted:
            items += _task(source, name, category[name])
        return Questions(
            tuple(items),
            lambda i, a: score_demon(i, a, repaired=repaired),
            facts={"repaired": repaired},
        )

    return load


def _task(source: Source, name: str, category: str) -> list[Question]:
    file = source.object(f"demon/{name}/core/core.json")
    metadata = file.within("metadata")
    instructions = metadata["task_instruction"]
    items = []
    for row in file.each("data"):
        instance = row.within("task_instance")
        context = instance["context"]
        choices = tuple(instance.get("choice_list") or ())
        if choices:
            context += choice_text(choices)
        text = instructions[row["task_instruction_id"]] + context
        parts = _interleaved(source, text, name, instance)
        kind = (
            "multi-choice"
            if choices or metadata["question_type"] == "multi-choice"
            else "open-ended"
        )
        tags = {"task": name, "category": category, "kind": kind}
        items.append(Question(f"{name}/{row['sample_id']}", parts, row["response"], tags, choices))
    return items


def choice_text(choices: Sequence[str]) -> str:
    """As i4_cheetah_llama2.py writes the options: a Python list."""
    return f"Choice list:{list(choices)}. Your answer is:"


def _interleaved(source: Source, text: str, name: str, instance: Fields) -> tuple[Part, ...]:
    """Text with its images where ``{image#k}`` and ``{table#k}`` stand, k from 1."""
    paths = instance["images_path"]
    parts: list[Part] = []
    for n, piece in enumerate(_PLACE.split(text)):
        if n % 2 == 0:
            parts += [piece] if piece else []
            continue
        if not 1 <= int(piece) <= len(paths):
            what = f"image#{piece} of {len(paths)} images"
            raise DataError(what, place=instance.place.with_field("context"), fix=UNCHANGED)
        parts.append(source.image(f"demon/{name}/core/images/{paths[int(piece) - 1]}"))
    return tuple(parts)


def score_demon(items: Sequence[Question], answers: Answers, *, repaired: bool = False) -> Score:
    """ROUGE-L F of open answers and accuracy of choices; a category is the mean of its tasks."""
    values: dict[str, list[float]] = {}
    for item, text in zip(items, answers, strict=True):
        values.setdefault(item.tags["task"], []).append(judged(item, text or "", repaired=repaired))
    tasks = {name: sample(found) for name, found in values.items()}
    samples: dict[str, Sample] = {}
    for category, members in TASKS.items():
        if all(name in tasks for name in members):
            samples[category] = joined([tasks[name] for name in members])
    return Score(samples | tasks)


def judged(item: Question, text: str, *, repaired: bool = False) -> float:
    """The value of one answer, by Cheetah's scripts/evaluate.py."""
    prediction, reference = demon_process(text), demon_process(str(item.answer))
    if item.tags["kind"] == "open-ended":
        return rouge_l(prediction, reference) if prediction else 0.0
    if item.tags["task"] in IMAGE_CHOICES or (
        repaired and item.tags["task"] == "RecipeQA_VisualCloze"
    ):
        return float(image_letter_match(prediction, reference))
    choices = [demon_process(choice) for choice in item.options]
    if not choices:
        return float(prediction == reference)
    found = tfidf_choice(prediction, choices)
    return float(found >= 0 and choices[found] == reference)
