"""The official rules on generated texts, with their mistakes; and the scores that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlduet.eval import answers
from vlduet.eval.benchmarks import choice, compositional, judged, knowledge, yes_no
from vlduet.eval.benchmarks.interleaved import score_demon_answer as demon_judged
from vlduet.eval.benchmarks.runners import invert_positives, best_positive_ranks
from vlduet.eval.benchmarks.scores import average, combine_samples
from vlduet.eval.benchmarks.tasks import Question
from vlduet.eval.benchmarks.vqa import is_gqa_match, llava_vqa_accuracy


def item(
    answer: Any = None, *, id: str = "0", options: Sequence[str] = (), **tags: str
) -> Question:
    return Question(id, ("?",), answer, tags, tuple(options))


# ------------------------------------------------------------------ VQA


@pytest.mark.parametrize(
    ("prediction", "truth", "value"),
    [
        ("Yes", ["yes"] * 10, 0.0),  # unanimous: raw strings are compared
        ("yes", ["yes"] * 10, 1.0),
        ("yes\n", ["yes"] * 10, 1.0),
        ("Yes", ["yes"] * 9 + ["no"], 1.0),
        ("down", ["down"] * 3 + ["up"] * 7, 0.9),  # 3 x 2/3 + 7 x 1
        ("down", ["down"] + ["up"] * 9, 0.3),
        ("none", ["0"] * 5 + ["1"] * 5, 1.0),
        ("The man!", ["man"] * 5 + ["a man"] * 5, 1.0),
        ("", ["a"] * 5 + ["b"] * 5, 0.0),
    ],
)
def test_vqa_accuracy(prediction: str, truth: list[str], value: float) -> None:
    found = answers.vqa_accuracy(prediction, truth)
    if truth[:1] == ["a"]:
        # "a" is an article: its ten annotators said nothing, as the prediction does.
        assert found == pytest.approx(1.0)
    else:
        assert found == pytest.approx(value)


def test_vqa_punctuation_keeps_the_official_mistakes() -> None:
    assert answers.strip_vqa_punctuation("3,000") == "3000"  # a comma between digits removes all marks
    assert answers.strip_vqa_punctuation("3,000-4,000") == "30004000"
    assert answers.strip_vqa_punctuation("black-white") == "black white"
    assert answers.strip_vqa_punctuation("black -white") == "black white"
    assert answers.strip_vqa_punctuation("it's") == "it's"  # the apostrophe is no mark
    assert answers.strip_vqa_punctuation("." * 40) == "." * 8  # re.UNICODE as count
    assert answers.strip_vqa_punctuation("1.5 m.") == "1.5 m"
    assert answers.normalize_vqa_words("Dont know ten cats") == "don't know 10 cats"
    assert answers.normalize_evalai("The dog's bone, yes?") == "dog 's bone yes"
    assert llava_vqa_accuracy("Yes", ["yes"] * 10) == 1.0
    assert len(answers.CONTRACTIONS) == 114  # of 120: four have capitals, two stand for themselves


def test_gqa_takes_the_period_off_and_nothing_else() -> None:
    assert [is_gqa_match(text, "no") for text in ("No", "no.", "no..", "no!", "")] == [1, 1, 1, 0, 0]


# ------------------------------------------------------------------ yes or no


@pytest.mark.parametrize(
    ("text", "yes"),
    [("NO", True), ("There is not one.", False), ("Yes, no doubt.", False), ("Yes. Not here.", True), ("", True),
     ("No", False), ("no,", False), ("nothing", True)],
)  # fmt: skip
def test_pope(text: str, yes: bool) -> None:
    assert answers.is_pope_yes(text) is yes


def test_pope_without_a_yes_is_0_and_no_crash() -> None:
    items = [item("no", split="random"), item("no", split="random")]
    samples = yes_no.score_pope(items, ["No", None]).samples
    values = {name: found.estimate().mean for name, found in samples.items()}
    assert values["F1"] == values["recall/random"] == 0.0  # no positive to find
    assert (values["yes/random"], values["accuracy/random"]) == (
        50.0,
        50.0,
    )  # nothing said counts as yes
    quiet = yes_no.score_pope(items, ["No", "No"]).samples
    assert quiet["precision/random"].estimate().mean == quiet["F1"].estimate().high == 0.0


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_pope_f1_equals_the_definition(rows: list[tuple[bool, bool]]) -> None:
    items = [item("yes" if gold else "no", split="random") for gold, _ in rows]
    found = (
        yes_no.score_pope(items, ["yes" if said else "no" for _, said in rows])
        .samples["F1/random"]
        .estimate()
        .mean
    )
    hits, gold, said = (
        sum(x) for x in ([g and s for g, s in rows], [g for g, _ in rows], [s for _, s in rows])
    )
    precision, recall = hits / said if said else 0.0, hits / gold if gold else 0.0
    expected = 200 * precision * recall / (precision + recall) if hits else 0.0
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is yes", "other"),
        ("YES", "yes"),
        ("yes, it is", "yes"),
        ("no yes", "no"),
        ("a no", "no"),
        ("", "other"),
    ],
)
def test_mme_answers(text: str, found: str) -> None:
    assert answers.parse_mme_answer(text) == found


def test_mme_sums_accuracy_and_accuracy_plus() -> None:
    items = [
        item(answer, task=task, image="1.jpg", question="q")
        for task in ("existence", "count", "code_reasoning")
        for answer in ("Yes", "No", "Yes", "No")
    ]
    said = ["yes", "yes", "yes", "no", *["yes", "no"] * 2, "no", "yes", None, "perhaps"]
    found = yes_no.score_mme(items, said)
    values = {name: sample.estimate().mean for name, sample in found.samples.items()}
    assert values["existence"] == pytest.approx(75 + 50)  # one pair with one right: acc 75, acc+ 50
    assert values["perception"] == pytest.approx(125 + 200)
    assert values["cognition"] == 0.0 and found.num_unparsed == 1
    table = yes_no.export_mme(items, said)["existence.txt"].decode().splitlines()
    assert table[0] == "1.jpg\tq\tYes\tyes"


# ------------------------------------------------------------------ multiple choice


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("B. a rock", "B"), ("The answer is C.", "C"), ("The answer is C. The answer is B.", None),
     ("b", None), ("Because", None), ("", None), ("F", None), ("(B)", None)],
)  # fmt: skip
def test_scienceqa_letters(text: str, letter: str | None) -> None:
    assert answers.parse_scienceqa_letter(text) == letter


def test_scienceqa_counts_what_it_cannot_read_as_wrong() -> None:
    items = [item("B", subject="s", options=("a", "b")) for _ in range(4)]
    found = choice.score_scienceqa(items, ["B", "E", "perhaps", None])
    assert found.samples["accuracy"].estimate().mean == 25.0 and found.num_unparsed == 1


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("(B)", "B"), ("B. dog", "B"), ("A", "A"), ("A cat is sitting", "A"), ("A man is sitting", None),
     ("A or B", None), ("the dog", "B"), ("a cat and a dog", None), ("The answer is **B**", "B"), ("D", None),
     ("I think it is C", "C"), ("", None), ("The answer is a dog.", "B"), ("The answer is b.", "B"),
     ("The correct answer is a cow, I think", "C"), ("the answer is: (B) dog", "B"),
     ("The answer is C because it has horns", "C")],
)  # fmt: skip
def test_mmbench_letters(text: str, letter: str | None) -> None:
    """`A cat is sitting` names option A by its text, not by the article."""
    assert answers.parse_mmbench_letter(text, ("cat", "dog", "cow")) == letter


def test_mmbench_is_circular() -> None:
    def rows(base: str, said: Sequence[str | None]) -> list[tuple[Question, str | None]]:
        options = ("x1", "y2", "z3")
        tags = {"base": base, "category": "c", "l2-category": "l"}
        return [(Question(str(n), ("?",), "A", tags, options), text) for n, text in enumerate(said)]

    pairs = rows("1", ["A", "A", "B"]) + rows("2", ["A", "A", "A"]) + rows("3", ["A", None])
    found = choice.score_mmbench([p[0] for p in pairs], [p[1] for p in pairs])
    assert found.samples["accuracy"].estimate().mean == pytest.approx(100 / 3)
    assert found.samples["vanilla"].estimate().mean == pytest.approx(100 * 6 / 8)
    assert found.details["questions"] == 3


def test_the_spreadsheet_opens() -> None:
    openpyxl = pytest.importorskip("openpyxl")
    import io

    from vlduet.eval.benchmarks.xlsx import workbook

    rows: list[list[str | int]] = [["index", "prediction"], [241, ' <b> & "x"\x07 ']]
    sheet = openpyxl.load_workbook(io.BytesIO(workbook(rows))).active
    assert [list(row) for row in sheet.values] == [["index", "prediction"], [241, ' <b> & "x" ']]


# ------------------------------------------------------------------ judges


def test_llava_bench_is_a_ratio_of_means_and_keeps_what_it_cannot_read() -> None:
    assert judged.parse_llava_scores("8 9\nGood.") == (8, 9)
    assert judged.parse_llava_scores("8,9\n") == (8, 9)
    assert judged.parse_llava_scores("8, 9") == (-1, -1)  # a double blank, officially unreadable
    assert judged.parse_llava_scores("Both are good.") == (-1, -1)
    items = [item({}, category="conv"), item({}, category="conv"), item({}, category="detail")]
    found = judged.score_llava_bench(items, ["8 4\n", "10 5\n", "free text"])
    values = {name: sample.estimate().mean for name, sample in found.samples.items()}
    assert values["relative/conv"] == pytest.approx(50.0)
    assert values["relative/all"] == pytest.approx(100 * (4 + 5 - 1) / (8 + 10 - 1))
    assert values["relative/detail"] == pytest.approx(0.0) or values[
        "relative/detail"
    ] == pytest.approx(100.0)
    assert (values["model/conv"], values["reference/conv"], found.num_unparsed) == (45.0, 90.0, 1)
    told = {"context": "A hill.", "reference": "R.", "rule": "Rule."}
    assert judged.llava_grader_prompt(Question("0", ("Q?",), told), "M.") == (
        "[Context]\nA hill.\n\n[Question]\nQ?\n\n[Assistant 1]\nR.\n\n[End of Assistant 1]\n\n[Assistant 2]\nM.\n\n"
        "[End of Assistant 2]\n\n[System]\nRule.\n\n"
    )


def test_mmvet_asks_again_and_warmer() -> None:
    asked: list[tuple[str, float]] = []

    def scripted(*said: str) -> Any:
        left = list(said)
        asked.clear()

        def ask(prompt: str, temperature: float) -> str:
            asked.append((prompt, temperature))
            return left.pop(0)

        return ask

    one = item("-1<AND>-5", question="What is x?")
    assert judged.request_mmvet_grade(one, "x = -1", scripted("0.5 because")) == "0.5 because"
    assert asked[0][0].endswith("characteristics. | 1.0\n\nWhat is x? | -1 <AND> -5 | x = -1 | ")
    assert judged.request_mmvet_grade(one, "x", scripted("junk", "1.5", "1.0")) == "1.0"
    assert [temperature for _, temperature in asked] == [0.0, 0.0, 0.5]
    assert asked[1][0].endswith("\nPredict the correctness of the answer (digit): ")
    assert judged.request_mmvet_grade(one, "x", scripted(*["junk"] * 5)) == "0.0"
    items = [item(capabilities="math+ocr"), item(capabilities="rec")]
    values = {
        n: s.estimate().mean for n, s in judged.score_mmvet(items, ["0.5 x", "1.0"]).samples.items()
    }
    assert (values["total"], values["math"], values["rec"], values["needs/math+ocr"]) == (
        75,
        50,
        100,
        50,
    )


# ------------------------------------------------------------------ DEMON


def test_rouge_works_on_sets_of_words() -> None:
    assert answers.rouge_l("the cat the cat sat", "the cat sat") == pytest.approx(1.0, abs=1e-6)
    assert answers.rouge_l("", "the cat") == answers.rouge_l("...", "the cat") == 0.0
    assert answers.rouge_l("a dog", "the cat") == 0.0


WORDS = st.lists(
    st.sampled_from(["a", "cat", "sat", "on", "the", "mat", ".", "dog."]), min_size=1, max_size=14
)


@settings(deadline=None, max_examples=200)
@given(WORDS, WORDS)
def test_rouge_equals_the_package(ours: list[str], theirs: list[str]) -> None:
    rouge = pytest.importorskip("rouge")
    prediction, reference = " ".join(ours), " ".join(theirs)
    try:
        expected = rouge.Rouge(metrics=["rouge-l"]).get_scores(prediction, reference)[0]["rouge-l"][
            "f"
        ]
    except ValueError:  # nothing but periods
        expected = 0.0
    assert answers.rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(WORDS, st.lists(WORDS, min_size=2, max_size=4))
def test_tfidf_equals_scikit_learn(prediction: list[str], choices: list[list[str]]) -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text")
    told = [" ".join(words) for words in (prediction, *choices)]
    try:
        rows = text.TfidfVectorizer().fit_transform(told).toarray()
    except ValueError:  # an empty vocabulary
        return
    cosines = rows[1:] @ rows[0]
    found = answers.best_tfidf_choice(told[0], told[1:])
    assert cosines[found] == pytest.approx(cosines.max(), abs=1e-12)


def test_demon_choices() -> None:
    assert (
        answers.best_tfidf_choice("nothing in common", ["two dogs", "a cat"]) == 0
    )  # officially the first one
    assert (
        answers.best_tfidf_choice("?", ["a", "?"]) == 1 and answers.best_tfidf_choice("!", ["a", "?"]) == -1
    )
    panel = item(
        "image B", task="COMICS_Panel", kind="multi-choice", options=("image A", "image B")
    )
    assert [demon_judged(panel, text) for text in ("Image B", "image b or image a", "image a")] == [
        1,
        0,
        0,
    ]
    cloze = item(
        "image B", task="RecipeQA_VisualCloze", kind="multi-choice", options=("image A", "image B")
    )
    assert (
        demon_judged(cloze, "image b, no doubt") == 0.0
    )  # TF-IDF sees "image" in both: the first one
    assert demon_judged(cloze, "image b, no doubt", repaired=True) == 1.0
    story = item("The cat sat.", task="AESOP", kind="open-ended")
    assert demon_judged(story, "the cat sat") == pytest.approx(1.0, abs=1e-6)
    assert answers.normalize_demon("'It is\nRed!'") == "it is red"


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
def test_webqa_accuracy(text: str, keywords: str, kind: str, value: float) -> None:
    assert knowledge.webqa_keyword_score(text, keywords, kind=kind) == pytest.approx(value)


# ------------------------------------------------------------------ comparisons


def test_pair_rules_are_strict() -> None:
    tie, clear = np.full((2, 2), 0.5), np.array([[0.9, 0.1], [0.2, 0.8]])
    texts = np.eye(2)
    assert compositional.winoground_rule(tie, texts) == {
        "text": False,
        "image": False,
        "group": False,
    }
    assert compositional.winoground_rule(clear, texts) == {
        "text": True,
        "image": True,
        "group": True,
    }
    assert not compositional.sugarcrepe_rule(np.full((2, 1), np.nan), texts)["accuracy"]
    s = np.array([[0.6], [0.4], [0.5]])
    t = np.array([[1, 0.7, 0.6], [0.7, 1, 0.7], [0.6, 0.7, 1]])
    found = compositional.sugarcrepe_plus_rule(s, t)
    assert found == {"ITT": False, "TOT": False, "image_caption1": True, "image_caption2": False}
    t[0, 1] = 0.8
    assert compositional.sugarcrepe_plus_rule(np.array([[0.6], [0.51], [0.5]]), t) == dict.fromkeys(
        found, True
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(2, 20))
def test_ranks_equal_the_definition(seed: int, num_queries: int, num_documents: int) -> None:
    random = np.random.default_rng(seed)
    queries = random.integers(1, 3, (num_queries, 3)).astype(
        np.float32
    )  # coarse, so that there are ties
    documents = random.integers(1, 3, (num_documents, 3)).astype(np.float32)
    positives = [
        tuple(random.choice(num_documents, random.integers(1, 3), replace=False)) for _ in queries
    ]
    excluded = [tuple(set(range(0, num_documents, 3)) - set(right)) for right in positives]
    ranks, _ = best_positive_ranks(queries, documents, positives, excluded=excluded)
    for n, right in enumerate(positives):
        scores = (
            (queries[n] @ documents.T)
            / np.linalg.norm(queries[n])
            / np.linalg.norm(documents, axis=1)
        )
        best = max(scores[list(right)])
        others = [i for i in range(num_documents) if i not in {*right, *excluded[n]}]
        assert ranks[n] == 1 + sum(scores[i] >= best - 1e-6 for i in others)


def test_ranks_equal_trec_eval_s_success() -> None:
    trec = pytest.importorskip("pytrec_eval")
    random = np.random.default_rng(3)
    queries, documents = (random.normal(size=(n, 8)).astype(np.float32) for n in (40, 60))
    positives = [tuple(random.choice(60, 5, replace=False)) for _ in range(40)]
    ranks, ties = best_positive_ranks(queries, documents, positives)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, documents)]
    scores = unit[0] @ unit[1].T
    judge = trec.RelevanceEvaluator(
        {str(q): {str(d): 1 for d in right} for q, right in enumerate(positives)},
        {"success.1,5,10"},
    )
    told = judge.evaluate(
        {str(q): {str(d): float(s) for d, s in enumerate(row)} for q, row in enumerate(scores)}
    )
    for k in (1, 5, 10):
        assert [told[str(q)][f"success_{k}"] for q in range(40)] == (ranks <= k).astype(
            float
        ).tolist()
    assert ties == 0
    assert invert_positives([(1,), (0, 1)], 3) == [(1,), (0, 1), ()]


def test_samples() -> None:
    one, other = average([1.0, 0.0]), average([1.0] * 4)
    assert combine_samples([one, other]).estimate().mean == 75.0  # groups weigh the same
    assert combine_samples([one, other], sum_groups=True).estimate().mean == 150.0
    weighted = average([1.0, 0.5], [1.0, 3.0])
    assert weighted.estimate().mean == pytest.approx(62.5)
    assert average([1.0, 1.0], [0.0, 0.0]).estimate().mean == 0.0
    found = average(np.random.default_rng(0).integers(0, 2, 400)).estimate(seed=1)
    assert found.low < found.mean < found.high and found.n == 400 and found.high - found.low < 12
