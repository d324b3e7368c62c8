"""Commands on a published embedding model: it is indexed, searched, trained further and saved."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from helpers import tiny
from helpers.tiny_published import IDENTITY, build_published
from vlduet.cli.main import app
from vlduet.harness.builtin import can_generate, read_training
from vlduet.model.checkpoint import read_provenance
from vlduet.model.duet import DuetModel

RUNNER = CliRunner()


def run_command(*arguments: object) -> str:
    """Run a command that must succeed and return what it prints."""
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (arguments, result.output, result.exception)
    return result.stdout


def write_photos(folder: Path) -> Path:
    """Write six images with captions and return the path of their table."""
    folder.mkdir()
    rows = [["filename", "caption"]]
    for number in range(6):
        data = tiny.random_image(number, 24).data
        assert data is not None
        (folder / f"{number}.png").write_bytes(data)
        rows.append([f"{number}.png", f"photo {number}"])
    with (folder / "photos.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "photos.csv"


def test_a_transformer_below_the_folder_is_checked(tmp_path: Path) -> None:
    folder = build_published(tmp_path / "model", path="0_Transformer")
    run_command("model", "check", folder)
    assert can_generate(folder) and can_generate(folder / "0_Transformer")
    assert not can_generate(tmp_path)


def test_a_transformer_below_the_folder_is_merged_limited_and_evaluated(tmp_path: Path) -> None:
    folder = build_published(tmp_path / "model", path="0_Transformer")
    assert read_training(folder) == {}
    run_command("model", "limit", folder, tmp_path / "limited", "--max-tokens", 200)
    run_command("model", "merge", tmp_path / "limited", tmp_path / "merged")
    run_command("model", "merge", folder, tmp_path / "direct")
    assert read_provenance(tmp_path / "direct") == {"merged_from": str(folder)}
    assert read_provenance(tmp_path / "merged") == {
        "limits_of": str(folder),
        "merged_from": str(tmp_path / "limited"),
    }


def test_a_published_model_is_indexed_searched_trained_and_saved(tmp_path: Path) -> None:
    folder = build_published(tmp_path / "model", dense=((12, IDENTITY),))
    photos = write_photos(tmp_path / "photos")
    run_command("model", "check", folder)
    facts = json.loads(run_command("model", "info", folder, "--json"))
    assert facts["head"] == {"kind": "linear", "dim": 12}
    assert facts["prompts"]["query_system"] == "Find it."

    run_command("index", folder, photos, "--to", tmp_path / "index")
    hits = json.loads(run_command("search", tmp_path / "index", "photo 3", "--json"))
    model = DuetModel.from_pretrained(folder, device="cpu")
    images = [tiny.random_image(number, 24) for number in range(6)]
    scores = model.encode(["photo 3"], is_query=True) @ model.encode(images).T
    best = Path(hits["hits"][0]["image"]).name
    assert best == f"{int(np.argmax(scores))}.png"
    run_command("encode", folder, photos, "--out", tmp_path / "photos.npz")
    stored = np.load(tmp_path / "photos.npz")["vectors"]
    assert np.abs(stored - model.encode(images)).max() < 1e-3
    run_command("caption", folder, photos, "--to", tmp_path / "captions.jsonl", "--long", 3)

    run = tmp_path / "run"
    settings = {
        "model.path": folder,
        "data.train.0.path": photos,
        "data.validation": "null",
        "out": run,
        "train.epochs": 1,
        "train.batch_size": 3,
        "train.lora.rank": 2,
        "train.lr": 0.01,
    }
    run_command("train", "small", *(f"{key}={value}" for key, value in settings.items()))
    trained = DuetModel.from_pretrained(run / "model", device="cpu")
    assert trained.prompts == model.prompts and trained.head.kind == "linear"
    vectors = trained.encode(images)
    assert np.abs(vectors - model.encode(images)).max() > 1e-3
    run_command("model", "check", run / "model")
    run_command("model", "merge", run / "model", tmp_path / "merged")
    merged = DuetModel.from_pretrained(tmp_path / "merged", device="cpu")
    assert np.abs(merged.encode(images) - vectors).max() < 1e-5
