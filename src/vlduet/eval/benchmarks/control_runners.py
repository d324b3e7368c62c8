"""Runners of the suite ``abilities``: numbers with their chance level and a text-only control.

    search      searches with several forms of their queries
    controlled  pairs of texts and images
    exist       yes-or-no questions about images, answered by likelihood

The control runs the same items without their images. A content without any text becomes one grey
image instead; where no query has an image, the images of the gallery become it. Equal vectors tie,
and a tie is a miss: such a control scores 0. The control of ``NUMBER`` is ``text_only/NUMBER``. The
detail ``chance`` says by number what random scores give, computed exactly or drawn with a fixed
seed; it names the numbers that the page of the suite shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlduet.data.records import ImageRef, Parts, extract_images
from vlduet.data.vectors import unit_rows
from vlduet.eval.benchmarks.composites import make_grey_image
from vlduet.eval.benchmarks.runners import OptionNats, best_positive_ranks, run_pairs
from vlduet.eval.benchmarks.scores import BenchmarkScore, MetricSample, average, average_by_tag
from vlduet.eval.benchmarks.tasks import (
    ChoiceTask,
    PairTask,
    Question,
    SearchTask,
    WeightedParts,
)
from vlduet.eval.benchmarks.yes_no import score_pope
from vlduet.eval.predictions import PredictionStore

TEXT_ONLY = "text_only/"
"""Prefix of the names of the numbers of the control."""
CHANCE_DRAWS = 4000
"""Number of random results whose mean is a chance level that has no formula."""
CHANCE_SEED = 0

Vectors = NDArray[np.float64]
VectorByContent = Mapping[Parts, Vectors]


# ------------------------------------------------------------------ search


def run_search(task: SearchTask, predictions: PredictionStore) -> BenchmarkScore:
    """Return R@k x 100 of every form of the queries, and what the first form gains over the others.

    ``R@k`` is that of the first form and comes first, then ``text_only/R@k``, ``TAG/R@k``, and for
    every other form ``FORM/R@k`` and ``gain over FORM``, the difference query by query. The
    predictions store the vectors ``queries`` and ``documents`` of the distinct contents. Contents
    that cannot be embedded have NaN and count as missing; a search with one is a miss.

    Details: number of ``queries``, size of the smallest ``gallery``, ``chance``, ``partial_forms``
    of the task, and ``ties``, the number of searches of the first form whose rank suffers from a
    tie.
    """
    forms = list(task.queries)
    text_queries, text_documents = remove_images(task.queries[forms[0]], task.documents)
    all_queries = [*task.queries.values(), text_queries]
    query_of = _embed_contents(all_queries, predictions, name="queries", query=True)
    all_documents = [task.documents, text_documents]
    document_of = _embed_contents(all_documents, predictions, name="documents", query=False)
    documents = _combine(task.documents, document_of)
    number = f"R@{task.k}"
    hits: dict[str, NDArray[np.float64]] = {}
    ties: dict[str, int] = {}
    for form, queries in task.queries.items():
        ranks, ties[form] = _rank_all_sets(_combine(queries, query_of), documents, task)
        hits[form] = (ranks <= task.k).astype(np.float64)
    ranks, _ = _rank_all_sets(
        _combine(text_queries, query_of), _combine(text_documents, document_of), task
    )
    first = hits[forms[0]]
    samples = {number: average(first), f"{TEXT_ONLY}{number}": average(ranks <= task.k)}
    if task.tags:
        by_tag = average_by_tag(first.tolist(), task.tags)
        samples |= {f"{tag}/{number}": sample for tag, sample in by_tag.items()}
    for form in forms[1:]:
        samples[f"{form}/{number}"] = average(hits[form])
        samples[f"gain over {form}"] = average(first - hits[form])
    sizes = [len(task.documents) - len(excluded) for excluded in _excluded_of(task)]
    details = {
        "queries": len(first),
        "gallery": min(sizes),
        "chance": {number: 100 * compute_search_chance(task)},
        "ties": ties[forms[0]],
        "partial_forms": list(task.partial_forms),
    }
    vectors = [*query_of.values(), *document_of.values()]
    num_missing = sum(bool(np.isnan(vector).any()) for vector in vectors)
    return BenchmarkScore(samples, num_missing, details=details | dict(task.details))


def remove_images(
    queries: Sequence[WeightedParts], documents: Sequence[WeightedParts]
) -> tuple[tuple[WeightedParts, ...], tuple[WeightedParts, ...]]:
    """Return the queries and documents of the text-only control (see the module)."""
    contents = [parts for query in queries for _, parts in query]
    if any(extract_images(parts) for parts in contents):
        return tuple(_without_images(query) for query in queries), tuple(documents)
    return tuple(queries), tuple(_without_images(document) for document in documents)


def _without_images(contents: WeightedParts) -> WeightedParts:
    """Return the contents without their images; one of images alone becomes the grey image."""
    reduced = []
    for weight, parts in contents:
        texts = tuple(part for part in parts if not isinstance(part, ImageRef))
        reduced.append((weight, texts or (make_grey_image(),)))
    return tuple(reduced)


def compute_search_chance(task: SearchTask) -> float:
    """Return the exact R@k, 0 to 1, of rankings in random order."""
    chances = []
    for sets, excluded in zip(task.positives, _excluded_of(task), strict=True):
        num_documents = len(task.documents) - len(set(excluded))
        chances.append(chance_of_hit(num_documents, [len(members) for members in sets], task.k))
    return float(np.mean(chances))


def chance_of_hit(num_documents: int, set_sizes: Sequence[int], k: int) -> float:
    """Return the probability that k random documents contain one of each of some disjoint sets.

    It is computed by inclusion and exclusion. `k` above `num_documents` counts as `num_documents`.
    """
    k = min(k, num_documents)
    probability = 0.0
    for count in range(len(set_sizes) + 1):
        for sizes in combinations(set_sizes, count):
            share_without = math.comb(num_documents - sum(sizes), k) / math.comb(num_documents, k)
            probability += (-1) ** count * share_without
    return probability


def _excluded_of(task: SearchTask) -> tuple[tuple[int, ...], ...]:
    """Return the excluded documents of every query, () where there are none."""
    return task.excluded_documents or ((),) * len(task.positives)


def _rank_all_sets(
    queries: Vectors, documents: Vectors, task: SearchTask
) -> tuple[NDArray[np.int64], int]:
    """Return the worst rank of the best members of the query's sets, and the number of ties.

    Ranks are int64[Q], those of `best_positive_ranks`; a search whose query is NaN is ranked last.
    Ties are counted once for every set.
    """
    worst = np.zeros(len(queries), dtype=np.int64)
    num_ties = 0
    num_sets = max(len(sets) for sets in task.positives)
    for n in range(num_sets):
        rows = [i for i, sets in enumerate(task.positives) if n < len(sets)]
        ranks, ties = best_positive_ranks(
            queries[rows].astype(np.float32),
            documents.astype(np.float32),
            [task.positives[i][n] for i in rows],
            excluded=[_excluded_of(task)[i] for i in rows],
        )
        worst[rows] = np.maximum(worst[rows], ranks)
        num_ties += ties
    return worst, num_ties


def _embed_contents(
    groups: Sequence[Sequence[WeightedParts]],
    predictions: PredictionStore,
    *,
    name: str,
    query: bool,
) -> dict[Parts, Vectors]:
    """Return the unit vector of every distinct content, float64[D] each; NaN where it failed.

    Groups are lists of queries or of documents. The vectors are stored under `name`.
    """
    contents: dict[Parts, None] = {}
    for group in groups:
        for item in group:
            contents |= dict.fromkeys(parts for _, parts in item)
    vectors = predictions.embed(list(contents), name=name, query=query)
    return dict(zip(contents, unit_rows(vectors), strict=True))


def _combine(items: Sequence[WeightedParts], vector_of: VectorByContent) -> Vectors:
    """Return the weighted sums of the vectors of the items' contents, float64[N, D]."""
    sums = []
    for item in items:
        sums.append(np.sum([weight * vector_of[parts] for weight, parts in item], axis=0))
    return np.stack(sums)


