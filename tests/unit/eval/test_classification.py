"""Zero-shot classification: the same as cosines by hand, and errors that name the cause."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from helpers.fake_embedder import COLOURS, FakeModel, paint
from vlduet import Classification, classify
from vlduet.data.labels import TEMPLATES
from vlduet.data.records import ImageRef, Part, Parts
from vlduet.errors import DataError, ImageError
from vlduet.eval.classification import list_images, read_labels


class TemperatureModel(FakeModel):
    """Fake model with the temperature exp(-2)."""

    logit_scale = np.float64(2.0)

    def encode(self, items: Sequence[Part | Parts]) -> np.ndarray:
        return self.encode_document(items)


@pytest.fixture
def images(tmp_path: Path) -> list[ImageRef]:
    return [ImageRef(path=paint(tmp_path / f"{name}.png", COLOURS[name])) for name in COLOURS]


def test_images_are_of_the_label_with_the_nearest_prompts(images: list[ImageRef]) -> None:
    result = classify(TemperatureModel(), images, list(COLOURS))
    assert isinstance(result, Classification)
    assert result.predicted_labels == list(COLOURS) == list(result.labels)
    assert np.allclose(result.probabilities.sum(1), 1)


def test_probabilities_are_a_softmax_of_plain_cosines(images: list[ImageRef]) -> None:
    model = TemperatureModel()
    labels = ["red", "a blue cat", "green"]
    result = classify(model, images, labels)
    vectors = model.encode(images)
    for n, row in enumerate(result.probabilities):
        logits = []
        for label in labels:
            prompts = model.encode([template.format(label) for template in TEMPLATES])
            mean = prompts.mean(0)
            logits.append(np.exp(2.0) * (vectors[n] @ mean) / np.linalg.norm(mean))
        expected = np.exp(logits) / np.exp(logits).sum()
        assert np.allclose(row, expected, atol=1e-5)


def test_a_low_temperature_makes_probabilities_sure(images: list[ImageRef]) -> None:
    sure = classify(TemperatureModel(), images, ["red", "blue"], temperature=1e-4)
    unsure = classify(TemperatureModel(), images, ["red", "blue"], temperature=1e4)
    assert sure.probabilities[0, 0] == pytest.approx(1.0)
    assert np.allclose(unsure.probabilities, 0.5, atol=1e-3)


def test_templates_are_used(images: list[ImageRef]) -> None:
    result = classify(TemperatureModel(), images[:1], ["x", "y"], templates=["blue {}", "red {}"])
    assert np.allclose(result.probabilities.sum(), 1)
    with pytest.raises(DataError, match="a template without"):
        classify(TemperatureModel(), images, ["x", "y"], templates=["blue"])


def test_no_images_give_no_rows() -> None:
    result = classify(TemperatureModel(), [], ["a", "b"])
    assert result.probabilities.shape == (0, 2) and result.predicted_labels == []


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "0 label"),
        (["a"], "1 label"),
        (["a", " "], "label 2 is empty"),
        (["a", "b", "A "], "'A ' occurs twice, as 1 and 3"),
    ],
)
def test_unusable_labels_are_named(labels: list[str], message: str, images: list[ImageRef]) -> None:
    with pytest.raises(DataError, match=message):
        classify(TemperatureModel(), images, labels)


def test_a_temperature_must_be_positive(images: list[ImageRef]) -> None:
    with pytest.raises(DataError, match="temperature 0"):
        classify(TemperatureModel(), images, ["a", "b"], temperature=0.0)


def test_an_unreadable_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"x\.png"):
        classify(TemperatureModel(), list_images([tmp_path / "x.png"]), ["a", "b"])


def test_labels_are_read_from_a_file_or_a_text(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_text("a cat\n\n a dog, brown \n", encoding="utf-8-sig")
    assert read_labels(str(file)) == ["a cat", "a dog, brown"]
    assert read_labels("a cat, a dog,,") == ["a cat", "a dog"]
    assert len(read_labels(",".join(f"label {n}" for n in range(500)))) == 500
    with pytest.raises(DataError, match=r"missing\.txt: 1 label"):
        read_labels("missing.txt")
    file.write_bytes(b"\xff\xfea")
    with pytest.raises(DataError, match="not UTF-8"):
        read_labels(str(file))


def test_images_of_folders_are_sorted_and_hidden_ones_skipped(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.png", ".cache/d.png", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    paths = [ref.path for ref in list_images([tmp_path, tmp_path / "e.txt"])]
    names = ["a.JPG", "b.png", "sub/c.png", "e.txt"]
    assert paths == [tmp_path / name for name in names]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images in this folder"):
        list_images([tmp_path / "empty"])
    with pytest.raises(DataError, match="no such image"):
        list_images([tmp_path / "missing.png"])
