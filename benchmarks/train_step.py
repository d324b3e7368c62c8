"""One training step: vlduet's fused one against plain transformers + peft, on the same weights, records and loss.

    vlduet, padded | packed N   one forward, both losses read from it (recipe vladva): an image and its long caption are one
                                sequence, logits at supervised tokens only, vision features cached from the first epoch on
    ... cold                    the same with the vision tower run in the step, as in the first epoch
    transformers + peft         the usual way, three passes of `model.model(...)`: images, short texts, and image with long
                                caption through `model(labels=...)`; get_peft_model(LoraConfig(same rank and targets)),
                                AdamW, padded batches, full logits; the frozen tower runs without gradient in two of them

Same batch, same trainable tensors, loss = InfoNCE + cross entropy of long captions; the losses of the first step are
compared. A step is forward, backward and AdamW. Peak memory is that of a process of its own that takes two steps.

    python benchmarks/train_step.py [--quick] [--model DIR] [--data FILE]
"""

from __future__ import annotations

import json
import math
import random
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import _bench
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from vlduet.data import images
from vlduet.data.records import Record
from vlduet.data.stream import Sample
from vlduet.model.adapters import TARGETS, Lora
from vlduet.model.duet import DuetModel
from vlduet.model.features import FeatureCache
from vlduet.model.readout import EmbeddingHead
from vlduet.recipes import vladva

LORA = Lora(rank=16, alpha=16, targets="all")
LEARNING_RATE = 1e-4
PACKS = (64, 128)
Step = Callable[[], dict[str, float]]


def batch_of(records: list[Record], count: int, seed: int) -> list[Record]:
    """Pairs with a short and a long caption. The long one is the short one and captions of the same category, 30 tokens
    and up, because the corpus has none of its own."""
    rng = random.Random(seed)
    chosen, seen = [], set()
    for record in rng.sample(records, len(records)):
        if len(chosen) < count and record.short[0] not in seen:
            others = [r.short[0] for r in records if r.metadata.get("category") == record.metadata.get("category")]
            long = " ".join([record.short[0], *rng.choices(others, k=rng.randint(4, 9))])
            chosen.append(Record(record.id, image=record.image, short=record.short[:1], long=long))
            seen.add(record.short[0])
    return chosen


# ------------------------------------------------------------------ vlduet


def ours(folder: Path, records: list[Record], *, pack: int | None, cold: bool) -> Step:
    """The step of `vlduet train`, without its bookkeeping."""
    torch.manual_seed(0)
    model = DuetModel.from_pretrained(folder, device="cpu")
    model.make_trainable(lora=LORA, projector=True)
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=LEARNING_RATE, weight_decay=0.0)
    samples = [Sample(record, position, 0) for position, record in enumerate(records)]
    options = vladva.Options()

    def step() -> dict[str, float]:
        if cold:
            model.features = FeatureCache(None)
        sequences = [s for sample in samples for s in vladva.layout(sample, model.renderer, options)]
        readout = model.train()(model.collate(sequences, pack_to=pack))
        losses = vladva.objective(readout, model.logit_scale, options)
        sum(losses.values(), torch.zeros(())).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {name: float(loss) for name, loss in losses.items()}

    return step


# ------------------------------------------------------------------ plain transformers + peft


