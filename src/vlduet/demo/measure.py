"""The demo's measurements on its held-out records: the model, the parts it is built of, and the ridge baseline."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlduet import logs
from vlduet.data.formats import read_jsonl
from vlduet.data.records import ImageRef, Message, Record
from vlduet.demo.prepare import DemoData, build_model
from vlduet.eval import protocols
from vlduet.eval.ridge import evaluate_ridge_baseline
from vlduet.reports.compose import Measurement

if TYPE_CHECKING:
    from vlduet.encoders.frozen import FrozenEncoders
    from vlduet.model.duet import DuetModel

MAX_CAPTION_TOKENS, NUM_CAPTION_DRAFTS = 24, 8

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
"""Questions without an image and their answers: what joint training on images may make a model forget."""


def measure_model(
    model: DuetModel, data: DemoData, *, captioned: Sequence[Record], seed: int
) -> Measurement:
    """The held-out measurements of one model; `captioned` are the records that it writes a caption for."""
    write = partial(
        model.caption_images,
        max_new_tokens=MAX_CAPTION_TOKENS,
        num_drafts=NUM_CAPTION_DRAFTS,
    )
    return Measurement(
        retrieval=protocols.measure_retrieval(
            model.encode_document, model.encode_query, records=data.held_out
        ),
        mixed=protocols.measure_composed_retrieval(
            model.encode_document, model.encode_query, data.held_out, seed=seed
        ),
        entropy=protocols.measure_caption_cross_entropy(
            model.compute_caption_nll, data.held_out, seed=seed
        ),
        captions=protocols.measure_captions(write, captioned),
        known=frozenset(known),
        plain=text_only_nll(model),
    )


def measure_untrained_parts(to: Path, data: DemoData, *, seed: int) -> protocols.RetrievalResult:
    """What the parts find with a random projector and a random head: the model without any training of ours."""
    model = build_model(to, "untrained", seed=seed, bare=True)
    found = protocols.measure_retrieval(
        model.encode_document, model.encode_query, records=data.held_out
    )
    shutil.rmtree(to / "untrained")
    return found


def text_only_nll(model: DuetModel) -> float:
    """Nats a token of the answers in `PLAIN`, without any image."""
    import torch

    turns = [
        (Message("user", (question,)), Message("assistant", (answer,)))
        for question, answer in TEXT_ONLY_QUESTIONS
    ]
    with torch.no_grad():
        batch = model.collate(
            [
                model.renderer.render_chat(messages, add_generation_prompt=False)
                for messages in turns
            ]
        )
        return float(model.eval()(batch).nll.mean())


def fit_ridge_baseline(
    model: DuetModel, data: DemoData, *, encoders: FrozenEncoders
) -> protocols.RetrievalResult:
    """The baseline, on features of the model's own frozen vision tower and vectors of a frozen sentence encoder."""
    from vlduet.encoders.frozen import make_slice

    def texts(captions: list[str]) -> np.ndarray:
        slices = [make_slice(caption) for caption in captions]
        found = encoders.compute_vectors("text", slices)
        return np.stack([found[one.content_key].numpy() for one in slices])

    def images(refs: list[ImageRef]) -> np.ndarray:
        found = []
        for begin in logs.track_progress(range(0, len(refs), 32), label="image features, batches"):
            prepared = [model.prepare_image(ref) for ref in refs[begin : begin + 32]]
            features = model.vision_features(prepared).split(
                [image.num_features for image in prepared]
            )
            found += [one.mean(0).float().cpu().numpy() for one in features]
        return np.stack(found)  # [N, F]

    return evaluate_ridge_baseline(
        images,
        texts,
        train=[
            record
            for path in data.train_files
            for record in read_jsonl(path)
            if record.image and record.short
        ],
        validation=list(read_jsonl(data.validation_file)),
        held_out=data.held_out,
    )
