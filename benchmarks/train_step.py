"""One training step of two losses, InfoNCE on short captions and cross entropy on long ones: vlduet against its peers.

a   vlduet, padded | packed N     one forward, both losses read from it (recipe vladva): an image and its long caption are
                                  one sequence, logits at supervised tokens only, vision features cached from the first
                                  epoch on; `cold` runs the vision tower in the step, as in the first epoch
    vlduet, a pass for each loss  the same numbers as most joint trainers compute them (train.fused=false)
    transformers + peft           the usual way, three passes of `model.model(...)`: images, short texts, and image with long
                                  caption through `model(labels=...)`; get_peft_model(LoraConfig(same rank and targets)),
                                  AdamW, padded batches, full logits; the frozen tower runs without gradient in two of them
b   vlduet, chunks                the step of a by GradCache, in chunks of about 16 images
    sentence-transformers + TRL   a step of CachedMultipleNegativesRankingLoss with mini-batches of 16, and one of
                                  SFTTrainer (pip install trl): _libraries.py, which is printed
c   peak memory of a process that takes contrastive steps by GradCache (`vlduet train`, train.chunk_tokens=512: a batch of 64
    is more than one chunk) on the same 4,096 records (256 with --quick) in batches of 64 to 4,096, from pixels on; each in
    a process of its own

Same weights, records and trainable tensors in all; the losses of the first step are printed. A step is forward, backward and
AdamW.

    python benchmarks/train_step.py [--quick] [--rows abc] [--model DIR] [--data FILE]
"""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import _bench
import _libraries
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from vlduet import config
from vlduet.data import images
from vlduet.data.batches import split_into_chunks
from vlduet.data.record_json import record_to_json
from vlduet.data.records import Record
from vlduet.data.sequences import Sequence, trim
from vlduet.data.stream import Sample
from vlduet.logs import install_log_handler
from vlduet.model.adapters import LORA_TARGET_PATTERNS, LoraSettings
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache
from vlduet.model.pooling import EmbeddingHead, Readout, concatenate_readouts, create_empty_readout
from vlduet.recipes import vladva
from vlduet.train import setup
from vlduet.train.gradcache import compute_cached_losses
from vlduet.train.step import forward_backward, optimizer_step

LORA = LoraSettings(rank=16, alpha=16, targets="all")
LEARNING_RATE = 1e-4
PACKS = (192, 128, 64)
"""Rows of so many tokens; the first is what the others of row a are compared with."""
MINI_BATCH = 16
"""Images of a chunk in row b."""
SIZES = (64, 256, 1024, 4096)
"""Contrastive batches of row c."""
ONE_PASS_PER_LOSS, CHUNKS = "vlduet, a pass for each loss", "vlduet, chunks"
TRANSFORMERS, LIBRARIES = "transformers + peft", "sentence-transformers + TRL"
Step = Callable[[], dict[str, float]]


def select_records(records: list[Record], count: int, seed: int) -> list[Record]:
    """Pairs with a short and a long caption. The long one is the short one and captions of the same category, 30 tokens
    and up, because the corpus has none of its own."""
    rng = random.Random(seed)
    chosen, seen = [], set()
    for record in rng.sample(records, len(records)):
        if len(chosen) < count and record.short[0] not in seen:
            others = [
                r.short[0]
                for r in records
                if r.metadata.get("category") == record.metadata.get("category")
            ]
            long = " ".join([record.short[0], *rng.choices(others, k=rng.randint(4, 9))])
            chosen.append(Record(record.id, image=record.image, short=record.short[:1], long=long))
            seen.add(record.short[0])
    return chosen


# ------------------------------------------------------------------ vlduet


