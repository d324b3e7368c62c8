"""`vlduet classify` on a tiny model: labels, images, JSON, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from helpers import tiny
from helpers.fake_embedder import COLOURS, paint
from vlduet.cli.main import app
from vlduet.data.records import ImageRef
from vlduet.encoders.dual import DualEncoder
from vlduet.encoders.frozen import FrozenEncoders
from vlduet.encoders.loading import open_encoder
from vlduet.errors import DataError, ImageError
from vlduet.eval.classification import classify
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny.build_duet_model(root / "base").save_pretrained(root / "mine")
    return root / "mine"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("red", "blue"):
        paint(tmp_path / f"photos/{name}.png", COLOURS[name])
    return tmp_path / "photos"


def invoke(*arguments: object) -> Result:
    """Run a command and raise its errors."""
    return RUNNER.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_images_are_classified_as_from_python(model: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a cat\na dog\na bird\n")
    options = ["--labels", tmp_path / "labels.txt"]
    result = json.loads(invoke("classify", model, photos, *options, "--json").stdout)
    assert result["labels"] == ["a cat", "a dog", "a bird"]
    files = [photos / "blue.png", photos / "red.png"]
    assert [row["image"] for row in result["images"]] == [str(file) for file in files]
    images = [ImageRef(path=file) for file in files]
    expected = classify(DuetModel.from_pretrained(model), images, result["labels"])
    for row, label, probabilities in zip(
        result["images"], expected.predicted_labels, expected.probabilities, strict=True
    ):
        assert row["label"] == label
        assert np.allclose(list(row["probabilities"].values()), probabilities, atol=1e-6)
    lines = invoke("classify", model, *files, *options).stdout.splitlines()
    assert [line.split("\t")[:2] for line in lines] == [
        [str(file), label] for file, label in zip(files, expected.predicted_labels, strict=True)
    ]


def test_templates_replace_the_default_ones(model: Path, photos: Path) -> None:
    command = ["classify", model, photos / "red.png", "--labels", "cat,dog", "--json"]
    default = json.loads(invoke(*command).stdout)["images"][0]
    other = json.loads(invoke(*command, "--template", "photo {} photo").stdout)["images"][0]
    assert default["probabilities"] != other["probabilities"]


def test_a_dual_encoder_classifies_too(photos: Path, tmp_path: Path) -> None:
    frozen = tiny.build_frozen_encoders(tmp_path / "frozen")
    roles = {role: open_encoder(frozen[role]) for role in ("vision", "text")}
    encoders = FrozenEncoders(roles, cache=FeatureCache(None))
    DualEncoder(encoders, dim=8).eval().save_pretrained(tmp_path / "dual")
    lines = invoke("classify", tmp_path / "dual", photos, "--labels", "a cat,a dog").stdout
    assert len(lines.splitlines()) == 2


def test_unusable_labels_and_images_are_named(model: Path, photos: Path) -> None:
    with pytest.raises(DataError, match="1 label"):
        invoke("classify", model, photos, "--labels", "labels.txt")
    with pytest.raises(DataError, match="occurs twice"):
        invoke("classify", model, photos, "--labels", "a,b,a")
    (photos / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images"):
        invoke("classify", model, photos / "empty", "--labels", "a,b")
    (photos / "broken.png").write_bytes(b"text")
    with pytest.raises(ImageError, match=r"broken\.png"):
        invoke("classify", model, photos, "--labels", "a,b")
