"""Protocols by name: how a task is played with a model's functions, and what comes out of it.

A `Player` gives vectors, answers, likelihoods and reviews, and remembers them (`vlduet.eval.predictions`). Nothing here knows a
model, and every comparison is strict: a tie counts as a miss, so that an encoder which gives everything one vector scores
nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from vlduet.data.records import Parts
from vlduet.eval.benchmarks.tasks import (
    Choices,
    Judged,
    Pairs,
    Question,
    Questions,
    Rag,
    Sample,
    Score,
    Search,
    by_tag,
    joined,
    sample,
)
from vlduet.eval.metrics import first_hit_ranks
from vlduet.eval.protocols import unit_rows

Vectors = NDArray[np.float32]
Indices = Sequence[Sequence[int]]

BLOCK = 512
"""Queries whose similarities are in memory at a time."""


class Player(Protocol):
    """A model's functions, with a memory."""

    seed: int

    def embed(self, items: Sequence[Parts], *, name: str, query: bool) -> Vectors:
        """float32[N, D]; NaN where an item cannot be embedded. `name` is where they are kept."""

    def embed_with_retriever(
        self, items: Sequence[Parts], *, name: str, query: bool
    ) -> Vectors | None:
        """The same by an independent retriever; None where there is none."""

    def answer(self, questions: Sequence[Question], *, name: str = "") -> list[str | None]:
        """Answers; None where there is none."""

    def score_options(
        self, questions: Sequence[Question], *, name: str = ""
    ) -> list[list[tuple[float, int]] | None]:
        """(nats, tokens) of every option of every question."""

    def grade_answers(self, task: Judged, answers: Sequence[str | None]) -> list[str | None] | None:
        """What the judge wrote of every answer; None where there is no judge and nothing stored."""

    def score_fluency(self, pairs: Sequence[tuple[str, str]]) -> list[float] | None:
        """Nats a token of every target after its source; None where there is no model for it and nothing stored."""

    def write_submission(self, name: str, data: bytes) -> None:
        """Keep a submission file."""


# ------------------------------------------------------------------ retrieval


def retrieval(task: Search, player: Player) -> Score:
    """Hit rates of every direction. Facts: queries, gallery, ties (queries whose rank a tie with a wrong item costs)."""
    queries = player.embed(task.queries, name="queries", query=True)
    documents = player.embed(task.documents, name="documents", query=False)
    missing = int(np.isnan(queries).any(1).sum() + np.isnan(documents).any(1).sum())
    documents = ensembled(documents, task.ensemble)
    samples: dict[str, Sample] = {}
    facts: dict[str, Any] = {}
    sides: list[tuple[Vectors, Vectors, Indices, Indices]] = [
        (queries, documents, task.positives, task.excluded)
    ]
    if len(task.directions) > 1:
        sides.append((documents, queries, inverted(task.positives, len(documents)), ()))
    for name, (asking, asked, positives, excluded) in zip(task.directions, sides, strict=True):
        prefix = f"{name}/" if name else ""
        kept = [i for i, found in enumerate(positives) if found]
        ranks, ties = search_ranks(
            asking[kept],
            asked,
            [positives[i] for i in kept],
            excluded=[excluded[i] for i in kept] if excluded else (),
        )
        samples |= {f"{prefix}R@{k}": sample((ranks <= k).astype(np.float64)) for k in task.ks}
        facts |= {
            f"{prefix}queries": len(kept),
            f"{prefix}gallery": len(asked),
            f"{prefix}ties": ties,
        }
    return Score(samples, missing=missing, facts={**task.facts, **facts})


