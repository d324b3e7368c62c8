"""`vlduet eval`, `score`, `certify` and `report`: measure models and compare the results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlduet.cli._common import Json, print_json, print_text
from vlduet.logs import logger

if TYPE_CHECKING:
    from vlduet.eval.benchmarks.tasks import Benchmark
    from vlduet.harness.builtin import EvaluationSettings

SET = (
    "seed=0, system='...', k=3, retriever=DIR, fluency=DIR, judge.url=http://..., "
    "judge.model=..., judge.key_file=FILE."
)
DATA = "Folder of the official files; 'vlduet eval --list' names them."
PREDICTIONS = "Answers that another toolkit generated."
REVIEWS = "Grades that an LLM wrote in another run."
QUESTIONS = "Question file of LLaVA, for predictions with its ids."
PAGE = "File of the page of the suite abilities; by default abilities.md in --to."
BEFORE = "Run of the model before joint training, to show the change of generation."

BenchmarkNames = Annotated[
    list[str], typer.Argument(metavar="BENCHMARK...", help="See 'vlduet eval --list'.")
]
Data = Annotated[Path, typer.Option("--data", metavar="DIR", help=DATA)]
Runs = Annotated[
    Path, typer.Option("--to", metavar="DIR", help="Gets a folder of results per benchmark.")
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET)]


def evaluate(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", help="A model folder.")] = None,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[BENCHMARK]...", help="See --list.")
    ] = None,
    *,
    data: Data = Path("data"),
    to: Runs = Path("runs/eval"),
    suite: Annotated[
        str | None,
        typer.Option(help="All of: builtin, abilities, discriminative, generative, knowledge."),
    ] = None,
    page: Annotated[Path | None, typer.Option("--page", metavar="FILE", help=PAGE)] = None,
    settings: Set = None,
    list_all: Annotated[
        bool, typer.Option("--list", help="List the benchmarks and the files that they need.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure a model by the official rules of benchmarks; print and store the scores.

    Results go to DIR/BENCHMARK; corpora that are needed are downloaded into corpora/ of the data
    folder. An interrupted run continues when it is started again. A benchmark that fails is logged
    and does not stop the others, but the exit status is 1. Without MODEL or any benchmark, or with
    an unknown name or setting, nothing is run. With --list, only list the benchmarks.

    The suite abilities is printed as one table, and written as a page in Markdown.
    """
    if list_all:
        _print_benchmarks(as_json)
        return
    from vlduet.errors import ConfigError

    if model is None:
        fix = "Write vlduet eval MODEL BENCHMARK..., or vlduet eval --list"
        raise ConfigError("no model", place="eval", fix=fix)
    parsed_settings = _parse_settings(settings)
    benchmarks = _select_benchmarks(names, suite)
    from vlduet.harness.builtin import evaluate_model

    scores, failed = evaluate_model(model, benchmarks, data=data, runs=to, settings=parsed_settings)
    if suite == "abilities":
        _write_abilities(scores, model, page or to / "abilities.md", as_json)
        if not as_json:
            scores = [row for row in scores if row["benchmark"] in (names or ())]
    _print_scores(scores, failed, as_json)


def _write_abilities(scores: list[dict[str, Any]], model: Path, page: Path, as_json: bool) -> None:
    """Write the page of the suite ``abilities``, and print its table unless JSON is printed.

    An older file is replaced. Without scores, nothing is written or printed.
    """
    from vlduet.files import write_text_atomically
    from vlduet.locks import lock_output
    from vlduet.reports.abilities import format_abilities_page, format_abilities_table

    if not scores:
        return
    with lock_output(page):
        write_text_atomically(page, format_abilities_page(scores, model=str(model)))
    if not as_json:
        print_text("\n".join([*format_abilities_table(scores), str(page)]))


