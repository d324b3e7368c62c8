"""DEMON: 29 tasks in 7 categories whose prompts interleave many images (Cheetah's core set)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from vlduet.data.records import Part
from vlduet.eval.answers import (
    best_tfidf_choice,
    is_same_image_letter,
    normalize_demon,
    rouge_l,
)
from vlduet.eval.benchmarks.official_files import OfficialFiles, OfficialObject
from vlduet.eval.benchmarks.scores import BenchmarkScore, MetricSample, average, combine_samples
from vlduet.eval.benchmarks.tasks import AnswerTask, AnswerTexts, Benchmark, Question

DEMON_TASKS: dict[str, tuple[str, ...]] = {
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
"""Category (as in Sugar's table) -> folders of its tasks."""

ROUGE_CATEGORIES = ("MMD", "VST", "VRI")
"""Categories scored by ROUGE-L; the others are scored by accuracy."""

IMAGE_CHOICE_TASKS = ("COMICS_Panel", "RecipeQA_ImageCoherence")
"""Tasks whose choices are images, compared by letter. The official list also means to contain
RecipeQA_VisualCloze, under a name that matches no folder, so that it is compared by TF-IDF."""

REPAIRED_IMAGE_CHOICE_TASKS = (*IMAGE_CHOICE_TASKS, "RecipeQA_VisualCloze")

_IMAGE_MARK = re.compile(r"\{(?:image|table)#(\d+)\}")


def list_demon_benchmarks() -> list[Benchmark]:
    """Return a benchmark ``demon/TASK`` for each of DEMON's 29 tasks, without reading files."""
    benchmarks = []
    for category, tasks in DEMON_TASKS.items():
        metric = "ROUGE-L" if category in ROUGE_CATEGORIES else "accuracy"
        for task in tasks:
            benchmark = Benchmark(
                f"demon/{task}",
                f"DEMON, {category}",
                ("Sugar",),
                split="core",
                metric=metric,
                files=(f"demon/{task}/core/core.json", f"demon/{task}/core/images/"),
                protocol="answer",
                load=partial(load_demon, tasks=(task,)),
            )
            benchmarks.append(benchmark)
    return benchmarks


def load_demon(
    files: OfficialFiles, *, tasks: Sequence[str] = (), repaired: bool = False
) -> AnswerTask:
    """Return the questions of DEMON's tasks, scored by `score_demon`.

    File hashes are stored in `files.hashes`; a missing file or image raises DataError.

    Args:
        files: data folder.
        tasks: folders of the tasks; empty for all 29, and an unknown one is ignored.
        repaired: compare RecipeQA_VisualCloze by letter, which the official script means to do.
    """
    items: list[Question] = []
    for category, members in DEMON_TASKS.items():
        for task in members:
            if not tasks or task in tasks:
                items += _read_task(files, task, category)
    scorer = partial(score_demon, repaired=repaired)
    return AnswerTask(tuple(items), scorer, details={"repaired": repaired})


def _read_task(files: OfficialFiles, task: str, category: str) -> list[Question]:
    """Return the questions of one task in file order, with ids ``TASK/SAMPLE_ID``.

    A prompt is the task's instruction, the context with its images, and the choices if any. The tag
    ``kind`` is ``multi-choice`` or ``open-ended``; ``task`` and `category` are tags too. The file's
    hash is stored in `files.hashes`. A missing file, image or key raises DataError.
    """
    content = files.read_object(f"demon/{task}/core/core.json")
    metadata = content.get_object("metadata")
    items = []
    for row in content.get_objects("data"):
        instance = row.get_object("task_instance")
        choices = tuple(instance.get("choice_list") or ())
        text = metadata["task_instruction"][row["task_instruction_id"]] + instance["context"]
        if choices:
            # Cheetah's i4_cheetah_llama2.py writes the choices as a Python list.
            text += f"Choice list:{list(choices)}. Your answer is:"
        has_choices = bool(choices) or metadata["question_type"] == "multi-choice"
        tags = {
            "task": task,
            "category": category,
            "kind": "multi-choice" if has_choices else "open-ended",
        }
        prompt = _insert_images(files, text, task, instance)
        items.append(Question(f"{task}/{row['sample_id']}", prompt, row["response"], tags, choices))
    return items


def _insert_images(
    files: OfficialFiles, text: str, task: str, instance: OfficialObject
) -> tuple[Part, ...]:
    """Return a text with image k (from 1) in place of each ``{image#k}`` or ``{table#k}``.

    Image k is the k-th of ``images_path`` in the task's folder. Empty texts are dropped.

    Raises:
        DataError: k is out of range, or the image is missing.
    """
    image_names = instance["images_path"]
    parts: list[Part] = []
    # The split alternates: text, k, text, k, ..., text.
    for n, segment in enumerate(_IMAGE_MARK.split(text)):
        if n % 2 == 0:
            parts += [segment] if segment else []
            continue
        if not 1 <= int(segment) <= len(image_names):
            raise instance.make_error(f"image#{segment} of {len(image_names)} images", "context")
        parts.append(files.find_image(f"demon/{task}/core/images/{image_names[int(segment) - 1]}"))
    return tuple(parts)


def score_demon(
    items: Sequence[Question], answers: AnswerTexts, *, repaired: bool = False
) -> BenchmarkScore:
    """Return the mean value x 100 of every task, after those of complete categories.

    A category is the mean over its tasks, and is reported if all of them are present. A missing
    answer is an empty one. For `repaired` see `load_demon`. No items give no numbers.
    """
    values: dict[str, list[float]] = {}
    for item, text in zip(items, answers, strict=True):
        value = score_demon_answer(item, text or "", repaired=repaired)
        values.setdefault(item.tags["task"], []).append(value)
    tasks = {task: average(task_values) for task, task_values in values.items()}
    categories: dict[str, MetricSample] = {}
    for category, members in DEMON_TASKS.items():
        if all(task in tasks for task in members):
            categories[category] = combine_samples([tasks[task] for task in members])
    return BenchmarkScore(categories | tasks)


def score_demon_answer(item: Question, text: str, *, repaired: bool = False) -> float:
    """Return the value of one answer, from 0 to 1, by Cheetah's scripts/evaluate.py.

    Open answers have their ROUGE-L F. The others are 1 or 0: tasks with images as choices are
    compared by letter, texts by the choice that is nearest by TF-IDF, and a question without listed
    choices by equality. All texts are normalized by `normalize_demon`. For `repaired` see
    `load_demon`.
    """
    prediction = normalize_demon(text)
    reference = normalize_demon(str(item.reference))
    if item.tags["kind"] == "open-ended":
        return rouge_l(prediction, reference) if prediction else 0.0
    image_tasks = REPAIRED_IMAGE_CHOICE_TASKS if repaired else IMAGE_CHOICE_TASKS
    if item.tags["task"] in image_tasks:
        return float(is_same_image_letter(prediction, reference))
    choices = [normalize_demon(choice) for choice in item.options]
    if not choices:
        return float(prediction == reference)
    index = best_tfidf_choice(prediction, choices)
    return float(index >= 0 and choices[index] == reference)
