"""Official rules that normalize a generated text and compare it: pure functions of strings.

Each rule is the official one with its mistakes, named where it is one: a repaired rule would give
numbers that compare with nobody's. Sources: GT-Vision-Lab/VQA vqaEval.py, Pythia's EvalAI
processor, POPE evaluate.py, MME calculation.py, LLaVA eval_science_qa.py, VLMEvalKit can_infer,
Cheetah scripts/evaluate.py.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# ------------------------------------------------------------------ VQA

NUMBER_WORDS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

CONTRACTIONS: dict[str, str] = json.loads(
    (Path(__file__).parent / "vqa_contractions.json").read_text(encoding="utf-8")
)
"""Official spelling repairs (``dont`` -> ``don't``). Four official entries with a capital letter
are left out: words are lower-case when they are looked up."""

_COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
"""Officially meant as a look-behind for digits, but mistyped: it looks ahead for ``<=``."""
_MAX_PERIODS = 32
"""Value of re.UNICODE, which the official code passes where `sub` takes its count."""


def normalize_vqa_punctuation(text: str) -> str:
    """Return the text without punctuation, as the official processPunctuation does.

    Every mark of `PUNCTUATION` becomes a blank, or is removed everywhere if it stands beside a
    blank anywhere, or if the text has a comma between digits. Then the first `_MAX_PERIODS` periods
    that no digit follows are removed.
    """
    result = text
    has_number_comma = _COMMA_BETWEEN_DIGITS.search(text) is not None
    for mark in PUNCTUATION:
        is_beside_blank = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_beside_blank or has_number_comma else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)


def normalize_vqa_tokens(text: str) -> str:
    """Apply the official processDigitArticle.

    The text becomes lower-case, number words become digits, articles are removed, and missing
    apostrophes are restored.
    """
    words = [NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def replace_line_ends(text: str) -> str:
    """Return the text with blanks for line ends and tabs, stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_evalai(text: str) -> str:
    """Apply Pythia's EvalAI processor, which LLaVA applies to its submissions."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalize_vqa_tokens(normalize_vqa_punctuation(replace_line_ends(text)))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return VQAv2's accuracy of one question, from 0 to 1.

    It is the mean over annotators of min(1, number of other annotators who gave the prediction /
    3). Line ends and tabs become blanks. Punctuation, case, number words and articles are
    normalized only if the annotators disagree. No answers raise ZeroDivisionError.
    """
    prediction = replace_line_ends(prediction)
    answers = [replace_line_ends(answer) for answer in answers]
    if len(set(answers)) > 1:
        answers = [normalize_vqa_tokens(normalize_vqa_punctuation(answer)) for answer in answers]
        prediction = normalize_vqa_tokens(normalize_vqa_punctuation(prediction))
    return annotator_agreement(prediction, answers)


def evalai_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy of TextVQA and VizWiz (m4c): both sides are always EvalAI-normalized."""
    return annotator_agreement(
        normalize_evalai(prediction), [normalize_evalai(answer) for answer in answers]
    )


def annotator_agreement(prediction: str, answers: Sequence[str]) -> float:
    """Return the mean over annotators of min(1, number of other annotators who agree / 3).

    An annotator agrees if the answer equals the prediction. No answers raise ZeroDivisionError.
    """
    matches = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(matches) - is_match) / 3) for is_match in matches) / len(matches)


# ------------------------------------------------------------------ yes or no


def is_pope_yes(text: str) -> bool:
    """Return whether POPE reads an answer as yes.

    It is a no if the first sentence contains the word No, not or no (in this case), and a yes
    otherwise, even if empty.
    """
    words = text.split(".", maxsplit=1)[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def parse_mme_answer(text: str) -> str:
    """Return ``yes``, ``no`` or ``other`` by MME's rule.

    Only the first four characters count, in any case: ``yes`` if they contain yes, else ``no`` if
    they contain no.
    """
    start = text[:4].lower()
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


# ------------------------------------------------------------------ multiple choice

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def parse_scienceqa_letter(text: str, letters: str = "ABCDE") -> str | None:
    """Return the letter that LLaVA's rule reads, or None.

    The text is one of `letters` alone, or starts with one and ". ", or contains "The answer is X"
    exactly once, where X is any capital letter and one more character follows (the official
    pattern means a period, but takes all).
    """
    if len(text) == 1 and text in letters:
        return text
    if len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
        return text[0]
    stated = re.findall(r"The answer is ([A-Z]).", text)
    return stated[0] if len(stated) == 1 else None


def parse_mmbench_letter(text: str, options: Sequence[str]) -> str | None:
    """Return the letter of an option by MMBench's rules without a language model, or None.

    The first rule that finds a letter of an option decides:

    1. the first "answer is B"; a small letter counts only at the end of the text
    2. capital letters that stand alone as words; in more than three words, A is an article
    3. options whose text occurs, in any case

    None is returned where the deciding rule finds several letters, or no rule finds one; officially
    a language model or chance decides then.

    Args:
        text: the answer.
        options: texts of A, B, ..., at most 26.
    """
    letters = LETTERS[: len(options)]
    # A small letter is one only where nothing follows: "the answer is a dog" states none.
    stated = re.search(r"(?i:answer is:?)\s*\**\(?(?:([A-Z])\b|([a-z])\b(?=\W*$))", text)
    letter = (stated[1] or stated[2]).upper() if stated else ""
    if letter and letter in letters:
        return letter
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    standing_alone = {letter for letter in letters if letter in words}
    # "A cat is sitting": in a sentence, A is an article.
    if "A" in standing_alone and len(words) > 3:
        standing_alone.discard("A")
    if standing_alone:
        return standing_alone.pop() if len(standing_alone) == 1 else None
    lowered = text.lower()
    named = []
    for letter, option in zip(letters, options, strict=True):
        if option.strip().lower() in lowered:
            named.append(letter)
    return named[0] if len(named) == 1 else None


# ------------------------------------------------------------------ DEMON


def normalize_demon(text: str) -> str:
    """Apply Cheetah's `process`: VQA's punctuation, then lower case, without surrounding quotes."""
    text = normalize_vqa_punctuation(replace_line_ends(text)).lower()
    return text.strip("'").strip('"').strip()


def is_same_image_letter(prediction: str, reference: str) -> bool:
    """Return whether two normalized answers start with the same "image b" (DEMON).

    A prediction that names two or more of the images a to d is wrong.
    """
    num_named = sum(f"image {letter}" in prediction for letter in "abcd")
    return num_named <= 1 and prediction[:7] == reference[:7]


# ------------------------------------------------------------------ ROUGE-L


def rouge_l(prediction: str, reference: str) -> float:
    """Return ROUGE-L F as the PyPI package `rouge` 1.0.1 computes it, which DEMON uses.

    It works on *sets* of words: sentences are cut at every period, the words of the longest common
    subsequences of all pairs of sentences are united, and precision and recall are taken against
    the distinct words. So "the cat the cat sat" against "the cat sat" is 1.0, where a plain F1 of
    the longest common subsequence is 0.75.

    Case and other punctuation count.

    Returns:
        A number from 0 to 1; 0 where either side is empty or has nothing but periods.
    """
    sentences = [" ".join(s.split()).split(" ") for s in prediction.split(".") if s]
    reference_sentences = [" ".join(s.split()).split(" ") for s in reference.split(".") if s]
    if not sentences or not reference_sentences:
        return 0.0
    common_words: set[str] = set()
    for reference_words in reference_sentences:
        for words in sentences:
            common_words.update(_longest_common_subsequence(reference_words, words))
    recall = len(common_words) / len(set().union(*reference_sentences))
    precision = len(common_words) / len(set().union(*sentences))
    return 2.0 * (precision * recall) / (precision + recall + 1e-8)


def _longest_common_subsequence(x: Sequence[str], y: Sequence[str]) -> list[str]:
    """Return the words of a longest common subsequence in reverse order; [] if there is none.

    Of several ones it is that of the official backtracking, because the score depends on it.
    """
    # lengths[i][j]: length of the longest common subsequence of x[:i] and y[:j].
    lengths = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, a in enumerate(x, 1):
        for j, b in enumerate(y, 1):
            if a == b:
                lengths[i][j] = lengths[i - 1][j - 1] + 1
            else:
                lengths[i][j] = max(lengths[i - 1][j], lengths[i][j - 1])
    common = []
    i = len(x)
    j = len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            common.append(x[i - 1])
            i -= 1
            j -= 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return common


# ------------------------------------------------------------------ TF-IDF

_TOKEN = re.compile(r"\b\w\w+\b")


def best_tfidf_choice(prediction: str, choices: Sequence[str]) -> int:
    """Return the index of the choice that is nearest to the prediction by TF-IDF (DEMON).

    Vectors are those of scikit-learn's TfidfVectorizer with its defaults, fitted on prediction and
    choices alone, so that words have at least two characters; the first of the highest cosines
    wins, also where no choice shares a word and all are 0. Where neither prediction nor choices
    have a word, the first choice equal to the prediction is taken, as officially, or -1 returned.
    No choices raise ValueError if the prediction has a word.
    """
    counts_by_text = [Counter(_TOKEN.findall(text.lower())) for text in (prediction, *choices)]
    vocabulary = sorted(set().union(*counts_by_text))
    if not vocabulary:
        return list(choices).index(prediction) if prediction in choices else -1
    rows = []
    for counts in counts_by_text:
        rows.append([counts[word] for word in vocabulary])
    term_counts = np.array(rows, dtype=np.float64)  # [1 + choices, words]
    document_frequency = (term_counts > 0).sum(0)
    tfidf = term_counts * (np.log((1 + len(rows)) / (1 + document_frequency)) + 1)
    norms = np.linalg.norm(tfidf, axis=1, keepdims=True)
    tfidf /= np.where(norms > 0, norms, 1.0)
    return int(np.argmax(tfidf[1:] @ tfidf[0]))
