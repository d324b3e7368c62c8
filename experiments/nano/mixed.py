"""Teach nano queries of an image and words: the shipped part goes on from the one that `base.py` made.

    python experiments/nano/mixed.py --data runs/nano-base/data --out runs/nano-mixed

The teacher is the model itself, as it is at the start. Of an image and words together the student shall say the sum of
what the teacher says of either; of either alone, and of every next token, what the teacher says. So any image goes with any
words, and no caption teaches anything.

1. material  all of `base.py`'s: pictures, classes as pictures, words and phrases; held out what is held out there
2. train     LoRA alone: cosine to the teacher's vectors (image and words; image; words), divergence from its next tokens
3. write     nano.safetensors, and a record of what was done
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence as Rows
from pathlib import Path

import numpy as np
import torch
from base import (
    KINDS,
    PACK,
    Deck,
    Material,
    Source,
    image_sequence,
    prepare,
    replay,
    shown_sequence,
    text_sequence,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vlduet.data.batches import Batch
from vlduet.data.sequences import Sequence
from vlduet.eval.metrics import HIT_CUTOFFS
from vlduet.eval.protocols import measure_composed_retrieval
from vlduet.logs import ProgressBar, install_log_handler, logger
from vlduet.model import nano
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import find_supervised_positions
from vlduet.workflows.validation import compute_validation_metrics

SHIPPED = Path(nano.__file__).with_name("nano.safetensors")
CAPTIONED = {"stamps": 6, "emoji": 1, "classes": 2}
"""Of each kind a step: images with their captions."""
ROLES = ("mixed", "image", "text")


def mixed_sequence(model: DuetModel, source: Source, i: int, text: str) -> Sequence:
    """Image tokens and words, read at the last of these, as nano renders a query of both."""
    builder = model.renderer.new_builder()
    builder.append_control(nano.START_TOKEN)
    builder.append_image(source.images[i])
    _, end = builder.append_text(text, supervised=True)
    builder.add_anchor(
        (end - 1, end), role="mixed", record_name=text, content_key=source.images[i].cache_key
    )
    builder.append_tokens(
        model.renderer.eos_token_ids[:1], supervised=True
    )  # whether it comes here is the teacher's to say
    return builder.build(10**6)


def said(model: DuetModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Unit vectors of all anchors, float[A, D], and log probabilities where a label is, float[S, vocabulary]."""
    hidden = model.hidden_states(batch)
    rows, at = find_supervised_positions(batch.labels)
    logits = model.backbone.lm_head(hidden[rows, at - 1])
    return model.embed_anchors(batch, hidden, batch.anchor_spans), F.log_softmax(logits, dim=-1)


def distances(model: DuetModel, teacher: DuetModel, batch: Batch) -> dict[str, Tensor]:
    """1 - cosine by role, and the divergence of next tokens in nats. What is mixed is in the batch alone, too."""
    vectors, words = said(model, batch)
    with torch.no_grad():
        their_vectors, their_words = said(teacher, batch)
    seen, read = (
        {
            getattr(a, name): v
            for a, v in zip(batch.anchors, their_vectors, strict=True)
            if a.role == role
        }
        for role, name in (("image", "key"), ("text", "record"))
    )
    found: dict[str, list[Tensor]] = {role: [] for role in ROLES}
    for anchor, vector, theirs in zip(batch.anchors, vectors, their_vectors, strict=True):
        wanted = (
            seen[anchor.content_key] + read[anchor.record_name.lower()]
            if anchor.role == "mixed"
            else theirs
        )
        found[anchor.role].append(1 - F.cosine_similarity(vector, wanted, dim=0))
    kl = (their_words.exp() * (their_words - words)).sum(1).mean()
    return {role: torch.stack(values).mean() for role, values in found.items()} | {"language": kl}


