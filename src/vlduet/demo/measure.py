"""Measurements of the demo on its held-out records.

Measured are the model before and after training, its parts without training, and a ridge baseline.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlduet.data.formats import read_jsonl
from vlduet.data.records import ImageRef, Message, Record
from vlduet.demo.prepare import DemoData, build_model
from vlduet.eval import protocols
from vlduet.eval.ridge import evaluate_ridge_baseline
from vlduet.logs import track_progress
from vlduet.reports.demo_report import ModelResults

if TYPE_CHECKING:
    from vlduet.encoders.frozen import FrozenEncoders
    from vlduet.model.duet import DuetModel

MAX_CAPTION_TOKENS = 24
NUM_CAPTION_DRAFTS = 4
"""Number of drafts per caption; the model's embedding chooses the one nearest to the image.

Four drafts for all held-out images take as long as eight drafts for 54 of them.
"""
IMAGES_PER_BATCH = 32
"""Number of images that pass through the vision tower at once."""

TEXT_ONLY_QUESTIONS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("What do bees make?", "Bees make honey."),
    ("What color is the sky on a clear day?", "The sky is blue on a clear day."),
    ("What is two plus three?", "Two plus three is five."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
    ("What is ice?", "Ice is frozen water."),
    ("Why do people sleep?", "People sleep so that their body and mind can rest and recover."),
)
"""Questions without an image, with answers: they show what training makes a model forget."""


def measure_model(
    model: DuetModel, data: DemoData, *, captioned: Sequence[Record], seed: int
) -> ModelResults:
    """Return all held-out measurements of one model, whose mode is restored.

    Args:
        captioned: Held-out records whose images the model writes a caption for.
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
        captions=protocols.measure_captions(write_captions, captioned),
        text_only_nats=compute_text_only_nll(model),
    )


def measure_untrained_parts(to: Path, data: DemoData, *, seed: int) -> protocols.RetrievalResult:
    """Return the retrieval of the default model's public parts with a random projector and head.

    The model is built in ``to/untrained``, which is deleted afterwards unless an error occurs, with
    torch's global seed set to `seed`. Raises as `build_model` and `protocols.measure_retrieval`.
    """
    model = build_model(to, "untrained", seed=seed, untrained=True)
    retrieval = protocols.measure_retrieval(
        model.encode_document, model.encode_query, records=data.held_out
    )
    shutil.rmtree(to / "untrained")
    return retrieval


def compute_text_only_nll(model: DuetModel) -> float:
    """Return the mean negative log likelihood, in nats, of all tokens of the text-only answers.

    They are those of `TEXT_ONLY_QUESTIONS`, each after its question. The model's mode is restored.
    """
    import torch

    from vlduet.model.backbone import eval_mode

    sequences = []
    for question, answer in TEXT_ONLY_QUESTIONS:
        messages = (Message("user", (question,)), Message("assistant", (answer,)))
        sequences.append(model.renderer.render_chat(messages, add_generation_prompt=False))
    with torch.no_grad(), eval_mode(model):
        return float(model(model.collate(sequences)).nll.mean())


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

    def embed_images(refs: list[ImageRef]) -> np.ndarray:
        """Return the mean vision feature of every image, float[N, F], and show the progress.

        No images raise ValueError.
        """
        means: list[np.ndarray] = []
        starts = range(0, len(refs), IMAGES_PER_BATCH)
        for begin in track_progress(starts, label="image features, batches"):
            images = [model.prepare_image(ref) for ref in refs[begin : begin + IMAGES_PER_BATCH]]
            features = model.vision_features(images)  # [all tokens of the batch, F]
            parts = features.split([image.num_features for image in images])
            means += [part.mean(0).float().cpu().numpy() for part in parts]
        return np.stack(means)

    training_records = [
        record
        for path in data.train_files
        for record in read_jsonl(path)
        if record.image and record.short
    ]
    return evaluate_ridge_baseline(
        embed_images,
        embed_texts,
        train=training_records,
        validation=list(read_jsonl(data.validation_file)),
        held_out=data.held_out,
    )
