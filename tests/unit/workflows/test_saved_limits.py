"""A model that was trained with a larger limit is used with it everywhere, without any option."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers import runs, tiny
from vlduet.cli.main import app
from vlduet.config import RunConfig, load_run_config
from vlduet.data.formats import read_records
from vlduet.encoders.dual import open_embedder
from vlduet.encoders.loading import open_encoder
from vlduet.inspect.tokens import list_record_tokens
from vlduet.model.duet import DuetModel
from vlduet.model.limits import Limits
from vlduet.recipes.registry import load_recipe
from vlduet.retrieval.build import build_index
from vlduet.retrieval.index import Index
from vlduet.retrieval.search import search
from vlduet.train.loop import train
from vlduet.train.setup import load_model
from vlduet.workflows.captioning import build_caption_specs, write_missing_captions
from vlduet.workflows.mining import mine_hard_negatives

OVERRIDES = ["data.max_tokens=2200", "model.max_image_tokens=2116"]
TRAINED_LIMITS = Limits(2200, 2116)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a Qwen2-VL, two images of 2,116 tokens, and a model trained on them in run/."""
    folder = tmp_path_factory.mktemp("limits")
    path = runs.write_run_config(folder, family="qwen2_vl", count=2, steps=1, batch_size=2)
    settings = folder / "base" / "preprocessor_config.json"
    size = {"shortest_edge": 256, "longest_edge": 368 * 368}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"size": size}))
    for i in range(2):
        (folder / f"{i}.png").write_bytes(tiny.random_image(i, 368, width=368).data or b"")
    train(load_run_config(path, OVERRIDES))
    return folder


def load_config(folder: Path, *overrides: str) -> RunConfig:
    """Return the config of another run that starts from the trained model."""
    start = f"model.path={folder / 'run' / 'model'}"
    return load_run_config(folder / "config.yaml", [start, *overrides])


def test_index_search_caption_mine_and_show_use_the_saved_limits(
    folder: Path, tmp_path: Path
) -> None:
    path, source = folder / "run" / "model", folder / "train.jsonl"
    model = open_embedder(path)
    assert isinstance(model, DuetModel) and model.limits == TRAINED_LIMITS
    report = build_index(model, source, to=tmp_path / "index", model_path=path)
    assert (report.count, report.quarantined) == (2, 0)
    records = list(read_records(source))
    image = records[0].image
    assert image is not None and model.prepare_image(image).num_tokens == 2116
    with Index.open(tmp_path / "index") as index:
        assert search(index, open_embedder(path), image, k=1)[0].id == "0"
    rows = list_record_tokens(records[0], path)
    assert "[image, 2116 tokens]" in {row.text for row in rows}
    mined = mine_hard_negatives(model, source, output=tmp_path / "mined.jsonl", margin=0.0)
    assert mined.records == 2 and mined.dropped == 0
    bare = [{"id": "0", "image": str(folder / "0.png")}]
    written = write_missing_captions(
        model,
        runs.write_rows(tmp_path / "bare.jsonl", bare),
        output=tmp_path / "captioned.jsonl",
        specs=build_caption_specs(short=2, long=0),
        model_name="tiny",
    )
    assert (written.records, written.short, written.dropped) == (1, 1, 0)


def test_encode_reads_what_the_model_was_trained_on(folder: Path, tmp_path: Path) -> None:
    arguments = ["encode", str(folder / "run" / "model"), str(folder / "train.jsonl"), "--json"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "vectors.npz")])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["count"], facts["quarantined"]) == (2, 0)


def test_further_training_keeps_saved_limits_unless_the_config_names_others(folder: Path) -> None:
    saved = load_config(folder)
    model = load_model(saved, load_recipe(saved), cache=None)
    assert model.limits == TRAINED_LIMITS
    other = load_config(folder, "data.max_tokens=128", "model.max_image_tokens=64")
    model = load_model(other, load_recipe(other), cache=None)
    assert model.limits == Limits(128, 64)
    record = next(iter(read_records(folder / "train.jsonl")))
    assert record.image is not None and model.prepare_image(record.image).num_tokens == 64


def test_a_checkpoint_without_saved_limits_gets_the_defaults(folder: Path) -> None:
    model = DuetModel.from_pretrained(folder / "base")
    assert model.limits == Limits(2048, 1536)
    record = next(iter(read_records(folder / "train.jsonl")))
    assert record.image is not None and model.prepare_image(record.image).num_tokens == 39**2


def test_model_limit_writes_a_folder_with_other_limits(folder: Path, tmp_path: Path) -> None:
    source, out = folder / "run" / "model", tmp_path / "limited"
    invoke = CliRunner().invoke
    limits = ["--max-tokens", "300", "--max-image-tokens", "256"]
    result = invoke(app, ["model", "limit", str(source), str(out), *limits])
    assert result.exit_code == 0, result.output
    limited, trained = DuetModel.from_pretrained(out), DuetModel.from_pretrained(source)
    assert (limited.limits, trained.limits) == (Limits(300, 256), TRAINED_LIMITS)
    assert limited.encode(["a text"]).tolist() == trained.encode(["a text"]).tolist()
    info = invoke(app, ["model", "info", str(out), "--json"])
    assert json.loads(info.stdout)["limits"] == {"max_tokens": 300, "max_image_tokens": 256}
    longer = invoke(app, ["model", "limit", str(out), str(tmp_path / "b"), "--max-tokens", "999"])
    assert longer.exit_code == 0
    assert DuetModel.from_pretrained(tmp_path / "b").limits == Limits(999, 256)
    nothing = invoke(app, ["model", "limit", str(out), str(tmp_path / "c")])
    assert nothing.exit_code != 0 and not (tmp_path / "c").exists()


def test_a_shared_vision_tower_has_features_of_its_own_limit(folder: Path) -> None:
    alone = open_encoder(folder / "base")
    own = DuetModel.from_pretrained(folder / "base", max_image_tokens=2116)
    fewer = DuetModel.from_pretrained(folder / "base", max_image_tokens=100)
    assert open_encoder(folder / "base", trained_model=own).fingerprint == alone.fingerprint
    limited = open_encoder(folder / "base", trained_model=fewer)
    assert limited.fingerprint != alone.fingerprint
