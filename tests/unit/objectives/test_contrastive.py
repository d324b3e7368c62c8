"""InfoNCE against a float64 loop, with repeated captions, hard negatives and several positives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from helpers import tiny
from vlduet.data.sequences import Anchor, Slice
from vlduet.model.pooling import Readout
from vlduet.objectives import contrastive as objective
from vlduet.objectives.contrastive import (
    clamp_logit_scale,
    contrastive_loss,
    find_false_negatives,
    match_content_keys,
)
from vlduet.recipes.contrast import compute_contrastive_loss, find_positive_pairs


def unit(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 6, dtype=torch.float64, generator=generator), dim=1)


def slow(left, right, scale, positive, ignore=None):
    """Both directions, one pair at a time: -log of e^s over itself and the negatives."""
    ignore = torch.zeros_like(positive) if ignore is None else ignore
    scores = (left @ right.T * math.exp(scale)).tolist()
    n, m = positive.shape

    def one(row, wanted, unknown):
        losses = []
        for j, yes in enumerate(wanted):
            if yes:
                rest = sum(
                    math.exp(row[k]) for k in range(len(row)) if not (wanted[k] or unknown[k])
                )
                losses.append(-math.log(math.exp(row[j]) / (math.exp(row[j]) + rest)))
        return sum(losses) / len(losses) if losses else None

    rows = [one(scores[i], positive[i].tolist(), ignore[i].tolist()) for i in range(n)]
    columns = [
        one([scores[i][j] for i in range(n)], positive[:, j].tolist(), ignore[:, j].tolist())
        for j in range(m)
    ]
    rows, columns = ([x for x in side if x is not None] for side in (rows, columns))
    return (sum(rows) / len(rows) if rows else 0.0) + (
        sum(columns) / len(columns) if columns else 0.0
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 99), st.floats(0, 4))
def test_is_the_slow_loop(n, m, seed, scale):
    left, right = unit(n, seed), unit(m, seed + 1)
    drawn = torch.rand(n, m, generator=torch.Generator().manual_seed(seed))
    positive, ignore = drawn < 0.3, drawn > 0.8
    temperature = torch.tensor(scale, dtype=torch.float64)
    found = contrastive_loss(
        left, right, logit_scale=temperature, positive_mask=positive, ignore_mask=ignore
    )
    assert float(found) == pytest.approx(slow(left, right, scale, positive, ignore), abs=1e-10)


def test_one_positive_a_row_is_cross_entropy():
    left, right = unit(5, 0), unit(5, 1)
    scale = torch.tensor(2.0, dtype=torch.float64)
    scores = left @ right.T * scale.exp()
    target = torch.arange(5)
    found = contrastive_loss(
        left, right, logit_scale=scale, positive_mask=torch.eye(5, dtype=torch.bool)
    )
    assert_close(found, F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target))


def test_blocks_of_rows_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    positive, ignore = (torch.rand(7, 9, generator=generator) < share for share in (0.2, 0.1))
    found = []
    for size in (100, 3):
        monkeypatch.setattr(objective, "SCORE_ROWS_PER_BLOCK", size)
        left, right = unit(7, 0).requires_grad_(), unit(9, 1).requires_grad_()
        scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        loss = contrastive_loss(
            left, right, logit_scale=scale, positive_mask=positive, ignore_mask=ignore & ~positive
        )
        loss.backward()
        found.append([loss.detach(), left.grad, right.grad, scale.grad])
    assert_close(*found, atol=1e-12, rtol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(*[st.sampled_from("abc")] * 2, st.booleans()), min_size=1, max_size=9),
    st.data(),
)
def test_positives_are_the_closure_of_pairs(rights, data):
    """Any chain left -> equal left -> its record -> right -> equal right."""
    lefts = data.draw(st.lists(st.tuples(*[st.sampled_from("abc")] * 2), min_size=1, max_size=6))
    left = [anchor("query", record, key) for record, key in lefts]
    right = [
        anchor("negative" if hard else "positive", record, key) for record, key, hard in rights
    ]

    def paired(a, b):
        return a.record == b.record and b.role != "negative"

    wanted = [
        [
            any(
                paired(x, y)
                for x in left
                if x.content_key == a.content_key
                for y in right
                if y.content_key == b.content_key
            )
            for b in right
        ]
        for a in left
    ]
    assert find_positive_pairs(left, right).tolist() == wanted


def test_gradients():
    left, right = unit(4, 0).requires_grad_(), unit(6, 1).requires_grad_()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    positive = torch.zeros(4, 6, dtype=torch.bool)
    positive[0, :3] = positive[2, 5] = positive[3, 5] = True  # row 1 has none
    torch.autograd.gradcheck(
        lambda a, b, s: contrastive_loss(a, b, logit_scale=s, positive_mask=positive),
        (left, right, scale),
    )


def test_a_pair_without_negatives_gives_zero_and_finite_gradients():
    left = unit(2, 0).requires_grad_()
    loss = contrastive_loss(
        left,
        unit(2, 1),
        logit_scale=torch.tensor(3.0),
        positive_mask=torch.ones(2, 2, dtype=torch.bool),
    )
    loss.backward()
    assert float(loss.detach()) == 0 and left.grad is not None and bool((left.grad == 0).all())


def test_shares_of_ranks_sum_to_the_whole():
    left, right = unit(5, 0), unit(7, 1)
    positive = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    scale = torch.tensor(2.0, dtype=torch.float64)
    whole = contrastive_loss(left, right, logit_scale=scale, positive_mask=positive)
    shares = [
        contrastive_loss(
            left,
            right,
            logit_scale=scale,
            positive_mask=positive,
            rows=rows,
            columns=columns,
            world_size=2,
        )
        for rows, columns in ((slice(0, 2), slice(0, 4)), (slice(2, 5), slice(4, 7)))
    ]
    assert_close((shares[0] + shares[1]) / 2, whole)


def anchor(role: str, record: str, key: str) -> Anchor:
    return Anchor(0, 1, role, record, key)


def test_repeated_captions_and_copies_of_an_image_are_positives():
    left = [
        anchor("image", "a", "img1"),
        anchor("image", "b", "img2"),
        anchor("image", "c", "img1"),
    ]
    right = [
        anchor("text", "a", "a flower"),
        anchor("text", "b", "a flower"),
        anchor("text", "c", "a rose"),
    ]
    # b shares its caption with a; c is the image of a, so a's captions are c's and c's are a's.
    assert find_positive_pairs(left, right).tolist() == [
        [True, True, True],
        [True, True, False],
        [True, True, True],
    ]


def test_what_asks_here_and_answers_there_is_not_its_own_negative():
    """The picture x is the query of record r and the answer of record s: its two readings may be near."""
    anchors = (Anchor(0, 1, "query", "r", "x"), Anchor(0, 1, "positive", "r", "a"))
    anchors += (Anchor(0, 1, "query", "s", "b"), Anchor(0, 1, "positive", "s", "x"))
    vectors = unit(4, 0)

    def loss(turned: torch.Tensor) -> float:
        embeddings = torch.stack([vectors[0], vectors[1], vectors[2], turned])
        scale = torch.tensor(1.0, dtype=torch.float64)
        return float(
            compute_contrastive_loss(
                Readout(embeddings, anchors, embeddings.new_zeros(0)), scale, min_temperature=0.01
            )
        )

    near, far = loss(vectors[0]), loss(-vectors[0])
    alone = F.softplus((vectors[2] @ vectors[1] - vectors[2] @ vectors[0]) * math.e)
    assert near == pytest.approx(
        float(alone / 2 + F.softplus((vectors[2] - vectors[0]) @ vectors[1] * math.e) / 2)
    )
    assert near != far, "it is still the answer of its own record"


def test_a_hard_negative_is_negative_even_for_its_own_record():
    left = [anchor("query", "a", "q")]
    right = [anchor("positive", "a", "yes"), anchor("negative", "a", "no")]
    assert find_positive_pairs(left, right).tolist() == [[True, False]]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 999))
def test_false_negatives_are_what_no_pair_outdoes(n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    alike = torch.randint(0, 5, (n, m), generator=generator) / 4  # ties are common
    positive, told = (torch.rand(n, m, generator=generator) < share for share in (0.3, 0.2))
    kinds = tuple(torch.randint(1, 4, (size,), generator=generator) for size in (n, m))
    found = find_false_negatives(alike, positive, named_negatives=told, content_kinds=kinds)
    left, right = (kind.tolist() for kind in kinds)
    for i in range(n):
        for j in range(m):
            own = [alike[i, k] for k in range(m) if positive[i, k] and right[k] == right[j]]
            own += [alike[k, j] for k in range(n) if positive[k, j] and left[k] == left[i]]
            outdone = not own or any(alike[i, j] < value for value in own)
            assert bool(found[i, j]) == (not positive[i, j] and not told[i, j] and not outdone)


def test_two_texts_are_not_taken_for_a_pair_because_they_are_texts():
    """Records that ask with images beside records that ask with texts: cosines of one modality are larger throughout."""
    positive = torch.eye(4, dtype=torch.bool)
    alike = torch.full((4, 4), 0.6)  # image with image, text with text
    alike[:2, :2] = alike[2:, 2:] = 0.1  # image with text, text with image
    alike[positive] = 0.3
    kinds = torch.tensor([1, 1, 2, 2]), torch.tensor([2, 2, 1, 1])
    assert not find_false_negatives(
        alike, positive, named_negatives=torch.zeros_like(positive), content_kinds=kinds
    ).any()
    alike[0, 1] = 0.4
    assert find_false_negatives(
        alike, positive, named_negatives=torch.zeros_like(positive), content_kinds=kinds
    ).nonzero().tolist() == [[0, 1]]


def test_a_guide_leaves_out_what_it_finds_as_alike_as_a_pair():
    """Two pictures of one thing: the guide sees that either's caption is true of the other."""
    seen = {
        "x1": [1.0, 0.0],
        "x2": [0.96, 0.28],
        "y": [0.0, 1.0],
        "a": [0.98, 0.199],
        "b": [1.0, 0.0],
        "c": [0.1, 0.995],
    }

    def guided_anchor(role: str, record: str, key: str, *slices: str) -> Anchor:
        shown = tuple(
            Slice(
                tiny.random_image() if one[0] in "xy" else one,
                one,
                {"cross": F.normalize(torch.tensor(seen[one]), dim=0)},
            )
            for one in slices or (key,)
        )
        return Anchor(0, 1, role, record, key, shown)

    anchors = tuple(
        guided_anchor(*told)
        for told in (
            ("image", "1", "x1"),
            ("text", "1", "a"),
            ("image", "2", "x2"),
            ("text", "2", "b"),
            ("query", "3", "y"),
            ("positive", "3", "c"),
            (
                "negative",
                "3",
                "y and x",
                "y",
                "y",
            ),  # the guide finds it nearer than c, but somebody said that it is wrong
        )
    )
    embeddings = unit(len(anchors), 3)
    readout = Readout(embeddings, anchors, embeddings.new_zeros(0))
    scale = torch.tensor(1.5, dtype=torch.float64)
    left, right = embeddings[[0, 2, 4]], embeddings[[1, 3, 5, 6]]
    positive = torch.eye(3, 4, dtype=torch.bool)
    ignore = torch.zeros_like(positive)
    ignore[0, 1] = (
        True  # x1 and b: nearer than x1 and a, and than x2 and b; x2 and a: nearer than both pairs too
    )
    ignore[1, 0] = True
    found = compute_contrastive_loss(readout, scale, min_temperature=0.01, guide="cross")
    assert float(found) == pytest.approx(slow(left, right, 1.5, positive, ignore), abs=1e-10)
    alone = compute_contrastive_loss(readout, scale, min_temperature=0.01)
    assert float(alone) == pytest.approx(slow(left, right, 1.5, positive), abs=1e-10) and float(
        alone
    ) > float(found)


