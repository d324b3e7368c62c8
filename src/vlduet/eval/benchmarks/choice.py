"""Multiple choice: ScienceQA-IMG, MMBench (circular) and SEED-Bench (by letter, and by likelihood)."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence

from vlduet.data.records import ImageRef
from vlduet.errors import DataError
from vlduet.eval.answers import LETTERS, mmbench_letter, scienceqa_letter
from vlduet.eval.benchmarks.source import UNCHANGED, Fields, Source
from vlduet.eval.benchmarks.tasks import (
    Answers,
    Choices,
    Question,
    Questions,
    Score,
    by_tag,
    sample,
)
from vlduet.eval.benchmarks.xlsx import workbook

LETTER = "\nAnswer with the option's letter from the given choices directly."
LONG = 1024
"""max_new_tokens of LLaVA's scripts for these."""


def lettered(options: Sequence[str]) -> str:
    """One option a line: ``A. ...``."""
    return "\n".join(
        f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)
    )


# ------------------------------------------------------------------ ScienceQA


def scienceqa(source: Source) -> Questions:
    """The 2,017 test questions with an image, in LLaVA's CQM-A form."""
    problems = source.entries("scienceqa/problems.json")
    items = []
    for key in source.object("scienceqa/pid_splits.json")["test"]:
        row = problems[key]
        if row.get("image"):
            image = source.image(
                f"scienceqa/images/test/{key}/image.png",
                f"scienceqa/images/test/{key}/{row['image']}",
            )
            items.append(
                Question(
                    key,
                    (image, scienceqa_text(row) + LETTER),
                    LETTERS[row["answer"]],
                    {"subject": row.get("subject", "")},
                    tuple(row["choices"]),
                    LONG,
                )
            )
    return Questions(tuple(items), score_scienceqa)


def scienceqa_text(row: Fields) -> str:
    """Context, question and options."""
    hint = f"Context: {row['hint']}\n" if row["hint"] else ""
    return f"{hint}{row['question']}\n{lettered(row['choices'])}"


def score_scienceqa(items: Sequence[Question], answers: Answers) -> Score:
    """Accuracy; what cannot be parsed, is missing, or names an option that is not there is wrong."""
    letters = [scienceqa_letter(text) if text is not None else None for text in answers]
    right = [float(found == item.answer) for item, found in zip(items, letters, strict=True)]
    unparsed = sum(
        found is None and text is not None for found, text in zip(letters, answers, strict=True)
    )
    samples = {"accuracy": sample(right)} | by_tag(
        right, [item.tags["subject"] for item in items], prefix="accuracy/"
    )
    return Score(samples, unparsed=unparsed)


# ------------------------------------------------------------------ MMBench

ROTATION = 10**6
"""Rotations of a question have its index plus a multiple of this."""


def mmbench(*files: str) -> Callable[[Source], Questions]:
    """A loader of an MMBench file, the first of these that is there; without answers in it, only exported."""

    def load(source: Source) -> Questions:
        items = []
        for row in source.table(*files, delimiter="\t"):
            options = _options(row)
            hint = f"{row['hint']}\n" if _told(row.get("hint", "")) else ""
            tags = {"base": str(int(row["index"]) % ROTATION), "category": row.get("category", "")}
            tags |= {"l2-category": row.get("l2-category", "")}
            text = f"{hint}{row['question']}\n{lettered(options)}{LETTER}"
            answer = row.get("answer") or None
            items.append(Question(row["index"], (_decoded(row), text), answer, tags, options, LONG))
        known = all(item.answer for item in items)
        return Questions(tuple(items), score_mmbench if known else None, export_mmbench)

    return load


def _options(row: Fields) -> tuple[str, ...]:
    """A, B, ... up to the first that is empty."""
    found = []
    for letter in "ABCD":
        if not _told(row.get(letter, "")):
            break
        found.append(row[letter])
    if not found:
        raise DataError("no options", place=row.place.with_field("A"), fix=UNCHANGED)
    return tuple(found)


def _told(value: str) -> bool:
    """Whether a cell holds something: tables write nothing as "" or nan."""
    return value.strip().lower() not in ("", "nan", "none")


def _decoded(row: Fields) -> ImageRef:
    try:
        return ImageRef(data=base64.b64decode(row["image"], validate=False))
    except (binascii.Error, ValueError) as error:
        raise DataError(
            f"broken base64 ({error})", place=row.place.with_field("image"), fix=UNCHANGED
        ) from None


