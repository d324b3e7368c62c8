"""Measure the value of every part of Sugar on documents of gimp-help and campaigns, with nano.

    vlduet model nano models/nano && vlduet model minilm models/minilm
    vlduet data fetch stamps emoji gimp-help campaigns --to data
    vlduet train clip-nano
    python experiments/sugar/study.py --work runs/sugar-study
    python experiments/sugar/study.py --work runs/sugar-study --report docs/results

Measured on the test splits, which share no image with the training splits:

    next      the last new image of a document, queried with up to three parts before it (only
              their texts, or all of them): its reciprocal rank among all images, once with and
              once without the images that occur earlier in the document
    order     a window of a document against the same window without one part, in order and in
              another order (with the same last part, which decides most of an embedding): how
              often the ordered one is nearer, and how often it is the nearest of all ordered and
              shuffled windows
    stamps    retrieval of single images and captions in both directions; cross entropy of captions
              after the right and after a wrong image; generated captions: whether the reference is
              among the five nearest of all references, by a sentence encoder
    pairs     emoji whose names differ in one word, scored as in Winoground: text and image score
    place     which of six captioned stamps is repeated, by the place of the relevant one (a small
              version of WebQA's probe)
    text      cross entropy of documents from their first image on
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from _captions import compare_captions
from _study import Measurements, Study, run_study

from vlduet.data.formats import read_jsonl
from vlduet.data.images import image_key
from vlduet.data.records import ImageRef, Parts, Record
from vlduet.demo.measure import MAX_CAPTION_TOKENS
from vlduet.eval import protocols
from vlduet.eval.benchmarks.builtin import (
    IMAGES_PER_PROMPT,
    find_one_word_pairs,
    make_position_questions,
)
from vlduet.eval.benchmarks.runners import best_positive_ranks
from vlduet.eval.benchmarks.scores import MetricSample, average
from vlduet.eval.protocols import unit_rows
from vlduet.harness.builtin import answer_nlls
from vlduet.model.duet import DuetModel

CORPORA = ("gimp-help", "campaigns")
MAX_CONTEXT_PARTS = 3
"""Number of parts before an image that are the query for it."""
WINDOW_PARTS = 5
"""Number of parts of a window whose order is tested."""
MAX_WINDOW_WORDS = 25
"""Number of words of the longest text in a window."""
MAX_DOCUMENT_TOKENS = 96
"""Number of tokens of a document whose cross entropy is measured."""
NUM_POSITION_PROMPTS = 16
"""Number of prompts of the probe of places."""


@dataclass(frozen=True)
class NextImageQuery:
    """A query for the last new image of a document."""

    context: Parts
    """Parts before the image."""
    target: str
    """Key of the image."""
    earlier_images: frozenset[str]
    """Keys of all images before it."""


def measure(model: DuetModel, data: Path) -> Measurements:
    """Return all numbers of one model; random choices are the same for every model."""
    documents: list[Record] = []
    for corpus in CORPORA:
        documents += read_jsonl(data / corpus / "test.jsonl")
    return {
        **measure_next_image(model, documents),
        **measure_order(model, documents),
        **measure_stamps(model, data),
        **measure_pairs(model, data),
        **measure_places(model, data),
        **measure_texts(model, documents),
    }


def make_next_image_query(record: Record) -> NextImageQuery | None:
    """Return the query for the last image that does not occur earlier in a document.

    None is returned if there is no such image, or no text among the parts before it.
    """
    keys: dict[int, str] = {}
    last_new = 0
    for position, part in enumerate(record.parts):
        if isinstance(part, ImageRef):
            key = image_key(part)
            if position and key not in keys.values():
                last_new = position
            keys[position] = key
    context = record.parts[max(0, last_new - MAX_CONTEXT_PARTS) : last_new]
    if not any(isinstance(part, str) for part in context):
        return None
    earlier = frozenset(key for position, key in keys.items() if position < last_new)
    return NextImageQuery(context, keys[last_new], earlier)


def select_texts(parts: Parts) -> Parts:
    """Return the texts among some parts, in order."""
    return tuple(part for part in parts if isinstance(part, str))


def measure_next_image(model: DuetModel, documents: list[Record]) -> Measurements:
    """Return the mean reciprocal rank (x 100) of the last new image of every document."""
    gallery: dict[str, ImageRef] = {}
    queries = []
    for record in documents:
        gallery |= {image_key(part): part for part in record.parts if isinstance(part, ImageRef)}
        query = make_next_image_query(record)
        if query is not None:
            queries.append(query)
    column = {key: position for position, key in enumerate(gallery)}
    images = model.encode_document(list(gallery.values()))
    targets = [[column[query.target]] for query in queries]
    earlier = [list(map(column.__getitem__, query.earlier_images)) for query in queries]
    contexts = {
        "texts": [select_texts(query.context) for query in queries],
        "texts and images": [query.context for query in queries],
    }
    numbers: Measurements = {}
    for name, items in contexts.items():
        vectors = model.encode_query(items)
        for suffix, excluded in (("", earlier), (", seen ones too", [])):
            ranks, _ = best_positive_ranks(vectors, images, targets, excluded=excluded)
            numbers[f"next image by {name}{suffix}"] = average(1 / ranks)
    return numbers


def draw_windows(documents: list[Record], rng: random.Random) -> list[Parts]:
    """Return one window of distinct parts with an image for every document that has one."""
    windows: list[Parts] = []
    for record in documents:
        parts = [
            part
            for part in record.parts
            if isinstance(part, ImageRef) or len(part.split()) <= MAX_WINDOW_WORDS
        ]
        candidates = []
        for start in range(len(parts) - WINDOW_PARTS + 1):
            window = tuple(parts[start : start + WINDOW_PARTS])
            has_image = any(isinstance(part, ImageRef) for part in window)
            if has_image and len(set(window)) == WINDOW_PARTS:
                candidates.append(window)
        if candidates:
            windows.append(rng.choice(candidates))
    return windows


def measure_order(model: DuetModel, documents: list[Record]) -> Measurements:
    """Return how often a window without one part is nearer in order than shuffled.

    It is compared with its own shuffled version, and with all ordered and shuffled windows.
    """
    rng = random.Random(0)
    windows = draw_windows(documents, rng)
    ordered: list[Parts] = []
    shuffled: list[Parts] = []
    for window in windows:
        dropped = rng.randrange(WINDOW_PARTS - 1)
        parts = [part for position, part in enumerate(window[:-1]) if position != dropped]
        permuted = parts[:]
        while permuted == parts:
            rng.shuffle(permuted)
        ordered.append((*parts, window[-1]))
        shuffled.append((*permuted, window[-1]))
    window_vectors = unit_rows(model.encode_document(windows))
    ordered_vectors = unit_rows(model.encode_document(ordered))
    shuffled_vectors = unit_rows(model.encode_document(shuffled))
    ordered_cosines = (window_vectors * ordered_vectors).sum(1)
    shuffled_cosines = (window_vectors * shuffled_vectors).sum(1)
    candidates = np.concatenate([ordered_vectors, shuffled_vectors])
    targets = [[row] for row in range(len(windows))]
    ranks, _ = best_positive_ranks(window_vectors, candidates, targets)
    return {
        "order kept is nearer": average(ordered_cosines > shuffled_cosines),
        "order kept is nearest of all": average(ranks == 1),
    }


def measure_stamps(model: DuetModel, data: Path) -> Measurements:
    """Return retrieval and captions of single images, which this study does not train."""
    records = [
        record
        for record in read_jsonl(data / "stamps" / "test.jsonl")
        if record.image is not None and record.short
    ]
    retrieval = protocols.measure_retrieval(
        model.encode_document, model.encode_query, records=records
    )
    entropy = protocols.measure_caption_cross_entropy(model.compute_caption_nll, records)
    images = [record.image for record in records if record.image is not None]
    captions = model.caption_images(images, max_new_tokens=MAX_CAPTION_TOKENS, batch_size=16)
    _, ranks = compare_captions(captions, [record.short[0] for record in records])
    increase = entropy.total_nats_wrong_image - entropy.total_nats_right_image
    return {
        "stamps, text to image R@10": average(retrieval.text_to_image.ranks <= 10),
        "stamps, image to text R@10": average(retrieval.image_to_text.ranks <= 10),
        "stamps, nats of captions": average_per_token(
            entropy.total_nats_right_image, entropy.num_tokens
        ),
        "stamps, nats their image is worth": average_per_token(increase, entropy.num_tokens),
        "stamps, captions like theirs": average(ranks <= 5),
    }


def measure_pairs(model: DuetModel, data: Path) -> Measurements:
    """Return Winoground's text and image score on pairs of emoji of one subgroup."""
    items = find_one_word_pairs(list(read_jsonl(data / "emoji" / "test.jsonl")), "subgroup")
    texts: list[str] = []
    images: list[ImageRef] = []
    for item in items:
        texts += item.texts
        images += item.images
    shape = (len(items), 2, -1)
    text_vectors = unit_rows(model.encode_query(texts)).reshape(shape)
    image_vectors = unit_rows(model.encode_document(images)).reshape(shape)
    cosines = np.einsum("nie,nje->nij", image_vectors, text_vectors)  # [items, image, text]
    right = (cosines[:, 0, 0], cosines[:, 1, 1])
    wrong_text = (cosines[:, 0, 1], cosines[:, 1, 0])
    text_score = (right[0] > wrong_text[0]) & (right[1] > wrong_text[1])
    image_score = (right[0] > wrong_text[1]) & (right[1] > wrong_text[0])
    return {"pairs, text score": average(text_score), "pairs, image score": average(image_score)}


