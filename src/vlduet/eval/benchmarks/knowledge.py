"""Knowledge and retrieval for generation (Sugar): WebQA and FVQA, WebQA's position probe, VizWiz and ScienceQA with RAG.

Every RAG task is answered without retrieval, with the model's own, and with an independent retriever where one is given.
How the paper splits, prompts and measures is only partly told; what we chose stands in each loader.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlduet.data.images import image_key
from vlduet.data.records import ImageRef, Part, Parts
from vlduet.errors import DataError
from vlduet.eval.answers import ARTICLES, LETTERS, NUMBERS, evalai_accuracy, rouge_l
from vlduet.eval.benchmarks import choice, vqa
from vlduet.eval.benchmarks.source import UNCHANGED, Fields, Source
from vlduet.eval.benchmarks.tasks import (
    Answers,
    Fact,
    Nats,
    Question,
    Questions,
    Rag,
    Sample,
    Score,
    by_tag,
    sample,
)

REFERENCE = (
    "If the reference information is useful, please use it. Otherwise, please ignore the reference information. "
    "Reference information: "
)
"""Sugar's words."""


def referred(item: Question, facts: Sequence[Fact]) -> Parts:
    """The references, then the question's own prompt; the prompt alone where nothing was retrieved."""
    if not facts:
        return item.parts
    return (REFERENCE, *(part for fact in facts for part in fact.shown), "\n", *item.parts)


# ------------------------------------------------------------------ WebQA

WEBQA = "webqa/WebQA_train_val.json"
SAMPLES, PROBES = 1000, 500
"""Questions that Sugar draws for its table and for its probe."""
YES_NO = " please answer the question in Yes or No."


class WebQAImages:
    """Images by id: files of ``webqa/images/``, or rows of the official ``imgs.tsv`` found by ``imgs.lineidx``."""

    def __init__(self, source: Source):
        self.source = source
        packed = source.has("webqa/imgs.tsv")
        self.starts = [int(x) for x in source.text("webqa/imgs.lineidx").split()] if packed else []

    def __call__(self, identity: int) -> ImageRef:
        if not self.starts:
            return self.source.image(*(f"webqa/images/{identity}{s}" for s in (".jpg", ".png")))
        with self.source.path("webqa/imgs.tsv").open("rb") as table:
            table.seek(self.starts[identity % 10_000_000])
            name, _, data = table.readline().partition(b"\t")
        if int(name) != identity:
            what = f"row {identity % 10_000_000} is image {int(name)}, not {identity}"
            raise DataError(what, place=self.source.path("webqa/imgs.tsv"), fix=UNCHANGED)
        return ImageRef(data=base64.b64decode(data.strip()))


def _webqa_rows(
    source: Source, count: int, wanted: Callable[[Fields], bool]
) -> list[tuple[str, Fields]]:
    """Questions of the validation split, as many as `count`, drawn with the run's seed, in file order."""
    rows = [
        (k, row)
        for k, row in source.entries(WEBQA).items()
        if row["split"] == "val" and wanted(row)
    ]
    if not rows:
        raise DataError(
            "no such question of the validation split", place=source.path(WEBQA), fix=UNCHANGED
        )
    drawn = np.random.default_rng(source.seed).permutation(len(rows))[:count]
    return [rows[i] for i in sorted(drawn)]


def webqa(source: Source) -> Rag:
    """1,000 validation questions, each with its own 10 to 40 candidate facts, image and text.

    A question has two equal views; an image fact is found by its image and by its caption, a text fact by its text: the
    mean of both similarities, Sugar's rule. As many facts are shown as a question has at most: 2, unless `k` says more.
    """
    image_of = WebQAImages(source)
    items, candidates, positives = [], [], []
    facts: list[Fact] = []
    for key, row in _webqa_rows(source, SAMPLES, lambda row: True):
        own, right = [], []
        for name in ("img_posFacts", "txt_posFacts", "img_negFacts", "txt_negFacts"):
            for fact in row.each(name) if row.get(name) else []:
                own.append(len(facts))
                right += [len(facts)] if "pos" in name else []
                facts.append(_webqa_fact(fact, image_of if name.startswith("img") else None))
        answers = [_unquoted(text) for text in row["A"]]
        tags = {"kind": row["Qcate"], "keywords": _unquoted(row.get("Keywords_A", ""))}
        items.append(Question(key, (_unquoted(row["Q"]),), answers, tags))
        candidates.append(tuple(own))
        positives.append(tuple(right))
    return Rag(
        items=tuple(items),
        queries=tuple((item.parts, item.parts) for item in items),
        facts=tuple(facts),
        prompt=referred,
        score=score_webqa,
        candidates=tuple(candidates),
        positives=tuple(positives),
        k=source.k or 2,
        fluency=webqa_fluency,
        told={"rouge": "ROUGE-L of the package rouge, as DEMON's"},
    )


