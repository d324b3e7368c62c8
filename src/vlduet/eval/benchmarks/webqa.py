"""WebQA: questions answered with retrieved images and texts (Sugar), and its position probe.

The paper tells its splits, prompts and metrics only partly; the loaders state what is chosen here.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vlduet.data.records import ImageRef, Part
from vlduet.errors import DataError
from vlduet.eval.answers import ARTICLES, NUMBER_WORDS
from vlduet.eval.benchmarks.knowledge import (
    ROUGE_DETAILS,
    best_rouge_values,
    prepend_references,
)
from vlduet.eval.benchmarks.multiple_choice import make_letter_scorer
from vlduet.eval.benchmarks.official_files import USE_OFFICIAL_FILE, OfficialFiles, OfficialObject
from vlduet.eval.benchmarks.scores import BenchmarkScore, MetricSample, average, average_by_tag
from vlduet.eval.benchmarks.tasks import (
    AnswerTask,
    AnswerTexts,
    KnowledgeEntry,
    NatsPerToken,
    Question,
    RagTask,
)

WEBQA_FILE = "webqa/WebQA_train_val.json"
NUM_RAG_QUESTIONS = 1000
"""Number of questions that Sugar draws for its table."""
NUM_PROBE_QUESTIONS = 500
"""Number of questions that Sugar draws for its position probe."""
YES_NO_INSTRUCTION = " please answer the question in Yes or No."

CLOSED_ANSWERS: dict[str, list[str]] = json.loads(
    (Path(__file__).parent / "webqa_closed_answers.json").read_text(encoding="utf-8")
)
"""Kind of question -> all its possible answers, as in WebQA's eval_1022.py."""


class WebQAImages:
    """Images of WebQA by id.

    They are files of ``webqa/images/``, or rows of the official ``imgs.tsv``, whose byte offsets
    stand in ``imgs.lineidx``.
    """

    def __init__(self, files: OfficialFiles):
        """Store `files`, and read the offsets of ``webqa/imgs.tsv`` where it exists.

        The hash of ``imgs.lineidx`` is stored in `files.hashes`. DataError is raised where it is
        missing.
        """
        self.files = files
        self.offsets: list[int] = []
        if files.has_file("webqa/imgs.tsv"):
            self.offsets = [int(line) for line in files.read_text("webqa/imgs.lineidx").split()]

    def read_image(self, image_id: int) -> ImageRef:
        """Return an image, as its bytes if it is in the table.

        Raises:
            DataError: its file is missing, or the table has another image in row `image_id` % 10^7.
            IndexError: the table has no such row.
            ValueError: the row is not ``ID<TAB>BASE64``.
        """
        if not self.offsets:
            stem = f"webqa/images/{image_id}"
            return self.files.find_image(f"{stem}.jpg", f"{stem}.png")
        path = self.files.find_path("webqa/imgs.tsv")
        row_number = image_id % 10_000_000
        with path.open("rb") as table:
            table.seek(self.offsets[row_number])
            name, _, data = table.readline().partition(b"\t")
        if int(name) != image_id:
            message = f"row {row_number} is image {int(name)}, not {image_id}"
            raise DataError(message, place=path, fix=USE_OFFICIAL_FILE)
        return ImageRef(data=base64.b64decode(data.strip()))


def load_webqa(files: OfficialFiles) -> RagTask:
    """Return 1,000 validation questions, each with its own 10 to 40 candidate entries.

    Questions are drawn with `files.seed`. Both views of a question are its text. The views of an
    image entry are its image and its caption, of a text entry twice its text, so that an image is
    found by the mean of both similarities, Sugar's rule. Positives are the ``posFacts``. `files.k`
    entries are shown; the default of 2 is as many as a question needs at most. Answers are scored
    by `score_webqa` and `score_webqa_fluency`. File hashes are stored in `files.hashes`; a missing
    file or image raises DataError.
    """
    images = WebQAImages(files)
    items: list[Question] = []
    entries: list[KnowledgeEntry] = []
    candidates: list[tuple[int, ...]] = []
    positives: list[tuple[int, ...]] = []
    for key, row in _draw_questions(files, NUM_RAG_QUESTIONS, lambda row: True):
        start = len(entries)
        entries += _read_entries(row, "img_posFacts", images)
        entries += _read_entries(row, "txt_posFacts", images)
        positives.append(tuple(range(start, len(entries))))
        entries += _read_entries(row, "img_negFacts", images)
        entries += _read_entries(row, "txt_negFacts", images)
        candidates.append(tuple(range(start, len(entries))))
        references = [_strip_quotes(text) for text in row["A"]]
        tags = {"kind": row["Qcate"], "keywords": _strip_quotes(row.get("Keywords_A", ""))}
        items.append(Question(key, (_strip_quotes(row["Q"]),), references, tags))
    return RagTask(
        items=tuple(items),
        query_views=tuple((item.prompt, item.prompt) for item in items),
        entries=tuple(entries),
        build_prompt=prepend_references,
        score=score_webqa,
        candidates=tuple(candidates),
        positives=tuple(positives),
        k=files.k or 2,
        score_fluency=score_webqa_fluency,
        details=ROUGE_DETAILS,
    )