def score(
    names: BenchmarkNames,
    *,
    data: Data = Path("data"),
    to: Runs = Path("runs/eval"),
    predictions: Annotated[
        Path | None, typer.Option("--predictions", metavar="FILE", help=PREDICTIONS)
    ] = None,
    reviews: Annotated[Path | None, typer.Option("--reviews", metavar="FILE", help=REVIEWS)] = None,
    questions: Annotated[
        Path | None, typer.Option("--questions", metavar="FILE", help=QUESTIONS)
    ] = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Score stored predictions, or those of another toolkit, without a model.

    The scores are printed, and stored in DIR/BENCHMARK. --predictions and --reviews replace what is
    stored there, and need exactly one benchmark. The first benchmark that cannot be scored, such as
    one without predictions, ends the command with an error.
    """
    from vlduet.errors import ConfigError
    from vlduet.eval.benchmarks.official_files import OfficialFiles
    from vlduet.eval.predictions import ModelFunctions
    from vlduet.eval.run import evaluate, import_predictions, import_reviews
    from vlduet.harness.builtin import open_fluency_model, open_settings_grader

    parsed_settings = _parse_settings(settings)
    benchmarks = _select_benchmarks(names, None)
    if (predictions or reviews) and len(benchmarks) != 1:
        message = f"{len(benchmarks)} benchmarks for one file"
        raise ConfigError(message, place="score", fix="Name the one that it belongs to")
    functions = ModelFunctions(
        grade=open_settings_grader(parsed_settings),
        fluency_model=open_fluency_model(parsed_settings),
    )
    scores = []
    for benchmark in benchmarks:
        source = OfficialFiles(data, seed=parsed_settings.seed, k=parsed_settings.k)
        if predictions is not None:
            counts = import_predictions(
                benchmark, predictions, source=source, runs=to, questions=questions
            )
            unknown = f"{counts['unknown']} fit no item"
            logger.info(f"{predictions}: {counts['taken']} predictions taken, {unknown}")
        if reviews is not None:
            logger.info(f"{reviews}: {import_reviews(benchmark, reviews, runs=to)} reviews taken")
        scores.append(evaluate(benchmark, functions, source=source, runs=to, provenance={}))
    _print_scores(scores, {}, as_json)


def certify(
    answers: Annotated[
        Path, typer.Argument(metavar="ANSWERS", help="Folder of LLaVA-1.5's released predictions.")
    ],
    *,
    data: Data = Path("data"),
    to: Runs = Path("runs/certify"),
    as_json: Json = False,
) -> None:
    """Check the scorers: released predictions of others must give the published numbers.

    Prints one outcome per number. The exit status is 1 if a number differs or cannot be computed.
    """
    from vlduet.eval.certify import certify as check_scorers
    from vlduet.eval.certify import load_targets
    from vlduet.reports.terminal import format_certification

    outcomes = check_scorers(answers, data=data, runs=to, targets=load_targets())
    if as_json:
        print_json({"targets": [outcome.to_json() for outcome in outcomes]})
    else:
        print_text("\n".join(format_certification(outcomes)))
    if not outcomes or any(outcome.verdict != "agrees" for outcome in outcomes):
        raise typer.Exit(1)


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders that 'vlduet eval --to' wrote.")
    ],
    *,
    before: Annotated[Path | None, typer.Option(help=BEFORE)] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.html", help="A page; Markdown goes beside it.")
    ] = Path("runs/results.html"),
    as_json: Json = False,
) -> None:
    """Write a page that compares runs with the papers, and with the model before training.

    Prints the changes from the run `--before` to the last RUN, and the paths of the page and its
    Markdown version. A run without scores is an error.
    """
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
    paths = write_results(out, runs=all_runs, tables=tables, changes=changes)
    written = [str(path) for path in paths]
    if as_json:
        values: dict[str, Any] = {"written": written}
        values["kept"] = [{**asdict(change), "verdict": change.verdict} for change in changes]
        print_json({**values, "tables": [table.to_json() for table in tables]})
        return
    print_text("\n".join([*format_changes(changes), *written]))


def _parse_settings(texts: list[str] | None) -> EvaluationSettings:
    """Return the settings that ``key=value`` and ``judge.key=value`` texts describe.

    Without texts, all are defaults. Raises ConfigError for a text of another form, an unknown key
    or an invalid value.
    """
    from vlduet.config import parse_options
    from vlduet.config_files import parse_overrides
    from vlduet.harness.builtin import EvaluationSettings

    values = parse_overrides(texts or [], place="--set")
    return parse_options(EvaluationSettings, values, place="--set")


def _select_benchmarks(names: list[str] | None, suite: str | None) -> list[Benchmark]:
    """Return the benchmarks of a suite, then the named ones, without repetitions.

    Raises ConfigError for an unknown name or suite, or if there is no benchmark.
    """
    from vlduet.errors import ConfigError, suggest_name
    from vlduet.eval.benchmarks.registry import SUITES, get_benchmark

    if suite is not None and suite not in SUITES:
        raise ConfigError(f"no suite '{suite}'", place="--suite", fix=suggest_name(suite, SUITES))
    benchmarks = [*(SUITES[suite] if suite else ()), *map(get_benchmark, names or ())]
    if not benchmarks:
        fix = "Name one or give --suite; 'vlduet eval --list' lists them"
        raise ConfigError("no benchmark", place="eval", fix=fix)
    return list(dict.fromkeys(benchmarks))


def _print_benchmarks(as_json: bool) -> None:
    """Print every benchmark with suite, protocol, papers, split, metric and official files."""
    from vlduet.eval.benchmarks.registry import BENCHMARKS, SUITES

    suites = {benchmark.name: name for name, rows in SUITES.items() for benchmark in rows}
    if as_json:
        fields = ("title", "papers", "split", "metric", "protocol", "files")
        values = {}
        for name, benchmark in BENCHMARKS.items():
            values[name] = {"suite": suites[name]}
            values[name] |= {field: getattr(benchmark, field) for field in fields}
        print_json(values)
        return
    for row in BENCHMARKS.values():
        print_text(f"{row.name}: {row.title} [{suites[row.name]}, {row.protocol}]")
        print_text(f"    papers {', '.join(row.papers) or 'none'}; split {row.split}; {row.metric}")
        print_text(f"    files  {', '.join(row.files) or 'none'}")


def _print_scores(scores: list[dict[str, Any]], failed: dict[str, str], as_json: bool) -> None:
    """Print results, as text (12 values per benchmark at most) or as JSON with the failures.

    Raises typer.Exit with status 1, after printing, if a benchmark failed.
    """
    if as_json:
        print_json({"scores": scores, "failed": failed})
    for result in scores if not as_json else ():
        print_text(f"{result['benchmark']} ({result['split']})")
        for name, value in list(result["values"].items())[:12]:
            interval = f"{value['low']:.2f} to {value['high']:.2f}"
            print_text(
                f"    {name:28} {value['mean']:8.2f}   95 % interval {interval}, n {value['n']}"
            )
        if not result["values"]:
            print_text(f"    no number here: needs {result['facts'].get('needs')}")
        facts = {key: result[key] for key in ("missing", "unparsed") if result[key]}
        facts |= result["facts"]
        print_text(f"    {', '.join(f'{key} {value}' for key, value in facts.items())}")
    if failed:
        raise typer.Exit(1)
