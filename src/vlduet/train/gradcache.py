"""GradCache: gradients of a batch of any size in the memory of one chunk (arXiv 2101.06983).

1. first pass      every chunk without a graph; its embeddings and its initial random state are kept
2. losses          of all embeddings of all processes together, and their gradient at each embedding
3. second pass     every chunk again with a graph and the same dropout; backward from them

A contrastive loss needs all embeddings before any has a gradient, hence two passes. The language
loss is linear in the negative log-likelihoods, and its denominator, the number of labels, is known
beforehand. It therefore is computed in the second pass: the first one has no LM head, and a chunk
without anchors has no first pass.

Processes communicate in step 2 only, so their numbers of chunks may differ.
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
"""States of the random generators of the CPU and of the current GPU (None without one)."""


def compute_cached_losses(
    model: Callable[[Batch], Readout],
    chunks: list[Batch],
    *,
    compute_losses: Callable[[Readout], dict[str, Tensor]],
    empty: Readout,
) -> dict[str, Tensor]:
    """Return the losses of all chunks together and add their gradients to the parameters' `.grad`.

    The second pass of a chunk with anchors repeats the random numbers of its first pass (dropout).

    Args:
        model: forward pass; runs twice on every chunk with anchors, and once on the others.
        chunks: batches of `data.batches.split_into_chunks`; no sequence is divided between two.
            May be empty: `compute_losses` then sees `empty`.
        compute_losses: maps the readout of everything to scalar losses by name; called once. Each
            must be linear in `nll`; the gradient is that of the loss named `loss`.
        empty: readout without content, for a process without a chunk.

    Returns:
        The losses by name, `loss` included, as detached scalars.
    """
    embeddings, random_states = _embed_chunks(model, chunks, empty)
    label_counts = [chunk.num_supervised_tokens for chunk in chunks]
    anchor_counts = [len(chunk.anchors) for chunk in chunks]
    anchors = tuple(anchor for chunk in chunks for anchor in chunk.anchors)

    # Losses at nll = 0: being linear, they are this value plus gradient @ nll.
    nll = embeddings.new_zeros(sum(label_counts)).requires_grad_()
    losses = compute_losses(Readout(embeddings, anchors, nll))
    nll_gradients = {name: _gradient(loss, nll) for name, loss in losses.items()}
    losses["loss"].backward()
    # Their graph holds masks of all pairs of embeddings.
    losses = {name: loss.detach() for name, loss in losses.items()}
    embedding_gradient = embeddings.grad
    if embedding_gradient is None:
        embedding_gradient = torch.zeros_like(embeddings)

    chunk_nlls = [empty.nll.detach()]
    for chunk, random_state, embedding_part, nll_part in zip(
        chunks,
        random_states,
        embedding_gradient.split(anchor_counts),
        nll_gradients["loss"].split(label_counts),
        strict=True,
    ):
        with _replay_random_state(random_state):
            readout = model(chunk)
        # A scalar whose gradient at the readout is the gradient of the loss.
        surrogate = (readout.embeddings * embedding_part).sum() + (readout.nll * nll_part).sum()
        if surrogate.requires_grad:
            surrogate.backward()
        chunk_nlls.append(readout.nll.detach())
    nll = torch.cat(chunk_nlls)
    return {name: loss + nll_gradients[name] @ nll for name, loss in losses.items()}


def _embed_chunks(
    model: Callable[[Batch], Readout], chunks: list[Batch], empty: Readout
) -> tuple[Tensor, list[RandomState | None]]:
    """Run the first pass: every chunk with anchors, without labels and without a graph.

    Returns:
        The embeddings float[A, E] of all chunks (those of `empty` if none has an anchor), a leaf
        that requires a gradient; and for each chunk the random state before it, None for chunks
        without anchors, which are not run.
    """
    random_states: list[RandomState | None] = []
    readouts = [empty]
    with torch.no_grad():
        for chunk in chunks:
            if not chunk.anchors:
                random_states.append(None)
                continue
            random_states.append(_get_random_state())
            no_labels = torch.full_like(chunk.labels, IGNORE_INDEX)
            readouts.append(model(replace(chunk, labels=no_labels)))
    embeddings = concatenate_readouts(readouts).embeddings
    return embeddings.detach().requires_grad_(), random_states


def _gradient(loss: Tensor, nll: Tensor) -> Tensor:
    """Return d loss / d nll, float[S]; zeros if loss does not use nll.

    The graph is kept for another backward pass, and no `.grad` is written.
    """
    gradient = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, nll, retain_graph=True, allow_unused=True)
    return torch.zeros_like(nll) if gradient is None else gradient


def _get_random_state() -> RandomState:
    """Return the present states of the random generators."""
    gpu_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return torch.get_rng_state(), gpu_state


@contextmanager
def _replay_random_state(state: RandomState | None) -> Iterator[None]:
    """Set torch's global generators to `state` inside the block and restore them after it.

    Those of the CPU and, if `state` has one for it, of the current GPU. They are restored after an
    error, too. None changes nothing: the block draws from the generators as they are.
    """
    if state is None:
        yield
        return
    cpu_state, gpu_state = state
    devices = [] if gpu_state is None else [torch.cuda.current_device()]
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(cpu_state)
        if gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state)
        yield