def train(
    model: DuetModel,
    teacher: DuetModel,
    data: Material,
    *,
    replayed: Rows[Sequence],
    options: argparse.Namespace,
) -> list[dict[str, float]]:
    """The loop. Returns what was logged."""
    parameters = list(model.adapter_tensors().values())
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.01)
    everything = sorted(
        {c for source in (*data.sources.values(), data.texts) for c in source.captions}
    )
    texts = Source(everything, [], torch.empty(0))
    decks, asked = {k: Deck(len(s.images)) for k, s in data.sources.items()}, Deck(len(everything))
    log, began = [], time.monotonic()
    with ProgressBar(total=options.steps, label="train") as bar:
        for step in range(options.steps):
            for group in optimizer.param_groups:
                factor = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / options.steps))
                group["lr"] = options.lr * min(1.0, (step + 1) / 15) * factor
            sequences = []
            for kind, count in zip(KINDS, options.mixed, strict=True):
                source = data.sources[kind]
                for i, j in zip(decks[kind].draw(count), asked.draw(count), strict=True):
                    sequences += [mixed_sequence(model, source, i, everything[j])]
                    sequences += [image_sequence(model, source, i), text_sequence(model, texts, j)]
                captioned = decks[kind].draw(CAPTIONED[kind])
                sequences += [image_sequence(model, source, i, caption=True) for i in captioned]
            if step % 2:
                sequences.append(random.choice(replayed))
            else:
                i = random.randrange(len(data.refs))
                sequences.append(
                    shown_sequence(model, data.refs[i], data.sources["stamps"].captions[i])
                )
            losses = distances(model, teacher, model.collate(sequences, pack_to=PACK))
            loss = sum(
                (options.weights[name] * value for name, value in losses.items()), torch.zeros(())
            )
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            told = {name: round(float(value.detach()), 4) for name, value in losses.items()}
            bar.advance(1, note=" ".join(f"{name} {value:.3f}" for name, value in told.items()))
            if step % 20 == 0:
                log.append({"step": step, "seconds": round(time.monotonic() - began, 1), **told})
    return log


def judge(model: DuetModel, data: Material) -> dict[str, float]:
    """Validation: what `measure` says, and queries of an image and words, joined in five ways."""
    asked = [
        measure_composed_retrieval(
            model.encode_document, model.encode_query, data.validation, seed=i
        )
        for i in range(5)
    ]
    found = [one.hit_values(max(HIT_CUTOFFS)) for one in asked]
    mixed = {f"mixed/{what}": float(np.mean([f[what].mean() for f in found])) for what in found[0]}
    return compute_validation_metrics(model, data.validation, seed=0) | mixed


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, default=SHIPPED, help="what base.py made")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument(
        "--mixed", type=int, nargs=3, default=[12, 6, 6], help="of stamps, emoji, classes a step"
    )
    parser.add_argument(
        "--replayed", type=int, default=64, help="questions that SmolLM2 answers itself"
    )
    parser.add_argument("--lr", type=float, default=2e-4)
    weights = {"mixed": 20.0, "text": 20.0, "image": 10.0, "language": 5.0}
    parser.add_argument("--weights", type=json.loads, default=weights)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    install_log_handler()
    began = time.monotonic()
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    model, data = prepare(options.data, options.out, seed=options.seed)
    replayed = replay(model, data.sources["classes"].captions, count=options.replayed)
    teacher = DuetModel.from_pretrained(options.out / "bare")
    teacher.feature_cache = model.feature_cache
    for one in (model, teacher):
        one.make_trainable(lora=nano.BASE_LORA, projector=True)
        nano.load_trained_tensors(one, load_file(options.start))
    start = judge(model, data)
    logger.info(f"validation at the start: {start}")
    model.train()
    log = train(model, teacher.eval(), data, replayed=replayed, options=options)
    model.eval()
    found = judge(model, data)
    logger.info(f"validation at the end: {found}")
    save_file(nano.export_trained_tensors(model), options.out / "nano.safetensors")
    facts = {
        "command": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "counts": data.counts() | {"replayed": len(replayed)},
        "validation": {"start": start, "end": found},
        "minutes": round((time.monotonic() - began) / 60, 1),
        "log": log,
    }
    (options.out / "mixed.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
