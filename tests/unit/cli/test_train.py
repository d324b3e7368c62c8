"""`vlduet train`: sources of one's own, and what a dry run says about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from helpers import runs, tiny
from vlduet.cli.main import app
from vlduet.config import RunConfig
from vlduet.logs import read_metrics
from vlduet.train import loop

RUNNER = CliRunner()
COUNT = 30


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a checkpoint, and a table whose photos lie in a folder of their own."""
    tiny.FAMILY_BUILDERS["fast_vlm"](tmp_path / "base")
    (tmp_path / "photos").mkdir()
    lines = ["photo_file,text_en,price"]
    for i in range(COUNT):
        runs.write_image(tmp_path / "photos" / f"{i}.png", i)
        lines.append(f"{i}.png,thing number {i},{i}.50")
    (tmp_path / "shop.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


OVERRIDES = (
    "model.path=base",
    "data.train.0.path=shop.csv",
    "data.train.0.root=photos",
    "data.train.0.columns={image: photo_file, caption: text_en}",
    "out=run",
)


def run_train(*arguments: str) -> Result:
    return RUNNER.invoke(app, ["train", *arguments])


def test_the_preset_small_trains_on_a_table_with_photos_elsewhere(shop: Path) -> None:
    result = run_train(
        "small", *OVERRIDES, "train.epochs=2", "train.batch_size=8", "data.validation=0.3"
    )
    assert result.exit_code == 0, result.output
    rows = read_metrics(shop / "run" / "metrics.jsonl")
    validations = [row for row in rows if "validation/text_to_image/hit@1" in row]
    assert [row["step"] for row in validations] == [0, rows[-1]["step"]]
    assert (shop / "run" / "model" / "vlduet.json").is_file()


def test_validation_records_may_have_a_root_and_columns_of_their_own(shop: Path) -> None:
    section = "{path: shop.csv, root: photos, columns: {image: photo_file, caption: text_en}}"
    result = run_train("small", *OVERRIDES, f"data.validation={section}", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["records"] == COUNT and plan["records held out"] == 0


def test_a_dry_run_of_the_preset_of_a_paper_warns_of_what_thirty_photos_cannot_give(
    shop: Path,
) -> None:
    result = run_train("vladva", *OVERRIDES, "--dry-run")
    assert result.exit_code == 0, result.output
    warnings = [line for line in result.stdout.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 3
    tokens, batch, epochs = warnings
    assert "objectives.language is 1, and there are no supervised tokens" in tokens
    assert "a batch of 1,024 is larger than the 30 records" in batch
    assert "1,877,333 epochs" in epochs
    in_json = json.loads(run_train("vladva", *OVERRIDES, "--dry-run", "--json").stdout)
    assert [f"warning: {warning}" for warning in in_json["warnings"]] == warnings


def test_a_dry_run_of_the_preset_small_has_no_warning(shop: Path) -> None:
    overrides = [*OVERRIDES, "train.batch_size=4", "data.validation=0.5"]
    result = run_train("small", *overrides, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "warning" not in result.output
    assert not (shop / "run").exists()


def test_images_elsewhere_are_refused_with_the_remedy(shop: Path) -> None:
    overrides = [text for text in OVERRIDES if ".root=" not in text]
    result = run_train("small", *overrides, "data.validation=null")
    assert result.exit_code == 1
    assert f"{COUNT} of {COUNT} records" in str(result.exception)
    assert "Set data.train.0.root=photos, where" in str(result.exception)
    result = run_train("small", *overrides)
    assert result.exit_code == 1 and "as `root` of the source" in str(result.exception)
    assert result.output.count("no such image") <= 2


@pytest.mark.parametrize(
    ("options", "resume", "steps"),
    [
        ([], False, 4),
        (["--resume"], True, 4),
        (["--resume", "train.steps=5"], True, 5),
        (["--resume", "auto"], "auto", 4),
        (["--resume", "auto", "train.steps=5"], "auto", 5),
        (["train.steps=5", "--resume=auto"], "auto", 5),
    ],
)
def test_resume_takes_an_optional_word(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    resume: bool | str,
    steps: int,
) -> None:
    tree = "{out: run, recipe: {name: vladva}, objectives: {language: 1}, model: {path: base}, "
    (tmp_path / "x.yaml").write_text(tree + "data: {train: [{path: x}]}, train: {steps: 4}}")
    calls = []

    def record_call(config: RunConfig, **settings: Any) -> Path:
        calls.append((settings["resume"], config.train.steps))
        return tmp_path

    monkeypatch.setattr(loop, "train", record_call)
    result = run_train(str(tmp_path / "x.yaml"), *options)
    assert result.exit_code == 0, result.output
    assert calls == [(resume, steps)]


def test_resume_refuses_another_word() -> None:
    result = run_train("small", *OVERRIDES, "--resume=yes")
    assert result.exit_code == 2 and "'auto'" in result.output