def ours(folder: Path, records: list[Record], name: str, *, again: bool = False) -> Step:
    """The step of `vlduet train`, without its bookkeeping; `again` computes layers twice and keeps only their inputs."""
    torch.manual_seed(0)
    model = DuetModel.from_pretrained(folder, check_golden=False)
    model.make_trainable(lora=LORA, projector=True)
    if again:
        model.backbone.enable_gradient_checkpointing()
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=LEARNING_RATE, weight_decay=0.0)
    samples = [Sample(record, position, 0) for position, record in enumerate(records)]
    options = vladva.VladvaOptions()
    packed = re.search(r"packed (\d+)", name)
    pack = int(packed[1]) if packed else None

    def losses(readout: Readout) -> dict[str, Tensor]:
        found = vladva.objective(readout, model.logit_scale, options)
        return {"loss": torch.stack(list(found.values())).sum(), **found}

    def step() -> dict[str, float]:
        if "cold" in name:
            model.feature_cache = FeatureCache(None)
        model.train()
        sequences = [
            s for sample in samples for s in vladva.layout(sample, model.renderer, options)
        ]
        if name == CHUNKS:
            nothing = create_empty_readout(model.dim, like=model.logit_scale.detach())
            chunks = [
                model.collate(part) for part in split_into_chunks(sequences, budget(sequences))
            ]
            told = compute_cached_losses(model, chunks, compute_losses=losses, empty=nothing)
        else:
            passes = [(False, True), (True, False)] if name == ONE_PASS_PER_LOSS else [(True, True)]
            parts = [
                [s for one in sequences if (s := trim(one, labels=labels, anchors=anchors))]
                for labels, anchors in passes
            ]
            told = losses(
                concatenate_readouts([model(model.collate(part, pack_to=pack)) for part in parts])
            )
            told["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {loss: float(told[loss].detach()) for loss in vladva.RECIPE.objectives}

    return step


def budget(sequences: list[Sequence]) -> int:
    """Padded tokens of MINI_BATCH images with their captions."""
    return MINI_BATCH * max(len(sequence) for sequence in sequences)


# ------------------------------------------------------------------ plain transformers + peft


class Peer:
    """The usual way: a pass for every side of every loss."""

    def __init__(self, folder: Path, records: list[Record], *, again: bool = False):
        torch.manual_seed(0)
        mine = DuetModel.from_pretrained(
            folder, check_golden=False
        )  # for its prompts and its head's weights
        self.device, dtype = mine.backbone.device, mine.backbone.model.dtype
        self.prompts, self.head = (
            mine.prompts,
            EmbeddingHead(mine.head.kind, mine.backbone.hidden_size, mine.head.dim),
        )
        self.head.load_state_dict(mine.head.state_dict())
        self.head.to(self.device)
        self.tokens = mine.prepare_image(records[0].image).num_tokens if records[0].image else 0
        self.scale = torch.nn.Parameter(mine.logit_scale.detach().clone())
        del mine
        base = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(self.device)
        base.requires_grad_(False)
        targets = rf".*language_model\..*\.({LORA_TARGET_PATTERNS[LORA.targets]})"
        get_peft_model(base, LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=targets))
        base.model.multi_modal_projector.requires_grad_(True)
        if again:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = base
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.image_token = self.tokenizer.convert_ids_to_tokens(base.config.image_token_id)
        self.records = records
        moving = [p for p in base.parameters() if p.requires_grad] + [
            *self.head.parameters(),
            self.scale,
        ]
        self.optimizer = torch.optim.AdamW(moving, lr=LEARNING_RATE, weight_decay=0.0)

    def step(self) -> dict[str, float]:
        self.model.train()
        self.model.model.vision_tower.eval()
        pictures = [images.load_image(r.image) for r in self.records if r.image]
        pixels = dict(self.processor(images=pictures, return_tensors="pt").to(self.device))
        prompt = self.prompts.image.replace("{image}", self.image_token * self.tokens)
        captions = [self.prompts.text.replace("{text}", r.short[0]) for r in self.records]
        left = self.embed([prompt] * len(self.records), pixels, image=True)
        scores = (
            left
            @ self.embed(captions, {}, image=False).T
            * self.scale.clamp(max=math.log(100)).exp()
        )
        target = torch.arange(len(scores), device=self.device)
        contrastive = F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)
        language = self.language(prompt, pixels)
        (contrastive + language).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"contrastive": float(contrastive), "language": float(language)}

    def embed(self, texts: list[str], pixels: dict[str, Tensor], *, image: bool) -> Tensor:
        inputs = self.tokens_of(texts)
        states = self.model.model(**inputs, **pixels).last_hidden_state.to(
            self.scale.dtype
        )  # [B, T, D]
        if image and self.prompts.image_pool == "mean":
            mask = (inputs["input_ids"] == self.model.config.image_token_id)[..., None].to(
                states.dtype
            )
            return self.head((states * mask).sum(1) / mask.sum(1))
        return self.head(states[torch.arange(len(states)), inputs["attention_mask"].sum(1) - 1])

    def language(self, prompt: str, pixels: dict[str, Tensor]) -> Tensor:
        inputs = self.tokens_of(
            [f"{prompt}{r.long}{self.tokenizer.eos_token}" for r in self.records]
        )
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, : len(self.tokenizer(prompt)["input_ids"])] = -100
        return self.model(**inputs, **pixels, labels=labels).loss

    def tokens_of(self, texts: list[str]) -> dict[str, Tensor]:
        return dict(
            self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(
                self.device
            )
        )


# ------------------------------------------------------------------ the run


def contender(name: str, folder: Path, records: list[Record], *, again: bool = False) -> Step:
    if name == TRANSFORMERS:
        return Peer(folder, records, again=again).step
    if name == LIBRARIES:
        return _libraries.TwoLibraries(
            folder, records, lora=LORA, lr=LEARNING_RATE, mini_batch=MINI_BATCH
        ).train_step
    return ours(folder, records, name, again=again)


def peak(step: Step, steps: int) -> tuple[float, float]:
    """(peak, of it beyond what was there before the first step) of this process, in GB."""
    before = _bench.peak_memory_gb()
    for _ in range(steps):
        step()
    return _bench.peak_memory_gb(), _bench.peak_memory_gb() - before


