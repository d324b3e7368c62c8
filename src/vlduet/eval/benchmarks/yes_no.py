"""Yes-or-no questions: POPE (objects that are not there) and MME (fourteen abilities, each image asked twice)."""

from __future__ import annotations

from collections.abc import Sequence

from vlduet.errors import DataError
from vlduet.eval.answers import mme_answer, pope_yes
from vlduet.eval.benchmarks.source import UNCHANGED, Source
from vlduet.eval.benchmarks.tasks import Answers, Question, Questions, Sample, Score, joined, sample
from vlduet.eval.benchmarks.vqa import SHORT

# ------------------------------------------------------------------ POPE

SPLITS = ("random", "popular", "adversarial")


def pope(source: Source) -> Questions:
    """Three splits over COCO val2014; papers print the mean of the three F1s."""
    items = []
    for split in SPLITS:
        for row in source.lines(f"pope/coco_pope_{split}.json"):
            image = source.image(f"coco/val2014/{row['image']}")
            # question_id starts again in every file.
            identity = f"{split}/{row['question_id']}"
            items.append(
                Question(identity, (image, row["text"] + SHORT), row["label"], {"split": split})
            )
    return Questions(tuple(items), score_pope)


def score_pope(items: Sequence[Question], answers: Answers) -> Score:
    """F1, accuracy, precision, recall and share of yes, by split; a missing answer is the empty text, which is a yes.

    Where a split has no predicted or no actual yes, the official code divides by zero; here the number is 0.
    """
    samples: dict[str, Sample] = {}
    for split in dict.fromkeys(item.tags["split"] for item in items):
        rows = [
            (item.answer == "yes", pope_yes(text or ""))
            for item, text in zip(items, answers, strict=True)
            if item.tags["split"] == split
        ]
        hit = [float(gold and said) for gold, said in rows]
        samples[f"F1/{split}"] = sample(hit, [float(gold) + float(said) for gold, said in rows])
        # F1 = 2 TP / (2 TP + FP + FN): a mean of hits with weights 2 (TP), 1 (FP, FN), 0 (TN).
        samples[f"accuracy/{split}"] = sample([float(gold == said) for gold, said in rows])
        samples[f"precision/{split}"] = sample(hit, [float(said) for _, said in rows])
        samples[f"recall/{split}"] = sample(hit, [float(gold) for gold, _ in rows])
        samples[f"yes/{split}"] = sample([float(said) for _, said in rows])
    f1 = joined([found for name, found in samples.items() if name.startswith("F1/")])
    return Score({"F1": f1} | samples)


# ------------------------------------------------------------------ MME

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
ASKED = " Please answer yes or no."
ROOT = "mme/MME_Benchmark_release_version"


def mme(source: Source) -> Questions:
    """Fourteen tasks; questions stand in ``TASK/*.txt`` or ``TASK/questions_answers_YN/*.txt``, two lines an image."""
    items = []
    for task in (*PERCEPTION, *COGNITION):
        folder = source.path(f"{ROOT}/{task}")
        apart = (folder / "questions_answers_YN").is_dir()
        texts = sorted((folder / "questions_answers_YN" if apart else folder).glob("*.txt"))
        if not texts:
            raise DataError("no questions (*.txt) in this folder", place=folder, fix=UNCHANGED)
        for path in texts:
            beside = f"{ROOT}/{task}/images" if apart else f"{ROOT}/{task}"
            image = source.image(*(f"{beside}/{path.stem}{s}" for s in (".jpg", ".png", ".jpeg")))
            lines = [
                text
                for text in source.text(path.relative_to(source.root).as_posix()).splitlines()
                if text.strip()
            ]
            for number, text in enumerate(lines, 1):
                question, tab, answer = text.partition("\t")
                if not tab or len(lines) != 2:
                    raise DataError(
                        "expected two lines 'question<TAB>answer'",
                        place=f"{path}:{number}",
                        fix=UNCHANGED,
                    )
                prompt = question.replace(ASKED, "") + SHORT
                tags = {
                    "task": task,
                    "image": image.path.name if image.path else "",
                    "question": question,
                }
                items.append(
                    Question(f"{task}/{path.stem}/{number}", (image, prompt), answer.strip(), tags)
                )
    return Questions(tuple(items), score_mme, export_mme)


def score_mme(items: Sequence[Question], answers: Answers) -> Score:
    """A task's score is 100 x accuracy + 100 x (share of images with both answers right); tasks are summed."""
    tasks: dict[str, Sample] = {}
    said = [mme_answer(text or "") for text in answers]
    for task in dict.fromkeys(item.tags["task"] for item in items):
        right = [
            float(found == item.answer.lower())
            for item, found in zip(items, said, strict=True)
            if item.tags["task"] == task
        ]
        # Lines are paired as they stand; mean over images of the mean of the two, plus both.
        pairs = list(zip(right[::2], right[1::2], strict=True))
        tasks[task] = sample([(a + b) / 2 + a * b for a, b in pairs])
    unparsed = sum(
        found == "other" and text is not None for found, text in zip(said, answers, strict=True)
    )
    samples = {
        "perception": joined([tasks[task] for task in PERCEPTION if task in tasks], total=True),
        "cognition": joined([tasks[task] for task in COGNITION if task in tasks], total=True),
    }
    return Score(samples | tasks, unparsed=unparsed)


def export_mme(items: Sequence[Question], answers: Answers) -> dict[str, bytes]:
    """The files that ``eval_tool/calculation.py`` reads: image, question, answer, prediction, by tabs."""
    files: dict[str, list[str]] = {}
    for item, text in zip(items, answers, strict=True):
        told = " ".join((text or "").split())  # a line end would break the table
        row = (item.tags["image"], item.tags["question"], item.answer, told)
        files.setdefault(f"{item.tags['task']}.txt", []).append("\t".join(row) + "\n")
    return {name: "".join(rows).encode() for name, rows in files.items()}
