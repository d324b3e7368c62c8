"""Run a task with a model's predictions, by protocol.

A `PredictionStore` supplies embeddings, answers, likelihoods and reviews. Every comparison is
strict: a tie counts as a miss, so that an encoder which gives everything the same vector scores 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from vlduet.data.vectors import unit_rows
from vlduet.eval.benchmarks.scores import (
    BenchmarkScore,
    MetricSample,
    average,
    average_by_tag,
    combine_samples,
)
from vlduet.eval.benchmarks.tasks import (
    AnswerTask,
    ChoiceTask,
    LLMGradedTask,
    PairTask,
    Question,
    RagTask,
    RetrievalTask,
)
from vlduet.eval.metrics import first_hit_ranks
from vlduet.eval.predictions import PredictionStore

Vectors = NDArray[np.float32]

OptionNats = list[tuple[float, int]]
"""(nats, number of tokens) of every option of a question."""

QUERIES_PER_BLOCK = 512
"""Number of queries whose similarities are in memory at once."""

MIN_RANKED_ENTRIES = 10
"""Number of entries ranked for every RAG question, the largest cutoff of its R@k."""


# ------------------------------------------------------------------ retrieval


def run_retrieval(task: RetrievalTask, predictions: PredictionStore) -> BenchmarkScore:
    """Return R@k x 100 of every direction, named ``R@k`` or ``DIRECTION/R@k``.

    The predictions store the vectors ``queries`` and ``documents``. Items that cannot be embedded
    have NaN, count as missing, and are never in favour of the model. A query without a positive is
    left out; a direction without any other raises AssertionError. Excluded documents concern the
    first direction alone.

    Details by direction are the number of ``queries``, the size of the ``gallery``, and ``ties``:
    the number of queries whose rank suffers from a tie with a wrong item.
    """
    queries = predictions.embed(task.queries, name="queries", query=True)
    documents = predictions.embed(task.documents, name="documents", query=False)
    num_missing = int(np.isnan(queries).any(1).sum() + np.isnan(documents).any(1).sum())
    documents = average_consecutive(documents, task.documents_per_class)
    samples: dict[str, MetricSample] = {}
    details: dict[str, Any] = dict(task.details)
    for direction in range(len(task.directions)):
        if direction == 0:
            searching, gallery = queries, documents
            positives, excluded = task.positives, task.excluded_documents
        else:
            searching, gallery = documents, queries
            positives, excluded = tuple(invert_positives(task.positives, len(documents))), ()
        scored = [i for i, indices in enumerate(positives) if indices]
        ranks, num_ties = best_positive_ranks(
            searching[scored],
            gallery,
            [positives[i] for i in scored],
            excluded=[excluded[i] for i in scored] if excluded else (),
        )
        name = task.directions[direction]
        prefix = f"{name}/" if name else ""
        for k in task.cutoffs:
            samples[f"{prefix}R@{k}"] = average((ranks <= k).astype(np.float64))
        details[f"{prefix}queries"] = len(scored)
        details[f"{prefix}gallery"] = len(gallery)
        details[f"{prefix}ties"] = num_ties
    return BenchmarkScore(samples, num_missing=num_missing, details=details)


def best_positive_ranks(
    queries: Vectors,
    documents: Vectors,
    positives: Sequence[Sequence[int]],
    *,
    excluded: Sequence[Sequence[int]] = (),
) -> tuple[NDArray[np.int64], int]:
    """Return the cosine rank of every query's best positive, and the number of harmful ties.

    Args:
        queries: float[Q, D].
        documents: float[G, D].
        positives: for every query the indices of its correct documents; none raise AssertionError.
        excluded: for every query the indices of documents that leave its gallery; empty for none.

    Returns:
        int64[Q], 1 is best; documents that score as high as the best positive go before it, and so
        do wrong ones whose score is NaN, as that of a vector of zeros.
        The number of queries whose rank would be better without ties and NaN.
    """
    unit_queries = unit_rows(queries)
    unit_documents = unit_rows(documents)
    rank_blocks = [np.zeros(0, dtype=np.int64)]
    num_ties = 0
    for start in range(0, len(queries), QUERIES_PER_BLOCK):
        block = slice(start, start + QUERIES_PER_BLOCK)
        # Multiplied in float64 and rounded: equal vectors get equal scores whatever the blocks.
        similarity = (unit_queries[block] @ unit_documents.T).astype(np.float32)
        relevant = np.zeros(similarity.shape, dtype=bool)
        for row, indices in enumerate(positives[block]):
            relevant[row, list(indices)] = True
        for row, indices in enumerate(excluded[block]):
            similarity[row, list(indices)] = -np.inf
        pessimistic = first_hit_ranks(similarity, relevant)
        best = np.where(relevant, similarity, -np.inf).max(1, keepdims=True)
        optimistic = 1 + ((similarity > best) & ~relevant).sum(1)
        num_ties += int((optimistic < pessimistic).sum())
        rank_blocks.append(pessimistic)
    return np.concatenate(rank_blocks), num_ties


def average_consecutive(vectors: Vectors, size: int) -> Vectors:
    """Return the means of `size` consecutive rows, each scaled to unit length before.

    The means, float32[N / size, D], are not scaled again. `vectors` is returned unchanged for a
    size of 1; a number of rows that `size` does not divide raises ValueError.
    """
    if size == 1:
        return vectors
    means = unit_rows(vectors).reshape(len(vectors) // size, size, -1).mean(1)
    return cast("Vectors", means.astype(np.float32))


def invert_positives(positives: Sequence[Sequence[int]], count: int) -> list[tuple[int, ...]]:
    """Return for every of `count` documents the indices of the queries it is correct for.

    They are in ascending order, () for none. An index of `count` or more raises IndexError.
    """
    queries_of: list[list[int]] = [[] for _ in range(count)]
    for query, documents in enumerate(positives):
        for document in documents:
            queries_of[document].append(query)
    return [tuple(queries) for queries in queries_of]


# ------------------------------------------------------------------ pairs


def run_pairs(task: PairTask, predictions: PredictionStore) -> BenchmarkScore:
    """Return the share x 100 of items that the rule decides correctly, by group and over groups.

    Every name of the rule has a number ``NAME/GROUP`` per group. Before them stand ``NAME/AVERAGE``
    for the macro averages of the task, or without these ``NAME`` over all items. An averaged group
    without items raises KeyError.

    The predictions store the vectors of the distinct ``texts`` and ``images``. An item for which a
    vector is missing (NaN) counts as missing, and every comparison with it as false.
    """
    texts = list(dict.fromkeys(text for item in task.items for text in item.texts))
    images = list(dict.fromkeys(image for item in task.items for image in item.images))
    text_vectors = unit_rows(predictions.embed([(t,) for t in texts], name="texts", query=True))
    image_vectors = unit_rows(predictions.embed([(i,) for i in images], name="images", query=False))
    text_index = {text: i for i, text in enumerate(texts)}
    image_index = {image: i for i, image in enumerate(images)}
    correct: dict[str, list[float]] = {}
    num_missing = 0
    for item in task.items:
        t = text_vectors[[text_index[text] for text in item.texts]]
        i = image_vectors[[image_index[image] for image in item.images]]
        num_missing += bool(np.isnan(t).any() or np.isnan(i).any())
        # Rounded as in `best_positive_ranks`, so that equal vectors tie; NaN compares as false.
        decisions = task.decide((t @ i.T).astype(np.float32), (t @ t.T).astype(np.float32))
        for name, is_correct in decisions.items():
            correct.setdefault(name, []).append(float(is_correct))
    groups = [item.group for item in task.items]
    samples: dict[str, MetricSample] = {}
    if not task.macro_averages:
        # The numbers that papers report go first.
        samples = {name: average(values) for name, values in correct.items()}
    for name, values in correct.items():
        by_group = average_by_tag(values, groups, prefix=f"{name}/")
        for label, members in task.macro_averages.items():
            parts = [by_group[f"{name}/{member}"] for member in members]
            samples[f"{name}/{label}"] = combine_samples(parts)
        # Items without a group add nothing to the overall number.
        samples |= {key: sample for key, sample in by_group.items() if not key.endswith("/")}
    details = {"items": len(task.items)}
    return BenchmarkScore(samples, num_missing=num_missing, details=details)


# ------------------------------------------------------------------ answers and options


def run_answers(task: AnswerTask, predictions: PredictionStore) -> BenchmarkScore:
    """Return the score of answers by the task's official rule.

    Answers are generated and stored, and submission files written where the task has an export.
    Where only a server can score them, there is no number, and the detail ``needs`` is ``server``.
    `num_missing` counts questions without answer.
    """
    answers = _generate_and_export(task, predictions)
    num_missing = sum(text is None for text in answers)
    details = {"items": len(task.items), **task.details}
    if task.score is None:
        return BenchmarkScore({}, num_missing, details={**details, "needs": "server"})
    score = task.score(task.items, answers)
    return replace(score, num_missing=num_missing, details={**details, **score.details})


def run_llm_grading(task: LLMGradedTask, predictions: PredictionStore) -> BenchmarkScore:
    """Return the score of a grader's reviews of the answers.

    Answers and reviews are generated and stored, and submission files written where the task has an
    export. Where there is neither a grader nor a stored review, there is no number: the detail
    ``needs`` is ``judge``. `num_missing` counts questions without answer.

    Raises:
        ConfigError: the grader fails; the reviews so far are stored.
    """
    answers = _generate_and_export(task, predictions)
    num_missing = sum(text is None for text in answers)
    details: dict[str, Any] = {"items": len(task.items)}
    reviews = predictions.grade_answers(task, answers)
    if reviews is None:
        details |= {"needs": "judge", "official_judge": task.grader_settings.get("model")}
        return BenchmarkScore({}, num_missing, details=details)
    score = task.score(task.items, reviews)
    return replace(score, num_missing=num_missing, details={**details, **score.details})


def _generate_and_export(
    task: AnswerTask | LLMGradedTask, predictions: PredictionStore
) -> list[str | None]:
    """Return the answers after storing them, and write the submission files of the task."""
    answers = predictions.generate_answers(task.items)
    if task.export is not None:
        for name, data in task.export(task.items, answers).items():
            predictions.write_submission(name, data)
    return answers


def run_choices(
    task: ChoiceTask, predictions: PredictionStore, *, name: str = ""
) -> BenchmarkScore:
    """Return the share x 100 of questions whose correct option is strictly the likeliest.

    ``accuracy`` compares nats per token, which favours long options; ``accuracy_sum`` compares
    their sum, which favours short ones; published protocols use either. ``accuracy_blind`` is the
    accuracy without the images, where the task asks for it, and ``accuracy/TAG`` the accuracy by
    its breakdown tag. The details contain two baselines x 100: ``chance``, and ``prior`` (see
    `_frequency_prior`). A question without likelihoods is wrong and counts as missing. No items
    raise AssertionError.

    Args:
        task: the questions.
        predictions: supplier of likelihoods, which stores them.
        name: prefix of the keys under which they are stored; empty for none.
    """
    option_nats = predictions.score_options(task.items, name=name)
    correct = _is_likeliest(task.items, option_nats, per_token=True)
    samples = {
        "accuracy": average(correct),
        "accuracy_sum": average(_is_likeliest(task.items, option_nats, per_token=False)),
    }
    if task.without_images_too:
        text_items = []
        for item in task.items:
            texts = tuple(part for part in item.prompt if isinstance(part, str))
            text_items.append(replace(item, id=f"{item.id}/blind", prompt=texts))
        text_nats = predictions.score_options(text_items, name=name)
        text_correct = _is_likeliest(text_items, text_nats, per_token=True)
        samples["accuracy_blind"] = average(text_correct)
    if task.breakdown_tag:
        tags = [item.tags[task.breakdown_tag] for item in task.items]
        samples |= average_by_tag(correct, tags, prefix="accuracy/")
    chance = float(np.mean([1 / len(item.options) for item in task.items]))
    details = {
        "items": len(task.items),
        "chance": 100 * chance,
        "prior": 100 * _frequency_prior(task),
    }
    num_missing = sum(nats is None for nats in option_nats)
    return BenchmarkScore(samples, num_missing, details=details)


def _is_likeliest(
    items: Sequence[Question], option_nats: Sequence[OptionNats | None], *, per_token: bool
) -> list[float]:
    """Return 1.0 per question whose correct option has strictly the fewest nats, else 0.0.

    Nats are compared per token, or in total. A question without likelihoods (None) gives 0.0, one
    with a single option 1.0.
    """
    correct = []
    for item, options in zip(items, option_nats, strict=True):
        if not options:
            correct.append(0.0)
            continue
        losses = [nats / num_tokens if per_token else nats for nats, num_tokens in options]
        own_loss = losses.pop(item.reference)
        correct.append(float(all(own_loss < loss for loss in losses)))
    return correct


def _frequency_prior(task: ChoiceTask) -> float:
    """Return the accuracy, 0 to 1, of choosing the option that is most often correct elsewhere.

    Only the other questions with the same value of the breakdown tag count: with its own answer, an
    option that is asked about once would give itself away. Options that are correct equally often
    share the point, also if none ever is. No questions give NaN.
    """
    tags = [item.tags.get(task.breakdown_tag, "") for item in task.items]
    frequency: Counter[tuple[str, str]] = Counter()
    for tag, item in zip(tags, task.items, strict=True):
        frequency[tag, item.options[item.reference]] += 1
    shares = []
    for tag, item in zip(tags, task.items, strict=True):
        counts = [frequency[tag, option] for option in item.options]
        counts[item.reference] -= 1
        is_best = counts[item.reference] == max(counts)
        shares.append(is_best / counts.count(max(counts)))
    return float(np.mean(shares))


# ------------------------------------------------------------------ retrieval-augmented generation


def run_rag(task: RagTask, predictions: PredictionStore) -> BenchmarkScore:
    """Return the scores of the same questions without retrieval and with one or two retrievers.

    Names begin with ``self/`` (the model's own retrieval; these come first), ``none/`` (no
    retrieval) and ``other/`` (an independent retriever, where there is one). For each retriever,
    ``retrieval/...`` scores the ranking where correct entries are known. `num_missing` and
    `num_unparsed` are those of ``self``. Vectors, and answers or likelihoods, are computed and
    stored by `predictions`; missing vectors without a model raise DataError.
    """
    bare_items = [replace(item, prompt=task.build_prompt(item, ())) for item in task.items]
    scores = {"none": _score_rag_prompts(task, bare_items, predictions, name="none")}
    retrieval: dict[str, MetricSample] = {}
    for name, embed in (("self", predictions.embed), ("other", predictions.embed_with_retriever)):
        views = _embed_views(task, embed, name)
        if views is None:
            continue
        rankings = [
            rank_entries(similarity, task, n) for n, similarity in _rag_similarities(task, views)
        ]
        if task.positives:
            for number, sample in _score_rankings(task, rankings).items():
                retrieval[f"{name}/{number}"] = sample
        items = []
        for item, ranking in zip(task.items, rankings, strict=True):
            entries = [task.entries[i] for i in ranking[: task.k]]
            items.append(replace(item, prompt=task.build_prompt(item, entries)))
        scores[name] = _score_rag_prompts(task, items, predictions, name=name)
    samples = retrieval
    for name, score in scores.items():
        samples |= {f"{name}/{number}": sample for number, sample in score.samples.items()}
    # The model's own retrieval is what papers report; the sort keeps the order otherwise.
    names = sorted(samples, key=lambda key: not key.startswith("self/"))
    details = {
        **scores["none"].details,
        **task.details,
        "items": len(task.items),
        "facts": len(task.entries),
        "k": task.k,
    }
    return replace(scores["self"], samples={key: samples[key] for key in names}, details=details)


def _score_rag_prompts(
    task: RagTask, items: Sequence[Question], predictions: PredictionStore, *, name: str
) -> BenchmarkScore:
    """Return the score of free answers, or of ranked options where the task has no scorer.

    Answers or likelihoods to the prompts of `items` are computed and stored with `name` as prefix
    of their keys. Numbers of the task's `score_fluency`, which are stored too, are added.
    """
    if task.score is None:
        return run_choices(ChoiceTask(tuple(items)), predictions, name=name)
    answers = predictions.generate_answers(items, name=name)
    num_missing = sum(text is None for text in answers)
    score = replace(task.score(items, answers), num_missing=num_missing)
    if task.score_fluency is None:
        return score
    fluency = task.score_fluency(items, answers, predictions.score_fluency)
    return replace(score, samples={**score.samples, **fluency})


Views = list[tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Unit vectors (queries float[Q, D], entries float[E, D]) of every view."""