def _webqa_fact(fact: Fields, image_of: WebQAImages | None) -> Fact:
    if image_of is None:
        text = _unquoted(fact["fact"])
        return Fact(str(fact["snippet_id"]), ((text,), (text,)), (text + "\n",))
    image, caption = (
        image_of(int(fact["image_id"])),
        _unquoted(fact.get("caption") or fact["title"]),
    )
    return Fact(str(fact["image_id"]), ((image,), (caption,)), (image, caption + "\n"))


def _unquoted(text: str) -> str:
    """Without the quotation marks that WebQA puts around its texts."""
    return text.strip().removeprefix('"').removesuffix('"').strip()


def score_webqa(items: Sequence[Question], answers: Answers) -> Score:
    """ROUGE-L with the best reference, and WebQA's Acc with keywords, which lacks the official lemmas."""
    pairs = list(zip(items, answers, strict=True))
    rouge = [
        max(rouge_l(text or "", reference) for reference in item.answer) for item, text in pairs
    ]
    accuracy = [
        webqa_accuracy(text or "", item.tags["keywords"], kind=item.tags["kind"])
        for item, text in pairs
    ]
    kinds = [item.tags["kind"] for item in items]
    samples = {"ROUGE-L": sample(rouge), "Acc": sample(accuracy)}
    return Score(
        samples | by_tag(rouge, kinds, prefix="ROUGE-L/") | by_tag(accuracy, kinds, prefix="Acc/")
    )


_COLOURS = (
    "orangebrown spot yellow blue rainbow ivory brown gray teal bluewhite orangepurple black white gold redorange pink "
    "blonde tan turquoise grey beige golden orange bronze maroon purple bluere red rust violet transparent yes silver "
    "chrome green aqua"
)
_SHAPES = (
    "globular octogon ring hoop octagon concave flat wavy shamrock cross cylinder cylindrical pentagon point pyramidal "
    "crescent rectangular hook tube cone bell spiral ball convex square arch h cuboid step rectangle dot oval circle star "
    "crosse crest octagonal cube triangle semicircle domeshape obelisk corkscrew curve circular xs slope pyramid round bow "
    "straight triangular heart fork teardrop fold curl spherical diamond keyhole conical dome sphere bellshaped rounded "
    "hexagon flower globe torus"
)
COLOURS, SHAPES = frozenset(_COLOURS.split()), frozenset(_SHAPES.split())
CLOSED = {"color": COLOURS, "shape": SHAPES, "YesNo": frozenset({"yes", "no"}), "number": None}
"""Kinds of question whose answers come from a closed list (as in WebQA's eval_1022.py); numbers are any digits."""


def webqa_accuracy(text: str, keywords: str, *, kind: str) -> float:
    """WebQA's Acc: F1 over the closed list of a kind of question, recall of the keywords for the other kinds."""
    said, wanted = (Counter(_webqa_words(part)) for part in (text, keywords))
    if kind in CLOSED:
        closed = CLOSED[kind]
        said, wanted = (
            Counter(
                {word for word in words if (word.isdigit() if closed is None else word in closed)}
            )
            for words in (said, wanted)
        )
    shared = (said & wanted).total()
    if not shared:
        return 0.0
    recall, precision = shared / wanted.total(), shared / said.total()
    return 2 * precision * recall / (precision + recall) if kind in CLOSED else recall


def _webqa_words(text: str) -> list[str]:
    words = re.sub(r"[^\w\s]", "", text.lower()).split()
    return [NUMBERS.get(word, word) for word in words if word not in ARTICLES]


