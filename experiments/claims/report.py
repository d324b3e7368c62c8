"""Write docs/results/claims.md from the results of all rows: verdicts, tables and what is needed.

python experiments/claims/report.py
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis import (
    ClaimReport,
    ComparisonReport,
    SeedResults,
    analyse_claims,
    describe_needs,
    read_results,
    summarise_row,
)
from inference import ALPHA
from protocol import PROTOCOL_FILE, Comparison, Protocol, load_protocol
from verdicts import Verdict

from vlduet.files import write_text_atomically

RESULTS = Path(__file__).parents[2] / "docs" / "results"

INTRODUCTION_FILE = Path(__file__).parent / "introduction.md"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, and write the page."""
    parser = argparse.ArgumentParser(description="Write the page with the verdicts.")
    parser.add_argument("--protocol", type=Path, default=PROTOCOL_FILE)
    parser.add_argument("--results", type=Path, default=RESULTS / "claims")
    parser.add_argument("--to", type=Path, default=RESULTS / "claims.md")
    options = parser.parse_args(arguments)
    protocol = load_protocol(options.protocol)
    results = read_results(protocol, options.results)
    text = format_page(protocol, results, read_pilots(protocol, options.results))
    write_text_atomically(options.to, text)


def read_pilots(protocol: Protocol, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the content of ``pilot-TRACK.json`` of every track whose pilot was run."""
    pilots = {}
    for track in protocol.tracks:
        path = folder / f"pilot-{track}.json"
        if path.exists():
            pilots[track] = json.loads(path.read_text(encoding="utf-8"))
    return pilots


def format_page(protocol: Protocol, results: SeedResults, pilots: dict[str, dict[str, Any]]) -> str:
    """Return the page in Markdown."""
    reports = analyse_claims(protocol, results)
    introduction = INTRODUCTION_FILE.read_text(encoding="utf-8").format(
        min_seeds=protocol.min_seeds,
        last_before_all=len(protocol.seeds) - 1,
        num_seeds=len(protocol.seeds),
    )
    sections = [introduction, format_summary(protocol, reports)]
    sections += [format_claim(protocol, report, results) for report in reports]
    sections += [format_tracks(protocol, pilots), format_runs(protocol, results)]
    return "\n".join(sections)


def format_summary(protocol: Protocol, reports: Sequence[ClaimReport]) -> str:
    """Return the table of all claims with their verdicts."""
    lines = ["| | claim | verdict | comparisons: hold / do not / open |", "|---|---|---|---|"]
    for report in reports:
        counts = [count_verdicts(report, verdict) for verdict in Verdict]
        cells = f"{counts[0]} / {counts[1]} / {counts[2]}"
        verdict = format_verdict(protocol, report)
        claim = report.claim
        lines.append(
            f"| {claim.id} | [{claim.title}](#{claim.id}-{slug(claim.title)}) "
            f"| {verdict} | {cells} |"
        )
    return "\n".join(lines) + "\n"


def slug(title: str) -> str:
    """Return the anchor that Markdown readers give to a heading."""
    letters = [letter for letter in title.lower() if letter.isalnum() or letter in " -"]
    return "".join(letters).replace(" ", "-")


def count_verdicts(report: ClaimReport, verdict: Verdict) -> int:
    """Return the number of a claim's comparisons with a verdict; missing ones are undecided."""
    verdicts = [
        Verdict.UNDECIDED if item.decision is None else item.decision.verdict
        for item in report.comparisons
    ]
    return verdicts.count(verdict)


def format_verdict(protocol: Protocol, report: ClaimReport) -> str:
    """Return the verdict of a claim in italics, marked as preliminary while seeds are missing."""
    is_preliminary = report.verdict is not Verdict.UNDECIDED and bool(report.missing)
    return f"*{report.verdict}*" + (" (preliminary)" if is_preliminary else "")


def format_claim(protocol: Protocol, report: ClaimReport, results: SeedResults) -> str:
    """Return the section of one claim."""
    claim = report.claim
    lines = [
        f"## {claim.id} {claim.title}",
        "",
        f"**Verdict: {format_verdict(protocol, report)}.**",
        "",
        f"- Statement: {claim.statement}",
        f"- Paper: {claim.paper}",
        f"- Here: {claim.protocol}",
        "",
        format_rows(protocol, report, results),
        format_comparisons(report),
    ]
    needs = describe_needs(protocol, report)
    if needs:
        lines += ["What would be needed:", ""] + [f"- {need}" for need in needs] + [""]
    return "\n".join(lines)


def format_rows(protocol: Protocol, report: ClaimReport, results: SeedResults) -> str:
    """Return the table of the rows and numbers that a claim compares."""
    numbers: dict[str, None] = {}
    for comparison in report.claim.comparisons:
        numbers |= dict.fromkeys(number for _, _, number in comparison.signed_terms)
    numbers |= dict.fromkeys(report.claim.further_numbers)
    lines = [
        "| row | seeds | " + " | ".join(numbers) + " |",
        "|---|---|" + "---|" * len(numbers),
    ]
    for name in protocol.list_claim_rows(report.claim):
        seeds = list(results.get(name, {}).values())
        cells = [format_cell(summarise_row(seeds, number)) for number in numbers]
        num_planned = len(protocol.get_seeds(protocol.rows[name]))
        about = protocol.rows[name].about
        lines.append(f"| {name}: {about} | {len(seeds)}/{num_planned} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def format_cell(summary: Sequence[float]) -> str:
    """Return mean ± deviation with two digits; without a deviation the mean alone."""
    return " ± ".join(f"{value:.2f}" for value in summary)


def format_comparisons(report: ClaimReport) -> str:
    """Return the table of the comparisons of a claim."""
    lines = [
        "| comparison | difference | 95 % interval | corrected interval | margin | MDE | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for item in report.comparisons:
        name = f"{item.comparison.name}: {describe_terms(item.comparison)}"
        lines.append(f"| {name} | {' | '.join(list_cells(item))} |")
    return "\n".join(lines) + "\n"


def describe_terms(comparison: Comparison) -> str:
    """Return what is subtracted from what, such as ``joint - ridge``, in the claimed direction."""
    texts = []
    for index, (factor, row, number) in enumerate(comparison.signed_terms):
        sign = "-" if factor < 0 else ("+" if index else "")
        size = "" if abs(factor) == 1 else f"{abs(factor):g} x "
        name = f"{row} ({number})" if comparison.against_number else row
        texts.append(f"{sign} {size}{name}".strip())
    return " ".join(texts)


def list_cells(item: ComparisonReport) -> list[str]:
    """Return the cells of a comparison after its name."""
    margin = f"{item.comparison.margin:+g}"
    if item.measured is None or item.decision is None:
        return ["", "", "", margin, "", f"*{Verdict.UNDECIDED}*"]
    bounds = (item.measured.difference.interval(ALPHA), (item.decision.low, item.decision.high))
    intervals = [f"{low:+.2f} to {high:+.2f}" for low, high in bounds]
    mde = "" if item.measured.mde is None else f"{item.measured.mde:.2f}"
    mean = f"{item.measured.difference.mean:+.2f}"
    return [mean, *intervals, margin, mde, f"*{item.decision.verdict}*"]


def format_tracks(protocol: Protocol, pilots: dict[str, dict[str, Any]]) -> str:
    """Return the section of the tracks, with the steps that their pilots found to be enough."""
    lines = ["## Rows and their settings", ""]
    for name, track in protocol.tracks.items():
        lines += [f"**{name}** (preset `{track.preset}`, {track.steps} steps). {track.about}", ""]
        if name not in pilots:
            command = f"python experiments/claims/run.py --work runs/claims --pilot {name}"
            text = "The pilot, which says when the joint row stops improving, was not run"
            lines += [f"{text}: `{command}`.", ""]
            continue
        pilot = pilots[name]
        lines += [
            f"| steps of '{pilot['row']}' | hit@10 | captions, nats | minutes |",
            "|---|---|---|---|",
        ]
        for steps, seeds in pilot["lengths"].items():
            names = ("hit@10", "nats", "minutes")
            hits, nats, minutes = (average_seeds(seeds, key) for key in names)
            lines.append(f"| {steps} | {hits:.1f} | {nats:.2f} | {minutes:.1f} |")
        num_steps = pilot["steps"]
        text = f"{num_steps} steps are enough" if num_steps else "the longest run still improves"
        lines += ["", f"Validation split of stamps, seeds {pilot['seeds']}: {text}.", ""]
    return "\n".join(lines)


def average_seeds(seeds: Sequence[dict[str, float]], key: str) -> float:
    """Return the mean over seeds of one value."""
    return statistics.mean(seed[key] for seed in seeds)


def format_runs(protocol: Protocol, results: SeedResults) -> str:
    """Return the section of the runs: minutes, machines and commits."""
    lines = [
        "## Runs",
        "",
        "| row | seeds done | minutes of training | minutes of measuring | machine | commit |",
        "|---|---|---|---|---|---|",
    ]
    total = 0.0
    for name, seeds in results.items():
        facts = [result.facts for result in seeds.values()]
        if not facts:
            continue
        train = sum(fact["train_seconds"] for fact in facts) / 60
        measure = sum(fact["measure_seconds"] for fact in facts) / 60
        total += train + measure
        machines = sorted({f"{fact['machine']}, {fact['threads']} thread" for fact in facts})
        commits = sorted({fact["commit"] for fact in facts})
        done = f"{len(facts)}/{len(protocol.get_seeds(protocol.rows[name]))}"
        lines.append(
            f"| {name} | {done} | {train:.1f} | {measure:.1f} "
            f"| {'; '.join(machines)} | {', '.join(commits)} |"
        )
    left = sum(
        row.minutes * (len(protocol.get_seeds(row)) - len(results.get(name, {})))
        for name, row in protocol.rows.items()
    )
    lines += [
        "",
        f"{total:.0f} minutes so far; about {left:.0f} minutes of one core are left for all rows.",
        "A commit with + had changes that were not committed.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
