"""One training step of two losses, InfoNCE on short captions and cross entropy on long ones.

Row a
    vlduet, padded | packed N     One forward pass, both losses read from it (vladva): an image
                                  and its long caption are one sequence, logits at labels only,
                                  vision features cached. `cold` runs the vision tower in the step,
                                  as in the first epoch.
    vlduet, a pass for each loss  The same numbers as most joint trainers compute them
                                  (train.fused=false).
    transformers + peft           The usual way, three passes of `model.model(...)`: images, short
                                  texts, and image with long caption through `model(labels=...)`;
                                  get_peft_model(LoraConfig(same rank and targets)), AdamW, padded
                                  batches, full logits. The frozen tower runs in two of them.
Row b
    vlduet, chunks                The step of a by GradCache, in chunks of about 16 images.
    sentence-transformers + TRL   A step of CachedMultipleNegativesRankingLoss with mini-batches of
                                  16, and one of SFTTrainer (pip install trl): _libraries.py.
Row c
    Peak memory of a process that takes contrastive steps by GradCache (`vlduet train`,
    train.chunk_tokens=512: a batch of 64 is more than one chunk) on the same 4,096 records (256
    with --quick) in batches of 64 to 4,096, from pixels on; each in a process of its own.
Row d
    Bytes that a layer of the language model keeps for its backward pass, for a token and with the
    frozen weights in bfloat16: its LoRA multiplies in bfloat16 (vlduet), or in float32 (PEFT).

Same weights, records and trainable tensors in all; the losses of the first step are printed. A step
is forward pass, backward pass and AdamW.

    python benchmarks/train_step.py [--quick] [--rows abcd] [--model DIR] [--data FILE]
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

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
from vlduet.data.sequences import IGNORE_INDEX, Sequence, trim
from vlduet.data.stream import Sample
from vlduet.logs import install_log_handler
from vlduet.model import adapters
from vlduet.model.adapters import LORA_TARGET_PATTERNS, LoraSettings
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache
from vlduet.model.pooling import EmbeddingHead, Readout, concatenate_readouts, create_empty_readout
from vlduet.recipes import vladva
from vlduet.train.gradcache import compute_cached_losses
from vlduet.train.loader import iterate_batches
from vlduet.train.memory import measure_activations
from vlduet.train.setup import prepare_run
from vlduet.train.step import forward_backward, optimizer_step

LORA = LoraSettings(rank=16, alpha=16, targets="all")
LEARNING_RATE = 1e-4
PACKED_ROW_LENGTHS = (192, 128, 64)
"""Tokens of a packed row; the others of row a are compared with the first."""
MINI_BATCH = 16
"""Number of images of a chunk in row b."""
BATCH_SIZES = (64, 256, 1024, 4096)
"""Contrastive batch sizes of row c."""
ONE_PASS_PER_LOSS = "vlduet, a pass for each loss"
CHUNKS = "vlduet, chunks"
TRANSFORMERS = "transformers + peft"
LIBRARIES = "sentence-transformers + TRL"
Step = Callable[[], dict[str, float]]
"""Function that takes one training step and returns the losses before it."""


def select_records(records: list[Record], count: int, seed: int) -> list[Record]:
    """Return `count` pairs with distinct short captions, and long captions of 30 tokens and more.

    The corpus has no long captions: they are the short one and captions of the same category.
    """
    rng = random.Random(seed)
    selected: list[Record] = []
    captions: set[str] = set()
    for record in rng.sample(records, len(records)):
        short = record.short[0]
        if len(selected) == count or short in captions:
            continue
        category = record.metadata.get("category")
        same_category = [r.short[0] for r in records if r.metadata.get("category") == category]
        long = " ".join([short, *rng.choices(same_category, k=rng.randint(4, 9))])
        selected.append(Record(record.id, image=record.image, short=(short,), long=long))
        captions.add(short)
    return selected


# ------------------------------------------------------------------ vlduet


def create_vlduet_step(
    folder: Path, records: list[Record], name: str, *, recompute_layers: bool = False
) -> Step:
    """Return the step of `vlduet train`, without its bookkeeping, as a contender's name says."""
    torch.manual_seed(0)
    model = DuetModel.from_pretrained(folder, check_golden=False)
    model.make_trainable(lora=LORA, projector=True)
    if recompute_layers:
        model.backbone.enable_gradient_checkpointing()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    options = vladva.VladvaOptions()
    packed = re.search(r"packed (\d+)", name)
    pack_to = int(packed[1]) if packed else None

    def compute_losses(readout: Readout) -> dict[str, Tensor]:
        losses = vladva.objective(readout, model.logit_scale, options)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def step() -> dict[str, float]:
        if "cold" in name:
            model.feature_cache = FeatureCache(None)
        model.train()
        sequences = layout_records(model, records)
        if name == CHUNKS:
            empty = create_empty_readout(model.dim, like=model.logit_scale.detach())
            max_tokens = MINI_BATCH * max(len(sequence) for sequence in sequences)
            chunks = [model.collate(part) for part in split_into_chunks(sequences, max_tokens)]
            losses = compute_cached_losses(
                model, chunks, compute_losses=compute_losses, empty=empty
            )
        else:
            passes = [(False, True), (True, False)] if name == ONE_PASS_PER_LOSS else [(True, True)]
            readouts = []
            for labels, anchors in passes:
                trimmed = [trim(s, labels=labels, anchors=anchors) for s in sequences]
                needed = [s for s in trimmed if s is not None]
                readouts.append(model(model.collate(needed, pack_to=pack_to)))
            losses = compute_losses(concatenate_readouts(readouts))
            losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {loss: float(losses[loss].detach()) for loss in vladva.RECIPE.objectives}

    return step