def webqa_fluency(items: Sequence[Question], answers: Answers, nats: Nats) -> dict[str, Sample]:
    """WebQA's FL and QA = FL x Acc, where a BART is given (``--set fluency=DIR``).

    FL = min(1, max over references A of BARTScore(A -> answer) / BARTScore(A -> A)), BARTScore being the geometric mean
    of the tokens' probabilities; an empty answer has 0. Acc lacks the official lemmas, as in `score_webqa`.
    """
    asked = [
        (n, pair)
        for n, (item, text) in enumerate(zip(items, answers, strict=True))
        for reference in (item.answer if (text or "").strip() else ())
        for pair in ((reference, text or ""), (reference, reference))
    ]
    found = nats([pair for _, pair in asked])
    if found is None:
        return {}
    fluent = [0.0] * len(items)
    for (n, _), said, own in zip(asked[::2], found[::2], found[1::2], strict=True):
        fluent[n] = max(fluent[n], min(1.0, float(np.exp(own - said))))
    right = [
        webqa_accuracy(text or "", item.tags["keywords"], kind=item.tags["kind"])
        for item, text in zip(items, answers, strict=True)
    ]
    both = [f * r for f, r in zip(fluent, right, strict=True)]
    return {"FL": sample(fluent), "QA": sample(both)}


def webqa_position(source: Source) -> Questions:
    """500 yes-or-no questions, six times each: one relevant image with its caption and five others, the relevant one at
    place 1 to 6. What accuracy loses by the place is what gets lost in the middle."""
    image_of = WebQAImages(source)

    def fits(row: Fields) -> bool:
        return (
            row["Qcate"] == "YesNo"
            and len(row["img_posFacts"]) >= 1
            and len(row["img_negFacts"]) >= 5
        )

    items = []
    for key, row in _webqa_rows(source, PROBES, fits):
        relevant, *others = [
            _webqa_fact(fact, image_of)
            for fact in (row.each("img_posFacts")[0], *row.each("img_negFacts")[:5])
        ]
        answer = "yes" if "yes" in _webqa_words(row["A"][0]) else "no"
        for place in range(6):
            told = [*others[:place], relevant, *others[place:]]
            parts: list[Part] = [part for fact in told for part in fact.shown]
            prompt = (*parts, _unquoted(row["Q"]) + YES_NO)
            items.append(
                Question(f"{key}/{place + 1}", prompt, answer, {"position": str(place + 1)})
            )
    return Questions(tuple(items), score_yes_no("position"))


def score_yes_no(tag: str) -> Callable[[Sequence[Question], Answers], Score]:
    """A scorer of yes or no: exactly one of the two words must occur."""

    def score(items: Sequence[Question], answers: Answers) -> Score:
        said = [{"yes", "no"} & set(_webqa_words(text or "")) for text in answers]
        right = [float(words == {item.answer}) for item, words in zip(items, said, strict=True)]
        samples = {"accuracy": sample(right)}
        samples |= by_tag(right, [item.tags[tag] for item in items], prefix=f"accuracy/{tag} ")
        unparsed = sum(
            len(words) != 1 and text is not None for words, text in zip(said, answers, strict=True)
        )
        return Score(samples, unparsed=unparsed)

    return score


# ------------------------------------------------------------------ FVQA

FVQA = "fvqa/new_dataset_release"
FVQA_START = "Please answer the questions based on the pictures. "


def fvqa(source: Source) -> Rag:
    """Questions whose answer comes from the knowledge base (`ans_source` KB), found by image and by question."""
    triples = source.entries(f"{FVQA}/all_fact_triples_release.json")
    number = {key: i for i, key in enumerate(triples)}
    facts = []
    for key, row in triples.items():
        text = (
            re.sub(r"\[\[|\]\]", "", str(row["surface"])).strip()
            or f"{row['e1_label']} {row['r']} {row['e2_label']}"
        )
        facts.append(Fact(key, ((text,), (text,)), (text,)))
    items, queries, positives = [], [], []
    for key, row in source.entries(f"{FVQA}/all_qs_dict_release.json").items():
        if _spelled(row, "ans_source") != "KB":
            continue
        image, question = (
            source.image(f"{FVQA}/images/{_spelled(row, 'img_file')}"),
            row["question"],
        )
        named = _spelled(row, "fact")
        wanted = [named] if isinstance(named, str) else named
        items.append(Question(key, (image, question), [str(row["answer"])]))
        queries.append(((image,), (question,)))
        positives.append(tuple(number[name] for name in wanted if name in number))
    return Rag(
        items=tuple(items),
        queries=tuple(queries),
        facts=tuple(facts),
        prompt=fvqa_prompt,
        score=score_fvqa,
        positives=tuple(positives),
        k=source.k or 1,
        told={"rouge": "ROUGE-L of the package rouge, as DEMON's"},
    )