def search_ranks(
    queries: Vectors,
    documents: Vectors,
    positives: Sequence[Sequence[int]],
    *,
    excluded: Sequence[Sequence[int]] = (),
) -> tuple[NDArray[np.int64], int]:
    """Rank of the best positive of every query by cosine, and the number of queries that a tie costs a rank.

    Args:
        queries: float[Q, D].
        documents: float[G, D].
        positives: indices of right documents, at least one a query.
        excluded: indices that a query may not find.

    Returns:
        int64[Q], pessimistic: documents that score as high as the best positive stand before it.
    """
    queries_64, documents_64 = unit_rows(queries), unit_rows(documents)
    ranks, ties = [], 0
    for begin in range(0, len(queries), BLOCK):
        # Multiplied in float64 and rounded: equal vectors get equal scores whatever the blocks.
        similarity = (queries_64[begin : begin + BLOCK] @ documents_64.T).astype(np.float32)
        relevant = np.zeros(similarity.shape, dtype=bool)
        for row, found in enumerate(positives[begin : begin + BLOCK]):
            relevant[row, list(found)] = True
        for row, banned in enumerate(excluded[begin : begin + BLOCK]):
            similarity[row, list(banned)] = -np.inf
        pessimistic = first_hit_ranks(similarity, relevant)
        best = np.where(relevant, similarity, -np.inf).max(1, keepdims=True)
        optimistic = 1 + ((similarity > best) & ~relevant).sum(1)
        ties += int((optimistic < pessimistic).sum())
        ranks.append(pessimistic)
    return np.concatenate(ranks) if ranks else np.zeros(0, dtype=np.int64), ties


