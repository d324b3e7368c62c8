"""A dual encoder through the training loop, and as encoder, embedder and index model afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from helpers import runs, tiny
from vlduet import config
from vlduet.cli.main import app
from vlduet.data.formats import read_records
from vlduet.encoders.dual import DualEncoder, open_dual_as_encoder, open_embedder
from vlduet.encoders.loading import open_encoder
from vlduet.errors import DataError, ModelError
from vlduet.logs import read_metrics
from vlduet.model.feature_cache import FeatureCache
from vlduet.train.loader import iterate_batches
from vlduet.train.loop import train
from vlduet.train.plan import plan_run
from vlduet.train.setup import prepare_run
from vlduet.workflows.validation import make_validator


@pytest.fixture(scope="module")
def dual(tmp_path_factory: pytest.TempPathFactory, encoders: dict[str, str]) -> Path:
    """The folder of a dual encoder that has learned eight pairs; tests must not change it."""
    folder = tmp_path_factory.mktemp("dual")
    rows = []
    for i in range(8):
        runs.write_image(folder / f"pair{i}.png", 10 + i)
        rows.append({"id": str(i), "image": f"pair{i}.png", "short": f"number {i}"})
    pairs = runs.write_rows(folder / "pairs.jsonl", rows)
    tree = yaml.safe_load((config.PRESETS_FOLDER / "clip-nano.yaml").read_text())
    tree["data"] = {"train": [{"path": str(pairs)}], "validation": str(pairs)}
    tree["out"] = str(folder / "clip")
    tree["encoders"] = {role: encoders[role] for role in ("vision", "text")}
    tree["train"] |= {"steps": 200, "batch_size": 8, "eval_every": 200, "log_every": 20, "lr": 3e-3}
    run_config = config.validate_run_config(tree, place="test")
    assert plan_run(run_config)["trainable parameters"] > 0
    validator = make_validator(pairs, seed=0)
    return train(run_config, evaluate=validator, calibrate=validator.calibrate)


def test_it_learns_pairs(dual: Path) -> None:
    rows = read_metrics(dual.parent / "metrics.jsonl")
    losses = [row["contrastive"] for row in rows if "contrastive" in row]
    assert losses[-1] < losses[0] / 2
    *_, last = [row for row in rows if "validation/text_to_image/hit@1" in row]
    assert last["validation/text_to_image/hit@1"] > 0.9
    assert "validation/caption_cross_entropy" not in last, "a dual encoder has no likelihoods"


def test_it_opens_as_it_was_saved(dual: Path) -> None:
    model = DualEncoder.from_pretrained(dual)
    image, same, other = model.encode([tiny.random_image(10), "number 0", "number 1"])
    assert image.shape == (256,)
    norms = np.linalg.norm([image, same, other], axis=1)
    assert np.allclose(norms, 1, atol=1e-5)
    assert image @ same > image @ other
    statistics = model.score_statistics
    assert statistics is not None and statistics.num_records == 8
    types = {(query, document) for query in ("text", "image") for document in ("text", "image")}
    assert set(statistics.distributions) == types, "it does not embed an image with a text"


def test_a_changed_encoder_and_a_broken_manifest_are_refused(dual: Path) -> None:
    changed = shutil.copytree(dual, dual.with_name("changed"))
    manifest = json.loads((changed / "dual.json").read_text())
    manifest["encoders"]["text"]["fingerprint"] = "other"
    for key in ("files", "manifest_sha256"):  # an earlier version wrote none
        del manifest[key]
    (changed / "dual.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"the text encoder .* is another one now"):
        DualEncoder.from_pretrained(changed)
    (changed / "dual.json").write_text("{}")
    with pytest.raises(ModelError, match="'format' is missing"):
        DualEncoder.from_pretrained(changed)


@pytest.mark.parametrize("name", ["dual.json", "dual.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "half", "flipped"])
def test_a_damaged_file_of_a_dual_encoder_is_named(
    dual: Path, tmp_path: Path, name: str, damage: str
) -> None:
    folder = shutil.copytree(dual, tmp_path / "copy")
    content = bytearray((folder / name).read_bytes())
    (folder / name).unlink()
    if damage == "half":
        (folder / name).write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        position = content.index(b'"dim": 256') + 9 if name == "dual.json" else len(content) - 1
        content[position] ^= 1
        (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"copy/{name}: ") as error_info:
        DualEncoder.from_pretrained(folder)
    assert "Copy the folder again" in str(error_info.value)


@pytest.mark.parametrize("changes", [{"dim": 10**10}, {"widths": {"vision": 10**10, "text": 16}}])
def test_a_size_that_no_tensor_has_is_refused(dual: Path, changes: dict[str, object]) -> None:
    folder = shutil.copytree(dual, dual.with_name(f"changed-{next(iter(changes))}"))
    manifest = json.loads((folder / "dual.json").read_text()) | changes
    for key in ("files", "manifest_sha256"):
        del manifest[key]
    (folder / "dual.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="is 10000000000, which no tensor in dual"):
        DualEncoder.from_pretrained(folder)


def test_sugar_accepts_it_as_cross_encoder(
    dual: Path, encoders: dict[str, str], tmp_path: Path
) -> None:
    run_config = runs.make_sugar_config(tmp_path, {**encoders, "cross": str(dual)})
    run = prepare_run(run_config, write_files=False)
    ((_, [batch]),) = iterate_batches(run, 3)
    slices = [item for anchor in batch.anchors for item in anchor.slices]
    assert {len(item.features["cross"]) for item in slices} == {256}
    (expected,) = DualEncoder.from_pretrained(dual).encode([slices[0].part])
    assert np.allclose(expected, slices[0].features["cross"].numpy(), atol=1e-6)
    vision_fingerprint = open_encoder(Path(encoders["vision"])).fingerprint
    assert vision_fingerprint != run.encoders.by_role["cross"].fingerprint


def test_it_embeds_single_images_and_texts_only(dual: Path) -> None:
    with pytest.raises(DataError, match="one image or one text"):
        DualEncoder.from_pretrained(dual).encode([(tiny.random_image(1), "what?")])


def test_it_has_the_same_fingerprint_as_embedder_and_as_encoder(dual: Path) -> None:
    encoder = open_dual_as_encoder(dual, cache=FeatureCache(None))
    assert open_embedder(dual).fingerprint == encoder.fingerprint


def test_it_searches_and_does_not_answer(dual: Path, tmp_path: Path) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    photos.mkdir()
    for i in (10, 11):
        runs.write_image(photos / f"{i}.png", i)
    runner = CliRunner()
    indexed = runner.invoke(app, ["index", str(dual), str(photos), "--to", str(index)])
    assert indexed.exit_code == 0
    search = runner.invoke(app, ["search", str(index), "number 1", "--json"])
    assert [hit["id"] for hit in json.loads(search.stdout)["hits"]] == ["11.png", "10.png"]
    with pytest.raises(ModelError, match=r"a dual encoder, which embeds and cannot generate"):
        runner.invoke(app, ["ask", str(index), "what?"], catch_exceptions=False)


def test_it_mines_negatives_and_aligns_records(dual: Path, tmp_path: Path) -> None:
    rows = []
    for i in (10, 11):
        runs.write_image(tmp_path / f"{i}.png", i)
        rows.append({"id": str(i), "image": f"{i}.png", "short": f"number {i - 10}"})
    pairs = str(runs.write_rows(tmp_path / "pairs.jsonl", rows))
    mined_path = tmp_path / "mined.jsonl"
    runner = CliRunner()
    mined = runner.invoke(app, ["mine", str(dual), pairs, "--to", str(mined_path), "-k", "1"])
    assert mined.exit_code == 0
    negatives = [record.negative for record in read_records(mined_path)]
    assert negatives == [(("number 1",),), (("number 0",),)]
    arguments = ["align", f"{pairs}:0", f"{pairs}:1", "--model", str(dual), "--json"]
    aligned = runner.invoke(app, arguments)
    assert aligned.exit_code == 0
    assert np.isfinite(json.loads(aligned.stdout)["cosines"]).all()
