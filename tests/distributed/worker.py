"""One rank of a gloo group: the loss and gradients of its share of a batch in every case, written to files.

python worker.py RANK WORLD_SIZE PORT FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed as dist

from helpers import frozen_encoders, tiny
from vlduet import distributed
from vlduet.data.batches import split_into_chunks
from vlduet.data.records import Message, Record
from vlduet.data.stream import Sample
from vlduet.model.pooling import Readout, concatenate_readouts, create_empty_readout
from vlduet.recipes import sugar, vladva
from vlduet.train.gradcache import compute_cached_losses

VLADVA = vladva, vladva.VladvaOptions()
GUIDED = vladva, vladva.VladvaOptions(guide="triple")
OURS = {
    "target": "awm",
    "same_sequence": "nested",
    "calibrate": True,
    "loss": "kl",
    "triple": False,
    "pair_order": "either",
}
CASES = {
    "infonce": (*VLADVA, {"contrastive": 1.0, "language": 0.0}),
    "language": (*VLADVA, {"contrastive": 0.0, "language": 1.0}),
    "joint": (*VLADVA, {"contrastive": 1.0, "language": 0.7}),
    "language, empty rank": (*VLADVA, {"contrastive": 0.0, "language": 1.0}),
    "empty rank": (*VLADVA, {"contrastive": 1.0, "language": 0.7}),
    "chat-only rank": (*VLADVA, {"contrastive": 1.0, "language": 0.7}),
    "chunked": (*VLADVA, {"contrastive": 1.0, "language": 0.7}),
    "chunked, empty rank": (*VLADVA, {"contrastive": 1.0, "language": 0.7}),
    "chunked, chat-only rank": (*VLADVA, {"contrastive": 1.0, "language": 0.7}),
    "guided": (*GUIDED, {"contrastive": 1.0, "language": 0.7}),
    "guided, empty rank": (*GUIDED, {"contrastive": 1.0, "language": 0.7}),
    "structure": (sugar, sugar.SugarOptions(k=3), {"structure": 1.0, "language": 0.0}),
    "sugar": (sugar, sugar.SugarOptions(), {"structure": 1.0, "language": 0.7}),
    "sugar, chunked": (sugar, sugar.SugarOptions(), {"structure": 1.0, "language": 0.7}),
    "sugar, empty rank": (sugar, sugar.SugarOptions(), {"structure": 1.0, "language": 0.7}),
    "sugar, ours": (sugar, sugar.SugarOptions(**OURS), {"structure": 1.0, "language": 0.7}),
}
CHUNK_TOKENS = 60
"""Of the chunked cases: the two ranks then have different numbers of chunks."""
CUTS = {
    "empty rank": 0,
    "language, empty rank": 0,
    "chat-only rank": 1,
    "chunked, empty rank": 0,
    "chunked, chat-only rank": 1,
    "guided, empty rank": 0,
    "sugar, empty rank": 0,
}
"""Where the batch is cut in two, if not after three records."""
FOUR = ("joint", "chunked", "sugar")
"""Cases that four ranks compute too; the batch is cut so that one of them has nothing."""


def cuts(case: str, world_size: int, count: int) -> list[int]:
    """Where every rank's share begins, and the end."""
    return {1: [0, count], 2: [0, CUTS.get(case, 3), count], 4: [0, 1, 4, 4, count]}[world_size]


def records() -> list[Record]:
    """Eight records: unequal answer lengths, hard negatives, a caption that repeats, captions of one kind only."""
    captions = ["a flower", "a cat", "a flower", "two dogs", None, "the sea"]
    longs = [
        "x",
        "a long text " * 4,
        None,
        "some words",
        "only long, and much longer than the others " * 2,
        None,
    ]
    pairs = [
        Record(f"p{i}", image=tiny.random_image(i), short=(caption,) if caption else (), long=long)
        for i, (caption, long) in enumerate(zip(captions, longs, strict=True))
    ]
    retrieval = [
        Record(
            "r0",
            query=("where is the cat?",),
            positive=(("a cat",),),
            negative=(("no cat",), ("a dog",)),
        ),
        Record(
            "r1",
            query=(tiny.random_image(7), "what?"),
            positive=(("a bird",), ("a wing",)),
            negative=(),
        ),
    ]
    return [*pairs[:3], retrieval[0], *pairs[3:], retrieval[1]]


