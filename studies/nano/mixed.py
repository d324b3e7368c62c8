"""Teach nano queries of an image and words: the shipped part goes on from the one that `base.py` made.

    python studies/nano/mixed.py --data runs/nano-base/data --out runs/nano-mixed

Its own vectors are the teacher, as they are at the start: of an image and words together it shall say the sum of what it
says of either, and of either alone what it says already. So any image goes with any words.

1. material  all of `base.py`'s: pictures, classes as pictures, words and phrases; held out what is held out there
2. teacher   the start's vector of every picture and every text
3. train     LoRA alone: cosine to the teacher (image and words; image; words), next token as in `base.py`
4. write     nano.safetensors, and a record of what was done
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
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
    with_noise,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vlduet.data.sequences import Sequence
from vlduet.eval.protocols import mixed_retrieval
from vlduet.logs import Progress, say
from vlduet.model import nano
from vlduet.model.duet import DuetModel
from vlduet.model.readout import Readout
from vlduet.objectives.language import language_loss
from vlduet.validation import measure

SHIPPED = Path(nano.__file__).with_name("nano.safetensors")
CAPTIONED = {"stamps": 6, "emoji": 1, "classes": 2}
"""Of each kind a step, with caption."""


def mixed_sequence(model: DuetModel, source: Source, i: int, text: str) -> Sequence:
    """Image tokens and words, read at the last token, as nano renders a query of both."""
    builder = model.renderer.builder()
    builder.control(nano.START)
    builder.image(source.images[i])
    builder.text(text)
    last = len(builder.ids)
    builder.anchor((last - 1, last), role="mixed", record=text, key=source.images[i].key)
    return builder.build(10**6)


@torch.no_grad()
def vectors(model: DuetModel, sequences: list[Sequence]) -> Tensor:
    """float[N, D], of sequences with one anchor each."""
    found = []
    with Progress(total=len(sequences), label="teacher") as bar:
        for begin in range(0, len(sequences), 128):
            chunk = sequences[begin : begin + 128]
            found.append(model(model.collate(chunk, pack_to=PACK)).of("image", "text")[0])
            bar.advance(len(chunk))
    return torch.cat(found)


class Teacher:
    """What the model said at the start, by the key of an image or by a text."""

    def __init__(self, model: DuetModel, data: Material):
        everything = [*data.sources.values(), data.texts]
        self.texts = Source(sorted({c for s in everything for c in s.captions}), [], torch.empty(0))
        said = vectors(model, [text_sequence(model, self.texts, i) for i in range(len(self.texts.captions))])
        self.text = dict(zip(self.texts.captions, said, strict=True))
        self.image: dict[str, Tensor] = {}
        for source in data.sources.values():
            seen = vectors(model, [image_sequence(model, source, i) for i in range(len(source.images))])
            self.image |= {image.key: vector for image, vector in zip(source.images, seen, strict=True)}
        self.lower = {text.lower(): vector for text, vector in self.text.items()}

    def losses(self, readout: Readout) -> dict[str, Tensor]:
        """1 - cosine to what is to be said, mean over the anchors of a role."""
        found = {}
        for role in ("mixed", "image", "text"):
            said, anchors = readout.of(role)
            if role == "mixed":
                wanted = [self.image[a.key] + self.text[a.record] for a in anchors]
            else:
                wanted = [self.image[a.key] if role == "image" else self.lower[a.key] for a in anchors]
            found[role] = 1 - (said * F.normalize(torch.stack(wanted), dim=1)).sum(1).mean()
        return found


def train(
    model: DuetModel, data: Material, *, teacher: Teacher, replayed: list[Sequence], options: argparse.Namespace
) -> list[dict[str, float]]:
    """The loop. Returns what was logged."""
    parameters = list(model.adapter_tensors().values())
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.01)
    decks = {k: Deck(len(s.images)) for k, s in data.sources.items()}
    asked, alone = (Deck(len(teacher.texts.captions)) for _ in range(2))
    log, step, began, limit = [], 0, time.monotonic(), 60 * options.minutes
    with Progress(total=round(limit), label="train, seconds") as bar:
        while (done := (time.monotonic() - began) / limit) < 1:
            for group in optimizer.param_groups:
                rate = min(1.0, (step + 1) / 15) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
                group["lr"] = options.lr * rate
            sequences = []
            for kind, count in zip(KINDS, options.mixed, strict=True):
                source = data.sources[kind]
                words = [teacher.texts.captions[j] for j in asked.draw(count)]
                drawn = decks[kind].draw(count)
                sequences += [mixed_sequence(model, source, i, text) for i, text in zip(drawn, words, strict=True)]
                sequences += [image_sequence(model, source, i) for i in decks[kind].draw(count // 3)]
                captioned = decks[kind].draw(CAPTIONED[kind])
                sequences += [image_sequence(model, source, i, caption=True) for i in captioned]
            sequences += [text_sequence(model, teacher.texts, i) for i in alone.draw(options.words)]
            if step % 2:
                sequences.append(random.choice(replayed))
            else:
                i = random.randrange(len(data.refs))
                sequences.append(shown_sequence(model, data.refs[i], data.sources["stamps"].captions[i]))
            batch = model.collate(sequences, pack_to=PACK)
            readout = model(batch)
            losses = teacher.losses(readout)
            losses["language"] = language_loss(readout.nll, global_count=len(readout.nll))
            loss = sum((options.weights[name] * value for name, value in losses.items()), torch.zeros(()))
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            told = {name: round(float(value.detach()), 4) for name, value in losses.items()}
            seconds = time.monotonic() - began
            bar.advance(
                int(seconds) - int(done * limit), note=" ".join(f"{name} {value:.3f}" for name, value in told.items())
            )
            if step % 20 == 1:
                log.append({"step": step, "seconds": round(seconds, 1), **told})
    return log


def judge(model: DuetModel, data: Material) -> dict[str, float]:
    """Validation: what `measure` says, and queries of an image and words, joined in five ways."""
    found = [
        mixed_retrieval(model.encode_document, model.encode_query, data.validation, seed=seed).found(10)
        for seed in range(5)
    ]
    mixed = {f"mixed/{what}": float(np.mean([f[what].mean() for f in found])) for what in found[0]}
    return measure(model, data.validation, seed=0) | mixed


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, default=SHIPPED, help="what base.py made")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--mixed", type=int, nargs=3, default=[18, 9, 9], help="of stamps, emoji, classes a step")
    parser.add_argument("--words", type=int, default=16, help="texts alone a step")
    parser.add_argument("--replayed", type=int, default=64, help="questions that SmolLM2 answers itself")
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--lr", type=float, default=2e-4)
    weights = {"mixed": 20.0, "text": 20.0, "image": 10.0, "language": 0.3}
    parser.add_argument("--weights", type=json.loads, default=weights)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    model, data = prepare(options.data, options.out, seed=options.seed)
    replayed = replay(model, data.sources["classes"].captions, count=options.replayed)
    model.make_trainable(lora=nano.BASE_LORA, projector=True)
    nano.load_trained(model, load_file(options.start))
    start = judge(model, data)
    say(f"validation at the start: {start}")
    teacher = Teacher(model, data)
    with_noise(model, data.sources, options.noise)
    model.train()
    log = train(model, data, teacher=teacher, replayed=replayed, options=options)
    model.eval()
    found = judge(model, data)
    say(f"validation at the end: {found}")
    save_file(nano.shipped(model), options.out / "nano.safetensors")
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
