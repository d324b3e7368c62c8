"""Small charts as inline SVG: lines, a bar with its interval, a heatmap. No library, no script.

Colours are CSS variables of the page that shows them (`--ink`, `--faint`, `--line`, `--a`, `--b`), so one chart serves
light and dark. Every chart has a label for screen readers. All text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

Point = tuple[float, float]

WIDTH, HEIGHT = 360, 214
LEFT, RIGHT, TOP, BOTTOM = 40, 14, 12, 34
CELL, PICTURE, MARGIN = 22, 22, 184
CAPTION_CHARS = 28
LETTER = 6
"""Width of a letter of a label, about."""
MAX_POINTS = 300


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart."""

    name: str
    points: tuple[Point, ...]
    """(x, y) with rising x; points that are not finite are left out."""


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, percent: bool = False
) -> Markup:
    """Lines over a common x axis, the first in `--a`, the second in `--b`, each ending in its last value.

    Args:
        series: at most two; a chart without a finite point says so.
        title: for screen readers; the page shows its own heading.
        x_label: under the axis.
        percent: y are fractions, shown as percentages on an axis from 0.
    """
    lines = [
        [p for p in one.points if math.isfinite(p[0]) and math.isfinite(p[1])] for one in series
    ]
    every = [p for line in lines for p in line]
    if not every:
        return Markup(f'<p class="note">{escape(title)}: nothing was measured.</p>')
    x_ticks = ticks(min(p[0] for p in every), max(p[0] for p in every), 4)
    y_low = min(0.0 if percent else math.inf, *(p[1] for p in every))
    y_ticks = ticks(y_low, max(p[1] for p in every), 4)
    x0, x1 = min(p[0] for p in every), max(p[0] for p in every)
    y0, y1 = y_ticks[0], y_ticks[-1]

    def at(point: Point) -> Point:
        across = (point[0] - x0) / ((x1 - x0) or 1.0)
        up = (point[1] - y0) / ((y1 - y0) or 1.0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (
            HEIGHT - TOP - BOTTOM
        )

    parts = [_grid(x_ticks, y_ticks, at=at, percent=percent)]
    parts.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>'
    )
    labels: list[float] = []
    for one, line, colour in zip(series, lines, ("--a", "--b"), strict=False):
        if line:
            parts.append(
                _line(
                    one,
                    [at(p) for p in thinned(line)],
                    colour=colour,
                    last=number(line[-1][1], percent=percent),
                    taken=labels,
                )
            )
    told = "; ".join(
        f"{s.name} from {number(q[0][1], percent=percent)} to {number(q[-1][1], percent=percent)}"
        for s, q in zip(series, lines, strict=True)
        if q
    )
    return _svg(WIDTH, HEIGHT, "".join(parts), label=f"{title}: {told}", name="chart")


def _grid(x_ticks: Sequence[float], y_ticks: Sequence[float], *, at: object, percent: bool) -> str:
    assert callable(at)
    parts = []
    step = y_ticks[1] - y_ticks[0]
    for y in y_ticks:
        height = at((x_ticks[0], y))[1]
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
        )
        text = _tick(y, step, percent=percent)
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{height + 3.5:.1f}" text-anchor="end">{text}</text>'
        )
    for x in x_ticks:
        across = at((x, y_ticks[0]))[0]
        if LEFT - 1 <= across <= WIDTH - RIGHT + 1:
            parts.append(
                f'<text class="tick" x="{across:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{x:g}</text>'
            )
    return "".join(parts)


