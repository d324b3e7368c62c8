"""Compute tables, targets and losses of fixed tensors, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from frozen import calls, fixed
from frozen.measures import plain

LENGTHS = (3, 1, 5, 2, 4)
OTHERS = (2, 6, 1)


def stories(name: str, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Return sequences of unit slices, float64[length, 4] each."""
    return [fixed.unit(f"{name} {n}", length, 4) for n, length in enumerate(lengths)]


def with_gradient(function: Callable[..., Tensor], *tensors: Tensor) -> dict[str, Any]:
    """Return what a function gives, and the gradients of its sum with fixed weights."""
    inputs = [value.clone().requires_grad_() for value in tensors]
    result = function(*inputs)
    weight = 1 + 0.3 * fixed.tensor("weight of a result", *result.shape)
    gradients = torch.autograd.grad((result * weight).sum(), inputs)
    return {"value": result, "gradients": list(gradients)}


def kernels() -> dict[str, Any]:
    """Compute alignment kernels of all pairs, their gradients, and alignment weights."""
    x, y = stories("x"), stories("y", OTHERS)
    variants: dict[str, dict[str, Any]] = {
        "normalized": {},
        "raw": {"normalize": False},
        "logarithm": {"log": True},
        "raw logarithm": {"normalize": False, "log": True},
        "narrow": {"delta": 0.35},
        "fixed width": {"sigma": 0.8},
    }
    values: dict[str, Any] = {}
    for name, options in variants.items():
        values[name] = {
            "with itself": calls.alignment.gak_matrix(x, **options),
            "with others": calls.alignment.gak_matrix(x, y, **options),
        }
        values[name]["gradients"] = with_gradient(
            lambda *rows, options=options: calls.alignment.gak_matrix(
                rows[:5], rows[5:], **options
            ),
            *x,
            *y,
        )["gradients"]
    values["single precision"] = calls.alignment.gak_matrix([slices.float() for slices in x])
    values["posterior"] = [posterior_of_pair(x[2], other) for other in x]
    values["narrow posterior"] = posterior_of_pair(x[2], x[4], delta=0.35)
    return plain(values | pairs())


def posterior_of_pair(x: Tensor, y: Tensor, *, delta: float = 1.0) -> Tensor:
    """Compute the alignment posterior of two sequences of unit slices, float64[M, N]."""
    lengths = torch.tensor([len(x)]), torch.tensor([len(y)])
    squared = ((x[:, None] - y[None]) ** 2).sum(-1)
    sigma = calls.alignment.compute_sigma(*lengths, delta)
    return calls.alignment.compute_alignment_posterior(squared[None], *lengths, sigma=sigma)[0]


def pairs() -> dict[str, Any]:
    """Compute kernels, posteriors and alignment-weighted means from distances of padded pairs."""
    sqdist = (2 - 2 * fixed.unit("a", 4, 5, 3) @ fixed.unit("b", 4, 6, 3).mT).clamp(min=0)
    lengths = torch.tensor([5, 1, 3, 4]), torch.tensor([6, 2, 1, 4])
    width = calls.alignment.compute_sigma(*lengths, 0.7)
    return {
        "widths": width,
        "of pairs": calls.alignment.compute_log_gak(sqdist, *lengths, sigma=width),
        "posteriors of pairs": calls.alignment.compute_alignment_posterior(
            sqdist, *lengths, sigma=width
        ),
        "weighted means of pairs": calls.alignment.compute_alignment_weighted_mean(
            sqdist, *lengths, sigma=0.5
        ),
    }


# ------------------------------------------------------------------ targets


IMAGES = torch.tensor([True, False, True, False, False, True, False, True, False])
PREFIXES = {
    "slice_indices": torch.tensor(
        [[0, 1, 2, 3], [0, 1, 0, 0], [4, 5, 6, 0], [4, 0, 0, 0], [7, 0, 0, 0], [8, 7, 1, 2]]
    ),
    "lengths": torch.tensor([4, 2, 3, 1, 1, 4]),
    "sequence_ids": torch.tensor([0, 0, 1, 1, 2, 3]),
}


def many_cosines(*, triple: bool) -> Tensor:
    """Return cosines of nine slices, float64[9, 9]."""
    return calls.sugar_targets.compute_triple_cosines(
        fixed.unit("same kind", 9, 5),
        fixed.unit("any kind", 9, 4),
        is_image=IMAGES,
        use_triple_kernel=triple,
    )


