"""The baseline against the closed form and, where it is installed, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from vlduet.eval.ridge import RidgeBaseline, RidgeValidation


def world(
    num: int, *, noise: float, seed: int, width: int = 40, dim: int = 12
) -> tuple[np.ndarray, np.ndarray]:
    """Features that are a fixed linear view of the text vectors, plus noise and a common offset."""
    view = np.random.default_rng(0).normal(size=(dim, width))
    random = np.random.default_rng(seed)
    texts = random.normal(size=(num, dim)) + 0.5
    return texts @ view + noise * random.normal(size=(num, width)) + 2.0, texts


def validation(noise: float) -> RidgeValidation:
    features, texts = world(60, noise=noise, seed=2)
    return RidgeValidation(features, texts, np.eye(60, dtype=bool))


@pytest.mark.parametrize("num", [25, 300])  # fewer and more rows than features
def test_weights_equal_the_closed_form(num: int) -> None:
    features, texts = world(num, noise=1.0, seed=1)
    fitted = RidgeBaseline.fit(features, texts, validation=validation(1.0))
    x = features / np.linalg.norm(features, axis=1, keepdims=True)
    y = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    xc, yc = x - x.mean(0), y - y.mean(0)
    closed = np.linalg.solve(xc.T @ xc + fitted.penalty * np.eye(x.shape[1]), xc.T @ yc)
    np.testing.assert_allclose(fitted.weights, closed, rtol=1e-6, atol=1e-9)

    linear = pytest.importorskip("sklearn.linear_model")
    theirs = linear.Ridge(alpha=fitted.penalty).fit(x, y)
    np.testing.assert_allclose(fitted.weights, theirs.coef_.T, rtol=1e-6, atol=1e-9)
    predicted = theirs.predict(x) - y.mean(0)
    predicted /= np.linalg.norm(predicted, axis=1, keepdims=True)
    np.testing.assert_allclose(fitted.embed_image(features), predicted, atol=1e-5)


def test_it_retrieves_what_it_was_not_fitted_on_and_vectors_are_of_unit_length() -> None:
    fitted = RidgeBaseline.fit(*world(200, noise=0.5, seed=1), validation=validation(0.5))
    features, texts = world(100, noise=0.5, seed=3)
    images, queries = fitted.embed_image(features), fitted.embed_text(texts)
    for vectors in (images, queries):
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert ((queries @ images.T).argmax(1) == np.arange(100)).mean() > 0.9


def test_the_penalty_is_the_best_of_the_grid_on_validation() -> None:
    # As many features as rows and much noise: without a penalty the fit is useless.
    fitted = RidgeBaseline.fit(*world(40, noise=20.0, seed=1), validation=validation(20.0))
    assert fitted.validation_hit_rates[fitted.penalty] == max(fitted.validation_hit_rates.values())
    assert fitted.penalty > min(fitted.validation_hit_rates)
    one = RidgeBaseline.fit(
        *world(40, noise=20.0, seed=1), validation=validation(20.0), grid=(1e-9,)
    )
    assert fitted.validation_hit_rates[fitted.penalty] > one.validation_hit_rates[one.penalty]


def test_equal_penalties_prefer_the_larger() -> None:
    features, texts = world(200, noise=0.0, seed=1)
    fitted = RidgeBaseline.fit(features, texts, validation=validation(0.0), grid=(1e-6, 1e-5))
    assert fitted.penalty == max(fitted.validation_hit_rates)
