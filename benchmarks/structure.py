"""Cost of the structure loss of Sugar in a joint training step, with cached frozen features.

    joint step   the step of `vlduet train` with recipe sugar on 64 sequences of two images and two
                 captions, k = 4: forward, L_g and L_d, backward, AdamW; vision features are cached
    L_d          part of it: targets of all prefixes, the loss, and its gradient in the embeddings
    lookup       part of it: reading the frozen encoders' vectors from the cache. Training does it
                 in a thread, one step ahead

L_d should take at most 3 % of the step. The frozen encoders return random vectors of the usual
dimensions, since their values do not change the time.

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
from vlduet.recipes import prefixes, sugar

ENCODER_DIMS = {"vision": 2 * nano.NUM_FEATURES, "text": 384, "cross": 256}
LORA = LoraSettings(rank=16, alpha=32, targets="qv")
PACKED_TOKENS = 64
"""Number of tokens of a packed row."""


def make_documents(records: list[Record], count: int, seed: int) -> list[Record]:
    """Return interleaved records of two random pairs each: image, caption, image, caption."""
    rng = random.Random(seed)
    documents = []
    for i in range(count):
        parts: list[Part] = []
        for record in rng.sample(records, 2):
            if record.image is not None:
                parts += [record.image, record.short[0]]
        documents.append(Record(f"document {i}", parts=tuple(parts)))
    return documents


def build_random_encoders() -> FrozenEncoders:
    """Return encoders of random vectors; their cache is in memory, like a warm one on disk."""

    def build_encoder(role: str, dim: int) -> FrozenEncoder:
        generator = torch.Generator().manual_seed(dim)

        def encode(parts: list[Part]) -> Tensor:
            return F.normalize(torch.randn(len(parts), dim, generator=generator) + 0.3, dim=1)

        modalities = ROLE_MODALITIES[role]
        return FrozenEncoder(
            Path(role), modalities, lambda: dict.fromkeys(modalities, encode), role
        )

    by_role = {role: build_encoder(role, dim) for role, dim in ENCODER_DIMS.items()}
    return FrozenEncoders(by_role, cache=FeatureCache(None))


def prepare_contenders(folder: Path, records: list[Record]) -> dict[str, Callable[[], object]]:
    """Return the step and its parts as functions, all on the same batch."""
    torch.manual_seed(0)
    model = DuetModel.from_pretrained(folder, device="cpu")
    model.set_prompts(replace(model.prompts, image_pool="mean"))
    model.make_trainable(lora=LORA, projector=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    options = sugar.SugarOptions(n_ref=len(records) * sugar.SugarOptions().k)
    encoders = build_random_encoders()
    sequences = []
    for position, record in enumerate(records):
        sequences += sugar.layout(Sample(record, position, 0), model.renderer, options)
    batch = model.collate(encoders.attach_features(sequences), pack_to=PACKED_TOKENS)
    with torch.no_grad():
        fixed_readout = model(batch)

    def run_step() -> None:
        readout = model.train()(batch)
        losses = sugar.objective(readout, model.logit_scale, options)
        sum(losses.values(), torch.zeros(())).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def compute_structure_loss() -> None:
        embeddings = fixed_readout.embeddings.detach().requires_grad_()
        readout = replace(fixed_readout, embeddings=embeddings)
        loss = prefixes.compute_structure_loss(readout, options, roles=sugar.PREFIX_ROLES)
        loss.backward()

    return {
        "joint step": run_step,
        "L_d": compute_structure_loss,
        "lookup": lambda: encoders.attach_features(sequences),
    }


def main() -> None:
    """Print the median time of the step and its parts, and their shares of the step."""
    options = _bench.build_parser(__doc__).parse_args()
    folder = _bench.find_model_folder(options.model)
    count, repeats = (8, 2) if options.quick else (64, 5)
    records = make_documents(_bench.load_pairs(options.data), count, options.seed)
    _bench.print_environment(options, folder)
    contenders = prepare_contenders(folder, records)
    for contender in contenders.values():
        contender()
    seconds = _bench.time_in_turns(contenders, options.repeats or repeats)
    print(f"\n{count} sequences, {count * sugar.SugarOptions().k} prefixes")
    for name, times in seconds.items():
        shares = [part / step for part, step in zip(times, seconds["joint step"], strict=True)]
        milliseconds = statistics.median(times) * 1e3
        share = 100 * statistics.median(shares)
        print(f"  {name:42} {milliseconds:10.1f} ms   {share:6.2f} % of the step")


if __name__ == "__main__":
    main()
