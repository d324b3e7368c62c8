"""What official scripts do to a generated text before they compare it: pure functions of strings.

Each rule is the official one with its mistakes, named where it is one: a repaired rule gives numbers that compare with
nobody's. Sources: GT-Vision-Lab/VQA vqaEval.py, Pythia's EvalAI processor, POPE evaluate.py, MME calculation.py,
LLaVA eval_science_qa.py, VLMEvalKit can_infer, Cheetah scripts/evaluate.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

# ------------------------------------------------------------------ VQA

NUMBERS = {
    word: str(i)
    for i, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_SHORT = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't "
    "it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't "
    "somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's "
    "they'd they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd where's where've "
    "who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"
)
CONTRACTIONS = {word.replace("'", ""): word for word in _SHORT.split()} | {
    "couldn'tve": "couldn't've", "couldnt've": "couldn't've", "hadnt've": "hadn't've", "hadn'tve": "hadn't've",
    "hed've": "he'd've", "he'dve": "he'd've", "itd've": "it'd've", "it'dve": "it'd've", "mightnt've": "mightn't've",
    "mightn'tve": "mightn't've", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at",
    "shed've": "she'd've", "she'dve": "she'd've", "shouldnt've": "shouldn't've", "shouldn'tve": "shouldn't've",
    "somebody'd": "somebodyd", "somebodyd've": "somebody'd've", "somebody'dve": "somebody'd've",
    "someoned've": "someone'd've", "someone'dve": "someone'd've", "somethingd've": "something'd've",
    "something'dve": "something'd've", "thered've": "there'd've", "there'dve": "there'd've", "theyd've": "they'd've",
    "they'dve": "they'd've", "twas": "'twas", "wed've": "we'd've", "we'dve": "we'd've", "whod've": "who'd've",
    "who'dve": "who'd've", "wouldnt've": "wouldn't've", "wouldn'tve": "wouldn't've", "yall'll": "y'all'll",
    "y'allll": "y'all'll", "yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've",
    "youd've": "you'd've", "you'dve": "you'd've",
}  # fmt: skip
"""As officially; entries with a capital letter are left out, because words are lower-case when it is asked."""

_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
"""The official look-behind is mistyped: it is a look-ahead for the characters <=."""
_MAX_PERIODS = 32
"""re.UNICODE, officially passed where `sub` takes its count."""


def vqa_punctuation(text: str) -> str:
    """The official processPunctuation: each mark is removed, or becomes a blank where it joins two words."""
    found = text
    comma = _COMMA.search(text) is not None
    for mark in PUNCTUATION:
        alone = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if alone or comma else " ")
    return _PERIOD.sub("", found, count=_MAX_PERIODS)


def vqa_words(text: str) -> str:
    """The official processDigitArticle: lower case, digits for number words, no articles, apostrophes restored."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_strip(text: str) -> str:
    """Line ends and tabs become blanks."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def evalai(text: str) -> str:
    """Pythia's EvalAI processor, which LLaVA applies before it submits."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_words(vqa_punctuation(vqa_strip(text)))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQAv2's accuracy of one question: the mean over the annotators of min(1, others who gave this answer / 3).

    Both sides are normalised only if the annotators disagree; where all wrote the same, strings are compared as they are.
    """
    prediction, answers = vqa_strip(prediction), [vqa_strip(answer) for answer in answers]
    if len(set(answers)) > 1:
        answers = [vqa_words(vqa_punctuation(answer)) for answer in answers]
        prediction = vqa_words(vqa_punctuation(prediction))
    return leave_one_out(prediction, answers)


def evalai_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA's and VizWiz' accuracy (m4c): the EvalAI processor on both sides, always."""
    return leave_one_out(evalai(prediction), [evalai(answer) for answer in answers])


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Mean over annotators of min(1, matches among the others / 3)."""
    same = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


# ------------------------------------------------------------------ yes or no


def pope_yes(text: str) -> bool:
    """POPE: no, iff the first sentence holds the word No, not or no (of this case); anything else is yes, even nothing."""
    words = text.split(".", maxsplit=1)[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def mme_answer(text: str) -> str:
    """MME: yes, no or other; beyond an exact answer only the first four characters are looked at."""
    text = text.lower()
    if text in ("yes", "no"):
        return text
    return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"


# ------------------------------------------------------------------ multiple choice

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def scienceqa_letter(text: str, letters: str = "ABCDE") -> str | None:
    """LLaVA's parse: the letter alone; else "B. ..."; else exactly one "The answer is B."."""
    if text in letters and len(text) == 1:
        return text
    if len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def mmbench_letter(text: str, options: Sequence[str]) -> str | None:
    """MMBench's rules without a judge: one letter that stands alone, else one option whose text occurs.

    Args:
        text: the answer.
        options: texts of A, B, ...

    Returns:
        The letter, or None where the rules find none or several; officially a language model or chance decides then.
    """
    letters = LETTERS[: len(options)]
    # A small letter is one only where nothing follows: "the answer is a dog" states none.
    stated = re.search(r"(?i:answer is:?)\s*\**\(?(?:([A-Z])\b|([a-z])\b(?=\W*$))", text)
    letter = (stated[1] or stated[2]).upper() if stated else ""
    if letter and letter in letters:
        return letter
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    alone = {letter for letter in letters if letter in words}
    # "A cat is sitting": in a sentence, A is an article.
    if "A" in alone and len(words) > 3:
        alone.discard("A")
    if len(alone) == 1:
        return alone.pop()
    if alone:
        return None
    lowered = text.lower()
    named = [
        letter
        for letter, option in zip(letters, options, strict=True)
        if option.strip().lower() in lowered
    ]
    return named[0] if len(named) == 1 else None