def test_same_content_is_string_equality():
    assert match_content_keys(["a", "b"], ["b", "a", "b"]).tolist() == [
        [False, True, False],
        [True, False, True],
    ]


def test_the_temperature_has_a_floor():
    assert float(torch.exp(-clamp_logit_scale(torch.tensor(100.0), 0.01))) == pytest.approx(0.01)
    assert float(clamp_logit_scale(torch.tensor(1.0), 0.01)) == 1.0


def test_the_temperature_leaves_its_floor_again():
    """Momentum carries it across; a loss that then wants it warmer must be heard."""
    scale = torch.nn.Parameter(torch.tensor(4.5))
    optimizer = torch.optim.AdamW([scale], lr=0.05, weight_decay=0.0)
    for step in range(60):
        (clamp_logit_scale(scale, 0.01) * (-1.0 if step < 30 else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 29:
            highest = float(scale.detach())
    assert highest > 4.6052, "beyond the floor"
    assert highest < 5.1, "as far as momentum carries"
    assert float(scale.detach()) < 4.5


def test_the_limit_is_a_minimum_and_its_gradient_where_it_may_move():
    for value, slope, wanted in [
        (1.0, -2.0, -2.0),
        (1.0, 2.0, 2.0),
        (5.0, -2.0, 0.0),
        (5.0, 2.0, 2.0),
    ]:
        scale = torch.tensor(value, requires_grad=True)
        (clamp_logit_scale(scale, 0.01) * slope).backward()
        assert float(scale.grad) == wanted
