"""Published numbers are data, and the numbers of runs stand below them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from helpers import official, pages, tiny
from helpers import runs as training_runs
from vlduet import config
from vlduet.cli.main import app
from vlduet.data.records import Parts
from vlduet.eval.benchmarks.official_files import OfficialFiles
from vlduet.eval.benchmarks.registry import BENCHMARKS, get_benchmark
from vlduet.eval.comparison import before_and_after, read_run_scores
from vlduet.eval.paper_rows import Training
from vlduet.eval.predictions import ModelFunctions
from vlduet.eval.run import evaluate
from vlduet.reports import papers


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two runs: `base` answers Yes and `joint` No to everything."""
    root = tmp_path_factory.mktemp("runs")
    data = official.write_official_files(root / "official")

    def embed(items: list[Parts], query: bool) -> np.ndarray:
        return np.random.default_rng(len(items)).normal(size=(len(items), 6)).astype(np.float32)

    def run_benchmarks(name: str, answer: str) -> None:
        functions = ModelFunctions(
            embed=embed, generate=lambda prompts, max_new_tokens: [answer] * len(prompts)
        )
        for benchmark in ("pope", "mme", "winoground", "builtin_stamps"):
            evaluate(
                get_benchmark(benchmark),
                functions,
                source=OfficialFiles(data),
                runs=root / name,
                provenance={"model": name},
            )

    run_benchmarks("base", "Yes")
    run_benchmarks("joint", "No")
    return root


def test_published_tables_are_complete() -> None:
    tables = json.loads(papers.PUBLISHED_FILE.read_text())["tables"]
    assert {table["paper"] for table in tables} == {"Sugar", "VladVA"}
    numbers = {}
    for table in tables:
        assert table["source"]
        for column in table["columns"]:
            assert column["benchmark"] in BENCHMARKS, column
        for row in table["rows"]:
            assert len(row["values"]) == len(table["columns"]), (table["title"], row["model"])
            numbers[table["paper"], table["title"], row["model"]] = row["values"]
        names = [row["model"] for row in [*table["rows"], *table.get("unpublished", ())]]
        assert len(set(names)) == len(names), "a run is placed by the name of its row"
    sugar = numbers["Sugar", "Generation", "Sugar-7B"]
    assert sugar[:6] == [76.0, 58.7, 60.4, 69.4, 57.5, 86.6]
    sugarcrepe = numbers["VladVA", "SugarCrepe", "VladVA 7B"]
    assert sugarcrepe == [98.1, 92.1, 86.8, 79.0, 82.9, 95.2, 95.8]
    retrieval = numbers["VladVA", "Retrieval", "VladVA LLaVA-1.5-7B"]
    assert retrieval[:6] == [85.0, 98.5, 59.0, 88.6, 72.3, 96.5]
    assert retrieval[6:] == [94.3, 99.9, 72.9, 94.4, 85.7, 99.5]
    soft_prompts = numbers["VladVA", "Ablation", "soft prompts"]
    assert soft_prompts == [86.4, 66.9, 89.3, 76.7, 91.7]
    without_triple = numbers["Sugar", "Ablation", "without triple kernel"]
    assert without_triple == [71.6, 85.3, 63.9, 49.0, 44.1, 20.5]


def test_means_of_subsets_in_the_ablation_are_those_of_the_table_of_subsets() -> None:
    tables = json.loads(papers.PUBLISHED_FILE.read_text())["tables"]
    rows = {
        (table["title"], row["model"]): row["values"]
        for table in tables
        if table["paper"] == "VladVA"
        for row in table["rows"]
    }
    subsets = rows["SugarCrepe", "LLaVA-1.5-7B"]
    means = [np.mean(subsets[:3]), np.mean(subsets[3:5]), np.mean(subsets[5:])]
    zero_shot = rows["Ablation", "LLaVA-1.5-7B zero-shot"]
    assert zero_shot[:3] == pytest.approx(means, abs=0.051)
    retrieval = rows["Retrieval", "LLaVA-1.5-7B zero-shot"]
    assert zero_shot[3:] == [retrieval[0], retrieval[6]]


