"""The report of ``vlduet demo``: one HTML file, and the numbers of ``summary.json``.

`Report` holds the results as the protocols return them; ``templates/report.html`` renders them
directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlduet.eval.benchmarks.scores import BenchmarkScore, paired_difference
from vlduet.eval.examples import AnsweredQuestion, Gallery, evenly_spaced, evenly_spaced_indices
from vlduet.eval.metrics import HIT_CUTOFFS, Interval, paired_bootstrap
from vlduet.eval.protocols import (
    AnswerCrossEntropy,
    CaptionCrossEntropy,
    CaptionResult,
    ComposedRetrievalResult,
    GeneratedCaption,
    RetrievalResult,
)
from vlduet.reports.charts import LineChart, ScatterChart, ScatterPoint, Series
from vlduet.reports.pages import write_page

if TYPE_CHECKING:
    from vlduet.inspect.alignment import Alignment

NUM_CAPTION_EXAMPLES = 18
"""Number of held-out images whose captions the page shows, before and after training."""
SIMILARITY_SIZE = 24
"""Number of captions and of images in the heatmap of similarities."""


@dataclass(frozen=True, slots=True)
class ModelResults:
    """Measurements of one generating model on the held-out records."""

    retrieval: RetrievalResult
    composed: ComposedRetrievalResult
    cross_entropy: CaptionCrossEntropy
    captions: CaptionResult
    """Generated captions of all held-out records."""
    answers: AnswerCrossEntropy
    """Answers to questions without an image."""


@dataclass(frozen=True, slots=True)
class Change:
    """A number before and after training, as a row of the first table of the page."""

    name: str
    note: str
    before: Interval
    after: Interval
    change: Interval
    """after - before, paired over items."""
    is_rate: bool = True
    """The number is a fraction; otherwise nats per token."""
    lower_is_better: bool = False
    ridge: Interval | None = None
    """The same number of the ridge baseline; None where it has none."""
    ridge_difference: Interval | None = None
    """after - ridge, paired over items."""
    chance: float | None = None

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``level``: what the interval of the change resolves."""
        if self.change.verdict == "level":
            return "level"
        is_better = (self.change.mean > 0) != self.lower_is_better
        return "better" if is_better else "worse"


@dataclass(frozen=True, slots=True)
class TradeOffPoint:
    """A model between retrieval and captioning, for the chart of both."""

    name: str
    hit_rate: float
    """Mean hit@10 of both directions, a fraction."""
    nats: float
    """Nats per token of held-out captions after the right image."""
    nats_gap: float
    """Nats per token by which they cost more after a wrong image."""
    is_of_this_run: bool
    """False for a published point, which is drawn hollow."""