def stories() -> list[Record]:
    """Nine records: unequal lengths, slices that repeat across ranks, one record on both, and no image on the first."""

    def story(number: int, *tail: str) -> Record:
        return Record(f"s{number}", parts=(tiny.random_image(number), f"Story {number}.", *tail))

    texts = Record("texts", parts=("Story 1.", "No picture here.", "None at all."))
    chat = Record("chat", messages=(Message("user", ("hi",)), Message("assistant", ("ho",))))
    pair = Record("pair", image=tiny.random_image(1), short=("Story 1.", "another"))
    one, two = story(1, "It rains.", "It stops."), story(2)
    three = story(3, "It rains.", "It stops.", "It rains.", "The end.")
    return [
        texts,
        chat,
        Record("more", parts=("It rains.", "Story 2.")),
        one,
        one,
        pair,
        two,
        texts,
        three,
    ]


def share(model, case: str, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Loss and gradients of this rank's part of the batch; ranks get unequal parts."""
    recipe, options, weights = CASES[case]
    model.zero_grad()
    chat = Record("c0", messages=(Message("user", ("hello",)), Message("assistant", ("good day",))))
    everything = (
        stories()
        if recipe is sugar
        else [chat, *records()]
        if "chat-only rank" in case
        else records()
    )
    cut = cuts(case, world_size, len(everything))
    rows = range(cut[rank], cut[rank + 1])
    sequences = [
        s for i in rows for s in recipe.layout(Sample(everything[i], i, 0), model.renderer, options)
    ]
    if recipe is sugar or options.guide != "none":
        sequences = frozen_encoders.build_random_encoders().attach_features(sequences)

    def losses(readout: Readout) -> dict[str, torch.Tensor]:
        found = recipe.objective(readout, model.logit_scale, options)
        return {"loss": sum((weights[n] * v for n, v in found.items()), torch.zeros(())), **found}

    if pictured := [image for sequence in sequences for _, image in sequence.images]:
        model.vision_features(
            pictured
        )  # the cache keeps them in single precision: the same ones for every pass
    nothing = create_empty_readout(model.dim, like=model.logit_scale.detach())
    if (
        "chunked" in case and world_size > 1
    ):  # one process, all at once, is what the ranks are compared with
        chunks = [model.collate(part) for part in split_into_chunks(sequences, CHUNK_TOKENS)]
        loss = compute_cached_losses(model, chunks, compute_losses=losses, empty=nothing)["loss"]
    else:
        loss = losses(
            concatenate_readouts(
                [nothing, model(model.collate(sequences))] if sequences else [nothing]
            )
        )["loss"]
        loss.backward()
    moved = [p for p in model.parameters() if p.requires_grad]
    distributed.average_gradients(moved)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    grads = {name: p.grad for name, p in zip(names, moved, strict=True) if p.grad is not None}
    return {
        "loss": torch.tensor(
            distributed.all_reduce_sum(float(loss.detach())) / distributed.get_world_size()
        ),
        **grads,
    }


def model_in_float64(folder: Path):
    """A tiny model in double precision with something to train everywhere."""
    from vlduet.model.adapters import LoraSettings

    model = tiny.build_duet_model(folder / "base").double()
    torch.manual_seed(3)
    model.make_trainable(lora=LoraSettings(rank=2, alpha=4), projector=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.double()


if __name__ == "__main__":
    rank, world_size, port, folder = (
        int(sys.argv[1]),
        int(sys.argv[2]),
        sys.argv[3],
        Path(sys.argv[4]),
    )
    torch.set_num_threads(1)
    model = model_in_float64(
        folder / f"rank{rank}"
    )  # before the group: transformers saves on rank 0 only
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    for case in CASES if world_size == 2 else FOUR:
        torch.save(share(model, case, rank, world_size), folder / f"{case} {rank}.pt")
    dist.destroy_process_group()
