"""Teach nano queries of an image and words, starting from the part that `base.py` trained.

    python experiments/nano/mixed.py --data runs/nano-base/data --out runs/nano-mixed

The teacher is the model itself, as it is at the start. For an image and words together, the target
is the sum of the teacher's vectors of both; for an image, a text, or the next token, it is what
the teacher computes. Any image can therefore be combined with any words, and no caption teaches
anything.

1. material  the same as in `base.py`
2. train     LoRA alone: cosine to the teacher's vectors, and divergence from its next tokens
3. write     nano.safetensors, and mixed.json with options, counts and losses
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from base import KINDS, PACKED_ROW_TOKENS, learning_rate_factor, save_run
from material import Material, Source, prepare_material
from safetensors.torch import load_file
from sequences import (
    Deck,
    composed_sequence,
    generate_replay_sequences,
    image_question_sequence,
    image_sequence,
    text_sequence,
)
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

SHIPPED_FILE = Path(nano.__file__).with_name("nano.safetensors")
NUM_CAPTIONED = {"stamps": 6, "emoji": 1, "classes": 2}
"""Number of images with their captions of each kind in a step."""
ROLES = ("mixed", "image", "text")
LOSS_WEIGHTS = {"mixed": 20.0, "text": 20.0, "image": 10.0, "language": 5.0}
NUM_VALIDATION_SEEDS = 5
LOG_INTERVAL = 20


def read_batch(model: DuetModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the unit vectors of all anchors and the log probabilities at the labels.

    Returns:
        float[A, E] and float[S, vocabulary].
    """
    hidden = model.hidden_states(batch)
    rows, columns = find_supervised_positions(batch.labels)
    logits = model.backbone.lm_head(hidden[rows, columns - 1])
    embeddings = model.embed_anchors(batch, hidden, batch.anchor_spans)
    return embeddings, F.log_softmax(logits, dim=-1)


def compute_distances(model: DuetModel, teacher: DuetModel, batch: Batch) -> dict[str, Tensor]:
    """Return 1 - cosine for each role, and the divergence of the next tokens in nats.

    The image and the text of every composed sequence must be in the batch on their own, too: the
    sum of their vectors by the teacher is its target."""
    vectors, log_probabilities = read_batch(model, batch)
    with torch.no_grad():
        teacher_vectors, teacher_log_probabilities = read_batch(teacher, batch)
    image_vectors: dict[str, Tensor] = {}
    text_vectors: dict[str, Tensor] = {}
    for anchor, vector in zip(batch.anchors, teacher_vectors, strict=True):
        if anchor.role == "image":
            image_vectors[anchor.content_key] = vector
        elif anchor.role == "text":
            text_vectors[anchor.record_name] = vector
    distances: dict[str, list[Tensor]] = {role: [] for role in ROLES}
    for anchor, vector, target in zip(batch.anchors, vectors, teacher_vectors, strict=True):
        if anchor.role == "mixed":
            text = text_vectors[anchor.record_name.lower()]
            target = image_vectors[anchor.content_key] + text
        distances[anchor.role].append(1 - F.cosine_similarity(vector, target, dim=0))
    differences = teacher_log_probabilities - log_probabilities
    divergence = (teacher_log_probabilities.exp() * differences).sum(1).mean()
    means = {role: torch.stack(values).mean() for role, values in distances.items()}
    return means | {"language": divergence}


class ComposedSampler:
    """Draw the sequences of every step.

    Args:
        model: renders the sequences.
        data: the material.
        replay: chats about names, see `generate_replay_sequences`.
        num_composed: number of composed sequences of stamps, emoji and classes in a step.
    """

    def __init__(
        self, model: DuetModel, data: Material, replay: list[Sequence], num_composed: list[int]
    ):
        self.model = model
        self.data = data
        self.replay = replay
        self.num_composed = dict(zip(KINDS, num_composed, strict=True))
        captions = set(data.texts.captions)
        for source in data.sources.values():
            captions |= set(source.captions)
        self.texts = Source(sorted(captions), [], torch.empty(0))
        self.decks = {name: Deck(len(source.images)) for name, source in data.sources.items()}
        self.text_deck = Deck(len(captions))

    def draw(self, step: int) -> list[Sequence]:
        """Return the sequences of one step: composed ones with their parts, captions, one chat."""
        sequences = []
        for name, count in self.num_composed.items():
            source = self.data.sources[name]
            rows = zip(self.decks[name].draw(count), self.text_deck.draw(count), strict=True)
            for row, text_row in rows:
                text = self.texts.captions[text_row]
                sequences.append(composed_sequence(self.model, source, row, text))
                sequences.append(image_sequence(self.model, source, row))
                sequences.append(text_sequence(self.model, self.texts, text_row))
            for row in self.decks[name].draw(NUM_CAPTIONED[name]):
                sequences.append(image_sequence(self.model, source, row, with_caption=True))
        if step % 2:
            sequences.append(random.choice(self.replay))
        else:
            row = random.randrange(len(self.data.stamp_refs))
            caption = self.data.sources["stamps"].captions[row]
            image = self.data.stamp_refs[row]
            sequences.append(image_question_sequence(self.model, image, caption))
        return sequences


