"""Yes-or-no questions: POPE (objects that are absent) and MME (fourteen abilities)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlduet.errors import DataError
from vlduet.eval.answers import is_pope_yes, parse_mme_answer
from vlduet.eval.benchmarks.official_files import USE_OFFICIAL_FILE, OfficialFiles
from vlduet.eval.benchmarks.scores import BenchmarkScore, MetricSample, average, combine_samples
from vlduet.eval.benchmarks.tasks import AnswerTask, AnswerTexts, Question
from vlduet.eval.benchmarks.vqa import SHORT_ANSWER_INSTRUCTION

# ------------------------------------------------------------------ POPE

POPE_SPLITS = ("random", "popular", "adversarial")


def load_pope(files: OfficialFiles) -> AnswerTask:
    """Return POPE's three splits over COCO val2014; papers print the mean of the three F1s.

    The tag ``split`` is the split; ids are ``SPLIT/QUESTION_ID``. File hashes are stored in
    `files.hashes`; a missing file or image raises DataError.
    """
    items = []
    for split in POPE_SPLITS:
        for row in files.read_json_lines(f"pope/coco_pope_{split}.json"):
            image = files.find_image(f"coco/val2014/{row['image']}")
            # question_id starts again in every file.
            key = f"{split}/{row['question_id']}"
            prompt = (image, row["text"] + SHORT_ANSWER_INSTRUCTION)
            items.append(Question(key, prompt, row["label"], {"split": split}))
    return AnswerTask(tuple(items), score_pope)


def score_pope(items: Sequence[Question], answers: AnswerTexts) -> BenchmarkScore:
    """Return the mean F1 x 100, then F1, accuracy, precision, recall and share of yes by split.

    They are named ``F1``, ``F1/SPLIT``, ..., ``yes/SPLIT``. A missing answer is the empty text,
    which officially is a yes. Where a split has no predicted or no actual yes, the official code
    divides by zero; here the number is 0. No items raise AssertionError.
    """
    samples: dict[str, MetricSample] = {}
    for split in dict.fromkeys(item.tags["split"] for item in items):
        is_yes, said_yes = [], []
        for item, text in zip(items, answers, strict=True):
            if item.tags["split"] == split:
                is_yes.append(float(item.reference == "yes"))
                said_yes.append(float(is_pope_yes(text or "")))
        pairs = list(zip(is_yes, said_yes, strict=True))
        hits = [label * answer for label, answer in pairs]
        # F1 = 2 TP / (2 TP + FP + FN): a mean of hits with weights 2 (TP), 1 (FP, FN), 0 (TN).
        samples[f"F1/{split}"] = average(hits, [label + answer for label, answer in pairs])
        samples[f"accuracy/{split}"] = average([float(label == answer) for label, answer in pairs])
        samples[f"precision/{split}"] = average(hits, said_yes)
        samples[f"recall/{split}"] = average(hits, is_yes)
        samples[f"yes/{split}"] = average(said_yes)
    f1 = combine_samples([value for name, value in samples.items() if name.startswith("F1/")])
    return BenchmarkScore({"F1": f1} | samples)


# ------------------------------------------------------------------ MME

MME_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
MME_COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
MME_FOLDER = "mme/MME_Benchmark_release_version"
MME_INSTRUCTION = " Please answer yes or no."
"""MME's own instruction, which LLaVA replaces."""


def load_mme(files: OfficialFiles) -> AnswerTask:
    """Return MME's fourteen tasks, two questions per image, exported by `export_mme`.

    Questions are in ``TASK/*.txt`` beside the images, or in ``TASK/questions_answers_YN/*.txt``
    with the images in ``TASK/images``. File hashes are stored in `files.hashes`.

    Raises:
        DataError: a task has no questions, an image is missing, or a file has another form.
    """
    items = []
    for task in (*MME_PERCEPTION, *MME_COGNITION):
        folder = files.find_path(f"{MME_FOLDER}/{task}")
        question_folder, image_folder = folder, f"{MME_FOLDER}/{task}"
        if (folder / "questions_answers_YN").is_dir():
            question_folder = folder / "questions_answers_YN"
            image_folder += "/images"
        paths = sorted(question_folder.glob("*.txt"))
        if not paths:
            message = "no questions (*.txt) in this folder"
            raise DataError(message, place=folder, fix=USE_OFFICIAL_FILE)
        for path in paths:
            items += _read_mme_questions(files, path, task=task, image_folder=image_folder)
    return AnswerTask(tuple(items), score_mme, export_mme)