# ------------------------------------------------------------------ pairs


def run_controlled_pairs(task: PairTask, predictions: PredictionStore) -> BenchmarkScore:
    """Return the score of `run_pairs`, with the control and chance of its first number.

    The control gives every image the vector of the grey image, which is stored as ``grey``; chance
    is that of `compute_pair_chance`.
    """
    score = run_pairs(task, predictions)
    grey = unit_rows(predictions.embed([(make_grey_image(),)], name="grey", query=False))
    texts = list(dict.fromkeys(text for item in task.items for text in item.texts))
    vectors = unit_rows(predictions.embed([(t,) for t in texts], name="texts", query=True))
    vector_of = dict(zip(texts, vectors, strict=True))
    first = next(iter(score.samples))
    correct = []
    for item in task.items:
        rows = np.stack([vector_of[text] for text in item.texts])
        similarity = np.repeat(rows @ grey.T, len(item.images), axis=1).astype(np.float32)
        decisions = task.decide(similarity, (rows @ rows.T).astype(np.float32))
        correct.append(float(decisions[first]))
    samples = dict(score.samples)
    samples = {first: samples.pop(first), f"{TEXT_ONLY}{first}": average(correct)} | samples
    chance = {first: 100 * compute_pair_chance(task, name=first)}
    return replace(score, samples=samples, details={**score.details, "chance": chance})


def compute_pair_chance(task: PairTask, *, name: str) -> float:
    """Return the exact share, 0 to 1, of random similarities that the rule decides correctly.

    All orders of the text-image similarities [T, I] of the first item are tried, of which there are
    (T I)! for its T texts and I images. The rule must not depend on text-text similarities.

    Args:
        task: the pairs, of one form.
        name: number of the rule.
    """
    shape = (len(task.items[0].texts), len(task.items[0].images))
    text_similarity = np.zeros((shape[0], shape[0]))
    correct = []
    for order in permutations(range(shape[0] * shape[1])):
        similarity = np.array(order, dtype=np.float64).reshape(shape)
        correct.append(float(task.decide(similarity, text_similarity)[name]))
    return float(np.mean(correct))