def measure_places(model: DuetModel, data: Path) -> Measurements:
    """Return whether the likeliest of six captions is the right one.

    The first number is over all places, the second the edges minus the middle.
    """
    path = data / "stamps" / "test.jsonl"
    questions = make_position_questions(
        list(read_jsonl(path)), num_prompts=NUM_POSITION_PROMPTS, seed=0, place=path
    )
    requests = []
    for question in questions:
        requests += [(question.prompt, option) for option in question.options]
    losses = np.array([nats / tokens for nats, tokens in answer_nlls(model, requests)])
    losses = losses.reshape(NUM_POSITION_PROMPTS, IMAGES_PER_PROMPT, IMAGES_PER_PROMPT)
    is_right = losses.argmin(2) == np.arange(IMAGES_PER_PROMPT)  # [prompts, places]
    is_edge = np.isin(np.arange(IMAGES_PER_PROMPT), (0, IMAGES_PER_PROMPT - 1))
    difference = is_right[:, is_edge].mean(1) - is_right[:, ~is_edge].mean(1)
    return {
        "place, accuracy": average(is_right.ravel()),
        "place, edges less middle": average(difference),
    }


def measure_texts(model: DuetModel, documents: list[Record]) -> Measurements:
    """Return the nats per token of documents, from their first image on."""
    renderer = model.renderer.with_options(max_tokens=MAX_DOCUMENT_TOKENS)
    sequences = []
    for record in documents:
        is_image = [isinstance(part, ImageRef) for part in record.parts]
        builder, _ = renderer.render_document(record.parts[is_image.index(True) :])
        sequences.append(builder.build(MAX_DOCUMENT_TOKENS))
    losses = np.array(model.compute_sequence_nll(sequences), dtype=np.float64)
    return {"documents, nats": average_per_token(losses[:, 0], losses[:, 1])}


