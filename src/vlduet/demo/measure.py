"""The demo's measurements on its held-out records: the model, the parts it is built of, and the ridge baseline."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlduet import logs
from vlduet.data.records import ImageRef, Message, Record, read_jsonl
from vlduet.demo.prepare import Data, build_model
from vlduet.eval import protocols
from vlduet.eval.compose import Measurement
from vlduet.eval.ridge import ridge_baseline

if TYPE_CHECKING:
    from vlduet.model.duet import DuetModel
    from vlduet.model.encoders import Encoders

CAPTION_TOKENS, DRAFTS = 24, 8

PLAIN = (
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


def measure(model: DuetModel, data: Data, *, captioned: Sequence[Record], seed: int) -> Measurement:
    """The held-out measurements of one model; `captioned` are the records that it writes a caption for."""
    known = dict(zip(data.captions, model.encode_query(data.captions), strict=True))
    write = partial(model.caption, max_new_tokens=CAPTION_TOKENS, drafts=DRAFTS, known=known)
    return Measurement(
        retrieval=protocols.retrieval(model.encode_document, model.encode_query, records=data.held_out),
        mixed=protocols.mixed_retrieval(model.encode_document, model.encode_query, data.held_out, seed=seed),
        entropy=protocols.caption_cross_entropy(model.caption_nll, data.held_out, seed=seed),
        captions=protocols.captions(write, captioned),
        known=frozenset(known),
        plain=plain_nll(model),
    )


def measure_untrained(to: Path, data: Data, *, seed: int) -> protocols.RetrievalResult:
    """What the parts find with a random projector and a random head: the model without any training of ours."""
    model = build_model(to, "untrained", seed=seed, bare=True)
    found = protocols.retrieval(model.encode_document, model.encode_query, records=data.held_out)
    shutil.rmtree(to / "untrained")
    return found


def plain_nll(model: DuetModel) -> float:
    """Nats a token of the answers in `PLAIN`, without any image."""
    import torch

    turns = [(Message("user", (question,)), Message("assistant", (answer,))) for question, answer in PLAIN]
    with torch.no_grad():
        batch = model.collate([model.renderer.chat(messages, answer=False) for messages in turns])
        return float(model.eval()(batch).nll.mean())


def measure_ridge(model: DuetModel, data: Data, *, encoders: Encoders) -> protocols.RetrievalResult:
    """The baseline, on features of the model's own frozen vision tower and vectors of a frozen sentence encoder."""
    from vlduet.model.encoders import slice_of

    def texts(captions: list[str]) -> np.ndarray:
        slices = [slice_of(caption) for caption in captions]
        found = encoders.vectors("text", slices)
        return np.stack([found[one.key].numpy() for one in slices])

    def images(refs: list[ImageRef]) -> np.ndarray:
        found = []
        for begin in logs.progress(range(0, len(refs), 32), label="image features, batches"):
            prepared = [model.prepare(ref) for ref in refs[begin : begin + 32]]
            features = model.vision_features(prepared).split([image.num_features for image in prepared])
            found += [one.mean(0).float().cpu().numpy() for one in features]
        return np.stack(found)  # [N, F]

    return ridge_baseline(
        images,
        texts,
        train=[record for path in data.train for record in read_jsonl(path) if record.image and record.short],
        validation=list(read_jsonl(data.validation)),
        held_out=data.held_out,
    )
