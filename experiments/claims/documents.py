"""Measures of interleaved documents: test pages of a manual and stories of a game.

Random choices are the same for every model.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np
from corpora import WINDOW_PARTS, draw_windows
from subjects import Measurements, Subject, percent

from vlduet.data.formats import read_jsonl
from vlduet.data.images import image_key
from vlduet.data.records import ImageRef, Parts, Record
from vlduet.data.vectors import unit_rows
from vlduet.eval.benchmarks.runners import best_positive_ranks
from vlduet.eval.benchmarks.scores import average, average_per_token

CORPORA = ("gimp-help", "campaigns")
MAX_CONTEXT_PARTS = 3
"""Number of parts before an image that are the query for it."""
NUM_ORDERS = 6
"""Number of orders of a story that are compared, its own among them."""
MAX_DOCUMENT_TOKENS = 96
"""Number of tokens of a document whose cross entropy is measured."""


@dataclass(frozen=True)
class NextImageQuery:
    """A query for the last new image of a document."""

    context: Parts
    """Parts before the image."""
    target: str
    """Key of the image."""
    earlier_images: frozenset[str]
    """Keys of all images before it."""


def measure_documents(subject: Subject) -> Measurements:
    """Return the numbers of the test documents: next images, orders and cross entropy.

    The cross entropy is left out for a model that only embeds.
    """
    documents: list[Record] = []
    for corpus in CORPORA:
        documents += read_jsonl(subject.data / corpus / "test.jsonl")
    numbers = {**measure_next_image(subject, documents), **measure_order(subject, documents)}
    if subject.model is not None:
        numbers |= measure_texts(subject, documents)
    return numbers


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


def measure_next_image(subject: Subject, documents: list[Record]) -> Measurements:
    """Return the mean reciprocal rank (x 100) of the last new image of every document.

    Images that occur earlier in the document are left out of the candidates.
    """
    gallery: dict[str, ImageRef] = {}
    queries = []
    for record in documents:
        gallery |= {image_key(part): part for part in record.parts if isinstance(part, ImageRef)}
        query = make_next_image_query(record)
        if query is not None:
            queries.append(query)
    column = {key: position for position, key in enumerate(gallery)}
    images = subject.embed_document(list(gallery.values()))
    targets = [[column[query.target]] for query in queries]
    earlier = [list(map(column.__getitem__, query.earlier_images)) for query in queries]
    contexts = {
        "next image by texts": [select_texts(query.context) for query in queries],
        "next image by texts and images": [query.context for query in queries],
    }
    numbers: Measurements = {}
    for name, items in contexts.items():
        vectors = subject.embed_query(items)
        ranks, _ = best_positive_ranks(vectors, images, targets, excluded=earlier)
        numbers[name] = average(1 / ranks)
    return numbers


def measure_order(subject: Subject, documents: list[Record]) -> Measurements:
    """Return how often a story without one part is nearest to it in its own order.

    Candidates are the story's remaining parts in six orders, five of them shuffled; chance is 16.7.
    In the harder number all orders end with the same part, which decides most of an embedding.
    """
    draw = random.Random(0)
    windows = draw_windows(documents, draw)
    vectors = unit_rows(subject.embed_document(windows))
    numbers: Measurements = {}
    for name, num_fixed in (("", 0), (", same end", 1)):
        candidates: list[Parts] = []
        for window in windows:
            dropped = draw.randrange(WINDOW_PARTS - 1)
            parts = tuple(part for position, part in enumerate(window) if position != dropped)
            end = parts[len(parts) - num_fixed :]
            orders = list(itertools.permutations(parts[: len(parts) - num_fixed]))
            shuffled = draw.sample(orders[1:], NUM_ORDERS - 1)  # the first one is the order itself
            candidates += [(*order, *end) for order in (orders[0], *shuffled)]
        candidate_vectors = unit_rows(subject.embed_query(candidates))
        shaped = candidate_vectors.reshape(len(windows), NUM_ORDERS, -1)
        cosines = np.einsum("ne,noe->no", vectors, shaped)
        numbers[f"order of stories among six{name}"] = percent(
            cosines[:, 0] > cosines[:, 1:].max(1)
        )
    return numbers


def measure_texts(subject: Subject, documents: list[Record]) -> Measurements:
    """Return the nats per token of documents, from their first image on."""
    model = subject.generator
    renderer = model.renderer.with_options(max_tokens=MAX_DOCUMENT_TOKENS)
    sequences = []
    for record in documents:
        is_image = [isinstance(part, ImageRef) for part in record.parts]
        builder, _ = renderer.render_document(record.parts[is_image.index(True) :])
        sequences.append(builder.build(MAX_DOCUMENT_TOKENS))
    losses = np.array(model.compute_sequence_nll(sequences), dtype=np.float64)
    return {"documents, nats": average_per_token(losses[:, 0], losses[:, 1])}