def score_mmbench(items: Sequence[Question], answers: Answers) -> Score:
    """CircularEval: a question counts iff it is right in every rotation. Rules only: what they cannot read is wrong.

    Also `vanilla`, the accuracy of single rows.
    """
    letters = [
        mmbench_letter(text, item.options) if text else None
        for item, text in zip(items, answers, strict=True)
    ]
    right = [found == item.answer for item, found in zip(items, letters, strict=True)]
    groups: dict[str, list[bool]] = {}
    tags: dict[str, Question] = {}
    for item, ok in zip(items, right, strict=True):
        groups.setdefault(item.tags["base"], []).append(ok)
        tags.setdefault(item.tags["base"], item)
    circular = [float(all(found)) for found in groups.values()]
    samples = {"accuracy": sample(circular), "vanilla": sample([float(ok) for ok in right])}
    for name in ("l2-category", "category"):
        samples |= by_tag(
            circular, [tags[base].tags[name] for base in groups], prefix=f"accuracy/{name}/"
        )
    unparsed = sum(
        found is None and bool(text) for found, text in zip(letters, answers, strict=True)
    )
    return Score(samples, unparsed=unparsed, facts={"questions": len(groups)})


def export_mmbench(items: Sequence[Question], answers: Answers) -> dict[str, bytes]:
    """LLaVA's upload: the options and the prediction, without image, hint and categories."""
    rows: list[list[str | int]] = [
        ["index", "question", "answer", "A", "B", "C", "D", "prediction"]
    ]
    for item, text in zip(items, answers, strict=True):
        question = (
            str(item.parts[-1]).removesuffix(LETTER).removesuffix("\n" + lettered(item.options))
        )
        options = [*item.options, "", "", "", ""][:4]
        rows.append([int(item.id), question, item.answer or "", *options, text or ""])
    return {"mmbench.xlsx": workbook(rows)}


# ------------------------------------------------------------------ SEED-Bench


def seedbench(source: Source) -> Questions:
    """By letter, as LLaVA-1.5: the answer must equal the letter exactly; a video is its middle frame."""
    return Questions(tuple(_seed_items(source)), score_seed)


def seedbench_likelihood(source: Source) -> Choices:
    """SEED-Bench's own protocol: the options' texts are ranked by likelihood after the bare question."""
    items = [
        Question(
            item.id,
            (item.parts[0], item.tags["question"]),
            LETTERS.index(item.answer),
            {"kind": item.tags["kind"]},
            item.options,
        )
        for item in _seed_items(source)
    ]
    return Choices(tuple(items), "kind")


def _seed_items(source: Source) -> list[Question]:
    file = source.object("seedbench/SEED-Bench.json")
    names = {str(number): name for name, number in file.within("question_type").items()}
    items = []
    for row in file.each("questions"):
        if row["data_type"] == "image":
            places = [
                f"seedbench/SEED-Bench-image/{row['data_id']}{s}" for s in ("", ".jpg", ".png")
            ]
        else:
            places = [
                f"seedbench/SEED-Bench-video-image/{row['question_id']}{s}"
                for s in (".png", ".jpg")
            ]
        options = tuple(str(row[f"choice_{letter}"]) for letter in "abcd")
        text = f"{row['question']}\n{lettered(options)}{LETTER}"
        kind = names.get(str(row["question_type_id"]), str(row["question_type_id"]))
        tags = {"data": row["data_type"], "kind": kind, "question": row["question"]}
        items.append(
            Question(
                str(row["question_id"]), (source.image(*places), text), row["answer"], tags, options
            )
        )
    return items


def score_seed(items: Sequence[Question], answers: Answers) -> Score:
    """Accuracy over all items, images, videos and each type of question."""
    right = [
        float((text or "").strip() == item.answer)
        for item, text in zip(items, answers, strict=True)
    ]
    samples = {"accuracy": sample(right)}
    samples |= by_tag(right, [item.tags["data"] for item in items], prefix="accuracy/")
    samples |= by_tag(right, [item.tags["kind"] for item in items], prefix="accuracy/type/")
    unparsed = sum(
        text is not None and text.strip() not in ("A", "B", "C", "D") for text in answers
    )
    return Score(samples, unparsed=unparsed)
