"""Train the shipped part of nano: projector, LoRA and head.

    python experiments/nano/base.py --data runs/nano-base/data --out runs/nano-base

1. material   emoji reserved for this purpose; ImageNet's class names, whose features are the rows
              of EfficientNet's classifier; texts without an image (`material.py`)
2. start      the projector in seconds, without the language model; the head by ridge regression, in
              closed form
3. train      one packed forward pass per step: next token, and the cosine to the teacher's vectors
              at images, at texts, and at an image with a text
4. write      nano.safetensors in half precision, and base.json with options, counts and losses
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lists import write_seen_list
from material import (
    Material,
    Source,
    add_class_columns,
    compute_statistics,
    draw_noise,
    prepare_material,
    stack_cached_features,
)
from safetensors.torch import save_file
from sequences import (
    Deck,
    chat_sequence,
    composed_sequence,
    generate_replay_chats,
    image_question_sequence,
    image_sequence,
    text_sequence,
)
from torch import Tensor, nn
from torch.nn import functional as F

from vlduet.data.sequences import PreparedImage, Sequence
from vlduet.logs import ProgressBar, install_log_handler, logger
from vlduet.model import nano
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import Readout, pool_hidden_states
from vlduet.objectives.language import language_loss
from vlduet.workflows.validation import compute_validation_metrics

IMAGE_TOKEN_SCALE = 500.0
"""Factor of the image tokens.