def test_runs_stand_below_the_published_rows(runs: Path) -> None:
    joint = read_run_scores(runs / "joint")
    tables = {(table.paper, table.title): table for table in papers.paper_tables([joint])}
    assert set(tables) == {
        ("Sugar", "Generation"),
        ("Sugar", "Winoground"),
        ("Sugar", "Ablation"),
        ("VladVA", "Winoground"),
    }
    generation = tables["Sugar", "Generation"]
    last_row = generation.rows[-1]
    values = dict(zip(generation.columns, last_row.values, strict=True))
    assert last_row.is_ours and last_row.model == "joint"
    assert not any(row.is_ours for row in generation.rows[:-1])
    assert papers.cell_text(values["POPE"]) == "0.0"
    assert papers.cell_tooltip(values["POPE"]).endswith("n 6")
    assert values["GQA"] is None and papers.cell_text(None) == papers.cell_tooltip(None) == ""
    assert papers.cell_tooltip(76.0) == "" and papers.cell_text(76.0) == "76.0"
    assert papers.cell_text(13.25) == "13.25", "Sugar prints two decimals of ViLLA"


def make_training(preset: str, *overrides: str) -> Training:
    """Return a short run of a preset with overrides."""
    return Training(config.load_run_config(preset, overrides), {}, 60, [500])


def test_a_run_stands_below_the_row_that_it_was_trained_as(runs: Path) -> None:
    untrained = read_run_scores(runs / "base")
    assert untrained.training is None
    without_gak = make_training(
        "ablations/sugar-without-gak", "data.train=[{path: own.jsonl}]", "train.batch_size=8"
    )
    trained = replace(read_run_scores(runs / "joint"), training=without_gak)
    tables = {
        (table.paper, table.title): table for table in papers.paper_tables([untrained, trained])
    }
    ablation = tables["Sugar", "Ablation"]
    names = [row.model for row in ablation.rows]
    place = names.index("joint, as 'without GAK, by mean similarity'")
    assert names[place - 1] == "without GAK, by mean similarity" and names[-1] == "base"
    assert [row.is_ours for row in ablation.rows].count(True) == 2
    (note,) = ablation.run_notes
    assert note.startswith(
        "joint was trained as the row 'without GAK, by mean similarity'. Ours: models/nano trained "
        "on 500 records of own.jsonl for 60 steps in batches of 8. The paper's: VILA-7B trained on "
    )
    assert "Settings that differ from the preset sugar:" in note
    assert "train.lora.rank 16 (128)" in note and "recipe.target" not in note
    # In a table of the whole method, the run is no row; that of the other paper has another recipe.
    for paper in ("Sugar", "VladVA"):
        assert [row.model for row in tables[paper, "Winoground"].rows[-2:]] == ["base", "joint"]
        assert tables[paper, "Winoground"].run_notes == ()


def test_rows_without_numbers_and_runs_without_a_row_are_explained(runs: Path) -> None:
    joint = read_run_scores(runs / "joint")
    all_runs = [
        replace(joint, name="control", training=make_training("ablations/sugar-alpha-0")),
        replace(joint, name="other", training=make_training("sugar", "recipe.target=awm")),
        replace(joint, name="large", training=make_training("sugar")),
    ]
    tables = {(table.paper, table.title): table for table in papers.paper_tables(all_runs)}
    ablation = tables["Sugar", "Ablation"]
    names = [row.model for row in ablation.rows]
    assert names[:2] == ["all parts", "large, as 'all parts'"]
    assert names[-2:] == ["control, as 'alpha = 0'", "other"]
    control, other, large = ablation.run_notes
    assert "'alpha = 0': a control that the paper does not have. Ours: models/nano" in control
    assert other.startswith("No row has the settings of other. Ours: models/base trained on 500")
    assert "differ" not in large
    assert tables["Sugar", "Winoground"].rows[-3].model == "large, as 'Sugar'"


def test_a_row_of_another_base_model_names_it(runs: Path) -> None:
    joint = read_run_scores(runs / "joint")
    score = joint.scores["winoground"]
    crepe = {"values": {"accuracy/swap_obj": score["values"]["text"]}}
    trained = replace(
        joint, scores={"sugarcrepe": crepe}, training=make_training("vladva-qwen2-vl-2b")
    )
    (table,) = papers.paper_tables([trained])
    names = [row.model for row in table.rows]
    place = names.index("joint, as 'VladVA Qwen2-VL-2B'")
    assert names[place - 1] == "VladVA Qwen2-VL-2B"
    assert "The paper's: Qwen2-VL-2B with the same data" in table.run_notes[0]
    assert "model.max_image_tokens 576 (not set)" in table.run_notes[0]


