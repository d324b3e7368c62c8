"""One rank of a gloo group: saves losses and gradients of its share of a batch, for every case.

python worker.py RANK WORLD_SIZE PORT FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from helpers import frozen_encoders, tiny
from vlduet import distributed
from vlduet.data.batches import split_into_chunks
from vlduet.data.records import Message, Record
from vlduet.data.sequences import Sequence
from vlduet.data.stream import Sample
from vlduet.model.adapters import LoraSettings
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import Readout, concatenate_readouts, create_empty_readout
from vlduet.recipes import duet, sugar, vladva
from vlduet.train.gradcache import compute_cached_losses

CHUNK_TOKENS = 60
"""With chunks of so many tokens, the two ranks have different numbers of chunks."""


@dataclass(frozen=True)
class Case:
    """A recipe on a batch, and the share of rank 0."""

    recipe: ModuleType = vladva
    options: Any = field(default_factory=vladva.VladvaOptions)
    weights: dict[str, float] = field(default_factory=lambda: {"contrastive": 1.0, "language": 0.7})
    first_share: int = 3
    """Number of records of rank 0 of two; 0 makes it an empty rank."""
    starts_with_chat: bool = False
    """Put a chat before the records."""
    is_chunked: bool = False
    """Let the ranks use GradCache; one process never does."""


GUIDED = vladva.VladvaOptions(guide="triple")
SUGAR = {
    "recipe": sugar,
    "options": sugar.SugarOptions(),
    "weights": {"structure": 1.0, "language": 0.7},
}
SUGAR_EXTENSIONS = sugar.SugarOptions(
    target="awm",
    same_sequence="nested",
    calibrate=True,
    loss="kl",
    triple=False,
    pair_order="either",
)
DUET = {
    "recipe": duet,
    "weights": {"contrastive": 1.0, "language": 0.7, "structure": 0.3},
}
ONLY_LANGUAGE = {"contrastive": 0.0, "language": 1.0}
CASES = {
    "contrastive": Case(weights={"contrastive": 1.0, "language": 0.0}),
    "language": Case(weights=ONLY_LANGUAGE),
    "joint": Case(),
    "language, empty rank": Case(weights=ONLY_LANGUAGE, first_share=0),
    "empty rank": Case(first_share=0),
    "chat-only rank": Case(first_share=1, starts_with_chat=True),
    "chunked": Case(is_chunked=True),
    "chunked, empty rank": Case(is_chunked=True, first_share=0),
    "chunked, chat-only rank": Case(is_chunked=True, first_share=1, starts_with_chat=True),
    "guided": Case(options=GUIDED),
    "guided, empty rank": Case(options=GUIDED, first_share=0),
    "structure": Case(
        recipe=sugar,
        options=sugar.SugarOptions(k=3),
        weights={"structure": 1.0, "language": 0.0},
    ),
    "sugar": Case(**SUGAR),
    "sugar, chunked": Case(**SUGAR, is_chunked=True),
    "sugar, empty rank": Case(**SUGAR, first_share=0),
    "sugar, extensions": Case(**{**SUGAR, "options": SUGAR_EXTENSIONS}),
    # Rank 0 has pairs alone.
    "duet": Case(**DUET, options=duet.DuetOptions(guide="cross")),
    "duet, chunked": Case(**DUET, options=duet.DuetOptions(loss="kl", k=2), is_chunked=True),
}
CASES_OF_FOUR_RANKS = ("joint", "chunked", "sugar", "duet")
"""Cases that four ranks compute too; the third rank has no record."""


def case_names(world_size: int) -> tuple[str, ...]:
    """Return the names of the cases that a group of this size computes."""
    return tuple(CASES) if world_size == 2 else CASES_OF_FOUR_RANKS


def share_boundaries(case: Case, world_size: int, count: int) -> list[int]:
    """Return where the share of every rank begins among `count` records, and the end."""
    boundaries = {
        1: [0, count],
        2: [0, case.first_share, count],
        4: [0, 1, 4, 4, count],
    }
    return boundaries[world_size]


def make_pairs() -> list[Record]:
    """Return eight records: captions of one or both kinds, one twice, and hard negatives."""
    shorts = ["a flower", "a cat", "a flower", "two dogs", None, "the sea"]
    only_long = "only long, and much longer than the others " * 2
    longs = ["x", "a long text " * 4, None, "some words", only_long, None]
    pairs = []
    for i, (short, long) in enumerate(zip(shorts, longs, strict=True)):
        captions = () if short is None else (short,)
        pairs.append(Record(f"p{i}", image=tiny.random_image(i), short=captions, long=long))
    text_query = Record(
        "r0",
        query=("where is the cat?",),
        positive=(("a cat",),),
        negative=(("no cat",), ("a dog",)),
    )
    image_query = Record(
        "r1", query=(tiny.random_image(7), "what?"), positive=(("a bird",), ("a wing",))
    )
    return [*pairs[:3], text_query, *pairs[3:], image_query]


def make_documents() -> list[Record]:
    """Return nine records of unequal length; slices and one record repeat across ranks.

    The first three, the share of rank 0, have no image.
    """

    def make_story(number: int, *sentences: str) -> Record:
        parts = (tiny.random_image(number), f"Story {number}.", *sentences)
        return Record(f"s{number}", parts=parts)

    texts = Record("texts", parts=("Story 1.", "No picture here.", "None at all."))
    chat = Record("chat", messages=(Message("user", ("hi",)), Message("assistant", ("ho",))))
    more_texts = Record("more", parts=("It rains.", "Story 2."))
    first = make_story(1, "It rains.", "It stops.")
    pair = Record("pair", image=tiny.random_image(1), short=("Story 1.", "another"))
    second = make_story(2)
    third = make_story(3, "It rains.", "It stops.", "It rains.", "The end.")
    return [texts, chat, more_texts, first, first, pair, second, texts, third]


def render_share(model: DuetModel, case: Case, rank: int, world_size: int) -> list[Sequence]:
    """Return the sequences of one rank's records."""
    records = make_documents() if case.recipe is sugar else make_pairs()
    if case.recipe is duet:
        records += make_documents()
    if case.starts_with_chat:
        turns = (Message("user", ("hello",)), Message("assistant", ("good day",)))
        records = [Record("c0", messages=turns), *records]
    boundaries = share_boundaries(case, world_size, len(records))
    sequences: list[Sequence] = []
    for i in range(boundaries[rank], boundaries[rank + 1]):
        sequences += case.recipe.layout(Sample(records[i], i, 0), model.renderer, case.options)
    if case.recipe is not vladva or case.options.guide != "none":
        sequences = frozen_encoders.build_random_encoders().attach_features(sequences)
    return sequences


