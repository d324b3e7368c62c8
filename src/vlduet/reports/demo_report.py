"""The report of ``vlduet demo``: one HTML file, and the numbers of ``summary.json``.

`Report` holds the results as the protocols return them; ``templates/report.html`` renders them
directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlduet.eval.benchmarks.scores import BenchmarkScore, paired_difference
from vlduet.eval.examples import AnsweredQuestion, Gallery, evenly_spaced_indices
from vlduet.eval.metrics import HIT_CUTOFFS, Interval, paired_bootstrap
from vlduet.eval.protocols import (
    CaptionCrossEntropy,
    CaptionResult,
    ComposedRetrievalResult,
    GeneratedCaption,
    RetrievalResult,
)
from vlduet.reports.charts import LineChart, Series
from vlduet.reports.pages import write_page

if TYPE_CHECKING:
    from vlduet.inspect.alignment import Alignment

SIMILARITY_SIZE = 24
"""Number of captions and of images in the heatmap of similarities."""


@dataclass(frozen=True, slots=True)
class ModelResults:
    """Measurements of one generating model on the held-out records."""

    retrieval: RetrievalResult
    composed: ComposedRetrievalResult
    cross_entropy: CaptionCrossEntropy
    captions: CaptionResult
    """Generated captions of some held-out records."""
    text_only_nats: float
    """Nats per token of answers to questions without an image."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the page of a demo run shows."""

    trained: ModelResults
    """Results of the model after training."""
    start: ModelResults
    """Results of the model that training began with."""
    untrained: RetrievalResult
    """Result of the same model with random weights where its parts meet."""
    ridge: RetrievalResult
    """Result of the ridge baseline."""
    galleries: tuple[Gallery, ...]
    answers: tuple[AnsweredQuestion, ...]
    alignments: Mapping[str, Alignment]
    """Title -> alignment of two documents."""
    rag: BenchmarkScore
    """Score of the `rag` protocol with the prefixes ``none/``, ``self/`` and ``other/``."""
    seed: int
    """Seed of training and of all bootstrap intervals."""
    command: str
    facts: Mapping[str, str]
    """Versions, machine, model fingerprint: name -> value, in the order shown."""
    seconds: Mapping[str, float]
    """Duration of every step in order; ``train`` is among them."""
    corpus_table: tuple[Mapping[str, str], ...]
    """One row per corpus; all rows have the same keys, which are the columns."""
    metrics: Sequence[Mapping[str, float]]
    """Rows of ``metrics.jsonl``."""
    next_commands: tuple[str, ...]

    @property
    def competitors(self) -> tuple[tuple[str, str, RetrievalResult], ...]:
        """(name, description, result) per row of the retrieval table, best expected first."""
        return (
            ("VLDuet", "generates and embeds", self.trained.retrieval),
            ("Ridge baseline", "frozen vision to MiniLM, cannot generate", self.ridge),
            ("Start", "nano as it is shipped, before this run", self.start.retrieval),
            ("Untrained", "its parts, never trained together", self.untrained),
        )

    @property
    def caption_pairs(self) -> list[tuple[GeneratedCaption, GeneratedCaption]]:
        """(caption at the start, caption after training) of every record that has both."""
        trained = {item.id: item for item in self.trained.captions.items}
        return [
            (item, trained[item.id]) for item in self.start.captions.items if item.id in trained
        ]

    @property
    def minutes(self) -> float:
        """Duration of the run without downloads, in minutes."""
        return sum(value for name, value in self.seconds.items() if name != "download") / 60

    @property
    def similarity_sample(self) -> RetrievalResult:
        """Result of the trained model on evenly spaced images and their first captions."""
        retrieval = self.trained.retrieval
        return retrieval.sample(evenly_spaced_indices(len(retrieval.records), SIMILARITY_SIZE))

    @property
    def composed_gain(self) -> Interval:
        """Rise of composed queries with both items among the first ten, paired over queries."""
        k = max(HIT_CUTOFFS)
        after = self.trained.composed.hit_values(k)["both"]
        before = self.start.composed.hit_values(k)["both"]
        return paired_bootstrap(after, before, seed=self.seed)

    def rag_gain(self, against: str) -> Interval:
        """Return accuracy with the model's own retrieval minus accuracy in another setting.

        Args:
            against: ``none`` (no retrieval) or ``other`` (the independent retriever).

        Returns:
            Difference of fractions, paired over questions.
        """
        samples = self.rag.samples
        gain = paired_difference(
            samples["self/accuracy"], samples[f"{against}/accuracy"], seed=self.seed
        )
        assert gain is not None, "all settings answer the same questions"
        return Interval(gain.mean / 100, gain.low / 100, gain.high / 100)


