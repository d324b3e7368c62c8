"""Multiple choice: ScienceQA-IMG, MMBench (circular) and SEED-Bench (by letter, by likelihood)."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Callable, Mapping, Sequence

from vlduet.data.records import ImageRef
from vlduet.eval.answers import LETTERS, parse_mmbench_letter, parse_scienceqa_letter
from vlduet.eval.benchmarks.official_files import OfficialFiles, OfficialObject
from vlduet.eval.benchmarks.scores import BenchmarkScore, average, average_by_tag
from vlduet.eval.benchmarks.tasks import (
    AnswerScorer,
    AnswerTask,
    AnswerTexts,
    ChoiceTask,
    Question,
)

LETTER_INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."
MAX_NEW_TOKENS = 1024
"""Answer length in LLaVA's scripts for ScienceQA and MMBench."""


def format_options(options: Sequence[str]) -> str:
    """Return one option per line: ``A. ...``."""
    lettered = zip(LETTERS, options, strict=False)
    return "\n".join(f"{letter}. {option}" for letter, option in lettered)


def make_letter_scorer(
    parse_letter: Callable[[str, Sequence[str]], str | None], breakdown: Mapping[str, str]
) -> AnswerScorer:
    """Return a scorer of accuracy by letters (or other short forms), which compares exactly.

    The scorer returns ``accuracy`` first. A missing answer counts as wrong and not as unparsed. No
    items raise AssertionError, an item without a tag KeyError.

    Args:
        parse_letter: (answer, options) -> letter, or None where it finds none.
        breakdown: prefix -> tag; every value of the tag has a number ``PREFIX + VALUE``.
    """

    def score_letters(items: Sequence[Question], answers: AnswerTexts) -> BenchmarkScore:
        """Return the accuracies x 100, and the number of answers without a letter."""
        correct = []
        num_unparsed = 0
        for item, text in zip(items, answers, strict=True):
            letter = None if text is None else parse_letter(text, item.options)
            correct.append(float(letter == item.reference))
            num_unparsed += letter is None and text is not None
        samples = {"accuracy": average(correct)}
        for prefix, tag in breakdown.items():
            samples |= average_by_tag(correct, [item.tags[tag] for item in items], prefix=prefix)
        return BenchmarkScore(samples, num_unparsed=num_unparsed)

    return score_letters


# ------------------------------------------------------------------ ScienceQA


def load_scienceqa(files: OfficialFiles) -> AnswerTask:
    """Return the 2,017 test questions with an image, prompted in LLaVA's CQM-A form.

    The reference is the letter of the correct option, and the tag ``subject`` breaks scores down.
    File hashes are stored in `files.hashes`; a missing file or image raises DataError.
    """
    problems = files.read_named_objects("scienceqa/problems.json")
    items = []
    for key in files.read_object("scienceqa/pid_splits.json")["test"]:
        row = problems[key]
        if not row.get("image"):
            continue
        folder = f"scienceqa/images/test/{key}"
        image = files.find_image(f"{folder}/image.png", f"{folder}/{row['image']}")
        question = Question(
            key,
            (image, format_scienceqa(row) + LETTER_INSTRUCTION),
            LETTERS[row["answer"]],
            {"subject": row.get("subject", "")},
            tuple(row["choices"]),
            MAX_NEW_TOKENS,
        )
        items.append(question)
    return AnswerTask(tuple(items), score_scienceqa)


def format_scienceqa(row: OfficialObject) -> str:
    """Return context (where there is one), question and options of a problem."""
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    return f"{context}{row['question']}\n{format_options(row['choices'])}"


score_scienceqa = make_letter_scorer(
    lambda text, _: parse_scienceqa_letter(text), {"accuracy/": "subject"}
)
"""Scorer of ScienceQA; a letter that names no option is wrong."""

# ------------------------------------------------------------------ MMBench

ROTATION_STEP = 10**6
"""Rotations of a question have its index plus a multiple of this."""

_XML_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")
"""Characters that XML, and so a spreadsheet, cannot hold."""


