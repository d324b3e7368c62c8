"""InfoNCE against a float64 loop, false negatives, and the limit of the temperature."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from helpers.infonce_reference import compute_reference_loss, draw_unit_vectors
from vlduet.objectives import contrastive
from vlduet.objectives.contrastive import (
    clamp_logit_scale,
    contrastive_loss,
    find_false_negatives,
    match_content_keys,
)

# ------------------------------------------------------------------ loss


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 99), st.floats(0, 4))
def test_loss_equals_the_loop(num_queries, num_targets, seed, logit_scale):
    queries = draw_unit_vectors(num_queries, seed)
    targets = draw_unit_vectors(num_targets, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_queries, num_targets, generator=generator)
    masks = {"positive_mask": uniform < 0.3, "ignore_mask": uniform > 0.8}
    scale = torch.tensor(logit_scale, dtype=torch.float64)
    loss = contrastive_loss(queries, targets, logit_scale=scale, **masks)
    expected = compute_reference_loss(queries, targets, logit_scale, **masks)
    assert float(loss) == pytest.approx(expected, abs=1e-10)


def test_one_positive_per_row_is_cross_entropy_in_both_directions():
    queries = draw_unit_vectors(5, 0)
    targets = draw_unit_vectors(5, 1)
    scale = torch.tensor(2.0, dtype=torch.float64)
    scores = queries @ targets.T * scale.exp()
    labels = torch.arange(5)
    expected = F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)
    assert_close(contrastive_loss(queries, targets, logit_scale=scale), expected)
    diagonal = torch.eye(5, dtype=torch.bool)
    loss = contrastive_loss(queries, targets, logit_scale=scale, positive_mask=diagonal)
    assert_close(loss, expected)


def test_loss_and_gradients_do_not_depend_on_the_block_size(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    positive_mask = torch.rand(7, 9, generator=generator) < 0.2
    ignore_mask = (torch.rand(7, 9, generator=generator) < 0.1) & ~positive_mask
    results = []
    for size in (100, 3):
        monkeypatch.setattr(contrastive, "SCORE_ROWS_PER_BLOCK", size)
        queries = draw_unit_vectors(7, 0).requires_grad_()
        targets = draw_unit_vectors(9, 1).requires_grad_()
        scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        loss = contrastive_loss(
            queries,
            targets,
            logit_scale=scale,
            positive_mask=positive_mask,
            ignore_mask=ignore_mask,
        )
        loss.backward()
        results.append([loss.detach(), queries.grad, targets.grad, scale.grad])
    assert_close(*results, atol=1e-12, rtol=1e-10)


def test_gradients_pass_gradcheck():
    queries = draw_unit_vectors(4, 0).requires_grad_()
    targets = draw_unit_vectors(6, 1).requires_grad_()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    positive_mask = torch.zeros(4, 6, dtype=torch.bool)
    positive_mask[0, :3] = True
    positive_mask[2, 5] = positive_mask[3, 5] = True  # row 1 has no positive
    assert torch.autograd.gradcheck(
        lambda a, b, s: contrastive_loss(a, b, logit_scale=s, positive_mask=positive_mask),
        (queries, targets, scale),
    )


def test_positives_without_negatives_give_loss_0_and_gradient_0():
    queries = draw_unit_vectors(2, 0).requires_grad_()
    loss = contrastive_loss(
        queries,
        draw_unit_vectors(2, 1),
        logit_scale=torch.tensor(3.0),
        positive_mask=torch.ones(2, 2, dtype=torch.bool),
    )
    loss.backward()
    assert float(loss.detach()) == 0
    assert bool((queries.grad == 0).all())


def test_mean_of_the_shares_of_ranks_is_the_loss():
    queries = draw_unit_vectors(5, 0)
    targets = draw_unit_vectors(7, 1)
    positive_mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    scale = torch.tensor(2.0, dtype=torch.float64)

    def compute(rows: slice, columns: slice, world_size: int) -> torch.Tensor:
        return contrastive_loss(
            queries,
            targets,
            logit_scale=scale,
            positive_mask=positive_mask,
            rows=rows,
            columns=columns,
            world_size=world_size,
        )

    first = compute(slice(0, 2), slice(0, 4), 2)
    second = compute(slice(2, 5), slice(4, 7), 2)
    assert_close((first + second) / 2, compute(slice(None), slice(None), 1))


def test_content_keys_match_if_the_strings_are_equal():
    matches = match_content_keys(["a", "b"], ["b", "a", "b"])
    assert matches.tolist() == [[False, True, False], [True, False, True]]
    assert match_content_keys([], ["a"]).shape == (0, 1)


# ------------------------------------------------------------------ false negatives


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 999))
def test_false_negatives_score_at_least_as_high_as_every_positive_of_their_kinds(n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (n, m), generator=generator) / 4  # ties are common
    positive_mask = torch.rand(n, m, generator=generator) < 0.3
    named_negatives = torch.rand(n, m, generator=generator) < 0.2
    query_kinds = torch.randint(1, 4, (n,), generator=generator)
    target_kinds = torch.randint(1, 4, (m,), generator=generator)
    false_negatives = find_false_negatives(
        scores,
        positive_mask,
        named_negatives=named_negatives,
        content_kinds=(query_kinds, target_kinds),
    )
    for i in range(n):
        for j in range(m):
            of_query = positive_mask[i] & (target_kinds == target_kinds[j])
            of_target = positive_mask[:, j] & (query_kinds == query_kinds[i])
            positives = torch.cat([scores[i][of_query], scores[:, j][of_target]])
            is_as_high = len(positives) > 0 and bool((scores[i, j] >= positives).all())
            is_excluded = bool(positive_mask[i, j] or named_negatives[i, j])
            assert bool(false_negatives[i, j]) == (is_as_high and not is_excluded)


def test_two_texts_are_not_compared_with_an_image_and_its_text():
    """Image queries beside text queries: similarities in one modality are larger throughout."""
    positive_mask = torch.eye(4, dtype=torch.bool)
    scores = torch.full((4, 4), 0.6)  # of an image with an image, and of a text with a text
    scores[:2, :2] = scores[2:, 2:] = 0.1  # of an image with a text
    scores[positive_mask] = 0.3
    facts = {
        "named_negatives": torch.zeros_like(positive_mask),
        "content_kinds": (torch.tensor([1, 1, 2, 2]), torch.tensor([2, 2, 1, 1])),
    }
    assert not find_false_negatives(scores, positive_mask, **facts).any()
    scores[0, 1] = 0.4
    false_negatives = find_false_negatives(scores, positive_mask, **facts)
    assert false_negatives.nonzero().tolist() == [[0, 1]]


# ------------------------------------------------------------------ temperature


def test_logit_scale_is_clamped_to_the_lowest_temperature():
    clamped = clamp_logit_scale(torch.tensor(100.0), 0.01)
    assert float(torch.exp(-clamped)) == pytest.approx(0.01)
    assert float(clamp_logit_scale(torch.tensor(1.0), 0.01)) == 1.0


@pytest.mark.parametrize(
    ("value", "slope", "expected"),
    [(1.0, -2.0, -2.0), (1.0, 2.0, 2.0), (5.0, -2.0, 0.0), (5.0, 2.0, 2.0)],
)
def test_gradient_beyond_the_limit_passes_only_if_it_leads_back(value, slope, expected):
    scale = torch.tensor(value, requires_grad=True)
    (clamp_logit_scale(scale, 0.01) * slope).backward()
    assert float(scale.grad) == expected


def test_logit_scale_that_momentum_carried_across_the_limit_comes_back():
    scale = torch.nn.Parameter(torch.tensor(4.5))
    optimizer = torch.optim.AdamW([scale], lr=0.05, weight_decay=0.0)
    values = []
    for step in range(60):
        (clamp_logit_scale(scale, 0.01) * (-1.0 if step < 30 else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(float(scale.detach()))
    limit = 4.6052
    assert limit < values[29] < 5.1, "beyond the limit, but only as far as momentum carries"
    assert values[-1] < 4.5
