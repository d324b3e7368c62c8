"""The official rules on generated texts, with their mistakes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlduet.eval import answers
from vlduet.eval.benchmarks.vqa import gqa_exact_match, llava_vqa_accuracy

# ------------------------------------------------------------------ VQA


@pytest.mark.parametrize(
    ("prediction", "references", "value"),
    [
        ("Yes", ["yes"] * 10, 0.0),  # unanimous: the texts are compared as they are
        ("yes", ["yes"] * 10, 1.0),
        ("yes\n", ["yes"] * 10, 1.0),
        ("Yes", ["yes"] * 9 + ["no"], 1.0),
        ("down", ["down"] * 3 + ["up"] * 7, 0.9),  # 3 x 2/3 + 7 x 1
        ("down", ["down"] + ["up"] * 9, 0.3),
        ("none", ["0"] * 5 + ["1"] * 5, 1.0),
        ("The man!", ["man"] * 5 + ["a man"] * 5, 1.0),
        ("", ["a"] * 5 + ["b"] * 5, 1.0),  # the article "a" is removed, which leaves nothing
        ("", ["b"] * 5 + ["c"] * 5, 0.0),
    ],
)
def test_vqa_accuracy(prediction: str, references: list[str], value: float) -> None:
    assert answers.vqa_accuracy(prediction, references) == pytest.approx(value)


def test_llava_normalizes_before_it_submits() -> None:
    assert llava_vqa_accuracy("Yes", ["yes"] * 10) == 1.0


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("3,000", "3000"),  # a comma between digits removes all marks
        ("3,000-4,000", "30004000"),
        ("black-white", "black white"),
        ("black -white", "black white"),
        ("it's", "it's"),  # the apostrophe is not a mark
        ("." * 40, "." * 8),  # re.UNICODE as count
        ("1.5 m.", "1.5 m"),
    ],
)
def test_vqa_punctuation_keeps_the_official_mistakes(text: str, stripped: str) -> None:
    assert answers.normalize_vqa_punctuation(text) == stripped


def test_vqa_answers_are_normalized() -> None:
    assert answers.normalize_vqa_tokens("Dont know ten cats") == "don't know 10 cats"
    assert answers.normalize_evalai("The dog's bone, yes?") == "dog 's bone yes"
    # Of 120 official entries four have capitals, and two map a word to itself.
    assert len(answers.CONTRACTIONS) == 114


def test_gqa_removes_final_periods_and_nothing_else() -> None:
    texts = ("No", "no.", "no..", "no!", "")
    assert [gqa_exact_match(text, "no") for text in texts] == [1, 1, 1, 0, 0]


# ------------------------------------------------------------------ yes or no


@pytest.mark.parametrize(
    ("text", "is_yes"),
    [
        ("NO", True),
        ("There is not one.", False),
        ("Yes, no doubt.", False),
        ("Yes. Not here.", True),
        ("", True),
        ("No", False),
        ("no,", False),
        ("nothing", True),
    ],
)
def test_pope_reads_everything_as_yes_but_three_answers(text: str, is_yes: bool) -> None:
    assert answers.is_pope_yes(text) is is_yes


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is yes", "other"),
        ("YES", "yes"),
        ("yes, it is", "yes"),
        ("no yes", "no"),
        ("a no", "no"),
        ("", "other"),
    ],
)
def test_mme_looks_at_the_first_four_characters(text: str, answer: str) -> None:
    assert answers.parse_mme_answer(text) == answer


# ------------------------------------------------------------------ multiple choice


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B. a rock", "B"),
        ("The answer is C.", "C"),
        ("The answer is C. The answer is B.", None),
        ("b", None),
        ("Because", None),
        ("", None),
        ("F", None),
        ("(B)", None),
    ],
)
def test_scienceqa_letter(text: str, letter: str | None) -> None:
    assert answers.parse_scienceqa_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. dog", "B"),
        ("A", "A"),
        ("A cat is sitting", "A"),  # by the text of the option, not by the article
        ("A man is sitting", None),
        ("A or B", None),
        ("the dog", "B"),
        ("a cat and a dog", None),
        ("The answer is **B**", "B"),
        ("D", None),
        ("I think it is C", "C"),
        ("", None),
        ("The answer is a dog.", "B"),
        ("The answer is b.", "B"),
        ("The correct answer is a cow, I think", "C"),
        ("the answer is: (B) dog", "B"),
        ("The answer is C because it has horns", "C"),
    ],
)
def test_mmbench_letter(text: str, letter: str | None) -> None:
    assert answers.parse_mmbench_letter(text, ("cat", "dog", "cow")) == letter


# ------------------------------------------------------------------ DEMON


def test_demon_normalizes_punctuation_case_and_quotes() -> None:
    assert answers.normalize_demon("'It is\nRed!'") == "it is red"


def test_rouge_works_on_sets_of_tokens() -> None:
    assert answers.rouge_l("the cat the cat sat", "the cat sat") == pytest.approx(1.0, abs=1e-6)
    assert answers.rouge_l("", "the cat") == answers.rouge_l("...", "the cat") == 0.0
    assert answers.rouge_l("a dog", "the cat") == 0.0


WORDS = st.lists(
    st.sampled_from(["a", "cat", "sat", "on", "the", "mat", ".", "dog."]), min_size=1, max_size=14
)


@settings(deadline=None, max_examples=200)
@given(WORDS, WORDS)
def test_rouge_equals_the_package(words: list[str], reference_words: list[str]) -> None:
    rouge = pytest.importorskip("rouge")
    prediction, reference = " ".join(words), " ".join(reference_words)
    expected = 0.0
    try:
        scores = rouge.Rouge(metrics=["rouge-l"]).get_scores(prediction, reference)
        expected = scores[0]["rouge-l"]["f"]
    except ValueError:
        """The package refuses texts of nothing but periods."""
    assert answers.rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(WORDS, st.lists(WORDS, min_size=2, max_size=4))
def test_tfidf_choice_equals_scikit_learn(words: list[str], choice_words: list[list[str]]) -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text")
    texts = [" ".join(text_words) for text_words in (words, *choice_words)]
    try:
        rows = text.TfidfVectorizer().fit_transform(texts).toarray()
    except ValueError:  # an empty vocabulary, for which see the next test
        return
    cosines = rows[1:] @ rows[0]
    index = answers.best_tfidf_choice(texts[0], texts[1:])
    assert cosines[index] == pytest.approx(cosines.max(), abs=1e-12)


def test_tfidf_choice_without_common_tokens_is_the_first_or_an_exact_match() -> None:
    assert answers.best_tfidf_choice("nothing in common", ["two dogs", "a cat"]) == 0
    assert answers.best_tfidf_choice("?", ["a", "?"]) == 1
    assert answers.best_tfidf_choice("!", ["a", "?"]) == -1