def targets() -> dict[str, Any]:
    """Compute the target matrices of every switch, and the losses that follow from them."""
    prefixes = calls.sugar_targets.Prefixes(**PREFIXES)
    related = calls.sugar_targets.find_related_slices(prefixes, 9)
    values: dict[str, Any] = {"related": related.long()}
    wide = calls.sugar_targets.compute_triple_cosines(
        fixed.unit("many of a kind", 24, 5),
        fixed.unit("many", 24, 4),
        is_image=torch.arange(24) % 2 == 0,
    )
    alone = torch.eye(24, dtype=torch.bool)
    values["calibrated"] = calls.sugar_targets.calibrate_cosines(
        wide, is_image=torch.arange(24) % 2 == 0, is_related=alone
    )
    for triple, target, same, single in itertools.product(
        (True, False), ("gak", "mean", "awm"), ("all", "nested"), ("cosine", "gak")
    ):
        matrix = calls.sugar_targets.compute_target_matrix(
            many_cosines(triple=triple),
            prefixes,
            target=target,
            same_sequence=same,
            single=single,
            delta=0.8,
        )
        values[f"triple {triple}, {target}, {same}, {single}"] = matrix
    own = calls.sugar_targets.compute_target_matrix(
        many_cosines(triple=True), prefixes, rows=slice(2, 5)
    )
    return plain(values | {"of some rows": own, "losses": structures(own)})


def structures(target: Tensor) -> dict[str, Any]:
    """Compute the structure loss of three rows among six, in both forms."""
    everything = fixed.unit("embeddings", 6, 5)

    def loss(**options: Any) -> dict[str, Any]:
        return with_gradient(
            lambda rows: calls.structure.structure_loss(
                rows, target, all_embeddings=everything, first_row=2, **options
            ),
            everything[2:5],
        )

    return {
        "squares": loss(),
        "squares of a reference": loss(n_ref=16),
        "divergence": loss(kind="kl", temperature=0.2),
    }


# ------------------------------------------------------------------ losses


def losses() -> dict[str, Any]:
    """Compute contrastive and language losses with gradients."""
    left, right = fixed.unit("left", 4, 6), fixed.unit("right", 7, 6)
    positive = torch.zeros(4, 7, dtype=torch.bool)
    positive[[0, 1, 2, 0, 3], [0, 1, 2, 3, 4]] = True
    ignore = torch.zeros_like(positive)
    ignore[1, 5] = ignore[2, 0] = True

    def both(left: Tensor, right: Tensor, scale: Tensor, **options: Any) -> Tensor:
        return calls.contrastive.contrastive_loss(
            left, right, logit_scale=scale, positive_mask=positive, **options
        )

    scale = torch.tensor(2.0, dtype=torch.float64)
    shares = {"rows": slice(1, 3), "columns": slice(2, 6), "world_size": 2}
    hidden, weight = fixed.tensor("hidden", 5, 6), fixed.tensor("weight", 9, 6)
    targets, bias = torch.tensor([3, 0, 8, 3, 5]), fixed.tensor("bias", 9)
    nats = calls.language.compute_token_nll
    values = {
        "contrastive": with_gradient(both, left, right, scale),
        "contrastive, ignoring": with_gradient(
            lambda *t: both(*t, ignore_mask=ignore), left, right, scale
        ),
        "contrastive, a share": with_gradient(
            lambda *t: both(*t, ignore_mask=ignore, **shares), left, right, scale
        ),
        "single direction": with_gradient(
            lambda s: calls.contrastive.compute_row_infonce(s, positive, ignore), 3 * left @ right.T
        ),
        "false negatives": calls.contrastive.find_false_negatives(
            left @ right.T,
            positive,
            named_negatives=ignore,
            content_kinds=(torch.arange(4) % 2, torch.arange(7) % 2),
        ).long(),
        "limited": with_gradient(
            lambda s: calls.contrastive.clamp_logit_scale(s, 0.01), torch.tensor(5.0).double()
        ),
        "same content": calls.contrastive.match_content_keys(
            ["a", "b", "a"], ["a", "c", "b"]
        ).long(),
        "nats": with_gradient(lambda h, w: nats(h, w, targets), hidden, weight),
        "nats, bias and cap": with_gradient(
            lambda h, w, b: nats(h, w, targets, bias=b, logit_softcap=2.0), hidden, weight, bias
        ),
        "nats, in chunks": with_gradient(
            lambda h, w: nats(h, w, targets, chunk_size=2), hidden, weight
        ),
        "language": calls.language.language_loss(
            nats(hidden, weight, targets), global_token_count=12, world_size=2
        ),
    }
    return plain(values)