# ------------------------------------------------------------------ DEMON


def demon_process(text: str) -> str:
    """Cheetah's `process`: VQA's punctuation, lower case last, no surrounding quotes."""
    return vqa_punctuation(vqa_strip(text)).lower().strip("'").strip('"').strip()


def image_letter_match(prediction: str, reference: str) -> bool:
    """DEMON's image choices: "image b" at the start of both, and no second image named."""
    named = sum(f"image {letter}" in prediction for letter in "abcd")
    return named <= 1 and prediction[:7] == reference[:7]


# ------------------------------------------------------------------ ROUGE-L


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F as the PyPI package `rouge` 1.0.1 computes it, which DEMON uses: over *sets* of words.

    Sentences are cut at every period. The words of the longest common subsequences of all pairs of sentences are
    united, and precision and recall are taken against the distinct words. So "the cat the cat sat" against
    "the cat sat" is 1.0, where a plain F1 of the longest common subsequence is 0.75.

    Returns:
        0 where either side has no sentence.
    """
    ours = [" ".join(s.split()).split(" ") for s in prediction.split(".") if s]
    theirs = [" ".join(s.split()).split(" ") for s in reference.split(".") if s]
    if not ours or not theirs:
        return 0.0
    union = {word for right in theirs for said in ours for word in _common(right, said)}
    recall = len(union) / len({word for words in theirs for word in words})
    precision = len(union) / len({word for words in ours for word in words})
    return 2.0 * (precision * recall) / (precision + recall + 1e-8)


def _common(x: Sequence[str], y: Sequence[str]) -> list[str]:
    """The longest common subsequence that the official backtracking finds (of several, it matters which)."""
    table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, a in enumerate(x, 1):
        for j, b in enumerate(y, 1):
            table[i][j] = (
                table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
            )
    found, i, j = [], len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            found.append(x[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


# ------------------------------------------------------------------ TF-IDF

_TOKEN = re.compile(r"\b\w\w+\b")


def tfidf_choice(prediction: str, choices: Sequence[str]) -> int:
    """DEMON's multiple choice: the index of the choice whose TF-IDF vector has the highest cosine with the answer's.

    As scikit-learn's TfidfVectorizer with its defaults, fitted on answer and choices alone. Without any common word all
    cosines are 0 and the first choice wins (officially so); without any word of two letters at all, scikit-learn raises
    and the official script falls back to an exact match.

    Returns:
        -1 where that fallback finds no equal choice.
    """
    documents = [Counter(_TOKEN.findall(text.lower())) for text in (prediction, *choices)]
    words = sorted({word for document in documents for word in document})
    if not words:
        return list(choices).index(prediction) if prediction in choices else -1
    counts = np.array(
        [[document[word] for word in words] for document in documents], dtype=np.float64
    )
    idf = np.log((1 + len(documents)) / (1 + (counts > 0).sum(0))) + 1
    rows = counts * idf
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(lengths > 0, lengths, 1.0)
    return int(np.argmax(rows[1:] @ rows[0]))