def _embed_views(task: RagTask, embed: Callable[..., Vectors | None], name: str) -> Views | None:
    """Return (queries, entries) as unit rows for every view, in order; None if `embed` gives None.

    Vectors are stored as ``NAME-queries-VIEW`` and ``NAME-facts-VIEW``. Questions and entries with
    different numbers of views raise AssertionError.
    """
    query_views = list(zip(*task.query_views, strict=True))
    entry_views = list(zip(*(entry.search_views for entry in task.entries), strict=True))
    assert len(query_views) == len(entry_views), "questions and entries differ in their views"
    views: Views = []
    for view, (query_items, entry_items) in enumerate(zip(query_views, entry_views, strict=True)):
        queries = embed(query_items, name=f"{name}-queries-{view}", query=True)
        entries = embed(entry_items, name=f"{name}-facts-{view}", query=False)
        if queries is None or entries is None:
            return None
        views.append((unit_rows(queries), unit_rows(entries)))
    return views


def _rag_similarities(task: RagTask, views: Views) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield every question's index and its similarity to all entries, float32[E].

    The similarity is the mean of the cosines of the views in which both sides have a vector (no
    NaN): a sentence encoder reads no image and so retrieves by text alone. Entries that may not be
    retrieved, or have no such view, are -inf.
    """
    for n in range(len(task.items)):
        allowed = list(task.candidates[n]) if task.candidates else slice(None)
        cosines = np.stack([queries[n] @ entries[allowed].T for queries, entries in views])
        is_known = ~np.isnan(cosines)  # [views, allowed]
        sums = np.where(is_known, cosines, 0).sum(0)
        means = sums / is_known.sum(0).clip(1)
        similarity = np.full(len(task.entries), -np.inf, dtype=np.float32)
        similarity[allowed] = np.where(is_known.any(0), means, -np.inf)
        if task.excluded_entries:
            similarity[list(task.excluded_entries[n])] = -np.inf
        yield n, similarity


def rank_entries(similarity: NDArray[np.float32], task: RagTask, n: int) -> list[int]:
    """Return the indices of the entries that question `n` may retrieve, best first.

    They are at most max(`MIN_RANKED_ENTRIES`, k). Among equal similarities, the correct entries
    come last, so that a tie never helps. An entry of similarity -inf is left out; if all are, the
    list is empty.

    Args:
        similarity: float32[E], not NaN; see `_rag_similarities`.
        task: supplies k and the correct entries.
        n: index of the question.
    """
    positives = set(task.positives[n]) if task.positives else set()
    allowed = np.flatnonzero(similarity > -np.inf)
    size = max(MIN_RANKED_ENTRIES, task.k)
    if len(allowed) > size:
        # Sorting all of two hundred thousand entries for every question would be slow.
        threshold = np.partition(similarity[allowed], -size)[-size]
        allowed = allowed[similarity[allowed] >= threshold]
    indices = [int(i) for i in allowed]
    return sorted(indices, key=lambda i: (-similarity[i], i in positives, i))[:size]


def _score_rankings(task: RagTask, rankings: Sequence[Sequence[int]]) -> dict[str, MetricSample]:
    """Return ``retrieval/R@1``, ``R@5``, ``R@10`` and ``retrieval/F1``, all x 100.

    F1 compares the k entries in the prompt with the correct ones. Questions without known correct
    entries are left out; {} is returned if there is no other.
    """
    hits: dict[int, list[float]] = {1: [], 5: [], 10: []}
    f1 = []
    for ranking, indices in zip(rankings, task.positives, strict=True):
        if not indices:
            continue
        positives = set(indices)
        for k, values in hits.items():
            values.append(float(not positives.isdisjoint(ranking[:k])))
        prompted = ranking[: task.k]
        num_correct = len(positives.intersection(prompted))
        f1.append(2 * num_correct / (len(prompted) + len(positives)))
    if not f1:
        return {}
    samples = {f"retrieval/R@{k}": average(values) for k, values in hits.items()}
    return samples | {"retrieval/F1": average(f1)}


PROTOCOL_RUNNERS: dict[str, Callable[[Any, PredictionStore], BenchmarkScore]] = {
    "retrieval": run_retrieval,
    "pairs": run_pairs,
    "answer": run_answers,
    "choose": run_choices,
    "judge": run_llm_grading,
    "rag": run_rag,
}
"""Protocol -> the function that runs its kind of task."""
