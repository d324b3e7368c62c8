"""Measures of embeddings: retrieval, and choices between two captions, images or orders.

Random choices are the same for every model. Numbers are in percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from corpora import (
    ORDERS_PER_SET,
    SEEDS,
    SETS_PER_SPLIT,
    draw_sequences,
    list_caption_edits,
    make_sequence_parts,
    make_test_scenes,
    read_named_stamps,
)
from subjects import Measurements, Subject, percent

from vlduet.data.formats import read_jsonl
from vlduet.data.records import ImageRef
from vlduet.data.tools.caption_negatives import generate_caption_negatives
from vlduet.data.vectors import unit_rows
from vlduet.eval import protocols
from vlduet.eval.benchmarks.builtin import differ_in_one_word, find_one_word_pairs
from vlduet.eval.benchmarks.scores import MetricSample, average, average_per_token
from vlduet.eval.metrics import tokenize_answer

# ------------------------------------------------------------------ single images


def measure_retrieval(subject: Subject) -> Measurements:
    """Return hit@1 and hit@10 of test stamps in both directions."""
    result = protocols.measure_retrieval(
        subject.embed_document, subject.embed_query, records=subject.stamps
    )
    numbers: Measurements = {}
    for k in (1, 10):
        numbers[f"text to image, hit@{k}"] = percent(result.text_to_image.ranks <= k)
        numbers[f"image to text, hit@{k}"] = percent(result.image_to_text.ranks <= k)
    return numbers


def measure_edits(subject: Subject) -> Measurements:
    """Return how often the caption of a test stamp is nearer to it than one with a wrong word.

    The wrong words are replaced and added ones (`vlduet.data.tools.caption_negatives`); chance is
    50. These captions are too short to swap anything in them.
    """
    choices: dict[str, list[tuple[int, str, str]]] = {}
    for index, record in enumerate(subject.stamps):
        for edit in generate_caption_negatives(record.short[0]):
            kind = edit.kind.partition("_")[0]
            choices.setdefault(kind, []).append((index, record.short[0], edit.text))
    images = [record.image for record in subject.stamps if record.image is not None]
    named = {f"stamps, {kind}": choices[kind] for kind in ("replace", "add") if kind in choices}
    return compare_captions(subject, images, named)


def compare_captions(
    subject: Subject,
    images: Sequence[ImageRef],
    choices: Mapping[str, Sequence[tuple[int, str, str]]],
) -> Measurements:
    """Return how often right captions are strictly nearer to their images than wrong ones.

    Args:
        images: the images.
        choices: number -> (index of the image, right caption, wrong caption) triples.
    """
    vectors = unit_rows(subject.embed_document(list(images)))
    texts: dict[str, int] = {}
    for triples in choices.values():
        for _, right, wrong in triples:
            texts.setdefault(right, len(texts))
            texts.setdefault(wrong, len(texts))
    text_vectors = unit_rows(subject.embed_query(list(texts)))
    numbers: Measurements = {}
    for name, triples in choices.items():
        image_vectors = vectors[[index for index, _, _ in triples]]
        right_vectors = text_vectors[[texts[text] for _, text, _ in triples]]
        wrong_vectors = text_vectors[[texts[text] for _, _, text in triples]]
        right_cosines = (image_vectors * right_vectors).sum(1)
        numbers[name] = percent(right_cosines > (image_vectors * wrong_vectors).sum(1))
    return numbers


def measure_minimal_pairs(subject: Subject) -> Measurements:
    """Return Winoground's text and image score on test emoji whose names differ in one word."""
    records = list(read_jsonl(subject.data / "emoji" / "test.jsonl"))
    items = find_one_word_pairs(records, "subgroup")
    texts = [text for item in items for text in item.texts]
    images = [image for item in items for image in item.images]
    shape = (len(items), 2, -1)
    text_vectors = unit_rows(subject.embed_query(texts)).reshape(shape)
    image_vectors = unit_rows(subject.embed_document(images)).reshape(shape)
    cosines = np.einsum("nie,nje->nij", image_vectors, text_vectors)  # [items, image, text]
    right = (cosines[:, 0, 0], cosines[:, 1, 1])
    wrong = (cosines[:, 0, 1], cosines[:, 1, 0])
    text_score = (right[0] > wrong[0]) & (right[1] > wrong[1])
    image_score = (right[0] > wrong[1]) & (right[1] > wrong[0])
    return {
        "minimal pairs, text": percent(text_score),
        "minimal pairs, image": percent(image_score),
    }


