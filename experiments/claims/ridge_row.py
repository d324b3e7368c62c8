"""The ridge baseline as a row: a linear map from image features to text vectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from protocol import StudyPaths
from subjects import Embed, read_pairs

from vlduet.config import RunConfig
from vlduet.data.records import ImageRef
from vlduet.demo.measure import compute_mean_features
from vlduet.encoders.loading import open_encoder
from vlduet.eval.protocols import image_and_captions
from vlduet.eval.ridge import RidgeBaseline, RidgeValidation
from vlduet.harness.builtin import as_embedder
from vlduet.model.duet import DuetModel


def fit_ridge(config: RunConfig, paths: StudyPaths) -> tuple[Embed, Embed]:
    """Fit the baseline on the training sources of a config, and return its two embedders.

    Features are those of the base model's vision tower, averaged over the image; texts are embedded
    by MiniLM. The penalty is chosen on the validation split of stamps. Every short caption of a
    training record is a pair.

    Returns:
        Function that embeds images.
        Function that embeds texts.
    """
    model = DuetModel.from_pretrained(paths.model, check_golden=False)
    embed_parts = as_embedder(open_encoder(paths.minilm))

    def embed_texts(texts: Sequence[str]) -> np.ndarray:
        """Return MiniLM's vectors, float[N, E]."""
        return embed_parts([(text,) for text in texts], True)

    embed_images = partial(compute_mean_features, model)

    images: list[ImageRef] = []
    captions: list[str] = []
    for source in config.data.train:
        for record in read_pairs(source.path):
            image, short = image_and_captions(record)
            images += [image] * len(short)
            captions += short
    distinct = list(dict.fromkeys(images))
    rows = {image: row for row, image in enumerate(distinct)}
    features = embed_images(distinct)[[rows[image] for image in images]]
    pairs = [
        image_and_captions(record) for record in read_pairs(paths.data / "stamps" / "val.jsonl")
    ]
    texts = list(dict.fromkeys(short[0] for _, short in pairs))
    relevant = np.array(texts)[:, None] == np.array([short[0] for _, short in pairs])[None]
    baseline = RidgeBaseline.fit(
        features,
        embed_texts(captions),
        validation=RidgeValidation(
            embed_images([image for image, _ in pairs]), embed_texts(texts), relevant
        ),
    )
    return (
        lambda items: baseline.embed_image(embed_images(items)),
        lambda items: baseline.embed_text(embed_texts(items)),
    )