def _draw_questions(
    files: OfficialFiles, count: int, is_usable: Callable[[OfficialObject], bool]
) -> list[tuple[str, OfficialObject]]:
    """Return up to `count` usable validation questions as (id, row), drawn with `files.seed`.

    They are in file order. The file hash is stored in `files.hashes`. A missing file, or no usable
    question, raises DataError.
    """
    rows = []
    for key, row in files.read_named_objects(WEBQA_FILE).items():
        if row["split"] == "val" and is_usable(row):
            rows.append((key, row))
    if not rows:
        message = "no such question of the validation split"
        raise DataError(message, place=files.find_path(WEBQA_FILE), fix=USE_OFFICIAL_FILE)
    drawn = np.random.default_rng(files.seed).permutation(len(rows))[:count]
    return [rows[i] for i in sorted(drawn)]


def _read_entries(row: OfficialObject, key: str, images: WebQAImages) -> list[KnowledgeEntry]:
    """Return the entries under a key of a question, such as ``img_posFacts``; none if absent."""
    facts = row.get_objects(key) if row.get(key) else []
    read_entry = _read_image_entry if key.startswith("img") else _read_text_entry
    return [read_entry(fact, images) for fact in facts]


def _read_text_entry(fact: OfficialObject, images: WebQAImages) -> KnowledgeEntry:
    """Return a text entry, whose two views are its text."""
    text = _strip_quotes(fact["fact"])
    return KnowledgeEntry(str(fact["snippet_id"]), ((text,), (text,)), (text + "\n",))


def _read_image_entry(fact: OfficialObject, images: WebQAImages) -> KnowledgeEntry:
    """Return an image entry, whose views are its image and its caption, or title without a caption.

    The prompt shows the image, then the caption. A missing image raises DataError.
    """
    image = images.read_image(int(fact["image_id"]))
    caption = _strip_quotes(fact.get("caption") or fact["title"])
    views = ((image,), (caption,))
    return KnowledgeEntry(str(fact["image_id"]), views, (image, caption + "\n"))


def _strip_quotes(text: str) -> str:
    """Return a text without the quotation marks that WebQA puts around it."""
    return text.strip().removeprefix('"').removesuffix('"').strip()


def score_webqa(items: Sequence[Question], answers: AnswerTexts) -> BenchmarkScore:
    """Return ``ROUGE-L`` with the best reference and ``Acc``, the keyword score, both x 100.

    They are also given by kind, as ``ROUGE-L/KIND`` and ``Acc/KIND``. A missing answer is an empty
    one. No items raise AssertionError.
    """
    rouge = best_rouge_values(items, answers)
    keyword_scores = _keyword_scores(items, answers)
    kinds = [item.tags["kind"] for item in items]
    samples = {"ROUGE-L": average(rouge), "Acc": average(keyword_scores)}
    samples |= average_by_tag(rouge, kinds, prefix="ROUGE-L/")
    samples |= average_by_tag(keyword_scores, kinds, prefix="Acc/")
    return BenchmarkScore(samples)


def _keyword_scores(items: Sequence[Question], answers: AnswerTexts) -> list[float]:
    """Return `webqa_keyword_score` (0 to 1) of every answer; a missing answer is an empty one."""
    scores = []
    for item, text in zip(items, answers, strict=True):
        score = webqa_keyword_score(text or "", item.tags["keywords"], kind=item.tags["kind"])
        scores.append(score)
    return scores


def webqa_keyword_score(text: str, keywords: str, *, kind: str) -> float:
    """Return WebQA's Acc of one answer, from 0 to 1, without the official lemmatization.

    Kinds with closed answers, and ``number``, are scored by F1 over the closed answers (or the
    digits) that occur in text and keywords, each counted once; other kinds by the recall of the
    keywords, which counts repetitions. Nothing in common gives 0.
    """
    answer_words = _count_tokens(text)
    keyword_words = _count_tokens(keywords)
    is_closed = kind in CLOSED_ANSWERS or kind == "number"
    if is_closed:
        answer_words = _closed_answers_in(answer_words, kind)
        keyword_words = _closed_answers_in(keyword_words, kind)
    num_shared = (answer_words & keyword_words).total()
    if not num_shared:
        return 0.0
    recall = num_shared / keyword_words.total()
    precision = num_shared / answer_words.total()
    return 2 * precision * recall / (precision + recall) if is_closed else recall


