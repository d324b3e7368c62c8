"""What a benchmark is made of: what protocols play with a model's functions, and the score that comes out.

    Search      queries against a gallery                       protocol `retrieval`
    Pairs       a few texts and images that must be told apart  protocol `pairs`
    Questions   prompts to answer, judged by a rule             protocol `answer`
    Choices     prompts with options, ranked by likelihood      protocol `choose`
    Judged      prompts to answer, judged by another model      protocol `judge`
    Rag         questions with a knowledge base                 protocol `rag`

A loader reads official files into one of these. Loaders and scorers know no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlduet.data.records import ImageRef, Parts
from vlduet.eval.metrics import bootstrap_means

Values = NDArray[np.float64]
TAILS = (2.5, 97.5)


# ------------------------------------------------------------------ scores


@dataclass(frozen=True, slots=True)
class Value:
    """A number in the unit in which papers print it, with its bootstrap interval over `n` items."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Sample:
    """What a number is made of, item by item: the mean, or the sum, of the (weighted) means of its groups."""

    groups: tuple[tuple[Values, Values], ...]
    """(values float[N], weights float[N]); a group whose weights are all 0 counts as 0."""
    scale: float = 100.0
    total: bool = False
    """Sum the groups instead of averaging them."""

    def value(self, seed: int = 0) -> Value:
        """The number with its 95 % percentile bootstrap interval."""
        low, high = np.percentile(self.draws(seed), TAILS)
        return Value(self.mean, float(low), float(high), sum(len(v) for v, _ in self.groups))

    @property
    def mean(self) -> float:
        """The number."""
        return self.scale * float(
            self._combined([_ratio((v * w).sum(), w.sum()) for v, w in self.groups])
        )

    def draws(self, seed: int = 0) -> Values:
        """float[DRAWS], the number of resampled items; they are drawn within each group."""
        return np.asarray(
            self.scale
            * self._combined(
                [
                    _ratio(bootstrap_means(v * w, seed + i), bootstrap_means(w, seed + i))
                    for i, (v, w) in enumerate(self.groups)
                ]
            ),
            dtype=np.float64,
        )

    def _combined(self, parts: Sequence[Any]) -> Any:
        return np.sum(parts, axis=0) if self.total else np.mean(parts, axis=0)


def difference(ours: Sample, theirs: Sample, *, seed: int = 0) -> Value | None:
    """ours - theirs with its paired interval: the same items are drawn on both sides. None where the items differ."""
    sizes = [[len(v) for v, _ in side.groups] for side in (ours, theirs)]
    if sizes[0] != sizes[1] or (ours.scale, ours.total) != (theirs.scale, theirs.total):
        return None
    # Draws depend on seed and size alone, so equal sizes mean equal draws.
    low, high = np.percentile(ours.draws(seed) - theirs.draws(seed), TAILS)
    return Value(ours.mean - theirs.mean, float(low), float(high), sum(sizes[0]))


def _ratio(part: Any, whole: Any) -> Any:
    """part / whole, and 0 where whole is 0."""
    whole = np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)


def sample(values: ArrayLike, weights: ArrayLike | None = None, *, scale: float = 100.0) -> Sample:
    """A plain or weighted mean. Raises AssertionError for no values."""
    v = np.asarray(values, dtype=np.float64)
    w = np.ones_like(v) if weights is None else np.asarray(weights, dtype=np.float64)
    assert v.ndim == 1 and len(v) and v.shape == w.shape, (v.shape, w.shape)
    return Sample(((v, w),), scale=scale)


def joined(samples: Sequence[Sample], *, total: bool = False) -> Sample:
    """The mean of several numbers (macro average), or their sum."""
    assert samples and len({s.scale for s in samples}) == 1
    return Sample(
        tuple(group for s in samples for group in s.groups), scale=samples[0].scale, total=total
    )


def by_tag(values: Sequence[float], tags: Sequence[str], *, prefix: str = "") -> dict[str, Sample]:
    """One mean a tag, in the order in which tags first come."""
    found: dict[str, list[float]] = {}
    for value, tag in zip(values, tags, strict=True):
        found.setdefault(tag, []).append(value)
    return {f"{prefix}{tag}": sample(group) for tag, group in found.items()}


@dataclass(frozen=True, slots=True)
class Score:
    """The outcome of a benchmark."""

    samples: Mapping[str, Sample]
    """The number that papers report comes first."""
    missing: int = 0
    """Items without a prediction; they count as wrong unless the official rule says otherwise."""
    unparsed: int = 0
    """Predictions in which the official rule finds no answer."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else belongs beside the numbers: gallery size, ties, what was skipped, what is not scored and why."""


