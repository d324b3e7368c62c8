"""Official scores of answers, reviews and pairs, with their known mistakes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlduet.eval.benchmarks import (
    compositional,
    interleaved,
    llm_graded,
    multiple_choice,
    webqa,
    yes_no,
)
from vlduet.eval.benchmarks.scores import BenchmarkScore
from vlduet.eval.benchmarks.tasks import Question


def make_item(reference: Any = None, *, options: Sequence[str] = (), **tags: str) -> Question:
    return Question("0", ("?",), reference, tags, tuple(options))


def means_of(score: BenchmarkScore) -> dict[str, float]:
    return {name: sample.mean for name, sample in score.samples.items()}


# ------------------------------------------------------------------ yes or no


def test_pope_without_a_correct_yes_scores_zero_instead_of_dividing_by_zero() -> None:
    items = [make_item("no", split="random"), make_item("no", split="random")]
    means = means_of(yes_no.score_pope(items, ["No", None]))
    assert means["F1"] == means["recall/random"] == 0.0
    # A missing answer counts as yes.
    assert means["yes/random"] == means["accuracy/random"] == 50.0
    score = yes_no.score_pope(items, ["No", "No"])
    assert score.samples["precision/random"].mean == 0.0
    assert score.samples["F1"].estimate().high == 0.0


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_pope_f1_equals_its_definition(pairs: list[tuple[bool, bool]]) -> None:
    items = [make_item("yes" if label else "no", split="random") for label, _ in pairs]
    answers = ["yes" if answer else "no" for _, answer in pairs]
    f1 = yes_no.score_pope(items, answers).samples["F1/random"].mean
    num_hits = pairs.count((True, True))
    num_labels = sum(label for label, _ in pairs)
    num_answers = sum(answer for _, answer in pairs)
    expected = 0.0
    if num_hits:
        precision, recall = num_hits / num_answers, num_hits / num_labels
        expected = 200 * precision * recall / (precision + recall)
    assert f1 == pytest.approx(expected)


def test_mme_adds_accuracy_and_accuracy_plus() -> None:
    items = []
    for task in ("existence", "count", "code_reasoning"):
        for reference in ("Yes", "No", "Yes", "No"):
            items.append(make_item(reference, task=task, image="1.jpg", question="q"))
    existence = ["yes", "yes", "yes", "no"]
    answers = [*existence, *["yes", "no"] * 2, "no", "yes", None, "perhaps"]
    score = yes_no.score_mme(items, answers)
    means = means_of(score)
    assert means["existence"] == pytest.approx(75 + 50)  # one of two images has both correct
    assert means["perception"] == pytest.approx(125 + 200)
    assert means["cognition"] == 0.0
    assert score.num_unparsed == 1
    table = yes_no.export_mme(items, answers)["existence.txt"].decode().splitlines()
    assert table[0] == "1.jpg\tq\tYes\tyes"


# ------------------------------------------------------------------ multiple choice


def test_scienceqa_counts_unreadable_and_missing_answers_as_wrong() -> None:
    items = [make_item("B", subject="s", options=("a", "b"))] * 4
    score = multiple_choice.score_scienceqa(items, ["B", "E", "perhaps", None])
    assert means_of(score) == {"accuracy": 25.0, "accuracy/s": 25.0}
    assert score.num_unparsed == 1


def test_mmbench_question_counts_only_if_every_rotation_is_correct() -> None:
    items = []
    for base in ("1", "1", "1", "2", "2", "2", "3", "3"):
        tags = {"base": base, "category": "c", "l2-category": "l"}
        items.append(make_item("A", options=("x1", "y2", "z3"), **tags))
    score = multiple_choice.score_mmbench(items, ["A", "A", "B", "A", "A", "A", "A", None])
    assert means_of(score)["accuracy"] == pytest.approx(100 / 3)
    assert means_of(score)["vanilla"] == pytest.approx(100 * 6 / 8)
    assert score.details["questions"] == 3


def test_spreadsheet_contains_texts_without_control_characters() -> None:
    openpyxl = pytest.importorskip("openpyxl")
    rows: list[list[str | int]] = [["index", "prediction"], [241, ' <b> & "x"\x07 '], [3, "=1+1"]]
    content = io.BytesIO(multiple_choice.write_spreadsheet(rows))
    sheet = openpyxl.load_workbook(content, read_only=True, data_only=True).active
    values = [list(row) for row in sheet.values]
    # With data_only, a formula that was never computed would be None.
    assert values == [["index", "prediction"], [241, ' <b> & "x" '], [3, "=1+1"]]


# ------------------------------------------------------------------ graded by a language model


@pytest.mark.parametrize(
    ("review", "scores"),
    [
        ("8 9\nGood.", (8, 9)),
        ("8,9\n", (8, 9)),
        ("8, 9", (-1, -1)),  # a double blank, officially unreadable
        ("Both are good.", (-1, -1)),
    ],
)
def test_llava_scores_are_the_two_numbers_of_the_first_line(
    review: str, scores: tuple[float, float]
) -> None:
    assert llm_graded.parse_llava_scores(review) == scores


def test_llava_bench_is_a_ratio_of_means_and_unreadable_reviews_take_part() -> None:
    items = [make_item({}, category=category) for category in ("conv", "conv", "detail")]
    score = llm_graded.score_llava_bench(items, ["8 4\n", "10 5\n", "free text"])
    means = means_of(score)
    assert means["relative/conv"] == pytest.approx(50.0)
    assert means["relative/all"] == pytest.approx(100 * (4 + 5 - 1) / (8 + 10 - 1))
    # A weight of -1 counts as no weight.
    assert means["relative/detail"] == 0.0
    assert (means["model/conv"], means["reference/conv"]) == (45.0, 90.0)
    assert score.num_unparsed == 1


def test_llava_grader_prompt_is_the_official_one() -> None:
    reference = {"context": "A hill.", "reference": "R.", "rule": "Rule."}
    assert llm_graded.llava_grader_prompt(Question("0", ("Q?",), reference), "M.") == (
        "[Context]\nA hill.\n\n[Question]\nQ?\n\n[Assistant 1]\nR.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nM.\n\n[End of Assistant 2]\n\n[System]\nRule.\n\n"
    )


def scripted_grader(
    *replies: str,
) -> tuple[Callable[[str, float], str], list[tuple[str, float]]]:
    """Return a grader with fixed replies, and the list of its (prompt, temperature) requests."""
    remaining = list(replies)
    requests: list[tuple[str, float]] = []

    def ask(prompt: str, temperature: float) -> str:
        requests.append((prompt, temperature))
        return remaining.pop(0)

    return ask, requests


def test_mmvet_prompt_ends_with_the_row_to_complete() -> None:
    item = make_item("-1<AND>-5", question="What is x?")
    ask, requests = scripted_grader("0.5 because")
    assert llm_graded.request_mmvet_grade(item, "x = -1", ask) == "0.5 because"
    prompt = requests[0][0]
    assert prompt.startswith("Compare the ground truth and prediction from AI models, to give a")
    ending = "characteristics. | 1.0\n\nWhat is x? | -1 <AND> -5 | x = -1 | "
    assert prompt.endswith(ending)


def test_mmvet_grade_is_requested_again_at_rising_temperature() -> None:
    item = make_item("-1<AND>-5", question="What is x?")
    ask, requests = scripted_grader("junk", "1.5", "1.0")
    assert llm_graded.request_mmvet_grade(item, "x", ask) == "1.0"
    assert [temperature for _, temperature in requests] == [0.0, 0.0, 0.5]
    assert requests[1][0].endswith("\nPredict the correctness of the answer (digit): ")
    ask, requests = scripted_grader(*["junk"] * 5)
    assert llm_graded.request_mmvet_grade(item, "x", ask) == "0.0"
    assert [temperature for _, temperature in requests] == [0.0, 0.0, 0.5, 1.0, 1.5]


def test_mmvet_scores_by_capability_and_by_set_of_capabilities() -> None:
    items = [make_item(capabilities="math+ocr"), make_item(capabilities="rec")]
    means = means_of(llm_graded.score_mmvet(items, ["0.5 x", "1.0"]))
    assert (means["total"], means["math"], means["rec"]) == (75, 50, 100)
    assert means["needs/math+ocr"] == 50


# ------------------------------------------------------------------ DEMON


def test_demon_compares_image_choices_by_letter() -> None:
    options = ("image A", "image B")
    item = make_item("image B", task="COMICS_Panel", kind="multi-choice", options=options)
    answers = ("Image B", "image b or image a", "image a")
    values = [interleaved.score_demon_answer(item, answer) for answer in answers]
    assert values == [1, 0, 0]


def test_demon_compares_visual_cloze_by_tfidf_unless_repaired() -> None:
    options = ("image A", "image B")
    item = make_item("image B", task="RecipeQA_VisualCloze", kind="multi-choice", options=options)
    answer = "image b, no doubt"
    # TF-IDF sees the word "image" in both options and takes the first one.
    assert interleaved.score_demon_answer(item, answer) == 0.0
    assert interleaved.score_demon_answer(item, answer, repaired=True) == 1.0


def test_demon_scores_open_answers_by_rouge() -> None:
    story = make_item("The cat sat.", task="AESOP", kind="open-ended")
    assert interleaved.score_demon_answer(story, "the cat sat") == pytest.approx(1.0, abs=1e-6)
    assert interleaved.score_demon_answer(story, "") == 0.0


# ------------------------------------------------------------------ WebQA


@pytest.mark.parametrize(
    ("text", "keywords", "kind", "value"),
    [
        ("It is white and red.", "white", "color", 2 / 3),
        ("There are three.", "3", "number", 1.0),
        ("Yes, it is.", "yes", "YesNo", 1.0),
        ("yes and no", "yes", "YesNo", 2 / 3),
        ("The old church", "old stone church", "text", 2 / 3),
        ("", "x", "text", 0.0),
    ],
)
def test_webqa_keyword_score(text: str, keywords: str, kind: str, value: float) -> None:
    assert webqa.webqa_keyword_score(text, keywords, kind=kind) == pytest.approx(value)


# ------------------------------------------------------------------ pairs


def test_pair_rules_are_strict() -> None:
    texts = np.eye(2)
    tie = compositional.decide_winoground(np.full((2, 2), 0.5), texts)
    assert tie == {"text": False, "image": False, "group": False}
    clear = compositional.decide_winoground(np.array([[0.9, 0.1], [0.2, 0.8]]), texts)
    assert clear == {"text": True, "image": True, "group": True}
    missing = np.full((2, 1), np.nan)
    assert not compositional.decide_sugarcrepe(missing, texts)["accuracy"]


def test_sugarcrepe_plus_needs_both_captions_and_the_nearest_texts() -> None:
    texts = np.array([[1, 0.7, 0.6], [0.7, 1, 0.7], [0.6, 0.7, 1]])
    decisions = compositional.decide_sugarcrepe_plus(np.array([[0.6], [0.4], [0.5]]), texts)
    assert decisions == {
        "ITT": False,
        "TOT": False,
        "image_caption1": True,
        "image_caption2": False,
    }
    texts[0, 1] = 0.8
    decisions = compositional.decide_sugarcrepe_plus(np.array([[0.6], [0.51], [0.5]]), texts)
    assert all(decisions.values())
