"""The verbs that measure: eval, score, certify and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vlduet.eval.benchmarks.tasks import Benchmark
    from vlduet.harness.builtin import EvaluationSettings

SET = "seed=0, system='...', k=3, retriever=DIR, fluency=DIR, judge.url=http://..., judge.model=..., judge.key_file=FILE."

Data = Annotated[
    Path,
    typer.Option("--data", metavar="DIR", help="Where the official files lie; --list tells which."),
]
Runs = Annotated[
    Path, typer.Option("--to", metavar="DIR", help="Predictions and scores, a folder a benchmark.")
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET)]
Suite = Annotated[
    str | None, typer.Option(help="All of: builtin, discriminative, generative, knowledge.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command("eval")(evaluate)
    app.command("score")(score)
    app.command("certify")(certify)
    app.command("report")(report)


def evaluate(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", help="A model folder.")] = None,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[BENCHMARK]...", help="Which; see --list.")
    ] = None,
    *,
    data: Data = Path("data"),
    to: Runs = Path("runs/eval"),
    suite: Suite = None,
    settings: Set = None,
    listing: Annotated[
        bool, typer.Option("--list", help="Tell every benchmark, and what it needs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure a model by the official rules; run it again after an interruption and it goes on."""
    if listing:
        _print_benchmarks(as_json)
        return
    from vlduet.errors import ConfigError

    if model is None:
        raise ConfigError(
            "no model",
            place="eval",
            fix="Write vlduet eval MODEL BENCHMARK..., or vlduet eval --list",
        )
    chosen, wanted = _parse_settings(settings), _select_benchmarks(names, suite)
    from vlduet.harness.builtin import evaluate_model

    done, failed = evaluate_model(model, wanted, data=data, runs=to, settings=chosen)
    _print_scores(done, failed, as_json)