def make_trade_off_point(
    name: str, retrieval: RetrievalResult, cross_entropy: CaptionCrossEntropy
) -> TradeOffPoint:
    """Return the point of a model that this run has measured."""
    return TradeOffPoint(
        name,
        _mean_hit_rates(retrieval)[f"hit@{max(HIT_CUTOFFS)}"],
        cross_entropy.nats_right_image().mean,
        cross_entropy.nats_gap().mean,
        is_of_this_run=True,
    )


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the page of a demo run shows."""

    trained: ModelResults
    """Results of the model after training."""
    start: ModelResults
    """Results of the model that training began with."""
    single_losses: tuple[TradeOffPoint, ...]
    """Models trained with one of the losses: of this run, or published."""
    num_copied_captions: int
    """Number of generated captions that equal a caption of the training records."""
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
            ("Start", "the base model, before this run", self.start.retrieval),
        )

    @property
    def changes(self) -> tuple[Change, ...]:
        """Rows of the first table: retrieval, captions and plain answers before and after."""
        return (
            *self._retrieval_changes("text → image", "text_to_image"),
            *self._retrieval_changes("image → text", "image_to_text"),
            *self._caption_changes(),
            Change(
                "Plain answers, nats per token",
                "questions without an image, nothing like it in training",
                self.start.answers.nats(self.seed),
                self.trained.answers.nats(self.seed),
                self.trained.answers.nats_difference(self.start.answers, self.seed),
                is_rate=False,
                lower_is_better=True,
            ),
        )

    def _retrieval_changes(self, title: str, direction: str) -> Iterator[Change]:
        """Yield hit@10 and hit@1 of a direction, an attribute of `RetrievalResult`."""
        results = (self.start.retrieval, self.trained.retrieval, self.ridge)
        before, after, ridge = (getattr(result, direction) for result in results)
        for k in (max(HIT_CUTOFFS), min(HIT_CUTOFFS)):
            yield Change(
                f"{title}, hit@{k}",
                f"share of queries with a relevant item among the first {k}",
                before.hit_interval(k, self.seed),
                after.hit_interval(k, self.seed),
                after.hit_difference(before, k, seed=self.seed),
                ridge=ridge.hit_interval(k, self.seed),
                ridge_difference=after.hit_difference(ridge, k, seed=self.seed),
                chance=after.chance_hit_rates()[f"hit@{k}"],
            )

    def _caption_changes(self) -> Iterator[Change]:
        """Yield the numbers of captions: cross entropy, what a wrong image costs, and word F1."""
        seed = self.seed
        before = self.start.cross_entropy
        after = self.trained.cross_entropy
        differences = after.nats_differences(before, seed)
        yield Change(
            "Captions, nats per token",
            "held-out captions after their own image",
            before.nats_right_image(seed),
            after.nats_right_image(seed),
            differences["right image"],
            is_rate=False,
            lower_is_better=True,
        )
        yield Change(
            "Cost of a wrong image, nats per token",
            "the same captions after another item's image, minus the row above",
            before.nats_gap(seed),
            after.nats_gap(seed),
            differences["gap"],
            is_rate=False,
        )
        values = [[i.token_f1 for i in m.captions.items] for m in (self.trained, self.start)]
        yield Change(
            "Generated captions, word F1",
            "compared with the reference captions",
            self.start.captions.token_f1(seed),
            self.trained.captions.token_f1(seed),
            paired_bootstrap(values[0], values[1], seed=seed),
        )

    @property
    def caption_examples(self) -> list[tuple[GeneratedCaption, GeneratedCaption]]:
        """(caption at the start, caption after training) of evenly spaced records."""
        pairs = zip(self.start.captions.items, self.trained.captions.items, strict=True)
        return evenly_spaced(list(pairs), NUM_CAPTION_EXAMPLES)

    @property
    def trade_off(self) -> tuple[TradeOffPoint, ...]:
        """Points of the chart: the start, each loss alone, and both losses."""
        start, both = (
            make_trade_off_point(name, results.retrieval, results.cross_entropy)
            for name, results in (("start", self.start), ("all losses", self.trained))
        )
        return (start, *self.single_losses, both)

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


def draw_trade_off(points: Sequence[TradeOffPoint]) -> ScatterChart:
    """Return the chart of retrieval against captions with a point per model."""
    return ScatterChart(
        "Retrieval and captions of each training",
        "Up and to the right is better. In brackets: nats per token that captions cost more after "
        "a wrong image. Hollow points are published results of the same training with one of the "
        "losses (docs/results/demo.md).",
        tuple(
            ScatterPoint(
                f"{point.name} ({point.nats_gap:+.2f})",
                point.hit_rate,
                point.nats,
                is_hollow=not point.is_of_this_run,
            )
            for point in points
        ),
        x_label="retrieval: hit@10, mean of both directions",
        y_label="captions: nats per token",
    )


def summarize_report(report: Report) -> dict[str, Any]:
    """Return the content of ``summary.json``; nothing is written.

    Returns:
        ``changes``: row of the first table by its name, with ``before``, ``after`` and ``change``
            (``mean``, ``low``, ``high``), and for retrieval ``ridge``, ``ridge_difference`` and
            ``chance``. Rates are fractions; other numbers are nats per token.
        ``wrong_image_nats``: nats per token of captions after a wrong image, after training.
        ``trade_off``: ``hit@10``, ``nats`` and ``nats_gap`` (what a wrong image costs) of every
            point of the chart by its name, and whether it ``is_of_this_run``.
        ``gallery``: number of held-out images.
        ``captions``: number of ``distinct`` generated captions, and how many are ``copied``.
        ``mixed``: share of composed queries whose first ten hits contain the item of the ``image``,
            that of the ``text``, or ``both``; ``start`` is ``both`` before training.
        ``self_rag``: share of right answers without retrieval (``none``), with the model's own
            (``self``) and with the dual encoder's (``other``), ``chance``, number of ``questions``.
        ``minutes``: duration without downloads.
    """
    k = max(HIT_CUTOFFS)
    composed = report.trained.composed.hit_intervals(k, report.seed)
    composed_start = report.start.composed.hit_intervals(k, report.seed)["both"]
    facts = report.rag.details
    accuracies = {
        name: report.rag.samples[f"{name}/accuracy"].mean / 100
        for name in ("none", "self", "other")
    }
    wrong_image = report.trained.cross_entropy.nats_wrong_image(report.seed)
    return {
        "changes": {change.name: _summarize_change(change) for change in report.changes},
        "wrong_image_nats": asdict(wrong_image),
        "trade_off": {
            point.name: {
                f"hit@{k}": point.hit_rate,
                "nats": point.nats,
                "nats_gap": point.nats_gap,
                "is_of_this_run": point.is_of_this_run,
            }
            for point in report.trade_off
        },
        "gallery": len(report.trained.retrieval.records),
        "captions": {
            "distinct": report.trained.captions.num_distinct,
            "copied": report.num_copied_captions,
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


def _summarize_change(change: Change) -> dict[str, Any]:
    """Return the intervals and the chance level of a change; what it lacks is left out."""
    names = ("before", "after", "change", "ridge", "ridge_difference", "chance")
    row = asdict(change)
    return {name: row[name] for name in names if row[name] is not None}


def _mean_hit_rates(result: RetrievalResult) -> dict[str, float]:
    """Return the mean hit rates of both directions, by cut-off."""
    first = result.text_to_image.hit_rates()
    second = result.image_to_text.hit_rates()
    return {key: (first[key] + second[key]) / 2 for key in first}


def write_report(path: Path, report: Report) -> None:
    """Write the page, replacing an older one only once the new one is complete."""
    charts = training_charts(report.metrics)
    trade_off = draw_trade_off(report.trade_off)
    content = {"report": report, "charts": charts, "trade_off": trade_off}
    write_page(path, "report.html", content)