def load_mmbench(files: OfficialFiles, *, file_names: Sequence[str]) -> AnswerTask:
    """Return the rows of an MMBench file (TSV), the first of `file_names` that exists.

    The tag ``base`` is the index of the question of which a row is one rotation. Answers are
    exported for the server (`export_mmbench`), and are scored only if every row has its correct
    letter. The file hash is stored in `files.hashes`.

    Raises:
        DataError: no file exists, or a row lacks a column or an option, or its image is no base64.
    """
    items = []
    for row in files.read_table(*file_names, delimiter="\t"):
        options = _read_options(row)
        hint = f"{row['hint']}\n" if _has_content(row.get("hint", "")) else ""
        text = f"{hint}{row['question']}\n{format_options(options)}{LETTER_INSTRUCTION}"
        tags = {"base": str(int(row["index"]) % ROTATION_STEP)}
        tags |= {tag: row.get(tag, "") for tag in ("category", "l2-category")}
        reference = row.get("answer") or None
        prompt = (_decode_image(row), text)
        items.append(Question(row["index"], prompt, reference, tags, options, MAX_NEW_TOKENS))
    has_answers = all(item.reference for item in items)
    return AnswerTask(tuple(items), score_mmbench if has_answers else None, export_mmbench)


def _read_options(row: OfficialObject) -> tuple[str, ...]:
    """Return the texts of A to D up to the first empty one; raise DataError where A is empty."""
    options = []
    for letter in "ABCD":
        if not _has_content(row.get(letter, "")):
            break
        options.append(row[letter])
    if not options:
        raise row.make_error("no options", "A")
    return tuple(options)


def _has_content(cell: str) -> bool:
    """Return whether a cell contains something; tables write nothing as "", nan or none."""
    return cell.strip().lower() not in ("", "nan", "none")


def _decode_image(row: OfficialObject) -> ImageRef:
    """Return the image of a row's base64 column; raise DataError where it is broken."""
    try:
        return ImageRef(data=base64.b64decode(row["image"], validate=False))
    except (binascii.Error, ValueError) as error:
        raise row.make_error(f"broken base64 ({error})", "image") from None


def score_mmbench(items: Sequence[Question], answers: AnswerTexts) -> BenchmarkScore:
    """Return CircularEval: the share of questions that are correct in every rotation, x 100.

    It is ``accuracy``, also by ``accuracy/l2-category/VALUE`` and ``accuracy/category/VALUE`` of a
    question's first row; ``vanilla`` is the accuracy of single rows. Letters are read by rules
    alone; where the official code asks a language model, the answer is wrong here and counted in
    `num_unparsed`. A missing or empty answer is wrong without being counted. The detail
    ``questions`` counts questions. No items raise AssertionError.
    """
    letters = []
    for item, text in zip(items, answers, strict=True):
        letters.append(parse_mmbench_letter(text, item.options) if text else None)
    correct = [letter == item.reference for item, letter in zip(items, letters, strict=True)]
    rotations: dict[str, list[bool]] = {}
    first_items: dict[str, Question] = {}
    for item, is_correct in zip(items, correct, strict=True):
        rotations.setdefault(item.tags["base"], []).append(is_correct)
        first_items.setdefault(item.tags["base"], item)
    circular = [float(all(group)) for group in rotations.values()]
    samples = {"accuracy": average(circular), "vanilla": average([float(c) for c in correct])}
    for tag in ("l2-category", "category"):
        values = [item.tags[tag] for item in first_items.values()]
        samples |= average_by_tag(circular, values, prefix=f"accuracy/{tag}/")
    pairs = zip(letters, answers, strict=True)
    num_unparsed = sum(letter is None and bool(text) for letter, text in pairs)
    details = {"questions": len(rotations)}
    return BenchmarkScore(samples, num_unparsed=num_unparsed, details=details)


def export_mmbench(items: Sequence[Question], answers: AnswerTexts) -> dict[str, bytes]:
    """Return LLaVA's upload file ``mmbench.xlsx``, with a row per item after the header.

    Columns are index, question (without hint where the file has none), answer, A to D, and
    prediction; the image and the categories are left out. Only the first four options are written.
    A missing answer is an empty cell. An id that is no integer raises ValueError.
    """
    rows: list[list[str | int]] = [
        ["index", "question", "answer", "A", "B", "C", "D", "prediction"]
    ]
    for item, text in zip(items, answers, strict=True):
        question = str(item.prompt[-1]).removesuffix(LETTER_INSTRUCTION)
        question = question.removesuffix("\n" + format_options(item.options))
        options = [*item.options, "", "", "", ""][:4]
        rows.append([int(item.id), question, item.reference or "", *options, text or ""])
    return {"mmbench.xlsx": write_spreadsheet(rows)}