def train(
    model: DuetModel, teacher: DuetModel, sampler: ComposedSampler, options: argparse.Namespace
) -> list[dict[str, float]]:
    """Train the LoRA tensors for `options.steps` steps; return the logged losses."""
    parameters = list(model.adapter_tensors().values())
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.01)
    log = []
    start = time.monotonic()
    with ProgressBar(total=options.steps, label="train") as bar:
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = options.lr * learning_rate_factor(step, step / options.steps)
            batch = model.collate(sampler.draw(step), pack_to=PACKED_ROW_TOKENS)
            losses = compute_distances(model, teacher, batch)
            loss = torch.zeros(())
            for name, value in losses.items():
                loss = loss + options.weights[name] * value
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            values = {name: round(float(value.detach()), 4) for name, value in losses.items()}
            bar.advance(1, note=" ".join(f"{name} {value:.3f}" for name, value in values.items()))
            if step % LOG_INTERVAL == 0:
                seconds = round(time.monotonic() - start, 1)
                log.append({"step": step, "seconds": seconds, **values})
    return log


def validate(model: DuetModel, data: Material) -> dict[str, float]:
    """Return the validation metrics, and hit rates of queries of an image and words.

    Those are averaged over five random combinations of images and words.
    """
    hits: dict[str, list[float]] = {}
    for seed in range(NUM_VALIDATION_SEEDS):
        result = measure_composed_retrieval(
            model.encode_document, model.encode_query, data.validation, seed=seed
        )
        for name, values in result.hit_values(max(HIT_CUTOFFS)).items():
            hits.setdefault(f"mixed/{name}", []).append(float(values.mean()))
    composed = {name: float(np.mean(values)) for name, values in hits.items()}
    return compute_validation_metrics(model, data.validation, seed=0) | composed


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, default=SHIPPED_FILE, help="output of base.py")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument(
        "--mixed",
        type=int,
        nargs=3,
        default=[12, 6, 6],
        help="composed sequences of stamps, emoji and classes in a step",
    )
    parser.add_argument(
        "--replayed", type=int, default=64, help="number of questions that SmolLM2 answers itself"
    )
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--weights", type=json.loads, default=LOSS_WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Run steps 1 to 3 of the module's description."""
    options = parse_options()
    install_log_handler()
    start_time = time.monotonic()
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    model, data = prepare_material(options.data, options.out, seed=options.seed)
    classes = data.sources["classes"].captions
    replay = generate_replay_sequences(model, classes, count=options.replayed)
    teacher = DuetModel.from_pretrained(options.out / "bare")
    teacher.feature_cache = model.feature_cache
    tensors: Mapping[str, Tensor] = load_file(options.start)
    for network in (model, teacher):
        network.make_trainable(lora=nano.BASE_LORA, projector=True)
        nano.load_trained_tensors(network, dict(tensors))
    before = validate(model, data)
    logger.info(f"validation at the start: {before}")
    model.train()
    sampler = ComposedSampler(model, data, replay, options.mixed)
    log = train(model, teacher.eval(), sampler, options)
    model.eval()
    after = validate(model, data)
    logger.info(f"validation at the end: {after}")
    facts = {
        "counts": data.counts() | {"replayed": len(replay)},
        "validation": {"start": before, "end": after},
        "minutes": round((time.monotonic() - start_time) / 60, 1),
        "log": log,
    }
    save_run(model, "mixed", options, facts=facts)


if __name__ == "__main__":
    main()
