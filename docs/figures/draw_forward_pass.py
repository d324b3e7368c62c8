"""Draw docs/figures/forward_pass.svg: one forward pass, two readings.

python docs/figures/draw_forward_pass.py [--check]

With --check nothing is written: the exit status is 1 if the file differs from what this draws.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

OUTPUT = Path(__file__).with_name("forward_pass.svg")

NEUTRAL = "#eef1f5"
GENERATIVE = "#dcebfb"
DISCRIMINATIVE = "#fde8d3"
MODEL = "#e4f3e5"
INK = "#1f2933"
FONT_SIZE = 11


def draw_box(
    axes: Axes, center: tuple[float, float], *, text: str, width: float, color: str
) -> None:
    """Draw a rounded box of height 0.8 with centred text, in the units of the axes."""
    x, y = center
    height = 0.8
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0.02,rounding_size=0.12",
            facecolor=color,
            edgecolor=INK,
            linewidth=1.0,
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=FONT_SIZE, color=INK)


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow between two points, in the units of the axes."""
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK, linewidth=1.2)
    )


def draw_label(axes: Axes, position: tuple[float, float], text: str) -> None:
    """Write small centred text beside an arrow."""
    axes.text(*position, text, ha="center", va="center", fontsize=FONT_SIZE - 1.5, color=INK)


def build_figure() -> Figure:
    """Return the figure: a record on the left, the two losses on the right."""
    figure = Figure(figsize=(11.6, 4.2), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 11.6)
    axes.set_ylim(0, 4.2)
    axes.axis("off")

    draw_box(axes, (0.95, 2.1), text="record", width=1.3, color=NEUTRAL)
    draw_box(axes, (3.05, 2.1), text="sequence:\nlabels, anchors", width=1.7, color=NEUTRAL)
    draw_box(axes, (3.05, 3.5), text="images", width=1.7, color=NEUTRAL)
    draw_box(axes, (5.3, 3.5), text="vision tower,\nprojector", width=1.8, color=MODEL)
    draw_box(axes, (5.3, 2.1), text="language model\n(one forward pass)", width=1.9, color=MODEL)
    draw_box(axes, (8.0, 3.0), text="LM head", width=1.5, color=GENERATIVE)
    draw_box(axes, (8.0, 1.2), text="pooling, head", width=1.5, color=DISCRIMINATIVE)
    draw_box(axes, (10.4, 3.0), text="generative loss\n$L_g$", width=1.7, color=GENERATIVE)
    draw_box(axes, (10.4, 1.2), text="discriminative loss\n$L_d$", width=1.9, color=DISCRIMINATIVE)

    draw_arrow(axes, (1.62, 2.1), (2.18, 2.1))
    draw_label(axes, (1.9, 2.42), "layout")
    draw_arrow(axes, (3.05, 2.52), (3.05, 3.08))
    draw_arrow(axes, (3.92, 3.5), (4.38, 3.5))
    draw_arrow(axes, (5.3, 3.08), (5.3, 2.52))
    draw_arrow(axes, (3.92, 2.1), (4.33, 2.1))
    draw_arrow(axes, (6.27, 2.2), (7.23, 2.9))
    draw_label(axes, (6.45, 2.85), "at labels")
    draw_arrow(axes, (6.27, 2.0), (7.23, 1.3))
    draw_label(axes, (6.42, 1.35), "at anchors")
    draw_arrow(axes, (8.77, 3.0), (9.53, 3.0))
    draw_label(axes, (9.14, 3.25), "nll")
    draw_arrow(axes, (8.77, 1.2), (9.43, 1.2))
    draw_label(axes, (9.1, 0.62), "embeddings")
    axes.text(
        10.4,
        2.1,
        r"$L = L_g + \alpha\,L_d$",
        ha="center",
        va="center",
        fontsize=FONT_SIZE + 2,
        color=INK,
    )
    return figure


def render_svg() -> str:
    """Return the figure as SVG text, the same bytes at every call."""
    settings = {"svg.hashsalt": "vlduet", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(settings):
        buffer = io.StringIO()
        FigureCanvasSVG(build_figure()).print_svg(buffer, metadata={"Date": None, "Creator": None})
    # Git removes no trailing white space, but many editors do.
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the figure, or compare it with the file."""
    parser = argparse.ArgumentParser(description="Draw the figure of the README.")
    parser.add_argument("--check", action="store_true", help="only compare with the file")
    options = parser.parse_args()
    text = render_svg()
    if not options.check:
        OUTPUT.write_text(text, encoding="utf-8")
    elif not OUTPUT.exists() or OUTPUT.read_text(encoding="utf-8") != text:
        sys.exit(f"{OUTPUT} differs from what this script draws: run it without --check")


if __name__ == "__main__":
    main()