def _read_mme_questions(
    files: OfficialFiles, path: Path, *, task: str, image_folder: str
) -> list[Question]:
    """Return the two questions of one image, with MME's instruction replaced by LLaVA's.

    Blank lines are skipped; a file without any other line gives no questions. The hash of the file
    is stored in `files.hashes`.

    Args:
        files: data folder.
        path: file of questions; its stem is the name of the image.
        task: task for ids and tags.
        image_folder: folder of the image in the data folder.

    Raises:
        DataError: the image is missing, or the file has not two lines ``question<TAB>answer``.
    """
    suffixes = (".jpg", ".png", ".jpeg")
    image = files.find_image(*(f"{image_folder}/{path.stem}{suffix}" for suffix in suffixes))
    text = files.read_text(path.relative_to(files.root).as_posix())
    lines = [line for line in text.splitlines() if line.strip()]
    items = []
    for number, line in enumerate(lines, 1):
        question, tab, answer = line.partition("\t")
        if not tab or len(lines) != 2:
            message = "expected two lines 'question<TAB>answer'"
            raise DataError(message, place=f"{path}:{number}", fix=USE_OFFICIAL_FILE)
        prompt = (image, question.replace(MME_INSTRUCTION, "") + SHORT_ANSWER_INSTRUCTION)
        image_name = image.path.name if image.path else ""
        tags = {"task": task, "image": image_name, "question": question}
        items.append(Question(f"{task}/{path.stem}/{number}", prompt, answer.strip(), tags))
    return items


def score_mme(items: Sequence[Question], answers: AnswerTexts) -> BenchmarkScore:
    """Return ``perception`` and ``cognition``, the sums of their tasks, then every task's score.

    A task's score is 100 x accuracy + 100 x (share of images with both answers correct); the two
    questions of an image must follow each other, and an odd number raises ValueError. Tasks without
    questions are left out, but a sum without any task raises AssertionError. A missing answer is
    wrong; `num_unparsed` counts the others that are neither yes nor no.
    """
    parsed = [parse_mme_answer(text or "") for text in answers]
    correct_by_task: dict[str, list[float]] = {}
    for item, answer in zip(items, parsed, strict=True):
        is_correct = float(answer == item.reference.lower())
        correct_by_task.setdefault(item.tags["task"], []).append(is_correct)
    tasks = {}
    for task, correct in correct_by_task.items():
        # Questions of one image follow each other, in the order of the file.
        pairs = zip(correct[::2], correct[1::2], strict=True)
        tasks[task] = average([(first + second) / 2 + first * second for first, second in pairs])
    samples = {}
    for name, members in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION)):
        scored_tasks = [tasks[task] for task in members if task in tasks]
        samples[name] = combine_samples(scored_tasks, sum_groups=True)
    answered = [answer for answer, text in zip(parsed, answers, strict=True) if text is not None]
    return BenchmarkScore(samples | tasks, num_unparsed=answered.count("other"))


def export_mme(items: Sequence[Question], answers: AnswerTexts) -> dict[str, bytes]:
    """Return the files ``TASK.txt`` that ``eval_tool/calculation.py`` reads, by name.

    A line per item contains image, question, answer and prediction, separated by tabs. White space
    in a prediction becomes single blanks, and a missing answer is empty.
    """
    rows: dict[str, list[str]] = {}
    for item, text in zip(items, answers, strict=True):
        prediction = " ".join((text or "").split())  # a line end would break the table
        row = (item.tags["image"], item.tags["question"], item.reference, prediction)
        rows.setdefault(f"{item.tags['task']}.txt", []).append("\t".join(row) + "\n")
    return {name: "".join(lines).encode() for name, lines in rows.items()}