def test_commands_place_a_run_of_a_preset_below_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From training to the page, by the commands of the documentation."""
    monkeypatch.chdir(tmp_path)
    tiny.build_llava(tmp_path / "base")
    data = official.write_official_files(tmp_path / "official")
    rows = []
    for i in range(4):
        training_runs.write_image(tmp_path / f"{i}.png", i)
        rows.append({"image": f"{i}.png", "short": f"number {i}", "long": "a long text " * 4})
    training_runs.write_rows(tmp_path / "train.jsonl", rows)

    def run(*arguments: str) -> None:
        CliRunner().invoke(app, arguments, catch_exceptions=False)

    own = ["model.path=base", "data.train.0.path=train.jsonl", "train.batch_size=4"]
    run("train", "ablations/vladva-lora-only", *own, "train.epochs=1")
    run("model", "merge", "runs/ablations/vladva-lora-only/model", "merged")
    for model in ("runs/ablations/vladva-lora-only/model", "merged"):
        to = f"scores/{Path(model).name}"
        run("eval", model, "sugarcrepe", "--data", str(data), "--to", to)
    run("report", "scores/model", "scores/merged", "--out", "page.html")
    page = pages.parse_checked_page(Path("page.html").read_text())
    markdown = Path("page.md").read_text()
    note = (
        "was trained as the row 'LoRA'. Ours: base trained on 4 records of train.jsonl for 1 step "
        "in batches of 4. The paper's: LLaVA-1.5-7B trained on 1 million samples. Settings that "
        "differ from the preset vladva: train.batch_size 4 (1024)."
    )
    for name in ("model", "merged"):
        assert f"\n- {name} {note}\n" in markdown and f"{name} {note}" in page.text
    lines = markdown.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("| LoRA | 87.0"))
    assert lines[place + 1].startswith("| **model, as 'LoRA'** |")
    assert lines[place + 2].startswith("| **merged, as 'LoRA'** |")
    assert "ablations/vladva-lora-only" in page.text


def test_suite_has_a_row_per_number_and_a_column_per_run(runs: Path) -> None:
    all_runs = [read_run_scores(runs / name) for name in ("base", "joint")]
    table = papers.suite_table(all_runs)
    assert table is not None and table.columns == ("base", "joint")
    names = [row.model.split(": ")[1] for row in table.rows]
    assert "t2i/R@1" in names and "i2t/R@10" in names
    groups = {name.split("/")[0] for name in names if "/" in name}
    assert groups == {"t2i", "i2t"}
    for run in all_runs:
        del run.scores["builtin_stamps"]
    assert papers.suite_table(all_runs) is None


def test_changes_of_real_runs_are_paired(runs: Path) -> None:
    before = read_run_scores(runs / "base")
    after = read_run_scores(runs / "joint")
    changes = {change.benchmark: change for change in before_and_after(before, after)}
    assert list(changes) == ["pope", "mme", "builtin_stamps", "winoground"]
    pope = changes["pope"]
    assert pope.before.mean == pytest.approx(200 / 3) and pope.after.mean == 0.0
    assert pope.change is not None and pope.change.mean == pytest.approx(-200 / 3)
    # Both runs have the same vectors, so every resample differs by 0.
    winoground = changes["winoground"]
    assert winoground.verdict == "level"
    assert winoground.change is not None and winoground.change.low == 0.0


def test_command_writes_the_page_and_markdown(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    arguments = ["report", str(runs / "joint"), "--before", str(runs / "base"), "--out", str(out)]
    printed = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    assert "pope" in printed and "    66.7 ->      0.0" in printed
    page = pages.parse_checked_page(out.read_text())
    markdown = out.with_suffix(".md").read_text()
    assert "Before and after" in page.text and "Sugar-7B" in page.text
    bars = [a["aria-label"] or "" for _, a in page.tags if a.get("class") == "bar"]
    assert len([bar for bar in bars if bar.startswith("pope before: 66.7, 95 % interval")]) == 1
    assert len(bars) == 2 * 4
    assert "| **joint** |" in markdown and "| pope | F1 | 66.7 | 0.0 |" in markdown
    assert "| benchmark | number | before | after | change | |" in markdown


def test_command_prints_json_with_the_documented_keys(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    arguments = ["report", str(runs / "joint"), "--before", str(runs / "base"), "--out", str(out)]
    printed = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout
    content = json.loads(printed)
    assert content["written"] == [str(out), str(out.with_suffix(".md"))]
    assert set(content["kept"][0]) == {
        "benchmark",
        "number",
        "before",
        "after",
        "change",
        "verdict",
    }
    table = content["tables"][0]
    assert set(table) == {"paper", "title", "source", "notes", "columns", "lines", "run_notes"}
    line = table["lines"][-1]
    assert line["model"] == "joint" and line["ours"] is True
    assert set(line["cells"][0]) == {"text", "told"}