def ensembled(vectors: Vectors, size: int) -> Vectors:
    """Means of `size` consecutive unit vectors."""
    if size == 1:
        return vectors
    means = unit_rows(vectors).reshape(len(vectors) // size, size, -1).mean(1)
    return cast("Vectors", means.astype(np.float32))


def inverted(positives: Sequence[Sequence[int]], count: int) -> list[tuple[int, ...]]:
    """For every document the queries that it is right for."""
    found: list[list[int]] = [[] for _ in range(count)]
    for query, documents in enumerate(positives):
        for document in documents:
            found[document].append(query)
    return [tuple(queries) for queries in found]


# ------------------------------------------------------------------ pairs


def pairs(task: Pairs, player: Player) -> Score:
    """The share of items that the rule finds right, by group and over groups."""
    texts = list(dict.fromkeys(text for item in task.items for text in item.texts))
    images = list(dict.fromkeys(image for item in task.items for image in item.images))
    text_vectors = unit_rows(player.embed([(t,) for t in texts], name="texts", query=True))
    image_vectors = unit_rows(player.embed([(i,) for i in images], name="images", query=False))
    text_at, image_at = ({x: n for n, x in enumerate(items)} for items in (texts, images))
    right: dict[str, list[float]] = {}
    missing = 0
    for item in task.items:
        t = text_vectors[[text_at[text] for text in item.texts]]
        i = image_vectors[[image_at[image] for image in item.images]]
        missing += bool(np.isnan(t).any() or np.isnan(i).any())
        # Rounded as in `search_ranks`, so that equal vectors tie; a comparison with NaN is false.
        found = task.rule((t @ i.T).astype(np.float32), (t @ t.T).astype(np.float32))
        for name, value in found.items():
            right.setdefault(name, []).append(float(value))
    groups = [item.group for item in task.items]
    samples: dict[str, Sample] = {}
    for name, values in right.items():
        named = {
            key.rstrip("/"): value
            for key, value in by_tag(values, groups, prefix=f"{name}/").items()
        }
        for mean, members in task.means.items():
            samples[f"{name}/{mean}"] = joined([named[f"{name}/{member}"] for member in members])
        if not task.means:
            samples[name] = sample(values)
        samples |= {key: value for key, value in named.items() if key != name}
    # Papers' columns first: the means or the overall numbers, then the breakdown.
    first = [key for key in samples if not task.means and "/" not in key]
    ordered = {key: samples[key] for key in [*first, *samples]}
    return Score(ordered, missing=missing, facts={**task.facts, "items": len(task.items)})


# ------------------------------------------------------------------ answer, choose, judge


def answer(task: Questions, player: Player) -> Score:
    """Answers, judged by the official rule; where only a server can, exported and left without a number."""
    answers = player.answer(task.items)
    if task.export is not None:
        for name, data in task.export(task.items, answers).items():
            player.write_submission(name, data)
    missing = sum(text is None for text in answers)
    if task.score is None:
        told = {**task.facts, "items": len(task.items), "needs": "server"}
        return Score({}, missing=missing, facts=told)
    score = task.score(task.items, answers)
    return replace(
        score, missing=missing, facts={"items": len(task.items), **task.facts, **score.facts}
    )


def choose(task: Choices, player: Player, *, name: str = "") -> Score:
    """The share of questions whose right option is strictly the likeliest: by nats a token, and by nats in all.

    The sum favours short options, the mean long ones; both are told because published protocols use either. Baselines
    stand beside them: `chance`, `prior` (always the option that is most often right in the other questions of its tag), and,
    where a task asks for it, `accuracy_blind`: the same questions without their images.
    """
    found = player.score_options(task.items, name=name)
    right = {
        "accuracy": _likeliest(task.items, found, weigh=True),
        "accuracy_sum": _likeliest(task.items, found, weigh=False),
    }
    samples = {name: sample(values) for name, values in right.items()}
    if task.blind:
        bare = [replace(q, id=f"{q.id}/blind", parts=_words(q.parts)) for q in task.items]
        samples["accuracy_blind"] = sample(
            _likeliest(bare, player.score_options(bare, name=name), weigh=True)
        )
    if task.tag:
        samples |= by_tag(
            right["accuracy"], [item.tags[task.tag] for item in task.items], prefix="accuracy/"
        )
    chance = float(np.mean([1 / len(item.options) for item in task.items]))
    facts = {"items": len(task.items), "chance": 100 * chance, "prior": 100 * _prior(task)}
    return Score(
        samples, missing=sum(options is None for options in found), facts={**task.facts, **facts}
    )


def _likeliest(
    items: Sequence[Question], found: Sequence[list[tuple[float, int]] | None], *, weigh: bool
) -> list[float]:
    """1 where the right option has strictly the fewest nats (a token, or in all), else 0; 0 where there are none."""
    right = []
    for item, options in zip(items, found, strict=True):
        losses = [nats / tokens if weigh else nats for nats, tokens in options or ()]
        others = [loss for n, loss in enumerate(losses) if n != item.answer]
        right.append(float(losses != [] and all(losses[item.answer] < loss for loss in others)))
    return right


def _words(parts: Parts) -> Parts:
    """A prompt without its images."""
    return tuple(part for part in parts if isinstance(part, str))


def _prior(task: Choices) -> float:
    """What one scores who has never seen a picture but knows how often each option is right in the other questions: ties
    share the point. A question's own answer does not count, or an option that is asked of once would give itself away."""
    kind = [item.tags.get(task.tag, "") for item in task.items]
    often = Counter(
        (k, item.options[item.answer]) for k, item in zip(kind, task.items, strict=True)
    )
    shares = []
    for k, item in zip(kind, task.items, strict=True):
        counts = [often[k, option] - (n == item.answer) for n, option in enumerate(item.options)]
        best = [n for n, count in enumerate(counts) if count == max(counts)]
        shares.append((item.answer in best) / len(best))
    return float(np.mean(shares))


def judge(task: Judged, player: Player) -> Score:
    """Answers, then reviews of them by a judge; without a judge the answers are kept and there is no number yet."""
    answers = player.answer(task.items)
    if task.export is not None:
        for name, data in task.export(task.items, answers).items():
            player.write_submission(name, data)
    missing = sum(text is None for text in answers)
    reviews = player.grade_answers(task, answers)
    if reviews is None:
        told = {
            "items": len(task.items),
            "needs": "judge",
            "official_judge": task.judge.get("model"),
        }
        return Score({}, missing=missing, facts=told)
    score = task.score(task.items, reviews)
    return replace(score, missing=missing, facts={"items": len(task.items), **score.facts})


# ------------------------------------------------------------------ rag


def rag(task: Rag, player: Player) -> Score:
    """The same questions without retrieval, with the model's own, and with an independent retriever's where there is one.

    Names begin with `none/`, `self/` and `other/`. Where the right facts are known, retrieval is scored too.
    """
    bare = [replace(item, parts=task.prompt(item, ())) for item in task.items]
    samples: dict[str, Sample] = {}
    scores = {"none": _rag_score(task, bare, player, name="none")}
    for who, embed in (("self", player.embed), ("other", player.embed_with_retriever)):
        similarity = _rag_similarity(task, embed, who)
        if similarity is None:
            continue
        order = [_best(row, task, n) for n, row in enumerate(similarity)]
        if task.positives:
            samples |= {
                f"{who}/{name}": found for name, found in _rag_retrieval(task, order).items()
            }
        told = [
            replace(item, parts=task.prompt(item, [task.facts[i] for i in found[: task.k]]))
            for item, found in zip(task.items, order, strict=True)
        ]
        scores[who] = _rag_score(task, told, player, name=who)
    for who, score in scores.items():
        samples |= {f"{who}/{name}": found for name, found in score.samples.items()}
    ordered = {
        key: samples[key] for key in sorted(samples, key=lambda key: not key.startswith("self/"))
    }
    facts = {
        **scores["none"].facts,
        **task.told,
        "items": len(task.items),
        "facts": len(task.facts),
        "k": task.k,
    }
    unparsed = scores["self"].unparsed
    return Score(ordered, missing=scores["self"].missing, unparsed=unparsed, facts=facts)


def _rag_score(task: Rag, items: Sequence[Question], player: Player, *, name: str) -> Score:
    """The score of these prompts: of free answers, or of ranked options where the task has no scorer."""
    if task.score is None:
        return choose(Choices(tuple(items)), player, name=name)
    answers = player.answer(items, name=name)
    score = task.score(items, answers)
    more = task.fluency(items, answers, player.score_fluency) if task.fluency is not None else {}
    return replace(score, samples={**score.samples, **more})


def _rag_similarity(
    task: Rag, embed: Callable[..., Vectors | None], who: str
) -> Iterable[NDArray[np.float32]] | None:
    """For every question its similarities with all facts, or with its own candidates (others are -inf).

    A view counts where both sides have a vector: a sentence encoder sees no image, and finds by words alone.
    """
    queries = list(zip(*task.queries, strict=True))
    keys = list(zip(*(fact.keys for fact in task.facts), strict=True))
    assert len(queries) == len(keys), "a query and a fact have the same views"
    sides = []
    for view, (asking, asked) in enumerate(zip(queries, keys, strict=True)):
        left = embed(asking, name=f"{who}-queries-{view}", query=True)
        right = embed(asked, name=f"{who}-facts-{view}", query=False)
        if left is None or right is None:
            return None
        sides.append((unit_rows(left), unit_rows(right)))

    def row_of(n: int) -> NDArray[np.float32]:
        wanted = list(task.candidates[n]) if task.candidates else slice(None)
        row = np.full(len(task.facts), -np.inf, dtype=np.float32)
        views = np.stack([left[n] @ right[wanted].T for left, right in sides])  # [views, wanted]
        seen = ~np.isnan(views)
        row[wanted] = np.where(
            seen.any(0), np.where(seen, views, 0).sum(0) / seen.sum(0).clip(1), np.nan
        )
        if task.excluded:
            row[list(task.excluded[n])] = -np.inf
        # nan_to_num would make -inf a number, and allowed.
        return np.where(np.isnan(row), np.float32(-np.inf), row)

    return map(row_of, range(len(task.items)))


def _best(row: NDArray[np.float32], task: Rag, n: int) -> list[int]:
    """The facts of a question that are looked at, best first; among equals the right ones last, so that ties help nobody."""
    positive = set(task.positives[n]) if task.positives else set()
    allowed, most = np.flatnonzero(row > -np.inf), max(10, task.k)
    if (
        len(allowed) > most
    ):  # of two hundred thousand facts, a list a question would fill the memory
        allowed = allowed[row[allowed] >= np.partition(row[allowed], -most)[-most]]
    return sorted(map(int, allowed), key=lambda i: (-row[i], i in positive, i))[:most]


def _rag_retrieval(task: Rag, order: Sequence[Sequence[int]]) -> dict[str, Sample]:
    """R@k and the F1 of the k facts that were put in the prompt."""
    kept = [
        (found, set(right)) for found, right in zip(order, task.positives, strict=True) if right
    ]
    if not kept:
        return {}
    samples = {
        f"retrieval/R@{k}": sample([float(bool(set(found[:k]) & right)) for found, right in kept])
        for k in (1, 5, 10)
    }
    f1 = [
        2 * len(set(found[: task.k]) & right) / (len(found[: task.k]) + len(right))
        for found, right in kept
    ]
    return samples | {"retrieval/F1": sample(f1)}


PROTOCOLS: dict[str, Callable[[Any, Player], Score]] = {
    "retrieval": retrieval,
    "pairs": pairs,
    "answer": answer,
    "choose": choose,
    "judge": judge,
    "rag": rag,
}
"""Each takes its task and a player."""
