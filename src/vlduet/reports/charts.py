"""Draw charts and a figure of linked boxes with matplotlib, and compute shades of heatmap cells.

This is the only module that imports matplotlib, and it does so inside a function, because the
import takes more than a second. The look of a chart is in ``charts.mplstyle``.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from vlduet.logs import logger

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]
Box = str | NDArray[np.uint8]
"""Content of a box: text with its line ends, or the pixels uint8[h, w, 3] of an image."""
FigureFormat = Literal["svg", "png"]
"""Format of a figure that is a file of its own."""

STYLE_FILE = Path(__file__).with_name("charts.mplstyle")

CSS_COLOURS = {
    "#4f46c8": "var(--a)",
    "#b4541a": "var(--b)",
    "#5c5f6a": "var(--soft)",
    "#e4e3dc": "var(--line)",
}
"""Colours of the style file and the CSS variables of the page that replace them."""

MAX_UNSMOOTHED_POINTS = 50
"""Number of points up to which a line is drawn without smoothing."""
SMOOTHING_WINDOWS = 25
"""Number of windows of the moving average that fit into a smoothed line."""

MIN_LINK_WEIGHT = 0.05
"""Weight below which a link is not drawn."""
BOX_WIDTH, BOX_HEIGHT, BOX_GAP = 1.4, 1.1, 0.15
"""Size of a box and the least distance to the next one, in inches."""
MARGIN, NOTE_HEIGHT = 0.3, 0.85
"""Height above the upper row, where its name is, and of the note below the lower one, in inches."""
PNG_DPI = 150
"""Resolution of a figure as PNG, in dots per inch."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart."""

    name: str
    points: tuple[Point, ...]
    """(x, y) pairs with rising x; pairs with NaN or an infinity are not drawn."""


@dataclass(frozen=True, slots=True)
class LineChart:
    """A chart with one or two lines over a common x axis."""

    title: str
    note: str
    """Sentence below the chart that says what is drawn."""
    series: tuple[Series, ...]
    x_label: str = "minutes"
    percent: bool = False
    """Whether y values are fractions, to be labelled in percent on an axis that starts at 0."""


@dataclass(frozen=True, slots=True)
class ScatterPoint:
    """One labelled point of a scatter chart."""

    name: str
    x: float
    y: float
    is_hollow: bool = False
    """Draw only the outline, for what another run measured."""


@dataclass(frozen=True, slots=True)
class ScatterChart:
    """A chart of labelled points. Its x values are fractions, labelled in percent."""

    title: str
    note: str
    """Sentence below the chart that says what is drawn."""
    points: tuple[ScatterPoint, ...]
    """At least one, with finite coordinates."""
    x_label: str
    y_label: str


@dataclass(frozen=True, slots=True)
class LinkFigure:
    """Two rows of boxes and the weights of the links between them."""

    names: tuple[str, str]
    """Names of the upper and the lower row."""
    upper: tuple[Box, ...]
    """The M > 0 boxes of the upper row."""
    lower: tuple[Box, ...]
    """The N > 0 boxes of the lower row."""
    weights: ArrayLike
    """float[M, N], weight of the link from 0 to 1."""
    note: str
    """Text below the rows."""