def contrastive_step(
    folder: Path, records: list[Record], scratch: Path, *, size: int, steps: int
) -> Step:
    """The next step of a run of `vlduet train` whose batches have `size` records."""
    path = scratch / "train.jsonl"
    path.write_text(
        "".join(json.dumps(record_to_json(record, root=scratch)) + "\n" for record in records)
    )
    train = {"steps": steps, "batch_size": size, "chunk_tokens": 512, "projector": True}
    tree = {
        "out": str(scratch / "run"),
        "recipe": {"name": "vladva"},
        "objectives": {"contrastive": 1.0},
        "model": {"path": str(folder)},
        "data": {"train": [{"path": str(path)}], "cache": str(scratch / "features")},
        "train": train,
    }
    run = setup.prepare_run(config.validate_run_config(tree, place="row c"))
    laid_out = setup.iterate_batches(run, 0)

    def step() -> dict[str, float]:
        run.model.train()
        _, chunks = next(laid_out)
        told = forward_backward(run, chunks)
        optimizer_step(run, 0)
        return told

    return step


def compare_contenders(
    title: str,
    names: list[str],
    folder: Path,
    records: list[Record],
    repeats: int,
    *,
    again: bool = False,
) -> dict[str, list[float]]:
    """Warm up, print the first losses, then the times; a peer that is not installed is named as missing."""
    steps: dict[str, Step] = {}
    for name in names:
        try:
            steps[name] = contender(name, folder, records, again=again)
        except ImportError as error:
            print(f"  {name:28} not measured: {error}")
    first = {name: step() for name, step in steps.items()}
    for name, losses in first.items():
        print(
            f"  {name:28} first losses: "
            + ", ".join(f"{key} {value:.4f}" for key, value in losses.items())
        )
    seconds = _bench.time_in_turns(steps, repeats)
    _bench.print_ratios(title, "records/s", seconds, work=len(records), ours=names[0])
    return seconds


def main() -> None:
    parser = _bench.build_parser(__doc__)
    parser.add_argument(
        "--rows", default="abc", help="which of a, b and c to measure (default: all)"
    )
    parser.add_argument(
        "--peak",
        help="measure the memory of this contender, or of this size of row c, and print it",
    )
    options = parser.parse_args()
    install_log_handler()
    folder = _bench.find_model_folder(options.model)
    quick = options.quick
    pairs = _bench.load_pairs(options.data)
    records = select_records(pairs, 6 if quick else 12, options.seed)
    if options.peak:
        with tempfile.TemporaryDirectory() as scratch:
            size = int(options.peak) if options.peak.isdecimal() else 0
            if size:
                steps = (SIZES[1] if quick else SIZES[-1]) // size
                found = peak(
                    contrastive_step(folder, pairs, Path(scratch), size=size, steps=steps), steps
                )
            else:
                found = peak(contender(options.peak, folder, records), 2)
            print(json.dumps(found))
        return
    _bench.print_environment(options, folder)
    repeats = options.repeats or (2 if quick else 3)
    again = [sys.executable, __file__, *sys.argv[1:], "--peak"]

    def measured(what: str) -> tuple[float, float]:
        found = subprocess.run([*again, what], stdout=subprocess.PIPE, text=True, check=True).stdout
        whole, steps_only = json.loads(found.splitlines()[-1])
        return whole, steps_only

    if "a" in options.rows:
        packs = PACKS[:1] if quick else PACKS
        names = [f"vlduet, packed {n}" for n in packs]
        names += [
            "vlduet, padded",
            f"vlduet, packed {PACKS[0]}, cold",
            ONE_PASS_PER_LOSS,
            TRANSFORMERS,
        ]
        compare_contenders(f"a: a step on {len(records)} records", names, folder, records, repeats)
        print("\npeak memory of a process (of it in the steps), GB")
        for name in (names[0], "vlduet, padded", TRANSFORMERS):
            print("  {:28} {:6.2f}  ({:.2f})".format(name, *measured(name)), flush=True)
    if "b" in options.rows:
        many = select_records(pairs, 8 if quick else 24, options.seed)
        print(
            f"\nthe peer of row b, with B = {len(many)} and N = {MINI_BATCH}\n\n{_libraries.__doc__}"
        )
        names = [CHUNKS, f"vlduet, packed {PACKS[0]}", LIBRARIES]
        compare_contenders(f"b: a step on {len(many)} records", names, folder, many, repeats)
    if "c" in options.rows:
        print(
            "\nc: peak memory of a process (of it in the steps), GB, and against the smallest batch"
        )
        smallest = 0.0
        for size in SIZES[:2] if quick else SIZES:
            whole, steps_only = measured(str(size))
            smallest = smallest or whole
            print(
                f"  batch {size:6} {whole:6.2f}  ({steps_only:.2f})  {whole / smallest - 1:+.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