def layout_records(model: DuetModel, records: list[Record]) -> list[Sequence]:
    """Return the sequences of VladVA for records."""
    sequences: list[Sequence] = []
    for position, record in enumerate(records):
        sample = Sample(record, position, 0)
        sequences += vladva.layout(sample, model.renderer, vladva.VladvaOptions())
    return sequences


# ------------------------------------------------------------------ plain transformers + peft


class TransformersTrainer:
    """The usual way: one pass for each side of each loss."""

    def __init__(self, folder: Path, records: list[Record], *, recompute_layers: bool = False):
        torch.manual_seed(0)
        # Prompts and head are those of our model.
        duet = DuetModel.from_pretrained(folder, check_golden=False)
        self.device = duet.backbone.device
        self.prompts = duet.prompts
        self.head = EmbeddingHead(duet.head.kind, duet.backbone.hidden_size, duet.head.dim)
        self.head.load_state_dict(duet.head.state_dict())
        self.head.to(self.device)
        image = records[0].image
        self.num_image_tokens = duet.prepare_image(image).num_tokens if image else 0
        self.logit_scale = torch.nn.Parameter(duet.logit_scale.detach().clone())
        dtype = duet.backbone.model.dtype
        del duet
        base = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(self.device)
        base.requires_grad_(False)
        targets = rf".*language_model\..*\.({LORA_TARGET_PATTERNS[LORA.targets]})"
        get_peft_model(base, LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=targets))
        base.model.multi_modal_projector.requires_grad_(True)
        if recompute_layers:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = base
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.image_token = self.tokenizer.convert_ids_to_tokens(base.config.image_token_id)
        self.records = records
        trained = [p for p in base.parameters() if p.requires_grad]
        trained += [*self.head.parameters(), self.logit_scale]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)

    def step(self) -> dict[str, float]:
        """Take one training step and return the losses before it."""
        self.model.train()
        self.model.model.vision_tower.eval()
        decoded = [images.load_image(r.image) for r in self.records if r.image]
        pixels = dict(self.image_processor(images=decoded, return_tensors="pt").to(self.device))
        prompt = self.prompts.image.replace("{image}", self.image_token * self.num_image_tokens)
        captions = [self.prompts.text.replace("{text}", r.short[0]) for r in self.records]
        image_embeddings = self.embed([prompt] * len(self.records), pixels, is_image=True)
        text_embeddings = self.embed(captions, {}, is_image=False)
        scale = self.logit_scale.clamp(max=math.log(100)).exp()
        scores = image_embeddings @ text_embeddings.T * scale
        target = torch.arange(len(scores), device=self.device)
        contrastive = F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)
        language = self.compute_language_loss(prompt, pixels)
        (contrastive + language).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"contrastive": float(contrastive), "language": float(language)}

    def embed(self, texts: list[str], pixels: dict[str, Tensor], *, is_image: bool) -> Tensor:
        """Return the embeddings float[B, E] of prompts."""
        inputs = self.tokenize(texts)
        states = self.model.model(**inputs, **pixels).last_hidden_state  # [B, T, D]
        states = states.to(self.logit_scale.dtype)
        if is_image and self.prompts.image_pool == "mean":
            is_image_token = inputs["input_ids"] == self.model.config.image_token_id
            mask = is_image_token[..., None].to(states.dtype)
            return self.head((states * mask).sum(1) / mask.sum(1))
        last = inputs["attention_mask"].sum(1) - 1
        return self.head(states[torch.arange(len(states)), last])

    def compute_language_loss(self, prompt: str, pixels: dict[str, Tensor]) -> Tensor:
        """Return the cross entropy of the long captions after the image prompt."""
        inputs = self.tokenize(
            [f"{prompt}{r.long}{self.tokenizer.eos_token}" for r in self.records]
        )
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE_INDEX)
        labels[:, : len(self.tokenizer(prompt)["input_ids"])] = IGNORE_INDEX
        return self.model(**inputs, **pixels, labels=labels).loss

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Return the right-padded tokens of texts, on the device."""
        inputs = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        return dict(inputs.to(self.device))


# ------------------------------------------------------------------ measurements


def create_step(
    name: str, folder: Path, records: list[Record], *, recompute_layers: bool = False
) -> Step:
    """Return the training step of a contender; ImportError where its library is not installed."""
    if name == TRANSFORMERS:
        return TransformersTrainer(folder, records, recompute_layers=recompute_layers).step
    if name == LIBRARIES:
        return _libraries.TwoLibraries(
            folder, records, lora=LORA, lr=LEARNING_RATE, mini_batch=MINI_BATCH
        ).train_step
    return create_vlduet_step(folder, records, name, recompute_layers=recompute_layers)


def create_contrastive_step(
    folder: Path, records: list[Record], scratch: Path, *, batch_size: int, num_steps: int
) -> Step:
    """Return the step of a run of `vlduet train` with GradCache and batches of this size."""
    path = scratch / "train.jsonl"
    lines = [json.dumps(record_to_json(record, root=scratch)) + "\n" for record in records]
    path.write_text("".join(lines))
    tree = {
        "out": str(scratch / "run"),
        "recipe": {"name": "vladva"},
        "objectives": {"contrastive": 1.0},
        "model": {"path": str(folder)},
        "data": {"train": [{"path": str(path)}], "cache": str(scratch / "features")},
        "train": {
            "steps": num_steps,
            "batch_size": batch_size,
            "chunk_tokens": 512,
            "projector": True,
        },
    }
    run = prepare_run(config.validate_run_config(tree, place="row c"))
    batches_of_steps = iterate_batches(run, 0)

    def step() -> dict[str, float]:
        run.model.train()
        _, batches = next(batches_of_steps)
        values = forward_backward(run, batches)
        optimizer_step(run, 0)
        return values

    return step


def measure_peak(step: Step, num_steps: int) -> tuple[float, float]:
    """Take steps; return this process's peak memory in GB, and how much of it the steps added."""
    before = _bench.peak_memory_gb()
    for _ in range(num_steps):
        step()
    peak = _bench.peak_memory_gb()
    return peak, peak - before