def score(
    names: Annotated[
        list[str], typer.Argument(metavar="BENCHMARK...", help="Which; see 'vlduet eval --list'.")
    ],
    *,
    data: Data = Path("data"),
    to: Runs = Path("runs/eval"),
    predictions: Annotated[
        Path | None,
        typer.Option("--predictions", metavar="FILE", help="Answers that another toolkit made."),
    ] = None,
    reviews: Annotated[
        Path | None,
        typer.Option(
            "--reviews", metavar="FILE", help="What a judge wrote, kept from another run."
        ),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            "--questions", metavar="FILE", help="LLaVA's question file, where ids are its own."
        ),
    ] = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Score what is kept, or what others predicted, without a model."""
    from vlduet.errors import ConfigError
    from vlduet.eval.benchmarks.source import Source
    from vlduet.eval.predictions import ModelFunctions
    from vlduet.eval.run import evaluate, import_predictions, import_reviews
    from vlduet.harness.builtin import open_fluency_model, open_settings_grader
    from vlduet.logs import logger

    chosen, wanted = _parse_settings(settings), _select_benchmarks(names, None)
    if (predictions or reviews) and len(wanted) != 1:
        raise ConfigError(
            f"{len(wanted)} benchmarks for one file",
            place="score",
            fix="Name the one that it is of",
        )
    done, readers = (
        [],
        ModelFunctions(
            grade=open_settings_grader(chosen), fluency_model=open_fluency_model(chosen)
        ),
    )
    for benchmark in wanted:
        source = Source(data, seed=chosen.seed, k=chosen.k)
        if predictions is not None:
            counts = import_predictions(
                benchmark, predictions, source=source, runs=to, questions=questions
            )
            logger.info(
                f"{predictions}: {counts['taken']} predictions taken, {counts['unknown']} fit no item"
            )
        if reviews is not None:
            logger.info(f"{reviews}: {import_reviews(benchmark, reviews, runs=to)} reviews taken")
        done.append(evaluate(benchmark, readers, source=source, runs=to, provenance={}))
    _print_scores(done, {}, as_json)


def certify(
    answers: Annotated[
        Path,
        typer.Argument(metavar="ANSWERS", help="The folder of LLaVA-1.5's released predictions."),
    ],
    *,
    data: Data = Path("data"),
    to: Runs = Path("runs/certify"),
    as_json: Json = False,
) -> None:
    """Check the scorers: released predictions of others must give the published numbers."""
    from vlduet.eval.certify import certify as compare
    from vlduet.eval.certify import load_targets
    from vlduet.reports.terminal import format_certification

    outcomes = compare(answers, data=data, runs=to, targets=load_targets())
    if as_json:
        _print_json({"targets": [outcome.to_json() for outcome in outcomes]})
    else:
        print("\n".join(format_certification(outcomes)))
    if not outcomes or any(outcome.verdict != "agrees" for outcome in outcomes):
        raise typer.Exit(1)


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders that 'vlduet eval --to' wrote.")
    ],
    *,
    before: Annotated[
        Path | None,
        typer.Option(
            help="The run of the model before joint training: shows what generation paid."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.html", help="The page; Markdown goes beside it.")
    ] = Path("runs/results.html"),
    as_json: Json = False,
) -> None:
    """Put runs beside the numbers of the papers, and tell what generation paid for retrieval."""
    from dataclasses import asdict

    from vlduet.eval.comparison import before_and_after, read_run_scores
    from vlduet.reports.papers import build_tables, write_results
    from vlduet.reports.terminal import format_changes

    all_runs = [read_run_scores(run) for run in runs]
    changes = []
    if before is not None:
        base = read_run_scores(before)
        changes = before_and_after(base, all_runs[-1])
        all_runs = [base, *all_runs]
    tables = build_tables(all_runs)
    written = [str(path) for path in write_results(out, runs=all_runs, tables=tables, changes=changes)]
    if as_json:
        kept = [{**asdict(change), "verdict": change.verdict} for change in changes]
        _print_json(
            {"written": written, "kept": kept, "tables": [table.to_json() for table in tables]}
        )
        return
    print("\n".join([*format_changes(changes), *written]))


def _parse_settings(texts: list[str] | None) -> EvaluationSettings:
    """`key=value` and `judge.key=value` -> settings. Raises ConfigError as configs do."""
    from vlduet import config
    from vlduet.harness.builtin import EvaluationSettings

    return config.parse_options(
        EvaluationSettings, config.parse_overrides(texts or [], place="--set"), place="--set"
    )


def _select_benchmarks(names: list[str] | None, suite: str | None) -> list[Benchmark]:
    from vlduet.errors import ConfigError, suggest_name
    from vlduet.eval.benchmarks.table import SUITES, known

    if suite is not None and suite not in SUITES:
        raise ConfigError(f"no suite '{suite}'", place="--suite", fix=suggest_name(suite, SUITES))
    wanted = [*(SUITES[suite] if suite else ()), *map(known, names or ())]
    if not wanted:
        raise ConfigError(
            "no benchmark",
            place="eval",
            fix="Name one or give --suite; 'vlduet eval --list' lists them",
        )
    return list(dict.fromkeys(wanted))


def _print_benchmarks(as_json: bool) -> None:
    from vlduet.eval.benchmarks.table import BENCHMARKS, SUITES

    suites = {row.name: suite for suite, rows in SUITES.items() for row in rows}
    if as_json:
        _print_json(
            {
                row.name: {
                    "suite": suites[row.name],
                    "title": row.title,
                    "papers": row.papers,
                    "split": row.split,
                    "metric": row.metric,
                    "protocol": row.protocol,
                    "files": row.files,
                }
                for row in BENCHMARKS.values()
            }
        )
        return
    for row in BENCHMARKS.values():
        print(f"{row.name}: {row.title} [{suites[row.name]}, {row.protocol}]")
        print(f"    papers {', '.join(row.papers) or 'none'}; split {row.split}; {row.metric}")
        print(f"    files  {', '.join(row.files) or 'none'}")


def _print_scores(done: list[dict[str, Any]], failed: dict[str, str], as_json: bool) -> None:
    if as_json:
        _print_json({"scores": done, "failed": failed})
    for result in done if not as_json else ():
        print(f"{result['benchmark']} ({result['split']})")
        for name, value in list(result["values"].items())[:12]:
            interval = f"{value['low']:.2f} to {value['high']:.2f}"
            print(f"    {name:28} {value['mean']:8.2f}   95 % interval {interval}, n {value['n']}")
        if not result["values"]:
            print(f"    no number here: needs {result['facts'].get('needs')}; predictions are kept")
        beside = {key: result[key] for key in ("missing", "unparsed") if result[key]} | result[
            "facts"
        ]
        print(f"    {', '.join(f'{key} {value}' for key, value in beside.items())}")
    if failed:
        raise typer.Exit(1)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, default=str))