def draw_links(figure: LinkFigure, kind: FigureFormat) -> bytes:
    """Return a figure as an SVG or PNG file: boxes, and dashed links as dark as their weights.

    Both rows are equally wide, so that the boxes of the shorter one are further apart. Links
    lighter than `MIN_LINK_WEIGHT` are left out. Equal figures give equal files, and matplotlib's
    global settings are left as they were. In an SVG, texts remain texts, which the viewer shows by
    its own fonts. A PNG needs fonts of this computer: characters that none has become frames, and
    are named in a warning.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    num_columns = max(len(figure.upper), len(figure.lower))
    width = max(num_columns * (BOX_WIDTH + BOX_GAP) + BOX_GAP, 4.8)
    links_height = min(0.9 + 0.1 * num_columns, 2.4)
    lower_y = MARGIN + NOTE_HEIGHT
    upper_y = lower_y + BOX_HEIGHT + links_height
    height = upper_y + BOX_HEIGHT + MARGIN
    texts = [*figure.names, figure.note]
    texts += [box for box in (*figure.upper, *figure.lower) if isinstance(box, str)]
    families = _find_font_families("".join(texts)) if kind == "png" else ["sans-serif"]
    style = {"font.family": families, "text.parse_math": False, "font.size": 7}
    with matplotlib.style.context([STYLE_FILE, style]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing glyphs, which `_find_font_families` reports
        drawing = Figure(figsize=(width, height), facecolor="white")
        axes = drawing.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))  # in inches
        axes.set_axis_off()
        upper_x = _draw_boxes(axes, figure.upper, upper_y)
        lower_x = _draw_boxes(axes, figure.lower, lower_y)
        axes.text(BOX_GAP, upper_y + BOX_HEIGHT + 0.1, figure.names[0], weight="bold")
        axes.text(BOX_GAP, lower_y - 0.1, figure.names[1], weight="bold", va="top")
        _draw_links(axes, figure.weights, (upper_x, lower_x), (upper_y, lower_y + BOX_HEIGHT))
        _draw_note(axes, figure.note)
        if kind == "svg":
            return _save_svg(drawing).encode()
        file = io.BytesIO()
        drawing.savefig(file, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return file.getvalue()


def _draw_boxes(axes: Axes, boxes: Sequence[Box], y: float) -> list[float]:
    """Draw boxes from the lower edge `y` on, over the width of the axes; return their centers."""
    from matplotlib.patches import FancyBboxPatch

    step = axes.get_xlim()[1] / len(boxes)
    centers = [step * (i + 0.5) for i in range(len(boxes))]
    for center, box in zip(centers, boxes, strict=True):
        colour, edge = ("#e8eefc", "#b3c2ee") if isinstance(box, str) else ("#fdebf2", "#eebbd0")
        left = center - BOX_WIDTH / 2
        style = "round,pad=0,rounding_size=0.06"
        patch = FancyBboxPatch((left, y), BOX_WIDTH, BOX_HEIGHT, boxstyle=style)
        patch.set(facecolor=colour, edgecolor=edge, linewidth=0.8, zorder=2)
        axes.add_patch(patch)
        middle = y + BOX_HEIGHT / 2
        if isinstance(box, str):
            text = axes.text(left + 0.07, middle, box, va="center", linespacing=1.25, zorder=3)
            text.set_clip_path(patch)  # a viewer's font may be wider
            continue
        scale = min((BOX_WIDTH - 0.12) / box.shape[1], (BOX_HEIGHT - 0.12) / box.shape[0])
        x, z = box.shape[1] * scale / 2, box.shape[0] * scale / 2
        extent = (center - x, center + x, middle - z, middle + z)
        axes.imshow(box, extent=extent, aspect="auto", zorder=3, interpolation="antialiased")
    axes.set(xlim=(0, step * len(boxes)), ylim=axes.get_ylim())
    return centers


def _draw_links(
    axes: Axes, weights: ArrayLike, centers: tuple[Sequence[float], Sequence[float]], y: Point
) -> None:
    """Draw a dashed line for every weight float[M, N] that is not too small, the darkest last.

    Args:
        axes: axes to draw on.
        weights: weight of each link, from 0 to 1.
        centers: x of the M upper and of the N lower ends.
        y: y of the upper and of the lower ends.
    """
    values = np.asarray(weights, dtype=np.float64).clip(0.0, 1.0)  # rounding may exceed 1
    rows, columns = np.nonzero(values >= MIN_LINK_WEIGHT)
    for k in np.argsort(values[rows, columns], kind="stable"):
        row, column = rows[k], columns[k]
        _draw_link(axes, (centers[0][row], centers[1][column]), y, values[row, column])


def _draw_link(axes: Axes, x: Point, y: Point, weight: float) -> None:
    """Draw one dashed line as wide and as dark as its weight."""
    axes.plot(
        x,
        y,
        color="#4f46c8",
        linestyle=(0, (4, 2.5)),
        dash_capstyle="butt",
        linewidth=0.5 + 2 * weight,
        alpha=0.1 + 0.9 * weight,
        zorder=1,
    )


def _draw_note(axes: Axes, note: str) -> None:
    """Draw a note at the lower edge, and above it which weights the links stand for."""
    y = MARGIN + NOTE_HEIGHT - 0.48
    axes.text(BOX_GAP, y, "probability that the alignment passes", va="center", color="#5c5f6a")
    for i, weight in enumerate((0.1, 0.5, 1.0)):
        x = BOX_GAP + 2.1 + 0.85 * i
        _draw_link(axes, (x, x + 0.4), (y, y), weight)
        axes.text(x + 0.46, y, f"{weight:g}", va="center", color="#5c5f6a")
    axes.text(BOX_GAP, y - 0.15, note, va="top", color="#5c5f6a", linespacing=1.4)


def _find_font_families(text: str) -> list[str]:
    """Return the families of installed fonts that have the characters of a text.

    The first one is matplotlib's own. Those that have most of what is still missing follow; a
    warning names characters that no font has.
    """
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    families = ["DejaVu Sans"]
    missing = {ord(character) for character in text if character.isprintable()}
    missing -= get_font(findfont(FontProperties(family=families))).get_charmap().keys()
    if not missing:
        return families
    covered: dict[str, set[int]] = {}
    for entry in fontManager.ttflist:
        if entry.style == "normal" and not entry.name.startswith("Last Resort"):
            characters = missing & get_font(entry.fname).get_charmap().keys()
            covered[entry.name] = covered.get(entry.name, characters) & characters
    while missing and covered:
        best = min(covered, key=lambda name: (-len(covered[name] & missing), name))
        if not covered[best] & missing:
            break
        families.append(best)
        missing -= covered[best]
    if missing:
        sample = "".join(map(chr, sorted(missing)[:10]))
        logger.warning(
            f"no font of this computer has {len(missing)} of the characters, such as {sample}: "
            "install one, or write an SVG"
        )
    return families


def scatter_chart(chart: ScatterChart) -> Markup:
    """Return a chart of points as an ``<svg>`` element; lower y values are further up.

    The ``aria-label`` gives the title and both values of every point. All texts are escaped. Equal
    charts give equal text, and matplotlib's global settings are left as they were.
    """
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    with matplotlib.style.context(STYLE_FILE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for point in chart.points:
            # A marker would be a reference by id, and ids repeat among charts of a page.
            mark = "○" if point.is_hollow else "●"
            weight = "normal" if point.is_hollow else "bold"
            colour = "#5c5f6a" if point.is_hollow else "#4f46c8"
            axes.text(point.x, point.y, mark, ha="center", va="center", color="#4f46c8")
            axes.annotate(
                point.name,
                (point.x, point.y),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                weight=weight,
                color=colour,
            )
        # Texts do not widen the limits of the axes.
        axes.update_datalim([(point.x, point.y) for point in chart.points])
        axes.autoscale_view()
        axes.margins(x=0.25, y=0.2)
        axes.invert_yaxis()
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel(chart.y_label)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %", decimals=0))
        for grid_line in axes.get_ygridlines():
            grid_line.set_clip_on(False)
        svg = _save_svg(figure)
    values = [
        f"{point.name} {format_value(point.x, percent=True)} and {format_value(point.y)}"
        for point in chart.points
    ]
    return _as_inline_svg(svg, description=f"{chart.title}: {'; '.join(values)}")


def line_chart(chart: LineChart) -> Markup:
    """Return a chart as an ``<svg>`` element, or as a ``<p>`` that says that nothing was measured.

    The first line has the colour ``--a`` of the page and the second one ``--b``; each ends in its
    last value. A line of more than `MAX_UNSMOOTHED_POINTS` points is drawn as a moving average.
    The ``aria-label`` gives the title and the first and last value of every line; the title is
    nowhere else, and the note is left out. All texts are escaped. Equal charts give equal text.
    """
    lines = {series.name: _smooth_line(series) for series in chart.series}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return Markup("<p class='note'>{}: nothing was measured.</p>").format(chart.title)

    def label(value: float) -> str:
        return format_value(value, percent=chart.percent)

    ranges = [
        f"{name} from {label(points[0][1])} to {label(points[-1][1])}"
        for name, points in lines.items()
    ]
    svg = _plot(chart, lines)
    return _as_inline_svg(svg, description=f"{chart.title}: {'; '.join(ranges)}")


def _plot(chart: LineChart, lines: dict[str, list[Point]]) -> str:
    """Return the SVG document that matplotlib writes: lines with their last values, and the axes.

    Title and note are not drawn. matplotlib's global settings are left as they were.

    Args:
        lines: name -> points to draw, all finite and at least one each; without lines ValueError
            is raised. They replace those of ``chart.series``.
    """
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    with matplotlib.style.context(STYLE_FILE):
        figure = Figure(layout="constrained")
        axes = figure.subplots()
        lowest = min(lines, key=lambda name: lines[name][-1][1])
        for name, points in lines.items():
            x, y = zip(*points, strict=True)
            # Clipping and markers need references by id, and ids repeat among charts of a page.
            (line,) = axes.plot(x, y, clip_on=False)
            axes.annotate(
                format_value(y[-1], percent=chart.percent),
                (x[-1], y[-1]),
                xytext=(5, 0),
                textcoords="offset points",
                va="top" if name == lowest else "bottom",  # so that labels do not overlap
                weight="bold",
                color=line.get_color(),
            )
        axes.set_xlabel(chart.x_label)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _widen_flat_range(axes, [y for points in lines.values() for _, y in points])
        if chart.percent:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        for grid_line in axes.get_ygridlines():
            grid_line.set_clip_on(False)
        return _save_svg(figure)


def _save_svg(figure: Figure) -> str:
    """Return a figure as an SVG document without metadata, so that equal charts are equal."""
    svg = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(svg, format="svg", metadata=no_metadata)
    return svg.getvalue()


def _widen_flat_range(axes: Axes, values: Sequence[float]) -> None:
    """Set the y limits in place where the values span less than a thousandth of their size.

    The size is the largest absolute value, or 1 where all are (almost) 0; half of it is added below
    and above. Ticks would otherwise differ in digits that no label shows.
    """
    low = min(values)
    high = max(values)
    size = max(abs(low), abs(high))
    if size <= 1e-6:
        size = 1.0
    if high - low < 1e-3 * size:
        axes.set_ylim(low - size / 2, high + size / 2)


def _as_inline_svg(document: str, *, description: str) -> Markup:
    """Return the ``<svg>`` element of a matplotlib document, ready to stand in an HTML page.

    Its tag gets the class ``chart`` and the escaped description as ``aria-label``, and keeps only
    the view box. `CSS_COLOURS` become variables of the page. Removed are: everything before the
    element, its style sheet (it would apply to the whole page), ids (they repeat among the charts
    of a page) and font families (the page has its own).
    """
    body = document[document.index("<svg") :]
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="[^"]*"', "", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    for colour, variable in CSS_COLOURS.items():
        body = body.replace(colour, variable)
    box = re.search(r'viewBox="[^"]*"', document)
    assert box is not None, "matplotlib gives every figure a view box"
    head = f'<svg class="chart" {box.group()} role="img" aria-label="{escape(description)}">'
    return Markup(head + body)


def _smooth_line(series: Series) -> list[Point]:
    """Return the finite points of a series, as a moving average where there are many of them."""
    points = [p for p in series.points if math.isfinite(p[0]) and math.isfinite(p[1])]
    if len(points) <= MAX_UNSMOOTHED_POINTS:
        return points
    return moving_average(points, len(points) // SMOOTHING_WINDOWS)


def moving_average(points: Sequence[Point], width: int) -> list[Point]:
    """Return points with the same x, and as y the mean over a window around the point.

    The window has the point and ``width // 2`` neighbours on each side, fewer at both ends.
    """
    half = width // 2
    averages = []
    for i, (x, _) in enumerate(points):
        window = points[max(0, i - half) : i + half + 1]
        averages.append((x, sum(y for _, y in window) / len(window)))
    return averages


def format_value(value: float, *, percent: bool = False) -> str:
    """Return a number as a chart prints it: 0.713 as ``71 %`` or ``0.71``, and 12.3 as ``12``."""
    if percent:
        return f"{100 * value:.0f} %"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def percent_of(value: float, scale: float) -> str:
    """Return a value as percent of a scale, clipped to 0 and 100: 0.5 of 2 as ``25.00``.

    NaN gives ``0.00``.
    """
    share = value / scale if math.isfinite(value) else 0.0
    return f"{100 * min(max(share, 0.0), 1.0):.2f}"


def finite_range(values: ArrayLike) -> tuple[float, float]:
    """Return the lowest and the highest finite value, or (0, 0) where none is finite."""
    cells = np.asarray(values, dtype=np.float64)
    cells = cells[np.isfinite(cells)]
    return (float(cells.min()), float(cells.max())) if cells.size else (0.0, 0.0)


def cell_opacities(values: ArrayLike) -> NDArray[np.float64]:
    """Return the opacity of every cell of a heatmap, float[R, C] from 0.04 to 1; it may be empty.

    The lowest finite value gives 0.04 and the highest 1; values that are not finite give 0.04, and
    so do all values where they are equal. The scale is not linear (power 1.5), so that high values
    stand out.
    """
    cells = np.asarray(values, dtype=np.float64)
    low, high = finite_range(cells)
    shades = np.where(np.isfinite(cells), cells - low, 0.0) / ((high - low) or 1.0)
    opacities: NDArray[np.float64] = 0.04 + 0.96 * shades**1.5
    return opacities


def relative_to_row_maximum(values: ArrayLike) -> NDArray[np.float64]:
    """Return float[R, C] values divided by the largest value of their row, which must not be 0."""
    cells = np.asarray(values, dtype=np.float64)
    shares: NDArray[np.float64] = cells / cells.max(1, keepdims=True)
    return shares


def weight_opacities(weights: ArrayLike) -> NDArray[np.float64]:
    """Return the opacity of every attention weight, float[h, w] from 0 to 0.6.

    The largest weight gives 0.6. Weights that are 0, negative or not finite give 0.
    """
    cells = np.asarray(weights, dtype=np.float64)
    cells = np.where(np.isfinite(cells), cells, 0.0).clip(min=0.0)
    opacities: NDArray[np.float64] = 0.6 * cells / (cells.max() or 1.0)
    return opacities
