"""Measurements of the demo on its held-out records.

Measured are the model before and after training, and a ridge baseline.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlduet.data.content_keys import text_key
from vlduet.data.formats import read_jsonl
from vlduet.data.records import ImageRef
from vlduet.demo.prepare import DemoData, open_model
from vlduet.eval import protocols
from vlduet.eval.plain_questions import PLAIN_QUESTIONS
from vlduet.eval.ridge import evaluate_ridge_baseline
from vlduet.logs import track_progress
from vlduet.reports.demo_report import ModelResults, TradeOffPoint, make_trade_off_point

if TYPE_CHECKING:
    from vlduet.config import RunConfig
    from vlduet.encoders.frozen import FrozenEncoders
    from vlduet.model.duet import DuetModel

MAX_CAPTION_TOKENS = 24
NUM_CAPTION_DRAFTS = 4
"""Number of drafts per caption; the model's embedding chooses the one nearest to the image.

Four drafts for all held-out images take as long as eight drafts for 54 of them.
"""
IMAGES_PER_BATCH = 32
"""Number of images that pass through the vision tower at once."""


def measure_model(model: DuetModel, data: DemoData, *, seed: int) -> ModelResults:
    """Return all held-out measurements of one model, whose mode is restored.

    Args:
        seed: Seed of the random choices in the measurements (joined queries, wrong images).

    Raises:
        DataError: No records are held out, one lacks an image or a short caption, an image cannot
            be read, or a record shares a caption with all others.
    """
    write_captions = partial(
        model.caption_images, max_new_tokens=MAX_CAPTION_TOKENS, num_drafts=NUM_CAPTION_DRAFTS
    )
    return ModelResults(
        retrieval=protocols.measure_retrieval(
            model.encode_document, model.encode_query, records=data.held_out
        ),
        composed=protocols.measure_composed_retrieval(
            model.encode_document, model.encode_query, data.held_out, seed=seed
        ),
        cross_entropy=protocols.measure_caption_cross_entropy(
            model.compute_caption_nll, data.held_out, seed=seed
        ),
        captions=protocols.measure_captions(write_captions, data.held_out),
        answers=measure_plain_answers(model),
    )


def measure_plain_answers(model: DuetModel) -> protocols.AnswerCrossEntropy:
    """Return the negative log likelihood of the answers to `PLAIN_QUESTIONS`.

    Each answer is scored after its question. The model's mode is restored.
    """
    from vlduet.model.likelihood import compute_answer_nll

    totals, counts = zip(*compute_answer_nll(model, PLAIN_QUESTIONS), strict=True)
    return protocols.AnswerCrossEntropy(
        np.array(totals, dtype=np.float64), np.array(counts, dtype=np.float64)
    )


def count_copied_captions(captions: protocols.CaptionResult, data: DemoData) -> int:
    """Return how many generated captions equal a caption of the training records (`text_key`)."""
    known = {
        text_key(caption) for record in read_jsonl(data.train_file) for caption in record.short
    }
    return sum(text_key(item.generated) in known for item in captions.items)


def train_single_losses(to: Path, config: RunConfig, data: DemoData) -> tuple[TradeOffPoint, ...]:
    """Train the base with each loss of a run alone, and return the points of the two models.

    The runs write into ``to/language`` and ``to/contrastive``; all but the losses is as in
    `config`. Raises as `train`.
    """
    from vlduet.train.loop import train

    points = []
    for name in ("language", "contrastive"):
        objectives = {name: config.objectives[name]}
        run = config.model_copy(update={"out": to / name, "objectives": objectives})
        train(run)
        model = open_model(to / name, "model")
        retrieval = protocols.measure_retrieval(
            model.encode_document, model.encode_query, records=data.held_out
        )
        cross_entropy = protocols.measure_caption_cross_entropy(
            model.compute_caption_nll, data.held_out, seed=config.seed
        )
        points.append(make_trade_off_point(f"{name} loss alone", retrieval, cross_entropy))
    return tuple(points)


def read_published_points() -> tuple[TradeOffPoint, ...]:
    """Return the points of the models with one loss that ``vlduet demo --full`` has published.

    They are in ``single_losses.json`` beside this module, and in docs/results/demo.md.
    """
    text = Path(__file__).with_name("single_losses.json").read_text(encoding="utf-8")
    return tuple(
        TradeOffPoint(name, row["hit@10"], row["nats"], row["nats_gap"], is_of_this_run=False)
        for name, row in json.loads(text).items()
    )


def compute_mean_features(model: DuetModel, refs: Sequence[ImageRef]) -> np.ndarray:
    """Return the mean vision feature of every image, float[N, F], and show the progress.

    Features come from the model's frozen vision tower, or from its cache. No images raise
    ValueError; an unreadable one raises ImageError.
    """
    means: list[np.ndarray] = []
    starts = range(0, len(refs), IMAGES_PER_BATCH)
    for begin in track_progress(starts, label="image features, batches"):
        images = [model.prepare_image(ref) for ref in refs[begin : begin + IMAGES_PER_BATCH]]
        features = model.vision_features(images)  # [all tokens of the batch, F]
        parts = features.split([image.num_features for image in images])
        means += [part.mean(0).float().cpu().numpy() for part in parts]
    return np.stack(means)


def fit_ridge_baseline(
    model: DuetModel, data: DemoData, *, encoders: FrozenEncoders
) -> protocols.RetrievalResult:
    """Fit the ridge baseline on the training records, and return its held-out retrieval.

    It maps features of the model's own frozen vision tower, averaged over the image, to the vectors
    of the encoder with the role ``text`` in `encoders`. Only the first caption of a training or
    validation record is used; training records without image or caption are left out. Features are
    stored in the caches of `model` and `encoders`, and progress is logged.

    Raises:
        DataError: A held-out or validation record lacks an image or a caption, or an image cannot
            be read.
        ValueError: There are no training or no validation records.
    """
    from vlduet.encoders.frozen import make_slice

    def embed_texts(captions: list[str]) -> np.ndarray:
        """Return the text encoder's vectors, float[N, E]; ValueError for no captions."""
        slices = [make_slice(caption) for caption in captions]
        vectors = encoders.compute_vectors("text", slices)
        return np.stack([vectors[text.content_key].numpy() for text in slices])

    training_records = [
        record for record in read_jsonl(data.train_file) if record.image and record.short
    ]
    return evaluate_ridge_baseline(
        partial(compute_mean_features, model),
        embed_texts,
        train=training_records,
        validation=list(read_jsonl(data.validation_file)),
        held_out=data.held_out,
    )