def fvqa_prompt(item: Question, facts: Sequence[Fact]) -> Parts:
    """Sugar's prompt; without facts, its first sentence, the image and the question."""
    image, question = item.parts
    if not facts:
        return (FVQA_START, image, f" {question}.")
    knowledge = " ".join(str(part) for fact in facts for part in fact.shown)
    return (f"{FVQA_START}{REFERENCE}{knowledge} ", image, f" {question}.")


def score_fvqa(items: Sequence[Question], answers: Answers) -> Score:
    """ROUGE-L with the answer."""
    values = [
        max(rouge_l(text or "", reference) for reference in item.answer)
        for item, text in zip(items, answers, strict=True)
    ]
    return Score({"ROUGE-L": sample(values)})


def _spelled(row: Fields, key: str) -> Any:
    """A key as the files write it, or with a blank, as the README does."""
    apart = key.replace("_", " ")
    return row[apart] if apart in row else row[key]


# ------------------------------------------------------------------ VizWiz and ScienceQA with retrieval


def vizwiz_rag(source: Source) -> Rag:
    """VizWiz val with the training set as knowledge base: found by image and by question, shown with its answer."""
    asked = vqa.vizwiz("val")(source).items
    facts = []
    for row in source.items("vizwiz/Annotations/train.json"):
        image, question = source.image(f"vizwiz/train/{row['image']}"), row["question"]
        answer = Counter(one["answer"] for one in row.each("answers")).most_common(1)[0][0]
        facts.append(_example(row["image"], image, question, answer))
    questions = [
        str(item.parts[1]).removesuffix(vqa.SHORT).removesuffix(vqa.UNSURE) for item in asked
    ]
    return _with_examples(asked, questions, facts, score=vqa.scored(evalai_accuracy), k=source.k)


def scienceqa_rag(source: Source) -> Rag:
    """ScienceQA's image questions with the training questions that have an image as knowledge base."""
    problems, splits = (
        source.entries("scienceqa/problems.json"),
        source.object("scienceqa/pid_splits.json"),
    )
    asked = choice.scienceqa(source).items
    facts = []
    for key in splits["train"]:
        row = problems[key]
        if row.get("image"):
            image = source.image(f"scienceqa/images/train/{key}/image.png")
            answer = f"{LETTERS[row['answer']]}. {row['choices'][row['answer']]}"
            facts.append(_example(key, image, choice.scienceqa_text(row), answer))
    questions = [choice.scienceqa_text(problems[item.id]) for item in asked]
    return _with_examples(asked, questions, facts, score=choice.score_scienceqa, k=source.k)


def _example(name: str, image: ImageRef, question: str, answer: str) -> Fact:
    """A solved question: found by its image and its words, never by its answer; the prompt shows words and answer."""
    return Fact(name, ((image,), (question,)), (f"Question: {question} Answer: {answer}",))


def _with_examples(
    asked: Sequence[Question],
    questions: Sequence[str],
    facts: Sequence[Fact],
    *,
    score: Callable[[Sequence[Question], Answers], Score],
    k: int | None,
) -> Rag:
    """A RAG task of an ordinary one; an example with a question's own image may not be found for it."""
    if not facts:
        raise DataError("an empty knowledge base", fix="Put the training set beside the test set")
    images = [item.parts[0] for item in asked]
    return Rag(
        items=tuple(replace(item, tags={**item.tags}) for item in asked),
        queries=tuple(
            ((image,), (question,)) for image, question in zip(images, questions, strict=True)
        ),
        facts=tuple(facts),
        prompt=referred,
        score=score,
        excluded=tuple(same_images(images, [fact.keys[0][0] for fact in facts])),
        k=k or 1,
    )


def same_images(ours: Sequence[Part], theirs: Sequence[Part]) -> list[tuple[int, ...]]:
    """For each of `ours` the indices of `theirs` with equal bytes; only files of one size are read."""

    def size(part: Part) -> int:
        assert isinstance(part, ImageRef)
        return Path(part.path).stat().st_size if part.path else len(part.data or b"")

    by_size: dict[int, list[int]] = {}
    for i, image in enumerate(theirs):
        by_size.setdefault(size(image), []).append(i)
    found = []
    for image in ours:
        assert isinstance(image, ImageRef)
        near = by_size.get(size(image), [])
        key = image_key(image) if near else ""
        found.append(tuple(i for i in near if image_key(theirs[i]) == key))  # type: ignore[arg-type]
    return found