# ------------------------------------------------------------------ existence


def run_existence(task: ChoiceTask, predictions: PredictionStore) -> BenchmarkScore:
    """Return the scores of yes-or-no questions that come in pairs: a yes and a no about one image.

    The options of an item are yes and no, in this order; its `reference` is the index of the
    correct one, and its breakdown tag the kind of the pair. An answer is yes if yes has fewer nats
    per token; equal or missing likelihoods give the wrong answer.

    Numbers x 100 are those of `score_pope` with the kind as split; ``F1``, their mean, comes first.
    ``ranked`` is the share of pairs in which yes is strictly more preferred for what is there than
    for what is not: it is the same whatever the model's leaning to yes or no is. The chance of F1
    is that of coins; the detail ``always_yes`` is the F1 of a model that says nothing else.
    """
    text_items = []
    for item in task.items:
        texts = tuple(part for part in item.prompt if isinstance(part, str))
        text_items.append(replace(item, id=f"{item.id}/blind", prompt=texts))
    option_nats = predictions.score_options(task.items)
    text_nats = predictions.score_options(text_items)
    score = score_pope(*_as_pope(task, option_nats))
    text_score = score_pope(*_as_pope(task, text_nats))
    ranked = _rank_pairs(task.items, option_nats)
    samples: dict[str, MetricSample] = {"F1": score.samples["F1"], "ranked": average(ranked)}
    samples[f"{TEXT_ONLY}F1"] = text_score.samples["F1"]
    samples[f"{TEXT_ONLY}ranked"] = average(_rank_pairs(task.items, text_nats))
    kinds = [item.tags[task.breakdown_tag] for item in task.items[::2]]
    samples |= average_by_tag(ranked, kinds, prefix="ranked/")
    samples |= {name: sample for name, sample in score.samples.items() if name != "F1"}
    num_yes = sum(item.reference == 0 for item in task.items)
    details = {
        "items": len(task.items),
        "chance": {"F1": simulate_existence_chance(task), "ranked": 50.0},
        "always_yes": 200 * num_yes / (num_yes + len(task.items)),
    }
    num_missing = sum(nats is None for nats in option_nats)
    return BenchmarkScore(samples, num_missing, details=details)


def _rank_pairs(items: Sequence[Question], option_nats: Sequence[OptionNats | None]) -> list[float]:
    """Return 1.0 for every two consecutive items whose yes is preferred for what is there."""
    ranked = []
    for n in range(0, len(items), 2):
        first, second = (_prefer_yes(nats) for nats in option_nats[n : n + 2])
        present, absent = (first, second) if items[n].reference == 0 else (second, first)
        ranked.append(float(present > absent))  # NaN compares as false
    return ranked


def simulate_existence_chance(task: ChoiceTask) -> float:
    """Return the mean F1 x 100 of `CHANCE_DRAWS` lists of coin flips, drawn with `CHANCE_SEED`."""
    random = np.random.default_rng(CHANCE_SEED)
    is_yes = np.array([item.reference == 0 for item in task.items])
    kinds = np.array([item.tags[task.breakdown_tag] for item in task.items])
    answers = random.random((CHANCE_DRAWS, len(is_yes))) < 0.5
    f1 = []
    for kind in dict.fromkeys(kinds.tolist()):
        labels = is_yes[kinds == kind]
        said_yes = answers[:, kinds == kind]
        hits = (said_yes & labels).sum(1)
        f1.append(2 * hits / np.maximum(said_yes.sum(1) + labels.sum(), 1))
    return 100 * float(np.mean(f1))


def _prefer_yes(nats: OptionNats | None) -> float:
    """Return by how many nats per token yes is preferred to no; NaN without likelihoods."""
    if nats is None:
        return math.nan
    (yes, yes_tokens), (no, no_tokens) = nats
    return no / no_tokens - yes / yes_tokens


def _as_pope(
    task: ChoiceTask, option_nats: Sequence[OptionNats | None]
) -> tuple[list[Question], list[str | None]]:
    """Return the items and answers as `score_pope` takes them.

    The reference of an item is ``yes`` or ``no``, and its tag ``split`` the kind. So is the answer;
    it is the wrong one for a tie or without likelihoods.
    """
    items = []
    answers: list[str | None] = []
    for item, nats in zip(task.items, option_nats, strict=True):
        reference, opposite = ("yes", "no") if item.reference == 0 else ("no", "yes")
        tags = {"split": item.tags[task.breakdown_tag]}
        items.append(replace(item, reference=reference, tags=tags))
        preference = _prefer_yes(nats)
        if preference == 0 or math.isnan(preference):
            answers.append(opposite)
        else:
            answers.append("yes" if preference > 0 else "no")
    return items, answers


CONTROL_RUNNERS: dict[str, Callable[[Any, PredictionStore], BenchmarkScore]] = {
    "search": run_search,
    "controlled": run_controlled_pairs,
    "exist": run_existence,
}
"""Protocol -> the function that runs its kind of task."""
