"""The kinds of tasks that a benchmark can be. Tasks and their scorers know no model.

    RetrievalTask   queries against a gallery                        protocol ``retrieval``
    SearchTask      the same search with several forms of queries    protocol ``search``
    PairTask        a few texts and images to be distinguished       protocol ``pairs``
    AnswerTask      prompts answered in text, scored by a rule       protocol ``answer``
    ChoiceTask      prompts with options, ranked by likelihood       protocol ``choose``
    LLMGradedTask   prompts whose answers another model grades       protocol ``judge``
    RagTask         questions with a knowledge base                  protocol ``rag``

A loader reads official files into one task; `vlduet.eval.benchmarks.runners` runs it, or
`vlduet.eval.benchmarks.control_runners` with its chance level and a text-only control.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlduet.data.records import ImageRef, Parts
from vlduet.eval.benchmarks.scores import BenchmarkScore, MetricSample

if TYPE_CHECKING:
    from vlduet.eval.benchmarks.official_files import OfficialFiles

# ------------------------------------------------------------------ text answers


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt, and what a scorer needs to score the answer."""

    id: str
    prompt: Parts
    """Images and texts, in order."""
    reference: Any = None
    """The correct answer as the official file has it; None where it is hidden."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Properties by which scores are broken down, and texts that scorers and exports need."""
    options: tuple[str, ...] = ()
    max_new_tokens: int = 128


AnswerTexts = Sequence[str | None]
"""One generated text per question; None where there is none."""

AnswerScorer = Callable[[Sequence[Question], AnswerTexts], BenchmarkScore]
SubmissionExport = Callable[[Sequence[Question], AnswerTexts], Mapping[str, bytes]]
"""(questions, answers) -> content of every submission file, by file name."""


@dataclass(frozen=True, slots=True)
class AnswerTask:
    """Prompts to answer freely."""

    items: tuple[Question, ...]
    score: AnswerScorer | None = None
    """None where only a server knows the answers."""
    export: SubmissionExport | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChoiceTask:
    """Prompts whose options are ranked by likelihood.

    The `reference` of an item is the index of the correct option.
    """

    items: tuple[Question, ...]
    breakdown_tag: str = ""
    """Tag by which scores are broken down; empty for no breakdown."""
    without_images_too: bool = False
    """Ask the questions a second time without their images, as a text-only control."""


AskGrader = Callable[[str, float], str]
"""(prompt, temperature) -> text of the grading model."""


@dataclass(frozen=True, slots=True)
class LLMGradedTask:
    """Prompts whose answers another language model grades."""

    items: tuple[Question, ...]
    grade_answer: Callable[[Question, str, AskGrader], str]
    """(question, answer, ask) -> review text to store; it may ask several times."""
    score: AnswerScorer
    """Scorer of the reviews, which are None where an answer was not graded."""
    grader_settings: Mapping[str, Any] = field(default_factory=dict)
    """Official settings of the grader: ``model``, ``max_tokens``, ``system``."""
    export: SubmissionExport | None = None


# ------------------------------------------------------------------ embeddings


@dataclass(frozen=True, slots=True)
class RetrievalTask:
    """Queries against a gallery of documents."""

    queries: tuple[Parts, ...]
    documents: tuple[Parts, ...]
    positives: tuple[tuple[int, ...], ...]
    """For every query the indices of its correct documents, at least one."""
    excluded_documents: tuple[tuple[int, ...], ...] = ()
    """For every query the indices of documents that leave its gallery; empty for none at all."""
    directions: tuple[str, ...] = ("",)
    """Name prefixes: first for queries against documents, second (optional) for the reverse."""
    cutoffs: tuple[int, ...] = (1, 5, 10)
    """Values of k of the reported R@k."""
    documents_per_class: int = 1
    """Number of consecutive documents averaged into one, such as prompt templates of a class."""
    details: Mapping[str, Any] = field(default_factory=dict)


WeightedParts = tuple[tuple[float, Parts], ...]
"""Contents with weights. Their vector is the weighted sum of the unit vectors of the contents."""