def measure_peak_in_subprocess(name: str) -> tuple[float, float]:
    """Return the result of `measure_peak` for a contender, or a batch size of row c, by itself."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", name]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    peak, added = json.loads(output.splitlines()[-1])
    return peak, added


def compare_contenders(
    title: str,
    names: list[str],
    *,
    folder: Path,
    records: list[Record],
    repeats: int,
    recompute_layers: bool = False,
) -> dict[str, list[float]]:
    """Print the losses of the first step and the times of the others.

    Returns:
        Seconds of every timed step by contender; one that is not installed is printed and left out.
    """
    steps: dict[str, Step] = {}
    for name in names:
        try:
            steps[name] = create_step(name, folder, records, recompute_layers=recompute_layers)
        except ImportError as error:
            print(f"  {name:28} not measured: {error}")
    first_losses = {name: step() for name, step in steps.items()}
    for name, losses in first_losses.items():
        values = ", ".join(f"{key} {value:.4f}" for key, value in losses.items())
        print(f"  {name:28} first losses: {values}")
    seconds = _bench.time_in_turns(steps, repeats)
    _bench.print_ratios(title, "records/s", seconds, work=len(records), reference=names[0])
    return seconds


def print_peak(
    name: str, *, folder: Path, pairs: list[Record], records: list[Record], quick: bool
) -> None:
    """Measure the memory of a contender, or of a batch size of row c, and print it as JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        if name.isdecimal():
            batch_size = int(name)
            num_steps = (BATCH_SIZES[1] if quick else BATCH_SIZES[-1]) // batch_size
            step = create_contrastive_step(
                folder, pairs, Path(scratch), batch_size=batch_size, num_steps=num_steps
            )
            result = measure_peak(step, num_steps)
        else:
            result = measure_peak(create_step(name, folder, records), 2)
    print(json.dumps(result))


