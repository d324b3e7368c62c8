"""Write HTML pages: one file each, without script, that loads nothing from anywhere.

Templates are in ``templates/``; ``page.html`` is the frame with its content security policy. Every
text is escaped (captions, generated text and file names may contain anything), and images are
embedded as ``data:`` URLs that are encoded here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from vlduet.data.images import encode_thumbnail_data_url, from_pixels, load_image
from vlduet.data.records import ImageRef, Part, iter_labelled_parts
from vlduet.errors import ImageError
from vlduet.eval.metrics import HIT_CUTOFFS
from vlduet.files import write_text_atomically
from vlduet.locks import lock_output
from vlduet.reports import charts
from vlduet.reports.charts import LineChart, Series

if TYPE_CHECKING:
    from vlduet.inspect.alignment import Alignment
    from vlduet.inspect.internals import ModelAnalysis
    from vlduet.inspect.tokens import RecordInspection

TEMPLATES = Path(__file__).parent / "templates"

CURVE_POINTS = 40
"""Number of points of a curve of explained variance or entropy."""


def write_page(path: Path, template: str, content: Mapping[str, Any]) -> None:
    """Render a template of ``templates/`` and write it.

    An older file is replaced only once the new one is complete; missing folders are created.

    Args:
        template: file name of the template.
        content: its variables; a variable that the template lacks raises jinja2.UndefinedError.

    Raises:
        LockError: another process is writing this file.
    """
    text = _environment().get_template(template).render(content)
    with lock_output(path):
        write_text_atomically(path, text)


def _environment() -> jinja2.Environment:
    """Return a new environment for ``templates/``, with the filters and functions they use.

    It escapes every text, raises jinja2.UndefinedError for an unknown variable, and remembers
    thumbnails, so that one environment per page keeps no memory.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "percent": lambda fraction: f"{100 * fraction:.1f}",
        "signed": lambda value: f"{value:+.2f}".replace("-", "−"),
        "points": lambda fraction: f"{100 * fraction:+.1f}".replace("-", "−"),
        "interval": lambda v: f"{v['mean']:.2f} ({v['low']:.2f} to {v['high']:.2f})",
        "duration": format_duration,
        "percent_of": charts.percent_of,
        "thumbnail": cache(encode_thumbnail),
        "pixels_url": lambda pixels, side: encode_thumbnail_data_url(from_pixels(pixels), side),
    }
    environment.filters.update(filters)
    environment.tests["image"] = lambda part: isinstance(part, ImageRef)
    environment.globals |= {
        "hit_cutoffs": HIT_CUTOFFS,
        "line_chart": charts.line_chart,
        "scatter_chart": charts.scatter_chart,
        "cell_opacities": charts.cell_opacities,
        "weight_opacities": charts.weight_opacities,
        "finite_range": charts.finite_range,
        "relative_to_row_maximum": charts.relative_to_row_maximum,
    }
    return environment


def encode_thumbnail(image: ImageRef, side: int) -> str:
    """Return an image of at most `side` x `side` pixels as a ``data:`` URL.

    Raises:
        ImageError: the image cannot be read.
    """
    return encode_thumbnail_data_url(load_image(image), side)


def format_duration(seconds: float) -> str:
    """Return a duration in words: 75 as ``1 min 15 s``, less than half a second as ``< 1 s``."""
    minutes, seconds = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds} s" if seconds else "< 1 s"
    return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"


# ------------------------------------------------------------------ pages of single commands


def write_record_page(path: Path, inspection: RecordInspection) -> None:
    """Write the page of one record: its parts, its metadata and the sequences of a model, if any.

    An image that cannot be read is replaced by its error message. An older file is replaced, and
    missing folders are created.
    """
    record = inspection.record
    parts = [(label, part, *_read_size(part)) for label, part in iter_labelled_parts(record)]
    parts += [(key, str(value), "", "") for key, value in record.metadata.items()]
    content = {"record": record, "parts": parts, "sequences": inspection.sequences}
    write_page(path, "record.html", content)


def _read_size(part: Part) -> tuple[str, str]:
    """Return (size of an image as ``W x H``, "") or ("", why it cannot be read).

    A text gives two empty strings. Raises nothing for a missing or broken image.
    """
    if isinstance(part, str):
        return "", ""
    try:
        image = load_image(part)
    except ImageError as error:
        return "", str(error)
    return f"{image.width} x {image.height}", ""


def write_alignment_page(path: Path, alignment: Alignment) -> None:
    """Write the page of two aligned records: cosines as shades, the alignment path as outlines."""
    write_page(path, "align.html", {"alignment": alignment})


def write_analysis_page(
    path: Path,
    analyses: Sequence[ModelAnalysis],
    *,
    summaries: Sequence[Mapping[str, Any]],
    source: Path,
    command: str,
) -> None:
    """Write the page of one analysed model, or of two in the order before, after.

    Args:
        summaries: numbers of each model, as `vlduet.inspect.internals.summarize` returns them.
        source: the analysed file.
        command: the command line that made the numbers.
    """
    content = {
        "analyses": analyses,
        "summaries": summaries,
        "charts": list(_analysis_charts(analyses, summaries)),
        "source": source,
        "command": command,
    }
    write_page(path, "analysis.html", content)


def _analysis_charts(
    analyses: Sequence[ModelAnalysis], summaries: Sequence[Mapping[str, Any]]
) -> Iterable[LineChart]:
    """Yield the charts of explained variance and entropy of images, then of texts.

    Each has a line per model that measured this kind; a kind that none measured has no charts.
    """
    for kind in ("images", "texts"):
        curves = [(s["name"], s[kind]["explained_variance"]) for s in summaries if s[kind]]
        if not curves:
            continue
        yield LineChart(
            f"Explained variance, {kind}",
            "Share of the first components. A lower curve is spread over more of them.",
            tuple(Series(name, _thin_curve(curve)) for name, curve in curves),
            x_label="components",
            percent=True,
        )
        readings = [(a.name, a.readings[kind]) for a in analyses if kind in a.readings]
        yield LineChart(
            f"Next-token entropy, {kind}",
            "Nats at the reading token, items in rising order.",
            tuple(Series(name, _quantiles(reading.entropy)) for name, reading in readings),
            x_label="percentile of items",
        )


def _thin_curve(curve: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Return at most `CURVE_POINTS` points (k, value of the first k components), evenly spaced."""
    ks = np.unique(np.linspace(1, len(curve), CURVE_POINTS).round().astype(int))
    return tuple((float(k), float(curve[k - 1])) for k in ks)


def _quantiles(values: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Return (percentile, value) points of a distribution."""
    percentiles = np.linspace(0, 100, CURVE_POINTS)
    quantiles = np.percentile(values, percentiles)
    return tuple(zip(percentiles.tolist(), quantiles.tolist(), strict=True))