@dataclass(frozen=True, slots=True)
class SearchTask:
    """The same searches with queries in several forms, such as whole and in part."""

    queries: Mapping[str, tuple[WeightedParts, ...]]
    """Queries by the name of their form, equally many each: first the form that is reported."""
    documents: tuple[WeightedParts, ...]
    positives: tuple[tuple[tuple[int, ...], ...], ...]
    """For every query, sets of documents. A search is a hit if each set has one among the first k.
    Sets of one query have no document in common."""
    excluded_documents: tuple[tuple[int, ...], ...] = ()
    """For every query the indices of documents that leave its gallery; empty for none at all."""
    k: int = 10
    """Cutoff of the reported R@k."""
    partial_forms: tuple[str, ...] = ()
    """Forms that are a part of the first one, which it must exceed to be worth its other parts."""
    tags: tuple[str, ...] = ()
    """For every query the name by which scores are broken down; empty for no breakdown."""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PairItem:
    """The texts and images of one item that must be matched."""

    id: str
    texts: tuple[str, ...]
    images: tuple[ImageRef, ...]
    group: str = ""
    """Subset, pattern or tag of the item."""


PairRule = Callable[[NDArray[np.floating], NDArray[np.floating]], Mapping[str, bool]]
"""(text-image cosines float[T, I], text-text cosines float[T, T]) -> correctness by name."""


@dataclass(frozen=True, slots=True)
class PairTask:
    """Items that a rule decides with strict comparisons."""

    items: tuple[PairItem, ...]
    decide: PairRule
    macro_averages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name -> groups whose numbers are averaged; papers report the first one."""


# ------------------------------------------------------------------ retrieval-augmented generation


@dataclass(frozen=True, slots=True)
class KnowledgeEntry:
    """One entry of a knowledge base."""

    id: str
    search_views: tuple[Parts, ...]
    """Contents that are embedded to find the entry, one per view."""
    prompt_parts: Parts
    """Text and images that a prompt shows of the entry."""


NatsPerToken = Callable[[Sequence[tuple[str, str]]], "list[float] | None"]
"""(source, target) pairs -> nats per token of each target given its source, or None."""

FluencyScorer = Callable[
    [Sequence[Question], AnswerTexts, NatsPerToken], Mapping[str, MetricSample]
]
"""(questions, answers, nats per token) -> numbers by name, none without a model."""


@dataclass(frozen=True, slots=True)
class RagTask:
    """Questions to answer with entries retrieved from a knowledge base.

    A question and an entry have the same number of views (for instance image and text). Their
    similarity is the mean of the cosines of the views.
    """

    items: tuple[Question, ...]
    query_views: tuple[tuple[Parts, ...], ...]
    """Contents that are embedded to search for every question, one per view."""
    entries: tuple[KnowledgeEntry, ...]
    build_prompt: Callable[[Question, Sequence[KnowledgeEntry]], Parts]
    """(question, retrieved entries) -> prompt."""
    score: AnswerScorer | None
    """None for questions with options, which are ranked by likelihood."""
    candidates: tuple[tuple[int, ...], ...] = ()
    """For every question the indices of entries that may be retrieved; empty for all entries."""
    excluded_entries: tuple[tuple[int, ...], ...] = ()
    """For every question the indices of entries that may not be retrieved; empty for none."""
    positives: tuple[tuple[int, ...], ...] = ()
    """For every question the indices of entries that answer it; empty where unknown."""
    k: int = 1
    """Number of retrieved entries in the prompt."""
    score_fluency: FluencyScorer | None = None
    """Adds numbers for which another language model reads the answers."""
    details: Mapping[str, Any] = field(default_factory=dict)


BenchmarkTask = (
    AnswerTask | ChoiceTask | RetrievalTask | SearchTask | PairTask | LLMGradedTask | RagTask
)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One entry of ``benchmarks.yaml``: facts about a benchmark, and the loader of its files."""

    name: str
    title: str
    papers: tuple[str, ...]
    """Papers that report it: Sugar, VladVA, LLaVA-1.5, FROMAGe."""
    split: str
    metric: str
    files: tuple[str, ...]
    """Files and folders that must be in the data folder, relative to it."""
    protocol: str
    """Key of `runners.PROTOCOL_RUNNERS` or of `control_runners.CONTROL_RUNNERS`; fits the kind of
    task that `load` returns."""
    load: Callable[[OfficialFiles], BenchmarkTask] = field(repr=False)
    question: str = ""
    """Question that its items ask, for the page of the suite ``abilities``; empty elsewhere."""

    @property
    def corpora(self) -> tuple[str, ...]:
        """Names of the project's own corpora among the files; `vlduet data fetch` installs them."""
        names = [file.split("/")[1] for file in self.files if file.startswith("corpora/")]
        return tuple(dict.fromkeys(names))