class Peer:
    """The usual way: a pass for every side of every loss."""

    def __init__(self, folder: Path, records: list[Record]):
        torch.manual_seed(0)
        mine = DuetModel.from_pretrained(folder, device="cpu")  # for its prompts and its head's weights
        self.prompts, self.head = mine.prompts, EmbeddingHead(mine.head.kind, mine.backbone.width, mine.head.dim)
        self.head.load_state_dict(mine.head.state_dict())
        self.tokens = mine.prepare(records[0].image).num_tokens if records[0].image else 0
        self.scale = torch.nn.Parameter(mine.logit_scale.detach().clone())
        del mine
        base = AutoModelForImageTextToText.from_pretrained(folder)
        base.requires_grad_(False)
        targets = rf".*language_model\..*\.({TARGETS[LORA.targets]})"
        get_peft_model(base, LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=targets))
        base.model.multi_modal_projector.requires_grad_(True)
        self.model = base
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.image_token = self.tokenizer.convert_ids_to_tokens(base.config.image_token_id)
        self.records = records
        moving = [p for p in base.parameters() if p.requires_grad] + [*self.head.parameters(), self.scale]
        self.optimizer = torch.optim.AdamW(moving, lr=LEARNING_RATE, weight_decay=0.0)

    def step(self) -> dict[str, float]:
        self.model.train()
        self.model.model.vision_tower.eval()
        pixels = self.processor(images=[images.load(r.image) for r in self.records if r.image], return_tensors="pt")
        prompt = self.prompts.image.replace("{image}", self.image_token * self.tokens)
        captions = [self.prompts.text.replace("{text}", r.short[0]) for r in self.records]
        left = self.embed([prompt] * len(self.records), dict(pixels), image=True)
        scores = left @ self.embed(captions, {}, image=False).T * self.scale.clamp(max=math.log(100)).exp()
        target = torch.arange(len(scores))
        contrastive = F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)
        language = self.language(prompt, dict(pixels))
        (contrastive + language).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"contrastive": float(contrastive), "language": float(language)}

    def embed(self, texts: list[str], pixels: dict[str, Tensor], *, image: bool) -> Tensor:
        inputs = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        states = self.model.model(**inputs, **pixels).last_hidden_state  # [B, T, D]
        if image and self.prompts.image_pool == "mean":
            mask = (inputs["input_ids"] == self.model.config.image_token_id)[..., None].to(states.dtype)
            return self.head((states * mask).sum(1) / mask.sum(1))
        return self.head(states[torch.arange(len(states)), inputs["attention_mask"].sum(1) - 1])

    def language(self, prompt: str, pixels: dict[str, Tensor]) -> Tensor:
        texts = [f"{prompt}{r.long}{self.tokenizer.eos_token}" for r in self.records]
        inputs = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, : len(self.tokenizer(prompt)["input_ids"])] = -100
        return self.model(**inputs, **pixels, labels=labels).loss


# ------------------------------------------------------------------ the run


def contender(name: str, folder: Path, records: list[Record]) -> Step:
    if name == "transformers + peft":
        return Peer(folder, records).step
    packed = re.search(r"packed (\d+)", name)
    return ours(folder, records, pack=int(packed[1]) if packed else None, cold="cold" in name)


def peak(name: str, folder: Path, records: list[Record]) -> tuple[float, float]:
    """(peak, of it beyond what was there before the first step) of this process, in GB."""
    step = contender(name, folder, records)
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    for _ in range(2):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return after / 1e9, (after - before) / 1e9


def main() -> None:
    parser = _bench.arguments(__doc__)
    parser.add_argument("--peak", help="measure this contender's memory and print it as JSON")
    options = parser.parse_args()
    folder = _bench.model_folder(options.model)
    count, repeats = (6, 2) if options.quick else (12, 3)
    records = batch_of(_bench.pairs(options.data), count, options.seed)
    if options.peak:
        print(json.dumps(peak(options.peak, folder, records)))
        return
    _bench.facts(options, folder)
    packs = PACKS[:1] if options.quick else PACKS
    names = ["vlduet, padded", *(f"vlduet, packed {n}" for n in packs), f"vlduet, packed {PACKS[0]}, cold"]
    names += ["transformers + peft"]
    steps = {name: contender(name, folder, records) for name in names}
    first = {name: step() for name, step in steps.items()}  # warms up, too
    for name, losses in first.items():
        print(f"  {name:28} first losses: " + ", ".join(f"{key} {value:.4f}" for key, value in losses.items()))
    seconds = _bench.interleaved(steps, options.repeats or repeats)
    _bench.table(f"steps on {count} records", "records/s", seconds, work=count, ours=f"vlduet, packed {PACKS[0]}")
    print("\npeak memory of a process (of it in the steps), GB")
    again = [sys.executable, __file__, *sys.argv[1:], "--peak"]
    for name in (names[0], names[1], names[-1]):
        found = subprocess.run([*again, name], capture_output=True, text=True, check=True).stdout
        whole, steps_only = json.loads(found.splitlines()[-1])
        print(f"  {name:28} {whole:6.2f}  ({steps_only:.2f})", flush=True)


if __name__ == "__main__":
    main()
