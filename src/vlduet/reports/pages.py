"""The demo's report: one HTML file that needs nothing else, and the numbers of ``summary.json``.

The dataclasses below are everything that the page shows; `write_report` fills ``templates/report.html`` with them. Texts
may come from anywhere (captions, generated text, file names): all of them are escaped. The page has no script, and its
content security policy allows images from ``data:`` URLs alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from vlduet.eval.metrics import HIT_CUTOFFS, Interval
from vlduet.files import write_text_atomically
from vlduet.reports import charts
from vlduet.reports.charts import Series

TEMPLATES = Path(__file__).parent / "templates"

Scores = Mapping[str, Interval]
"""``{"hit@1": Interval, "hit@5": ..., "hit@10": ...}``, fractions."""

_DATA_URL = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]*\Z")


@dataclass(frozen=True, slots=True)
class Row:
    """One competitor in the table of results."""

    name: str
    note: str
    """What it is, in a few words."""
    text_to_image: Scores
    image_to_text: Scores


@dataclass(frozen=True, slots=True)
class Gap:
    """How much better one thing is than another, paired over queries; fractions."""

    direction: str
    metric: str
    difference: Interval

    @property
    def verdict(self) -> str:
        """above, level or below: what the interval resolves."""
        if self.difference.low > 0:
            return "above"
        return "below" if self.difference.high < 0 else "level"


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """Nats a token of held-out captions."""

    before: Interval
    """The model before training, right image."""
    after: Interval
    """The trained model, right image."""
    wrong_image: Interval
    """The trained model, another item's image."""
    gap: Interval
    """wrong_image - after, paired."""


@dataclass(frozen=True, slots=True)
class Cost:
    """One thing that generation may have lost, before and after joint training."""

    name: str
    note: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Curve:
    """Something measured during training."""

    title: str
    note: str
    series: tuple[Series, ...]
    x_label: str = "minutes"
    percent: bool = False


@dataclass(frozen=True, slots=True)
class Captioned:
    """A held-out image with the captions generated for it. Images are data URLs here and below."""

    image: str
    reference: str
    before: str
    after: str
    known: bool
    """What stands after is a known text, not a written one."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One result of a search."""

    score: float
    right: bool
    text: str = ""
    image: str = ""


@dataclass(frozen=True, slots=True)
class Search:
    """A query with its first results; a query may be text, image or both."""

    hits: tuple[Hit, ...]
    text: str = ""
    image: str = ""
    first_hit: int | None = None
    """Rank of the first right result in the whole gallery, where there is a right one."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Searches of one kind."""

    title: str
    note: str
    searches: tuple[Search, ...]


@dataclass(frozen=True, slots=True)
class Mixed:
    """Searches with an image and words about something else at once; the image itself may be found."""

    queries: int
    found: Mapping[str, Interval]
    """Share of queries with the thing of the `image`, that of the `text`, or `both` among the first ten."""
    start: Interval
    """`both`, before training."""
    gap: Gap
    """`both` against the start."""