def _line(
    series: Series, points: Sequence[Point], *, colour: str, last: str, taken: list[float]
) -> str:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    x, y = points[-1]
    # The value stands above its end, below where another one is already there.
    above = not any(abs(y - other) < 16 for other in taken)
    taken.append(y)
    height = max(y - 8, 11) if above else min(y + 16, HEIGHT - BOTTOM - 4)
    return (
        f'<g style="color:var({colour})"><title>{escape(series.name)}</title>'
        f'<path class="curve" d="{path}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
        f'<text class="last" x="{x:.1f}" y="{height:.1f}" text-anchor="end">{last}</text></g>'
    )


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MAX_POINTS` points, each the mean of a run of neighbours; fewer are kept as they are."""
    size = math.ceil(len(points) / MAX_POINTS)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(p[0] for p in run) / len(run), sum(p[1] for p in run) / len(run)) for run in runs]


def smoothed(points: Sequence[Point], width: int) -> tuple[Point, ...]:
    """Centred moving average of y over `width` points, narrower at the ends."""
    half = width // 2
    found = []
    for i, (x, _) in enumerate(points):
        near = points[max(0, i - half) : i + half + 1]
        found.append((x, sum(p[1] for p in near) / len(near)))
    return tuple(found)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that cover [low, high]."""
    size = max(abs(low), abs(high))
    size = size if size > 1e-6 else 1.0
    span = high - low if high - low > 1e-3 * size else size  # flat: a range of its own size
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def _tick(value: float, step: float, *, percent: bool) -> str:
    """With the digits that tell it from the ticks beside it."""
    if percent:
        value, step = 100 * value, 100 * step
    digits = next(n for n in range(12) if math.isclose(round(step, n), step, rel_tol=1e-6))
    return f"{value:.{digits}f}{' %' if percent else ''}"


def number(value: float, *, percent: bool = False) -> str:
    """0.713 -> 71 % or 0.71."""
    if percent:
        return f"{100 * value:.0f} %"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def bar(
    value: float, *, low: float, high: float, scale: float = 1.0, label: str, colour: str = "--a"
) -> Markup:
    """One horizontal bar from 0 to `value` with its interval as a whisker, on a track from 0 to `scale`."""

    def x(v: float) -> float:
        return 100 * min(max(v / scale, 0.0), 1.0) if math.isfinite(v) else 0.0

    parts = [
        '<rect class="track" width="100" height="8" rx="0"/>',
        f'<rect style="fill:var({colour})" width="{x(value):.2f}" height="8"/>',
    ]
    if high > low:
        parts.append(
            f'<rect class="whisker" x="{x(low):.2f}" y="3" width="{x(high) - x(low):.2f}" height="2"/>'
        )
    body = f'<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
    return Markup(f"{body}{''.join(parts)}</svg>")


def heatmap(
    values: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    marked: Sequence[Sequence[float]],
    title: str,
) -> Markup:
    """A matrix as shades of `--a`; marked cells are outlined.

    Args:
        values: float[R, C]; the shade runs from the lowest to the highest finite value.
        rows, columns: R and C labels, each a text, shortened to fit and told in full on hover, or an image as a data URL.
        marked: float[R, C], strength of the outline from 0 (none) to 1; bool will do.
        title: for screen readers.
    """
    finite = [v for row in values for v in row if math.isfinite(v)] or [0.0]
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    longest = max((len(label) for label in columns if not _is_image(label)), default=0)
    top = max(PICTURE, min(MARGIN, LETTER * longest)) + 8
    parts = [_column(label, MARGIN + c * CELL, bottom=top - 8) for c, label in enumerate(columns)]
    for r, (label, row) in enumerate(zip(rows, values, strict=True)):
        y = top + r * CELL
        parts.append(_row(label, y))
        name = "" if _is_image(label) else label
        for c, value in enumerate(row):
            shade = (value - low) / span if math.isfinite(value) else 0.0
            parts.append(
                f'<rect class="cell" x="{MARGIN + c * CELL + 1}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}"'
                f' fill-opacity="{0.04 + 0.96 * shade**1.5:.2f}"><title>{escape(name)} {value:.2f}</title></rect>'
            )
    # Outlines last, so that no neighbour covers them.
    parts += [
        f'<rect class="mark" x="{MARGIN + c * CELL + 1}" y="{top + r * CELL + 1}" width="{CELL - 2}" height="{CELL - 2}"'
        + ("/>" if on >= 1 else f' stroke-opacity="{on:.2f}"/>')
        for r, row in enumerate(marked)
        for c, on in enumerate(row)
        if on >= 0.01
    ]
    size = (MARGIN + len(columns) * CELL + 2, top + len(rows) * CELL + 2)
    label = f"{title}: {len(rows)} by {len(columns)}, cosine from {low:.2f} to {low + span:.2f}"
    return _svg(*size, "".join(parts), label=label, name="heatmap", grows=1.3)


def overlay(url: str, weights: Sequence[Sequence[float]], *, title: str) -> Markup:
    """A picture under a grid of shades of `--b`, the strongest for the largest weight.

    Args:
        url: the picture, as a data URL; the grid covers all of it.
        weights: float[h, w], 0 or more.
        title: for screen readers.
    """
    rows, columns = len(weights), len(weights[0])
    # Square cells: the picture has the proportions of its grid.
    width, height = CELL * columns, CELL * rows
    top = max((v for row in weights for v in row if math.isfinite(v)), default=0.0) or 1.0
    parts = [
        f'<image href="{escape(url)}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
    ]
    for r, row in enumerate(weights):
        for c, value in enumerate(row):
            shade = min(max(value / top, 0.0), 1.0) if math.isfinite(value) else 0.0
            parts.append(
                f'<rect x="{c * CELL}" y="{r * CELL}" width="{CELL}" height="{CELL}" fill-opacity="{0.6 * shade:.2f}"/>'
            )
    return _svg(width, height, "".join(parts), label=title, name="overlay")


def _is_image(label: str) -> bool:
    return label.startswith("data:")


def _image(url: str, *, x: int, y: int) -> str:
    return f'<image href="{escape(url)}" x="{x + 1}" y="{y + 1}" width="{PICTURE - 2}" height="{PICTURE - 2}"/>'


def _text(text: str, *, x: int, y: float, turn: str = "", anchor: str = "end") -> str:
    short = text if len(text) <= CAPTION_CHARS else text[: CAPTION_CHARS - 1].rstrip() + "…"
    return (
        f'<text class="row" x="{x}" y="{y:.0f}" text-anchor="{anchor}"{turn}>{escape(short)}'
        f"<title>{escape(text)}</title></text>"
    )


def _row(label: str, y: int) -> str:
    if _is_image(label):
        return _image(label, x=MARGIN - 8 - PICTURE, y=y)
    return _text(label, x=MARGIN - 8, y=y + CELL / 2 + 4)


def _column(label: str, x: int, *, bottom: int) -> str:
    """An image, or a text that reads upwards from `bottom`."""
    if _is_image(label):
        return _image(label, x=x, y=bottom - PICTURE)
    across = x + CELL // 2 + 4
    return _text(
        label,
        x=across,
        y=bottom,
        turn=f' transform="rotate(-90 {across} {bottom})"',
        anchor="start",
    )


def _svg(
    width: int, height: int, body: str, *, label: str, name: str, grows: float = 0.0
) -> Markup:
    """With `grows`, never smaller than its own size, and at most so many times as large; without, as CSS says."""
    bounds = f' style="min-width:{width}px;max-width:{grows * width:.0f}px"' if grows else ""
    return Markup(
        f'<svg class="{name}" viewBox="0 0 {width} {height}"{bounds} role="img" aria-label="{escape(label)}">{body}</svg>'
    )
