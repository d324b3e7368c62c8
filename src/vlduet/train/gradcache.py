"""GradCache: the gradient of a batch of any size in the memory of one chunk (Gao et al. 2021, arXiv 2101.06983).

1. first pass      every chunk without a graph; kept are its embeddings, and the random state that it began with
2. the losses      of all embeddings of all processes together, and their gradient at each embedding
3. second pass     every chunk again with a graph, its dropout replayed; backward from the gradients of its embeddings

A contrastive loss needs all embeddings before any has a gradient, hence two passes. The language loss does not: it is
linear in the negative log likelihoods, and its denominator, the number of supervised tokens, is known beforehand. So it
rides on the second pass: the first one has no LM head, and a chunk in which no embedding is read has no first pass at all.

Processes meet in step 2 alone, so they may have different numbers of chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from vlduet.data.batches import Batch
from vlduet.data.sequences import IGNORE_INDEX
from vlduet.model.pooling import Readout, concatenate_readouts

RandomState = tuple[Tensor, Tensor | None]
"""Of the CPU, and of the GPU where there is one."""


def compute_cached_losses(
    model: Callable[[Batch], Readout],
    chunks: list[Batch],
    *,
    compute_losses: Callable[[Readout], dict[str, Tensor]],
    empty: Readout,
) -> dict[str, Tensor]:
    """Losses of all chunks together; their gradients are added to the `.grad` of what they depend on.

    Args:
        model: the forward.
        chunks: cut by sequence (`vlduet.data.batches.chunked`).
        losses: a readout of everything -> named losses, each linear in `nll`, and `loss`, the one to descend.
        nothing: an empty readout, for a process without a chunk.

    Returns:
        The losses, by name, without gradient.
    """
    embeddings, states = _first_pass(model, chunks, empty)
    counts = [chunk.num_supervised_tokens for chunk in chunks]
    nll = embeddings.new_zeros(sum(counts)).requires_grad_()
    anchors = tuple(anchor for chunk in chunks for anchor in chunk.anchors)
    made = compute_losses(Readout(embeddings, anchors, nll))
    slopes = {name: _slope(loss, nll) for name, loss in made.items()}
    made["loss"].backward()
    made = {
        name: loss.detach() for name, loss in made.items()
    }  # its graph holds masks of all pairs
    wanted = torch.zeros_like(embeddings) if embeddings.grad is None else embeddings.grad
    found = [empty.nll.detach()]
    parts = zip(
        chunks,
        states,
        wanted.split([len(c.anchors) for c in chunks]),
        slopes["loss"].split(counts),
        strict=True,
    )
    for chunk, state, of_embeddings, of_nll in parts:
        with _replayed(state):
            readout = model(chunk)
        total = (readout.embeddings * of_embeddings).sum() + (readout.nll * of_nll).sum()
        if total.requires_grad:
            total.backward()
        found.append(readout.nll.detach())
    told = torch.cat(found)
    return {name: loss + slopes[name] @ told for name, loss in made.items()}


def _first_pass(
    model: Callable[[Batch], Readout], chunks: list[Batch], nothing: Readout
) -> tuple[Tensor, list[RandomState | None]]:
    """Embeddings of all chunks, a leaf float[A, E], and the random state of every chunk that must be replayed."""
    states: list[RandomState | None] = []
    readouts = [nothing]
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_state() if chunk.anchors else None)
            if chunk.anchors:
                readouts.append(
                    model(replace(chunk, labels=torch.full_like(chunk.labels, IGNORE_INDEX)))
                )
    return concatenate_readouts(readouts).embeddings.detach().requires_grad_(), states


def _slope(loss: Tensor, nll: Tensor) -> Tensor:
    """d loss / d nll, float[S]; zero for a loss that does not read it."""
    slope = None
    if loss.requires_grad:
        (slope,) = torch.autograd.grad(loss, nll, retain_graph=True, allow_unused=True)
    return torch.zeros_like(nll) if slope is None else slope


def _random_state() -> RandomState:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


@contextmanager
def _replayed(state: RandomState | None) -> Iterator[None]:
    """Random numbers as they were at `state` inside, and as if nothing had been drawn after; None: as they come."""
    if state is None:
        yield
        return
    here = [torch.cuda.current_device()] if state[1] is not None else []
    with torch.random.fork_rng(devices=here):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1])
        yield