def _count_tokens(text: str) -> Counter[str]:
    """Return how often each word occurs: lower-case, digits for number words, no articles."""
    words = re.sub(r"[^\w\s]", "", text.lower()).split()
    return Counter(NUMBER_WORDS.get(word, word) for word in words if word not in ARTICLES)


def _closed_answers_in(words: Counter[str], kind: str) -> Counter[str]:
    """Return the words that are possible answers of a kind, each counted once."""
    if kind == "number":
        return Counter([word for word in words if word.isdigit()])
    return Counter([word for word in words if word in CLOSED_ANSWERS[kind]])


def score_webqa_fluency(
    items: Sequence[Question], answers: AnswerTexts, nats_per_token: NatsPerToken
) -> dict[str, MetricSample]:
    """Return WebQA's FL and QA = FL x Acc, both x 100; {} if `nats_per_token` returns None.

    FL = min(1, max over references A of BARTScore(A -> answer) / BARTScore(A -> A)), BARTScore
    being the geometric mean of the tokens' probabilities. An empty or missing answer has FL 0 and
    is not passed to `nats_per_token`. For Acc see `webqa_keyword_score`. No items raise
    AssertionError.
    """
    owners: list[int] = []
    pairs: list[tuple[str, str]] = []
    for n, (item, text) in enumerate(zip(items, answers, strict=True)):
        if text is None or not text.strip():
            continue
        for reference in item.reference:
            owners.append(n)
            pairs += [(reference, text), (reference, reference)]
    nats = nats_per_token(pairs)
    if nats is None:
        return {}
    fluency = [0.0] * len(items)
    for n, answer_nats, reference_nats in zip(owners, nats[::2], nats[1::2], strict=True):
        ratio = float(np.exp(reference_nats - answer_nats))
        fluency[n] = max(fluency[n], min(1.0, ratio))
    keyword_scores = _keyword_scores(items, answers)
    products = [fl * score for fl, score in zip(fluency, keyword_scores, strict=True)]
    return {"FL": average(fluency), "QA": average(products)}


# ------------------------------------------------------------------ position probe


def load_webqa_position(files: OfficialFiles) -> AnswerTask:
    """Return yes-or-no questions, each asked six times with its relevant image at place 1 to 6.

    At most 500 are drawn with `files.seed`. A prompt shows the relevant image and five others, all
    with captions. The reference is ``yes`` if the first answer contains this word, else ``no``. The
    accuracy by ``position`` shows whether images in the middle of a prompt are overlooked. File
    hashes are stored in `files.hashes`; a missing file or image raises DataError. No such question
    raises it too.
    """
    images = WebQAImages(files)
    items = []
    for key, row in _draw_questions(files, NUM_PROBE_QUESTIONS, _fits_position_probe):
        relevant = _read_image_entry(row.get_objects("img_posFacts")[0], images)
        distractors = [
            _read_image_entry(fact, images) for fact in row.get_objects("img_negFacts")[:5]
        ]
        reference = "yes" if "yes" in _count_tokens(row["A"][0]) else "no"
        for place in range(6):
            prompt: list[Part] = []
            for entry in (*distractors[:place], relevant, *distractors[place:]):
                prompt += entry.prompt_parts
            prompt.append(_strip_quotes(row["Q"]) + YES_NO_INSTRUCTION)
            tags = {"position": str(place + 1)}
            items.append(Question(f"{key}/{place + 1}", tuple(prompt), reference, tags))
    return AnswerTask(tuple(items), score_webqa_position)


def _fits_position_probe(row: OfficialObject) -> bool:
    """Return whether a question is a yes-or-no question with enough images."""
    if row["Qcate"] != "YesNo":
        return False
    return len(row["img_posFacts"]) >= 1 and len(row["img_negFacts"]) >= 5


def parse_yes_or_no(text: str, options: Sequence[str]) -> str | None:
    """Return which of the words yes and no an answer contains; None for both or neither."""
    named = {"yes", "no"} & set(_count_tokens(text))
    return named.pop() if len(named) == 1 else None


score_webqa_position = make_letter_scorer(parse_yes_or_no, {"accuracy/position ": "position"})
"""Scorer of the position probe, overall and by place."""
