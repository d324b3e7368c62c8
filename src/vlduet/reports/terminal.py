"""Format results as text for a terminal; the command line prints it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlduet.eval.certify import CertificationOutcome
    from vlduet.eval.comparison import BenchmarkChange
    from vlduet.inspect.alignment import Alignment
    from vlduet.reports.demo_report import Change


def format_alignment(alignment: Alignment, *, width: int = 36) -> str:
    """Return lines of text: the numbered columns, the table of cosines, and the kernel and means.

    A star marks the likeliest cell of every row by the alignment posterior, or several if equal.

    Args:
        width: number of characters of a row label; longer ones are shortened.
    """
    title = f"{alignment.first} (rows) and {alignment.second} (columns), by {alignment.source}"
    numbers = range(1, len(alignment.columns) + 1)
    lines = [title, ""]
    lines += [f"{c:>4}  {label}" for c, label in zip(numbers, alignment.column_labels, strict=True)]
    lines += ["", " " * (width + 5) + "".join(f"{c:>7}" for c in numbers)]
    for r, label in enumerate(alignment.row_labels):
        short = label if len(label) <= width else label[: width - 1] + "…"
        posterior = alignment.posterior[r]
        line = f"{r + 1:>4} {short:<{width}}"
        for cosine, probability in zip(alignment.cosines[r], posterior, strict=True):
            line += f"{cosine:>6.2f}{'*' if probability == max(posterior) else ' '}"
        lines.append(line)
    lines += [
        "",
        f"alignment kernel {alignment.gak:.3f} (normalised, sigma {alignment.sigma:.2f})",
        f"alignment-weighted mean {alignment.awm:.3f}, mean {alignment.mean:.3f};"
        " * likeliest in its row",
    ]
    return "\n".join(lines)


def format_analysis(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines for every model: one per measured kind of content, one for its attention.

    A line of images or texts has their number, the mean entropy and the components for 90 % of the
    variance; that of attention has mean share and evenness. What is None gets no line.

    Args:
        summaries: numbers of each model, as `vlduet.inspect.internals.summarize` returns them.
    """
    lines = []
    for model in summaries:
        for kind in ("images", "texts"):
            if numbers := model[kind]:
                lines.append(
                    f"{model['name']}, {numbers['count']} {kind}:"
                    f" entropy {numbers['entropy']['mean']:.2f} nats,"
                    f" 90 % of the variance in {numbers['components']['0.9']} components"
                )
        if numbers := model["attention"]:
            lines.append(
                f"{model['name']}, attention to the image:"
                f" {numbers['share']['mean']:.2f} of all,"
                f" evenness {numbers['evenness']['mean']:.2f}"
            )
    return lines


def format_demo_changes(changes: Sequence[Change]) -> list[str]:
    """Return a title and a line per number of the demo: before, after, change, ridge and chance.

    Rates are in percent. The change and the difference to ridge have their paired 95 % intervals.
    """
    title = f"{'held-out records':38}{'before':>8}{'after':>8}   change (95 % interval)"
    lines = [title]
    for row in changes:
        scale, digits = (100, 1) if row.is_rate else (1, 2)

        def number(value: float, *, scale: int = scale, digits: int = digits) -> str:
            return f"{scale * value:+.{digits}f}"

        line = f"{row.name:38}{number(row.before.mean)[1:]:>8}{number(row.after.mean)[1:]:>8}"
        line += f"   {number(row.change.mean)} ({number(row.change.low)} to"
        line += f" {number(row.change.high)}) {row.verdict}"
        if row.ridge is not None and row.ridge_difference is not None:
            line += f"; against ridge ({number(row.ridge.mean)[1:]})"
            line += f" {number(row.ridge_difference.mean)}"
            line += f" ({number(row.ridge_difference.low)} to {number(row.ridge_difference.high)})"
        if row.chance is not None:
            line += f"; chance {number(row.chance)[1:]}"
        lines.append(line)
    return lines


def format_changes(changes: Sequence[BenchmarkChange]) -> list[str]:
    """Return one line per benchmark: number before -> after training, paired change and verdict.

    The change is ``MEAN (LOW to HIGH)`` with signs, or left out where the runs cannot be paired.
    """
    lines = []
    for row in changes:
        change = ""
        if row.change is not None:
            change = f"{row.change.mean:+6.1f} ({row.change.low:+.1f} to {row.change.high:+.1f})"
        lines.append(
            f"{row.benchmark:24} {row.number:16} {row.before.mean:8.1f} -> {row.after.mean:8.1f}"
            f" {change} {row.verdict}"
        )
    return lines


def format_certification(outcomes: Sequence[CertificationOutcome]) -> list[str]:
    """Return one line per target, and below it an indented line why it was left out, if it was.

    A line has model, benchmark, number, published value, our value (blank if left out) and verdict.
    """
    lines = []
    for outcome in outcomes:
        target = outcome.target
        value = "" if outcome.value is None else f"{outcome.value:.2f}"
        lines.append(
            f"{target.model:14} {target.benchmark:14} {target.value:13} {target.target:8.2f}"
            f" {value:>8} {outcome.verdict}"
        )
        if outcome.problem:
            lines.append(f"    {outcome.problem}")
    return lines