def main() -> None:
    parser = _bench.build_parser(__doc__)
    parser.add_argument(
        "--rows", default="abcd", help="which of a, b, c and d to measure (default: all)"
    )
    parser.add_argument(
        "--peak",
        help="measure the memory of this contender, or of this size of row c, and print it",
    )
    options = parser.parse_args()
    install_log_handler()
    folder = _bench.find_model_folder(options.model)
    pairs = _bench.load_pairs(options.data)
    records = select_records(pairs, 6 if options.quick else 12, options.seed)
    if options.peak:
        print_peak(options.peak, folder=folder, pairs=pairs, records=records, quick=options.quick)
        return
    _bench.print_environment(options, folder)
    repeats = options.repeats or (2 if options.quick else 3)
    if "a" in options.rows:
        print_row_a(folder, records, repeats=repeats, quick=options.quick)
    if "b" in options.rows:
        many = select_records(pairs, 8 if options.quick else 24, options.seed)
        print_row_b(folder, many, repeats=repeats)
    if "c" in options.rows:
        print_row_c(quick=options.quick)
    if "d" in options.rows:
        print_row_d(folder)


def print_row_a(folder: Path, records: list[Record], *, repeats: int, quick: bool) -> None:
    """Print times and memory of a step with one forward pass, and of its contenders."""
    row_lengths = PACKED_ROW_LENGTHS[:1] if quick else PACKED_ROW_LENGTHS
    packed = [f"vlduet, packed {length}" for length in row_lengths]
    names = [*packed, "vlduet, padded", f"{packed[0]}, cold", ONE_PASS_PER_LOSS, TRANSFORMERS]
    title = f"a: a step on {len(records)} records"
    compare_contenders(title, names, folder=folder, records=records, repeats=repeats)
    print("\npeak memory of a process (of it in the steps), GB")
    for name in (names[0], "vlduet, padded", TRANSFORMERS):
        peak, added = measure_peak_in_subprocess(name)
        print(f"  {name:28} {peak:6.2f}  ({added:.2f})", flush=True)


def print_row_b(folder: Path, records: list[Record], *, repeats: int) -> None:
    """Print times of a step in chunks, and of two libraries that train one loss each."""
    print(f"\nthe peer of row b, with B = {len(records)} and N = {MINI_BATCH}")
    print(f"\n{_libraries.__doc__}")
    names = [CHUNKS, f"vlduet, packed {PACKED_ROW_LENGTHS[0]}", LIBRARIES]
    title = f"b: a step on {len(records)} records"
    compare_contenders(title, names, folder=folder, records=records, repeats=repeats)


def print_row_c(*, quick: bool) -> None:
    """Print the memory of contrastive steps by batch size."""
    print("\nc: peak memory of a process (of it in the steps), GB, and against the smallest batch")
    smallest = None
    for batch_size in BATCH_SIZES[:2] if quick else BATCH_SIZES:
        peak, added = measure_peak_in_subprocess(str(batch_size))
        smallest = peak if smallest is None else smallest
        growth = f"{peak / smallest - 1:+.0%}"
        print(f"  batch {batch_size:6} {peak:6.2f}  ({added:.2f})  {growth}", flush=True)


def measure_layer_bytes(folder: Path, lora: LoraSettings) -> float:
    """Return the bytes that a layer of a model in bfloat16 keeps for a token of a text."""
    model = DuetModel.from_pretrained(folder, dtype=torch.bfloat16, check_golden=False)
    model.make_trainable(lora=lora, projector=False)
    sequences = [model.renderer.render_embedding((text,)) for text in ("a short text", "a text")]
    return measure_activations(model, [model.collate(sequences)]).layer.tokens


def print_row_d(folder: Path) -> None:
    """Print the memory of a layer with LoRA of two ranks, and that of PEFT's own products."""
    print("\nd: bytes a token and layer, and against vlduet")
    for rank in (LORA.rank, 8 * LORA.rank):
        lora = dataclasses.replace(LORA, rank=rank)
        vlduet_bytes = measure_layer_bytes(folder, lora)
        with mock.patch.object(adapters, "_multiply_in_input_dtype"):
            peft_bytes = measure_layer_bytes(folder, lora)
        ratio = peft_bytes / vlduet_bytes
        print(f"  {f'vlduet, rank {rank}':28} {vlduet_bytes:8,.0f}")
        print(f"  {f'PEFT, rank {rank}':28} {peft_bytes:8,.0f}  {ratio:.2f} x", flush=True)


if __name__ == "__main__":
    main()