SmolLM2's residual stream grows from 3 to 500 within a few layers; a smaller token would be lost.
"""
PACKED_ROW_TOKENS = 64
LOSS_WEIGHTS = {"language": 1.0, "image": 5.0, "text": 20.0, "composed": 5.0}
"""The gradients of a cosine are small beside nine nats of cross entropy, and Adam follows the
larger ones."""
KINDS = ("emoji", "classes")
HEAD_GAIN = 30.0
"""Factor of the head's weights: its output is normalised, and with larger weights Adam's steps are
relatively smaller."""
WARM_UP_BATCH = {"emoji": 80, "classes": 48}
WARM_UP_STEPS = 15
"""Number of training steps with a rising learning rate."""
MIN_RATE_FACTOR = 0.05
LOG_INTERVAL = 20
SEQUENCES_PER_BATCH = 96


# ------------------------------------------------------------------ start


def compute_caption_bags(model: DuetModel, sources: Mapping[str, Source]) -> dict[str, Tensor]:
    """Return the mean token embedding of every caption, float[N, D], without articles and "of"."""
    table = model.backbone.token_embedding.weight
    tokenizer = model.backbone.tokenizer
    ignored = set(tokenizer.encode("A An The the a of .", add_special_tokens=False))
    bags = {}
    for name, source in sources.items():
        rows = []
        for caption in source.captions:
            token_ids = [token for token in tokenizer.encode(caption) if token not in ignored]
            rows.append(table[token_ids or [0]].mean(0))
        bags[name] = torch.stack(rows)
    return bags


def warm_up_projector(
    model: DuetModel, sources: Mapping[str, Source], *, steps: int, noise: float
) -> None:
    """Train the projector alone, without a forward pass of the language model.

    The mean image token is compared with the mean token embedding of the caption (contrastive and
    squared distance), and through a linear map with the teacher's vector. At the end the
    projector's last layer is multiplied by `IMAGE_TOKEN_SCALE`."""
    projector = model.backbone.projector
    table = model.backbone.token_embedding.weight
    features = {name: stack_cached_features(model, s.images) for name, s in sources.items()}
    bags = compute_caption_bags(model, sources)
    centre = torch.cat([bags["emoji"][::2], bags["classes"]]).mean(0)
    scale, _ = compute_statistics(features["emoji"])
    to_teacher = nn.Linear(table.shape[1], sources["emoji"].targets.shape[1])
    parameters = [*projector.parameters(), *to_teacher.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    norm = table.norm(dim=1).mean()
    for _ in range(steps):
        rows = {
            name: torch.randint(len(sources[name].images), (count,))
            for name, count in WARM_UP_BATCH.items()
        }
        batch = torch.cat([features[name][index] for name, index in rows.items()])
        tokens = projector(batch + noise * draw_noise(batch, scale))
        bag = torch.cat([bags[name][index] for name, index in rows.items()])
        target = torch.cat([sources[name].targets[index] for name, index in rows.items()])
        mean = tokens.mean(1)
        scores = F.normalize(mean - centre, dim=1) @ F.normalize(bag - centre, dim=1).T / 0.05
        diagonal = torch.arange(len(scores))
        contrastive = F.cross_entropy(scores, diagonal) + F.cross_entropy(scores.T, diagonal)
        distance = ((tokens - bag[:, None]) ** 2).sum(-1).mean() / norm**2
        cosine = (F.normalize(to_teacher(mean), dim=1) * target).sum(1).mean()
        loss = 0.15 * (contrastive + distance) + 4 * (1 - cosine)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        projector.linear_2.weight.mul_(IMAGE_TOKEN_SCALE)
        projector.linear_2.bias.mul_(IMAGE_TOKEN_SCALE)


@torch.no_grad()
def fold_statistics(model: DuetModel, like: Tensor) -> None:
    """Fold the normalisation of the features into the projector's first layer, and add the classes.

    `like` are features, float[N, tokens, Dv]. The layer then sees features of mean 0 and standard
    deviation 1 without a layer for that.
    """
    scale, centre = compute_statistics(like)
    first = model.backbone.projector.linear_1
    first.weight.copy_(add_class_columns(first.weight / scale))
    first.bias.sub_(first.weight[:, : nano.NUM_FEATURES] @ centre)


@torch.no_grad()
def fit_head(
    model: DuetModel, sources: Mapping[str, Source], *, texts: Source, count: int, ridge: float
) -> None:
    """Set the head by ridge regression from hidden states to the teacher's vectors.

    The hidden states are those before any training, of images and texts together. At most `count`
    images per source and 3 * `count` texts are used; `ridge` is the penalty.
    """
    states, targets = [], []
    for source in sources.values():
        rows = random.sample(range(len(source.images)), min(count, len(source.images)))
        sequences = [image_sequence(model, source, row) for row in rows]
        states.append(compute_pooled_states(model, sequences))
        targets.append(source.targets[rows])
    for source, limit in ((sources["emoji"], count), (texts, 3 * count)):
        rows = random.sample(range(len(source.captions)), min(limit, len(source.captions)))
        sequences = [text_sequence(model, source, row) for row in rows]
        states.append(compute_pooled_states(model, sequences))
        targets.append(source.targets[rows])
    x = torch.cat(states).double()
    y = torch.cat(targets).double()
    mean = x.mean(0)
    scale = x.std(0).clamp(min=1e-2)
    z = torch.cat([(x - mean) / scale, torch.ones(len(x), 1).double()], 1)
    penalty = ridge * torch.eye(z.shape[1]).double()
    solution = torch.linalg.solve(z.T @ z + penalty, z.T @ y)
    weight = solution[:-1] / scale[:, None]  # [D, 384]
    model.head.layers.weight.copy_(weight.T * HEAD_GAIN)
    model.head.layers.bias.copy_((solution[-1] - mean @ weight) * HEAD_GAIN)


def compute_pooled_states(model: DuetModel, sequences: list[Sequence]) -> Tensor:
    """Return the pooled hidden states before the head, float[N, D], one anchor per sequence."""
    states = []
    for start in range(0, len(sequences), SEQUENCES_PER_BATCH):
        batch = model.collate(sequences[start : start + SEQUENCES_PER_BATCH])
        states.append(pool_hidden_states(model.hidden_states(batch), batch.anchor_spans))
    return torch.cat(states)


# ------------------------------------------------------------------ train


def teacher_distance(readout: Readout, targets: Mapping[str, Tensor], *roles: str) -> Tensor:
    """Return 1 - the cosine to the teacher's vector, averaged over the anchors of some roles."""
    embeddings, anchors = readout.select_roles(*roles)
    vectors = torch.stack([targets[anchor.record_name] for anchor in anchors])
    return 1 - (embeddings * vectors).sum(1).mean()


class Sampler:
    """Draw the sequences of every step from the material.

    Args:
        model: renders the sequences.
        data: the material.
        replay: chats about names, see `generate_replay_chats`.
        options: `pairs`, `alone`, `composed` and `texts`, the numbers of sequences of a step.
    """

    def __init__(
        self, model: DuetModel, data: Material, replay: list[Sequence], options: argparse.Namespace
    ):
        self.model = model
        self.data = data
        self.replay = replay
        self.options = options
        self.decks = {name: Deck(len(source.images)) for name, source in data.sources.items()}
        self.text_deck = Deck(len(data.texts.captions))
        self.replay_deck = Deck(len(replay))
        self.targets: dict[str, Tensor] = {}
        """Teacher's vector, float[384], by the record name of an anchor."""
        for source in (*data.sources.values(), data.texts):
            names = [caption.lower() for caption in source.captions]
            self.targets |= dict(zip(names, source.targets, strict=True))

    def draw(self, step: int) -> list[Sequence]:
        """Return the sequences of one step: images, captions, texts, and one chat."""
        sequences = []
        numbers = zip(KINDS, self.options.pairs, self.options.alone, strict=True)
        for name, num_pairs, num_alone in numbers:
            source = self.data.sources[name]
            for row in self.decks[name].draw(num_pairs):
                sequences.append(image_sequence(self.model, source, row, with_caption=True))
                sequences.append(text_sequence(self.model, source, row))
            rows = self.decks[name].draw(num_alone)
            sequences += [image_sequence(self.model, source, row) for row in rows]
            sequences += self._draw_composed(source, self.decks[name].draw(self.options.composed))
        rows = self.text_deck.draw(self.options.texts)
        sequences += [text_sequence(self.model, self.data.texts, row) for row in rows]
        if step % 2:
            sequences += [self.replay[row] for row in self.replay_deck.draw(1)]
        else:
            captions = self.data.sources["emoji"].captions
            row = random.randrange(len(self.data.emoji_refs))
            image = self.data.emoji_refs[row]
            sequences.append(image_question_sequence(self.model, image, captions[row]))
        return sequences

    def _draw_composed(self, source: Source, rows: list[int]) -> list[Sequence]:
        """Return images, each with the caption of another image of the source.

        The target of such a query is the normalised sum of the vectors of both, so that a search
        with an image and a text finds what is like either.
        """
        sequences = []
        for row in rows:
            other = random.randrange(len(source.captions))
            text = source.captions[other]
            key = f"{source.captions[row].lower()} + {text.lower()}"
            self.targets[key] = F.normalize(source.targets[row] + source.targets[other], dim=0)
            sequences.append(composed_sequence(self.model, source, row, text=text, key=key))
        return sequences


def build_optimizer(model: DuetModel, options: argparse.Namespace) -> torch.optim.Optimizer:
    """Return AdamW with a learning rate for each part; every group keeps it as `initial_lr`."""
    projector = model.backbone.projector
    # The size of Adam's step is its rate, whatever the size of the weights, and the weights of the
    # last layer are IMAGE_TOKEN_SCALE times larger.
    rates: list[tuple[list[Any], float]] = [
        (list(projector.linear_1.parameters()), options.lr_projector),
        (list(projector.linear_2.parameters()), options.lr_projector * IMAGE_TOKEN_SCALE),
        (list(model.head.parameters()), options.lr_head),
        (list(model.adapter_tensors().values()), options.lr_lora),
    ]
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "initial_lr": rate} for parameters, rate in rates
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)