@dataclass(frozen=True, slots=True)
class Heat:
    """A piece of the similarity matrix: captions by images."""

    captions: tuple[str, ...]
    images: tuple[str, ...]
    similarity: tuple[tuple[float, ...], ...]
    relevant: tuple[tuple[bool, ...], ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, the answer and what it was drawn from."""

    question: str
    answer: str
    sources: tuple[Hit, ...]
    image: str = ""


@dataclass(frozen=True, slots=True)
class Alignment:
    """Two documents, slice by slice. A label is a sentence, or an image as a data URL."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    similarity: tuple[tuple[float, ...], ...]
    """Cosines float[R, C]."""
    path: tuple[tuple[float, ...], ...]
    """float[R, C]: where the alignment passes, 1 at the likeliest cell of a row."""
    gak: float
    awm: float
    mean: float
    sigma: float
    title: str = ""


@dataclass(frozen=True, slots=True)
class RetrievalAugmented:
    """Questions answered alone (`none`), with what the model finds (`self`), and with what another finds (`other`)."""

    questions: int
    solved: int
    """Solved questions that may be found, one for each answer."""
    chance: float
    accuracy: Mapping[str, Interval]
    found: Mapping[str, Interval]
    """Share of questions for which the first thing found has the right answer: `self` and `other`."""
    gaps: tuple[Gap, ...]


@dataclass(frozen=True, slots=True)
class Provenance:
    """What made the numbers."""

    command: str
    facts: Mapping[str, str]
    """Seed, versions, machine, model fingerprint: name -> value, in the order shown."""
    phases: Mapping[str, float]
    """Seconds by phase, in order."""
    data: tuple[Mapping[str, str], ...]
    """One row a corpus; all rows have the same keys, which are the columns."""
    notes: tuple[str, ...] = ()
    """How examples were chosen, what was dropped and why."""


@dataclass(frozen=True, slots=True)
class DemoReport:
    """Everything on the page."""

    model: Row
    ridge: Row
    start: Row
    untrained: Row
    chance: Row
    num_images: int
    num_captions: int
    """Distinct captions among the held-out items."""
    gaps: tuple[Gap, ...]
    cross_entropy: CrossEntropy
    costs: tuple[Cost, ...]
    cost_note: str
    curves: tuple[Curve, ...]
    captioned: tuple[Captioned, ...]
    galleries: tuple[Gallery, ...]
    mixed: Mixed
    heat: Heat
    asked: tuple[Asked, ...]
    alignments: tuple[Alignment, ...]
    augmented: RetrievalAugmented
    provenance: Provenance
    next_commands: tuple[str, ...]
    training_seconds: float
    minutes: float
    """Of the whole run, downloads aside."""
    title: str = "One model that speaks and searches"

    @property
    def rows(self) -> tuple[Row, ...]:
        """Competitors, best expected first."""
        return self.model, self.ridge, self.start, self.untrained, self.chance


def summary(report: DemoReport) -> dict[str, Any]:
    """The content of ``summary.json``.

    ``text_to_image`` and ``image_to_text`` are the trained model's; ``chance``, ``untrained`` (the bare parts), ``start``
    (what training began with) and ``ridge_baseline`` are the mean of both directions. All are fractions by ``hit@1``,
    ``hit@5`` and ``hit@10``. ``gallery`` is the number of held-out images; ``caption_cross_entropy`` is in nats a token,
    ``before`` of the model at the start. ``mixed`` is of queries that join an image with words about something else: the
    share that finds the one, the other and ``both`` among the first ten, and ``start``, both of them before training.
    ``self_rag`` has the share of right answers without retrieval, with the model's own (``self``) and with the dual
    encoder's (``other``), the number of questions, and chance.
    """

    def plain(scores: Scores) -> dict[str, float]:
        return {f"hit@{k}": scores[f"hit@{k}"].mean for k in HIT_CUTOFFS}

    def both(row: Row) -> dict[str, float]:
        one, other = plain(row.text_to_image), plain(row.image_to_text)
        return {key: (one[key] + other[key]) / 2 for key in one}

    entropy = report.cross_entropy
    return {
        "text_to_image": plain(report.model.text_to_image),
        "image_to_text": plain(report.model.image_to_text),
        "chance": both(report.chance),
        "untrained": both(report.untrained),
        "start": both(report.start),
        "ridge_baseline": both(report.ridge),
        "gallery": report.num_images,
        "caption_cross_entropy": {
            "before": entropy.before.mean,
            "after": entropy.after.mean,
            "wrong_image": entropy.wrong_image.mean,
        },
        "mixed": {
            **{what: interval.mean for what, interval in report.mixed.found.items()},
            "start": report.mixed.start.mean,
        },
        "self_rag": {
            **{who: interval.mean for who, interval in report.augmented.accuracy.items()},
            "chance": report.augmented.chance,
            "questions": report.augmented.questions,
        },
        "minutes": report.minutes,
    }


def write_report(path: Path, report: DemoReport) -> None:
    """Write the page, whole or not at all."""
    write_page(path, "report.html", {"report": report})


def write_page(path: Path, template: str, content: Mapping[str, Any]) -> None:
    """Fill a template of ours and write it, whole or not at all; every text in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "percent": lambda v: f"{100 * v:.1f}",
        "signed": lambda v: f"{v:+.2f}".replace("-", "−"),
        "points": lambda v: f"{100 * v:+.1f}".replace("-", "−"),
        "duration": duration,
        "picture": picture,
    }
    environment.filters.update(filters)
    environment.globals |= {
        "line_chart": line_chart,
        "score_bar": score_bar,
        "heatmap": heatmap,
        "ks": HIT_CUTOFFS,
    }
    environment.globals |= {
        "nats_bar": nats_bar,
        "overlay": overlay,
        "alignment_map": alignment_map,
    }
    write_text_atomically(path, environment.get_template(template).render(content))


def picture(url: str) -> str:
    """A data URL, checked: anything else would make the page reach out or run."""
    assert _DATA_URL.match(url), f"not an image as a data URL: {url[:40]!r}"
    return url


def duration(seconds: float) -> str:
    """75 -> 1 min 15 s"""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s" if rest else "< 1 s"
    return f"{minutes} min {rest} s" if rest else f"{minutes} min"


def line_chart(curve: Curve) -> Markup:
    """A curve's chart; with many points, the line is a moving average."""
    series = [
        Series(s.name, charts.smoothed(s.points, max(1, len(s.points) // 25)))
        if len(s.points) > 50
        else s
        for s in curve.series
    ]
    return charts.line_chart(
        series, title=curve.title, x_label=curve.x_label, percent=curve.percent
    )


def score_bar(score: Interval, *, label: str, colour: str) -> Markup:
    """A hit rate's bar."""
    told = f"{label}: {100 * score.mean:.1f} %, 95 % interval {100 * score.low:.1f} to {100 * score.high:.1f}"
    return charts.bar(score.mean, low=score.low, high=score.high, label=told, colour=colour)


def nats_bar(entropy: Interval, *, label: str, colour: str, scale: float) -> Markup:
    """A cross entropy's bar."""
    told = f"{label}: {entropy.mean:.2f} nats a token, 95 % interval {entropy.low:.2f} to {entropy.high:.2f}"
    return charts.bar(
        entropy.mean, low=entropy.low, high=entropy.high, scale=scale, label=told, colour=colour
    )


def heatmap(heat: Heat) -> Markup:
    """The similarity heatmap."""
    columns = [picture(url) for url in heat.images]
    return charts.heatmap(
        heat.similarity,
        rows=heat.captions,
        columns=columns,
        marked=heat.relevant,
        title="Similarity",
    )


def alignment_map(one: Alignment) -> Markup:
    """Similarities with the path that the alignment takes."""
    rows, columns = (
        [picture(x) if x.startswith("data:") else x for x in labels]
        for labels in (one.rows, one.columns)
    )
    return charts.heatmap(
        one.similarity, rows=rows, columns=columns, marked=one.path, title=one.title or "Alignment"
    )


def overlay(url: str, weights: Sequence[Sequence[float]], *, title: str) -> Markup:
    """A picture with what lies over it."""
    return charts.overlay(picture(url), weights, title=title)