def write_spreadsheet(rows: Sequence[Sequence[str | int]]) -> bytes:
    """Return the content of an .xlsx file with one sheet, "Sheet1"; nothing is written to disk.

    Texts are never formulas, and lose characters that XML cannot hold.
    """
    # Imported here, because it is slow to import and only this export needs it.
    from openpyxl import Workbook  # type: ignore[import-untyped]
    from openpyxl.cell import WriteOnlyCell  # type: ignore[import-untyped]

    workbook = Workbook(write_only=True)
    sheet = workbook.create_sheet("Sheet1")
    for row in rows:
        cells = []
        for value in row:
            if isinstance(value, str):
                cell = WriteOnlyCell(sheet, _XML_CONTROL.sub("", value))
                # An answer that starts with "=" is a text and not a formula.
                cell.data_type = "s"
                cells.append(cell)
            else:
                cells.append(value)
        sheet.append(cells)
    content = io.BytesIO()
    workbook.save(content)
    return content.getvalue()


# ------------------------------------------------------------------ SEED-Bench


def load_seedbench(files: OfficialFiles) -> AnswerTask:
    """Read SEED-Bench by letter, as LLaVA-1.5: the answer must equal the letter exactly."""
    return AnswerTask(tuple(_read_seedbench(files)), score_seedbench)


def load_seedbench_likelihood(files: OfficialFiles) -> ChoiceTask:
    """Return SEED-Bench by its own protocol: options ranked by likelihood after the bare question.

    Scores are broken down by the tag ``kind``, the type of question. File hashes are stored in
    `files.hashes`; a missing file or image raises DataError.
    """
    items = []
    for item in _read_seedbench(files):
        prompt = (item.prompt[0], item.tags["question"])
        reference = LETTERS.index(item.reference)
        items.append(
            Question(item.id, prompt, reference, {"kind": item.tags["kind"]}, item.options)
        )
    return ChoiceTask(tuple(items), "kind")


def _read_seedbench(files: OfficialFiles) -> list[Question]:
    """Return all questions in the form by letter; a video is shown as its middle frame.

    The tags are ``data`` (image or video), ``kind`` (name of the type of question, or its number if
    it has no name) and ``question`` (without options). File hashes are stored in `files.hashes`; a
    missing file or image raises DataError.
    """
    annotations = files.read_object("seedbench/SEED-Bench.json")
    kinds = {str(number): kind for kind, number in annotations.get_object("question_type").items()}
    items = []
    for row in annotations.get_objects("questions"):
        if row["data_type"] == "image":
            stem = f"seedbench/SEED-Bench-image/{row['data_id']}"
            image = files.find_image(stem, f"{stem}.jpg", f"{stem}.png")
        else:
            stem = f"seedbench/SEED-Bench-video-image/{row['question_id']}"
            image = files.find_image(f"{stem}.png", f"{stem}.jpg")
        options = tuple(str(row[f"choice_{letter}"]) for letter in "abcd")
        text = f"{row['question']}\n{format_options(options)}{LETTER_INSTRUCTION}"
        kind = kinds.get(str(row["question_type_id"]), str(row["question_type_id"]))
        tags = {"data": row["data_type"], "kind": kind, "question": row["question"]}
        key = str(row["question_id"])
        items.append(Question(key, (image, text), row["answer"], tags, options))
    return items


def parse_bare_letter(text: str, options: Sequence[str]) -> str | None:
    """Return an answer that is nothing but one of the letters A to D, or None."""
    letter = text.strip()
    return letter if letter in ("A", "B", "C", "D") else None


score_seedbench = make_letter_scorer(
    parse_bare_letter, {"accuracy/": "data", "accuracy/type/": "kind"}
)
"""Scorer of SEED-Bench over all items, images, videos, and types of question."""