def learning_rate_factor(step: int, progress: float) -> float:
    """Return a linear warm-up times a cosine that ends at `MIN_RATE_FACTOR`; `progress` is 0 to
    1."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (MIN_RATE_FACTOR + (1 - MIN_RATE_FACTOR) * cosine)


def compute_losses(readout: Readout, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the four losses of a step by name, before they are weighted."""
    return {
        "language": language_loss(readout.nll, global_token_count=len(readout.nll)),
        "image": teacher_distance(readout, targets, "image"),
        "text": teacher_distance(readout, targets, "text"),
        "composed": teacher_distance(readout, targets, "composed"),
    }


def train(
    model: DuetModel, data: Material, *, replay: list[Sequence], options: argparse.Namespace
) -> list[dict[str, float]]:
    """Train for `options.steps` steps; return the logged losses."""
    optimizer = build_optimizer(model, options)
    trainable = []
    for group in optimizer.param_groups:
        trainable += group["params"]
    sampler = Sampler(model, data, replay, options)
    log: list[dict[str, float]] = []
    num_tokens = 0
    start = time.monotonic()
    with ProgressBar(total=options.steps, label="train") as bar:
        for step in range(options.steps):
            for group in optimizer.param_groups:
                factor = learning_rate_factor(step, step / options.steps)
                group["lr"] = group["initial_lr"] * factor
            batch = model.collate(sampler.draw(step), pack_to=PACKED_ROW_TOKENS)
            losses = compute_losses(model(batch), sampler.targets)
            loss = torch.zeros(())
            for name, value in losses.items():
                loss = loss + options.weights[name] * value
            loss.backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            num_tokens += batch.num_tokens
            values = {name: float(value.detach()) for name, value in losses.items()}
            bar.advance(1, note=" ".join(f"{name} {value:.3f}" for name, value in values.items()))
            if step % LOG_INTERVAL == 0:
                seconds = round(time.monotonic() - start, 1)
                row: dict[str, float] = {"step": step, "tokens": num_tokens, "seconds": seconds}
                log.append(row | {name: round(value, 4) for name, value in values.items()})
            if (step + 1) % options.validate_every == 0 and step + 1 < options.steps:
                validation = compute_validation_metrics(model, data.validation, seed=0)
                logger.info(f"validation after {step + 1} steps: {validation}")
                save_file(nano.export_trained_tensors(model), options.out / "nano.safetensors")
    return log