def training_charts(rows: Sequence[Mapping[str, float]]) -> tuple[LineChart, ...]:
    """Return three charts over minutes: training losses, validation hit@10 and cross entropy.

    Each has two lines, from the rows of metrics.jsonl that have the number and ``seconds``. A
    number that no row has gives a line without points.
    """

    def series(name: str, key: str) -> Series:
        """Return a number over minutes, from the rows that have it and the elapsed seconds."""
        points = [
            (row["seconds"] / 60, row[key]) for row in rows if key in row and "seconds" in row
        ]
        return Series(name, tuple(points))

    cross_entropy = "validation/caption_cross_entropy"
    return (
        LineChart(
            "Training losses",
            "The losses of the batches, as a moving average.",
            (series("language", "language"), series("contrastive", "contrastive")),
        ),
        LineChart(
            "Validation hit@10",
            "Share of queries with a relevant item among the first ten.",
            (
                series("text → image", "validation/text_to_image/hit@10"),
                series("image → text", "validation/image_to_text/hit@10"),
            ),
            percent=True,
        ),
        LineChart(
            "Validation caption cross entropy",
            "Nats per token. The distance of the lines is what the image tells the model.",
            (
                series("right image", cross_entropy),
                series("wrong image", f"{cross_entropy}_wrong_image"),
            ),
        ),
    )


def summarize_report(report: Report) -> dict[str, Any]:
    """Return the content of ``summary.json``; nothing is written.

    Returns:
        ``text_to_image``, ``image_to_text``: hit rates (fractions) of the trained model, keyed
            ``hit@1``, ``hit@5``, ``hit@10``.
        ``chance``, ``untrained``, ``start``, ``ridge_baseline``: hit rates as the mean of both
            directions.
        ``gallery``: number of held-out images.
        ``caption_cross_entropy``: nats per token ``before`` and ``after`` training, and after
            training with the ``wrong_image``.
        ``mixed``: share of composed queries whose first ten hits contain the item of the ``image``,
            that of the ``text``, or ``both``; ``start`` is ``both`` before training.
        ``self_rag``: share of right answers without retrieval (``none``), with the model's own
            (``self``) and with the dual encoder's (``other``), ``chance``, number of ``questions``.
        ``minutes``: duration without downloads.
    """
    retrieval = report.trained.retrieval
    start = report.start.cross_entropy
    trained = report.trained.cross_entropy
    k = max(HIT_CUTOFFS)
    composed = report.trained.composed.hit_intervals(k, report.seed)
    composed_start = report.start.composed.hit_intervals(k, report.seed)["both"]
    facts = report.rag.details
    accuracies = {
        name: report.rag.samples[f"{name}/accuracy"].mean / 100
        for name in ("none", "self", "other")
    }
    return {
        "text_to_image": retrieval.text_to_image.hit_rates(),
        "image_to_text": retrieval.image_to_text.hit_rates(),
        "chance": _mean_rates(
            retrieval.text_to_image.chance_hit_rates(), retrieval.image_to_text.chance_hit_rates()
        ),
        "untrained": _mean_hit_rates(report.untrained),
        "start": _mean_hit_rates(report.start.retrieval),
        "ridge_baseline": _mean_hit_rates(report.ridge),
        "gallery": len(retrieval.records),
        "caption_cross_entropy": {
            "before": start.nats_right_image(report.seed).mean,
            "after": trained.nats_right_image(report.seed).mean,
            "wrong_image": trained.nats_wrong_image(report.seed).mean,
        },
        "mixed": {
            **{name: interval.mean for name, interval in composed.items()},
            "start": composed_start.mean,
        },
        "self_rag": {
            **accuracies,
            "chance": facts["chance"] / 100,
            "questions": facts["items"],
        },
        "minutes": report.minutes,
    }


def _mean_hit_rates(result: RetrievalResult) -> dict[str, float]:
    """Return the mean hit rates of both directions, by cut-off."""
    return _mean_rates(result.text_to_image.hit_rates(), result.image_to_text.hit_rates())


def _mean_rates(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of two rates for every key."""
    return {key: (first[key] + second[key]) / 2 for key in first}


def write_report(path: Path, report: Report) -> None:
    """Write the page, replacing an older one only once the new one is complete."""
    charts = training_charts(report.metrics)
    write_page(path, "report.html", {"report": report, "charts": charts})
