"""The ridge baseline against the closed form and, where it is installed, against scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vlduet.data.records import ImageRef, Record
from vlduet.eval.ridge import RidgeBaseline, RidgeValidation, evaluate_ridge_baseline


def make_pairs(
    num: int, *, noise: float, seed: int, width: int = 40, dim: int = 12
) -> tuple[np.ndarray, np.ndarray]:
    """Return features and text vectors, where features are a fixed linear map plus noise.

    Both have a common offset, which the baseline must remove.
    """
    linear_map = np.random.default_rng(0).normal(size=(dim, width))
    random = np.random.default_rng(seed)
    texts = random.normal(size=(num, dim)) + 0.5
    return texts @ linear_map + noise * random.normal(size=(num, width)) + 2.0, texts


def make_validation(noise: float) -> RidgeValidation:
    features, texts = make_pairs(60, noise=noise, seed=2)
    return RidgeValidation(features, texts, np.eye(60, dtype=bool))


@pytest.mark.parametrize("num", [25, 300])  # fewer and more rows than features
def test_weights_equal_the_closed_form(num: int) -> None:
    features, texts = make_pairs(num, noise=1.0, seed=1)
    baseline = RidgeBaseline.fit(features, texts, validation=make_validation(1.0))
    x = features / np.linalg.norm(features, axis=1, keepdims=True)
    y = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    x_centred = x - x.mean(0)
    y_centred = y - y.mean(0)
    gram = x_centred.T @ x_centred + baseline.penalty * np.eye(x.shape[1])
    closed_form = np.linalg.solve(gram, x_centred.T @ y_centred)
    np.testing.assert_allclose(baseline.weights, closed_form, rtol=1e-6, atol=1e-9)

    linear_model = pytest.importorskip("sklearn.linear_model")
    reference = linear_model.Ridge(alpha=baseline.penalty).fit(x, y)
    np.testing.assert_allclose(baseline.weights, reference.coef_.T, rtol=1e-6, atol=1e-9)
    predicted = reference.predict(x) - y.mean(0)
    predicted /= np.linalg.norm(predicted, axis=1, keepdims=True)
    np.testing.assert_allclose(baseline.embed_image(features), predicted, atol=1e-5)


def test_baseline_retrieves_unseen_pairs_with_vectors_of_unit_length() -> None:
    train_features, train_texts = make_pairs(200, noise=0.5, seed=1)
    baseline = RidgeBaseline.fit(train_features, train_texts, validation=make_validation(0.5))
    features, texts = make_pairs(100, noise=0.5, seed=3)
    images = baseline.embed_image(features)
    queries = baseline.embed_text(texts)
    for vectors in (images, queries):
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    nearest = (queries @ images.T).argmax(1)
    assert (nearest == np.arange(100)).mean() > 0.9


def test_penalty_is_the_best_of_the_grid_on_validation() -> None:
    # As many features as rows and much noise: without a penalty the fit is useless.
    features, texts = make_pairs(40, noise=20.0, seed=1)
    validation = make_validation(20.0)
    baseline = RidgeBaseline.fit(features, texts, validation=validation)
    rates = baseline.validation_hit_rates
    assert rates[baseline.penalty] == max(rates.values())
    assert baseline.penalty > min(rates)
    unpenalised = RidgeBaseline.fit(features, texts, validation=validation, grid=(1e-9,))
    assert rates[baseline.penalty] > unpenalised.validation_hit_rates[unpenalised.penalty]


def test_larger_penalty_is_chosen_between_equals() -> None:
    features, texts = make_pairs(200, noise=0.0, seed=1)
    baseline = RidgeBaseline.fit(
        features, texts, validation=make_validation(0.0), grid=(1e-6, 1e-5)
    )
    assert baseline.penalty == max(baseline.validation_hit_rates)


def test_baseline_is_fitted_and_measured_on_records() -> None:
    features, texts = make_pairs(260, noise=0.3, seed=1)
    records = [
        Record(f"r{i}", image=ImageRef(path=Path(f"{i}.png")), short=(f"caption {i}",))
        for i in range(260)
    ]
    # Two validation records share a caption: both images are relevant for it.
    records[201] = Record("twin", image=records[201].image, short=("Caption 200",))

    def embed_images(refs: list[ImageRef]) -> np.ndarray:
        return features[[int(ref.path.stem) for ref in refs if ref.path]]

    def embed_texts(captions: list[str]) -> np.ndarray:
        return texts[[int(caption.split()[1]) for caption in captions]]

    result = evaluate_ridge_baseline(
        embed_images,
        embed_texts,
        train=records[:200],
        validation=records[200:220],
        held_out=records[220:],
    )
    assert result.records == tuple(records[220:])
    assert result.text_to_image.hit_rates()["hit@1"] > 0.9