def add_feature_noise(model: DuetModel, sources: Mapping[str, Source], noise: float) -> None:
    """Let training images have noise on their features; this replaces `model.vision_features`.

    A class has no texture of a real image otherwise, so it also gets that of a random emoji.
    """
    compute_plain_features = model.vision_features
    features = stack_cached_features(model, sources["emoji"].images)
    scale, _ = compute_statistics(features)
    texture = features - features.mean(1, keepdim=True)
    texture[..., nano.NUM_FEATURES :] = 0

    def compute_noisy_features(images: list[PreparedImage]) -> Tensor:
        """Return the features float[tokens, Dv], with noise while the model is training."""
        plain = compute_plain_features(images)
        if not model.training:
            return plain
        by_image = plain.view(len(images), nano.TOKENS_PER_IMAGE, -1)
        is_class = [image.cache_key.startswith("imagenet") for image in images]
        rows = torch.randint(len(texture), (len(images),))
        borrowed = texture[rows] * torch.tensor(is_class).float()[:, None, None]
        return (by_image + borrowed + noise * draw_noise(by_image, scale)).flatten(0, 1)

    model.vision_features = compute_noisy_features  # type: ignore[method-assign]


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument(
        "--pairs", type=int, nargs=2, default=[6, 3], help="captioned emoji and classes of a step"
    )
    parser.add_argument(
        "--alone", type=int, nargs=2, default=[3, 4], help="the same without a caption"
    )
    parser.add_argument(
        "--composed", type=int, default=2, help="queries of an image and a text, of each kind"
    )
    parser.add_argument("--texts", type=int, default=20, help="texts without an image of a step")
    parser.add_argument(
        "--replayed", type=int, default=64, help="number of questions that SmolLM2 answers itself"
    )
    parser.add_argument("--noise", type=float, default=1.0)
    parser.add_argument("--lr-projector", type=float, default=3e-4)
    parser.add_argument("--lr-head", type=float, default=3e-4)
    parser.add_argument("--lr-lora", type=float, default=9e-4)
    parser.add_argument("--validate-every", type=int, default=100)
    parser.add_argument("--warm-up", type=int, default=600, help="steps of the projector alone")
    parser.add_argument("--weights", type=json.loads, default=LOSS_WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def save_run(model: DuetModel, options: argparse.Namespace, facts: Mapping[str, Any]) -> None:
    """Write nano.safetensors, and base.json with the options and the facts, to `options.out`."""
    save_file(nano.export_trained_tensors(model), options.out / "nano.safetensors")
    command = {
        option: str(value) if isinstance(value, Path) else value
        for option, value in vars(options).items()
    }
    text = json.dumps({"command": command, **facts}, indent=1) + "\n"
    (options.out / "base.json").write_text(text)


def main() -> None:
    """Run steps 1 to 4 of the module's description."""
    options = parse_options()
    install_log_handler()
    start_time = time.monotonic()
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    model, data = prepare_material(options.data, options.out, seed=options.seed)
    classes = data.sources["classes"].captions
    chats = generate_replay_chats(model, classes, count=options.replayed)
    replay = [chat_sequence(model, question, answer) for question, answer in chats]
    chat_texts = [text for chat in chats for text in chat]
    write_seen_list(data.emoji_refs, [*data.all_texts(), *chat_texts])
    model.make_trainable(lora=nano.BASE_LORA, projector=True)
    fold_statistics(model, stack_cached_features(model, data.sources["emoji"].images))
    warm_up_projector(model, data.sources, steps=options.warm_up, noise=options.noise)
    fit_head(model, data.sources, texts=data.texts, count=500, ridge=100.0)
    before = compute_validation_metrics(model, data.validation, seed=0)
    logger.info(f"validation at the start: {before}")
    add_feature_noise(model, data.sources, options.noise)
    model.train()
    log = train(model, data, replay=replay, options=options)
    model.eval()
    after = compute_validation_metrics(model, data.validation, seed=0)
    logger.info(f"validation at the end: {after}")
    facts = {
        "counts": data.counts() | {"replayed": len(replay)},
        "validation": {"start": before, "end": after},
        "minutes": round((time.monotonic() - start_time) / 60, 1),
        "log": log,
    }
    save_run(model, options, facts)
    model.save_merged(options.out / "model", provenance={"made_by": "experiments/nano"})


if __name__ == "__main__":
    main()