# ------------------------------------------------------------------ tasks


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt and what a scorer needs to judge the answer."""

    id: str
    parts: Parts
    """Images and text, in order."""
    answer: Any = None
    """The reference, as the official file has it; None where it is hidden."""
    tags: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    max_new_tokens: int = 128


Answers = Sequence[str | None]
"""One an item, None where there is none."""

Scorer = Callable[[Sequence[Question], Answers], Score]
Export = Callable[[Sequence[Question], Answers], Mapping[str, bytes]]
"""Submission files by name."""


@dataclass(frozen=True, slots=True)
class Questions:
    """Prompts to answer freely; `score` is None where only a server knows the answers."""

    items: tuple[Question, ...]
    score: Scorer | None = None
    export: Export | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choices:
    """Prompts whose options are ranked by their likelihood; `answer` is the index of the right one."""

    items: tuple[Question, ...]
    tag: str = ""
    """The tag that scores are broken down by."""
    blind: bool = False
    """Ask the same without the images too: what the words alone give away."""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Search:
    """Queries against a gallery."""

    queries: tuple[Parts, ...]
    documents: tuple[Parts, ...]
    positives: tuple[tuple[int, ...], ...]
    """For every query the indices of its right documents, at least one."""
    excluded: tuple[tuple[int, ...], ...] = ()
    """For every query the indices of documents that it may not find; empty for none."""
    directions: tuple[str, ...] = ("",)
    """Prefixes of the numbers' names: one for queries against documents, a second one for the reverse."""
    ks: tuple[int, ...] = (1, 5, 10)
    ensemble: int = 1
    """So many consecutive documents are averaged to one: the prompt templates of a class."""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pair:
    """A few texts and images of one item."""

    id: str
    texts: tuple[str, ...]
    images: tuple[ImageRef, ...]
    group: str = ""
    """Its subset, pattern or tag."""


Rule = Callable[[NDArray[np.floating], NDArray[np.floating]], Mapping[str, bool]]
"""(text-image cosines float[T, I], text-text cosines float[T, T]) -> what is right, by name."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Items that a rule decides, all with strict comparisons."""

    items: tuple[Pair, ...]
    rule: Rule
    means: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name -> groups whose numbers are averaged; the first one is what papers report."""
    facts: Mapping[str, Any] = field(default_factory=dict)


Ask = Callable[[str, float], str]
"""(prompt, temperature) -> what the judge says."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Prompts whose answers another model reads."""

    items: tuple[Question, ...]
    review: Callable[[Question, str, Ask], str]
    """(item, answer, ask) -> the review that is kept; may ask several times."""
    score: Callable[[Sequence[Question], Sequence[str | None]], Score]
    """Of the reviews."""
    judge: Mapping[str, Any] = field(default_factory=dict)
    """What the official judge is and how it is asked: model, max_tokens, system."""
    export: Export | None = None


@dataclass(frozen=True, slots=True)
class Fact:
    """One entry of a knowledge base."""

    id: str
    keys: tuple[Parts, ...]
    """What it is found by, one a view."""
    shown: Parts
    """What the prompt shows of it."""


Nats = Callable[[Sequence[tuple[str, str]]], "list[float] | None"]
"""(source, target) pairs -> nats a token of each target after its source; None where nothing can tell."""

Fluency = Callable[[Sequence[Question], Answers, Nats], Mapping[str, Sample]]
"""(items, answers, nats) -> numbers; none where nothing can tell."""


@dataclass(frozen=True, slots=True)
class Rag:
    """Questions to answer with what was retrieved for them.

    A query and a fact have the same number of views (for instance by image and by text); their similarity is the mean of
    the views' cosines.
    """

    items: tuple[Question, ...]
    queries: tuple[tuple[Parts, ...], ...]
    """Views of every question."""
    facts: tuple[Fact, ...]
    prompt: Callable[[Question, Sequence[Fact]], Parts]
    score: Scorer | None
    """None: the questions have options, which are ranked by likelihood."""
    candidates: tuple[tuple[int, ...], ...] = ()
    """For every question the facts that it may find; empty: all facts."""
    excluded: tuple[tuple[int, ...], ...] = ()
    positives: tuple[tuple[int, ...], ...] = ()
    """For every question the facts that answer it, where they are known."""
    k: int = 1
    fluency: Fluency | None = None
    """Adds numbers for which another model reads the answers."""
    told: Mapping[str, Any] = field(default_factory=dict)


Task = Questions | Choices | Search | Pairs | Judged | Rag


# ------------------------------------------------------------------ the table's row


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One row of `BENCHMARKS`."""

    name: str
    title: str
    papers: tuple[str, ...]
    """Which of the two report it, and others: Sugar, VladVA, LLaVA-1.5, FROMAGe, ours."""
    split: str
    metric: str
    files: tuple[str, ...]
    """What must lie in the data folder, relative to it."""
    protocol: str
    load: Callable[[Any], Task] = field(repr=False)
    """From a `Source`."""

    @property
    def corpora(self) -> tuple[str, ...]:
        """The corpora of ours among its files, which `vlduet data fetch` brings."""
        return tuple(
            dict.fromkeys(name.split("/")[1] for name in self.files if name.startswith("corpora/"))
        )