def compute_share(model: DuetModel, name: str, rank: int, world_size: int) -> dict[str, Tensor]:
    """Return the loss of the global batch and all gradients, averaged over ranks (collective)."""
    case = CASES[name]
    model.zero_grad()
    sequences = render_share(model, case, rank, world_size)

    def compute_losses(readout: Readout) -> dict[str, Tensor]:
        losses = case.recipe.objective(readout, model.logit_scale, case.options)
        total = torch.zeros(())
        for loss_name, loss in losses.items():
            total = total + case.weights[loss_name] * loss
        return {"loss": total, **losses}

    images = [image for sequence in sequences for _, image in sequence.images]
    if images:
        # The cache rounds vision features to float32: fill it, so that all passes read the same.
        model.vision_features(images)
    empty = create_empty_readout(model.dim, like=model.logit_scale.detach())
    if case.is_chunked and world_size > 1:
        chunks = [model.collate(chunk) for chunk in split_into_chunks(sequences, CHUNK_TOKENS)]
        losses = compute_cached_losses(model, chunks, compute_losses=compute_losses, empty=empty)
    else:
        readouts = [empty]
        if sequences:
            readouts.append(model(model.collate(sequences)))
        losses = compute_losses(concatenate_readouts(readouts))
        losses["loss"].backward()
    loss = float(losses["loss"].detach())
    results = {"loss": torch.tensor(distributed.all_reduce_sum(loss) / world_size)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    distributed.average_gradients(list(trained.values()))
    for parameter_name, parameter in trained.items():
        if parameter.grad is not None:
            results[parameter_name] = parameter.grad
    return results


def build_double_model(folder: Path) -> DuetModel:
    """Return a tiny model in double precision whose trained parameters all have gradients."""
    model = tiny.build_duet_model(folder / "base").double()
    torch.manual_seed(3)
    model.make_trainable(lora=LoraSettings(rank=2, alpha=4), projector=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.double()


def main() -> None:
    rank, world_size = int(sys.argv[1]), int(sys.argv[2])
    port, folder = sys.argv[3], Path(sys.argv[4])
    torch.set_num_threads(1)
    # Before the group exists: transformers saves on rank 0 only.
    model = build_double_model(folder / f"rank{rank}")
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    for name in case_names(world_size):
        torch.save(compute_share(model, name, rank, world_size), folder / f"{name} {rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