def measure_near_images(subject: Subject) -> Measurements:
    """Return how often the right image is nearer to a caption than a near image.

    Near is the test stamp of the same category whose caption shares a word or, without one, the
    next stamp of that category. Stamps without a neighbour with another caption are left out.
    """
    queries: list[str] = []
    pairs: list[tuple[int, int]] = []
    for index, record in enumerate(subject.stamps):
        words = tokenize_answer(record.short[0])
        near: list[tuple[bool, int]] = []
        for other_index, other in enumerate(subject.stamps):
            other_words = tokenize_answer(other.short[0])
            same_category = other.metadata["category"] == record.metadata["category"]
            if same_category and other_words != words:
                near.append((not differ_in_one_word(words, other_words), other_index))
        if near:
            queries.append(record.short[0])
            pairs.append((index, min(near)[1]))
    images = [record.image for record in subject.stamps if record.image is not None]
    image_vectors = unit_rows(subject.embed_document(images))
    vectors = unit_rows(subject.embed_query(queries))
    right = (vectors * image_vectors[[index for index, _ in pairs]]).sum(1)
    wrong = (vectors * image_vectors[[index for _, index in pairs]]).sum(1)
    return {"near images": percent(right > wrong)}


# ------------------------------------------------------------------ scenes and sequences


def measure_scenes(subject: Subject) -> Measurements:
    """Return the choice between a right and a wrong caption of test scenes, and their captions.

    ``scenes, swapped`` is the mean over things and grounds, and ``scenes, replaced`` too; both have
    the same scenes in the same order.
    """
    scenes, records, stamps = make_test_scenes(subject.data / "stamps")
    images = [record.image for record in records if record.image is not None]
    edits = list_caption_edits(scenes, stamps)
    groups = {
        "scenes, swapped": [*edits["swapped things"], *edits["swapped grounds"]],
        "scenes, replaced": [*edits["replaced things"], *edits["replaced grounds"]],
        "scenes, added": edits["added things"],
        "scenes, swapped things": edits["swapped things"],
        "scenes, swapped grounds": edits["swapped grounds"],
    }
    numbers = compare_captions(subject, images, groups)
    numbers["scenes, swapped less replaced"] = subtract(
        numbers["scenes, swapped"], numbers["scenes, replaced"]
    )
    places = [record.short[0] for record in records]
    similarity = (
        unit_rows(subject.embed_query(places)) @ unit_rows(subject.embed_document(images)).T
    )
    ranks = (similarity >= np.diag(similarity)[:, None]).sum(1)  # ties count against the model
    numbers["scenes, text to image, hit@10"] = percent(ranks <= 10)
    if subject.model is not None:
        renderer = subject.model.renderer
        pairs = zip(images, records, strict=True)
        sequences = [renderer.render_caption(image, str(record.long)) for image, record in pairs]
        losses = np.array(subject.model.compute_sequence_nll(sequences), dtype=np.float64)
        numbers["scenes, nats"] = average_per_token(losses[:, 0], losses[:, 1])
    return numbers


def subtract(first: MetricSample, second: MetricSample) -> MetricSample:
    """Return the mean of the differences, item by item; both have the same items."""
    (first_values, _), (second_values, _) = first.groups[0], second.groups[0]
    return average(first_values - second_values, scale=first.scale)


def measure_sequences(subject: Subject) -> Measurements:
    """Return how often names in an order find the pictures in this order.

    Candidates are the pictures in all drawn orders of the same four test stamps; with ``of all``
    also those of all other sets, at rank ten. Chance of the first is one in six.
    """
    sequences = draw_sequences(
        read_named_stamps(subject.data / "stamps", "test"),
        num_sets=SETS_PER_SPLIT["test"],
        num_orders=ORDERS_PER_SET["test"],
        seed=SEEDS["test"],
    )
    texts = [make_sequence_parts(sequence, "texts") for sequence in sequences]
    images = [make_sequence_parts(sequence, "images") for sequence in sequences]
    similarity = unit_rows(subject.embed_query(texts)) @ unit_rows(subject.embed_document(images)).T
    sets = np.array([sequence.set_index for sequence in sequences])
    is_same_set = sets[:, None] == sets[None]
    right_cosines = np.diag(similarity)[:, None]
    is_wrong = ~np.eye(len(sets), dtype=bool)
    beats_right = (similarity >= right_cosines) & is_wrong
    same_set_ranks = 1 + (beats_right & is_same_set).sum(1)
    nearest_set = np.where(is_same_set, similarity, -np.inf).max(1) > np.where(
        is_same_set, -np.inf, similarity
    ).max(1)
    return {
        "order among six": percent(same_set_ranks == 1),
        "order, mean share beaten": average(
            1 - (same_set_ranks - 1) / (ORDERS_PER_SET["test"] - 1)
        ),
        "set of sequences": percent(nearest_set),
    }