def average_per_token(total_nats: np.ndarray, num_tokens: np.ndarray) -> MetricSample:
    """Return the mean nats per token; each item counts by its number of tokens."""
    return average(total_nats / np.maximum(num_tokens, 1), num_tokens, scale=1.0)


def training_sources(corpora: Sequence[str]) -> str:
    """Return the override that trains on the training splits of some corpora, equally weighted."""
    sources = ", ".join(f"{{path: data/{corpus}/train.jsonl, weight: 1}}" for corpus in corpora)
    return f"data.train=[{sources}]"


STUDY = Study(
    name="sugar",
    base=Path("sugar-nano"),
    overrides=(
        training_sources(CORPORA),
        "data.validation=null",
        "train.batch_size=8",
        "train.steps=24",
        "train.log_every=1",
        "train.save_every=24",
        "recipe.n_ref=32",
    ),
    rows={
        "joint": (),
        "L_g only": ("objectives={language: 1}",),
        "L_d only": ("objectives={structure: 1}",),
        "mean": ("recipe.target=mean",),
        "awm": ("recipe.target=awm",),
        "one encoder": ("recipe.triple=false",),
        "last token": ("recipe.pool=last", "model.prompts={image_pool: last}"),
        "kl": ("recipe.loss=kl",),
        "narrow": ("recipe.delta=0.35",),
    },
    reference="joint",
    measure=measure,
    lower_is_better=frozenset(
        {"stamps, nats of captions", "place, edges less middle", "documents, nats"}
    ),
)

if __name__ == "__main__":
    run_study(STUDY)
