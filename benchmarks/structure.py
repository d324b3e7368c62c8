"""What the structure loss of Sugar adds to a joint training step, frozen features cached.

    joint step      the step of `vlduet train` with recipe sugar on 64 sequences of two images and two captions, k = 4:
                    forward, L_g and L_d, backward, AdamW; vision features cached
    L_d             of it: targets of all prefixes, the loss, and its gradient for the embeddings
    looking up      of it: the frozen encoders' vectors out of the cache. Training does it in a thread, one step ahead

The mark is that L_d takes at most 3 % of the step. The frozen encoders are random vectors of the usual widths: what they say
decides no timing.

    python benchmarks/structure.py [--quick] [--model DIR] [--data FILE]
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import _bench
import torch
from torch import Tensor
from torch.nn import functional as F

from vlduet.data.records import Part, Record
from vlduet.data.stream import Sample
from vlduet.encoders.frozen import ROLE_MODALITIES, FrozenEncoder, FrozenEncoders
from vlduet.model import nano
from vlduet.model.adapters import LoraSettings
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache
from vlduet.recipes import sugar

WIDTHS = {"vision": 2 * nano.NUM_FEATURES, "text": 384, "cross": 256}
LORA = LoraSettings(rank=16, alpha=32, targets="qv")


def documents(records: list[Record], count: int, seed: int) -> list[Record]:
    """Sequences of two images with their captions."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        parts = [
            part
            for r in rng.sample(records, 2)
            if r.image is not None
            for part in (r.image, r.short[0])
        ]
        found.append(Record(f"document {i}", parts=tuple(parts)))
    return found


def build_random_encoders() -> FrozenEncoders:
    """Frozen encoders whose vectors are random; kept in memory, as a warm disk cache would be."""

    def encoder(role: str, width: int) -> FrozenEncoder:
        generator = torch.Generator().manual_seed(width)

        def encode(parts: list[Part]) -> Tensor:
            return F.normalize(torch.randn(len(parts), width, generator=generator) + 0.3, dim=1)

        return FrozenEncoder(
            Path(role),
            ROLE_MODALITIES[role],
            lambda: dict.fromkeys(ROLE_MODALITIES[role], encode),
            role,
        )

    return FrozenEncoders(
        {role: encoder(role, width) for role, width in WIDTHS.items()}, cache=FeatureCache(None)
    )


def contenders(folder: Path, records: list[Record]) -> dict[str, Callable[[], object]]:
    """The step and its parts, all on the same batch."""
    torch.manual_seed(0)
    model = DuetModel.from_pretrained(folder, device="cpu")
    model.set_prompts(replace(model.prompts, image_pool="mean"))
    model.make_trainable(lora=LORA, projector=True)
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=1e-4, weight_decay=0.0)
    options, encoders = (
        sugar.SugarOptions(n_ref=len(records) * sugar.SugarOptions().k),
        build_random_encoders(),
    )
    bare = [
        s
        for i, record in enumerate(records)
        for s in sugar.layout(Sample(record, i, 0), model.renderer, options)
    ]
    batch = model.collate(encoders.attach_features(bare), pack_to=64)
    with torch.no_grad():
        read = model(batch)

    def step() -> None:
        readout = model.train()(batch)
        losses = sugar.objective(readout, model.logit_scale, options)
        sum(losses.values(), torch.zeros(())).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def structure() -> None:
        embeddings = read.embeddings.detach().requires_grad_()
        sugar.compute_structure_loss(replace(read, embeddings=embeddings), options).backward()

    return {
        "joint step": step,
        "L_d": structure,
        "looking up": lambda: encoders.attach_features(bare),
    }


def main() -> None:
    options = _bench.arguments(__doc__).parse_args()
    folder = _bench.model_folder(options.model)
    count, repeats = (8, 2) if options.quick else (64, 5)
    records = documents(_bench.pairs(options.data), count, options.seed)
    _bench.facts(options, folder)
    found = contenders(folder, records)
    for contender in found.values():
        contender()
    seconds = _bench.interleaved(found, options.repeats or repeats)
    print(f"\n{count} sequences, {count * sugar.SugarOptions().k} prefixes")
    for name, times in seconds.items():
        share = statistics.median(
            mine / whole for mine, whole in zip(times, seconds["joint step"], strict=True)
        )
        print(
            f"  {name:42} {statistics.median(times) * 1e3:10.1f} ms   {100 * share:6.2f} % of the step"
        )


if __name__ == "__main__":
    main()
