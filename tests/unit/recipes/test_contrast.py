"""Positives, ignored pairs and guides of the contrastive loss of a readout."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from helpers import tiny
from helpers.infonce_reference import compute_reference_loss, draw_unit_vectors
from vlduet.data.sequences import Anchor, Slice
from vlduet.model.pooling import Readout
from vlduet.recipes import clip, fromage, vladva
from vlduet.recipes.contrast import compute_contrastive_loss, find_positive_pairs


def make_anchor(role: str, record: str, key: str) -> Anchor:
    return Anchor(0, 1, role, record, key)


def compute_loss(embeddings: Tensor, anchors: tuple[Anchor, ...], guide: str = "none") -> float:
    """Return the loss at logit scale 1."""
    readout = Readout(embeddings, anchors, embeddings.new_zeros(0))
    scale = torch.tensor(1.0, dtype=torch.float64)
    loss = compute_contrastive_loss(readout, scale, min_temperature=0.01, guide=guide)
    return float(loss)


# ------------------------------------------------------------------ positives


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from("abc"), st.booleans()),
        min_size=1,
        max_size=9,
    ),
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=6),
)
def test_positives_are_pairs_of_a_record_with_all_equal_contents(target_facts, query_facts):
    queries = [make_anchor("query", record, key) for record, key in query_facts]
    targets = []
    for record, key, is_negative in target_facts:
        targets.append(make_anchor("negative" if is_negative else "positive", record, key))

    def is_positive(query: Anchor, target: Anchor) -> bool:
        for q in queries:
            for t in targets:
                is_pair = q.record_name == t.record_name and t.role != "negative"
                is_equal = (q.content_key, t.content_key) == (query.content_key, target.content_key)
                if is_pair and is_equal:
                    return True
        return False

    positives = find_positive_pairs(queries, targets)
    for i, query in enumerate(queries):
        for j, target in enumerate(targets):
            assert bool(positives[i, j]) == is_positive(query, target)


def test_repeated_captions_and_copies_of_an_image_are_positives():
    images = [
        make_anchor("image", "a", "image 1"),
        make_anchor("image", "b", "image 2"),
        make_anchor("image", "c", "image 1"),
    ]
    captions = [
        make_anchor("text", "a", "a flower"),
        make_anchor("text", "b", "a flower"),
        make_anchor("text", "c", "a rose"),
    ]
    # b has the caption of a, and c has the image of a: the captions of a and c are those of both.
    assert find_positive_pairs(images, captions).tolist() == [
        [True, True, True],
        [True, True, False],
        [True, True, True],
    ]


def test_a_hard_negative_is_a_negative_of_its_own_record():
    queries = [make_anchor("query", "a", "q")]
    targets = [make_anchor("positive", "a", "yes"), make_anchor("negative", "a", "no")]
    assert find_positive_pairs(queries, targets).tolist() == [[True, False]]


# ------------------------------------------------------------------ ignored pairs


def test_content_that_is_query_and_target_is_not_its_own_negative():
    """Image x is the query of record r and the target of record s."""
    anchors = (
        make_anchor("query", "r", "x"),
        make_anchor("positive", "r", "a"),
        make_anchor("query", "s", "b"),
        make_anchor("positive", "s", "x"),
    )
    x, a, b = draw_unit_vectors(3, 0)
    same = compute_loss(torch.stack([x, a, b, x]), anchors)
    opposite = compute_loss(torch.stack([x, a, b, -x]), anchors)
    # Row b has one negative, the target a; column a has one negative, the query b.
    row_loss = F.softplus((b @ a - b @ x) * math.e)
    column_loss = F.softplus((b - x) @ a * math.e)
    assert same == pytest.approx(float(row_loss / 2 + column_loss / 2))
    assert same != opposite, "x remains the positive of b"


# ------------------------------------------------------------------ temperature


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (vladva, vladva.VladvaOptions(temperature_floor=0.2)),
        (clip, clip.ClipOptions(temperature_floor=0.2)),
        (fromage, fromage.FromageOptions(temperature_floor=0.2)),
    ],
)
def test_below_the_floor_the_temperature_is_the_floor(recipe, options):
    anchors = []
    for name in ("a", "b", "c"):
        anchors += [make_anchor("image", name, f"image {name}"), make_anchor("text", name, name)]
    embeddings = draw_unit_vectors(6, 5)
    readout = Readout(embeddings, tuple(anchors), embeddings.new_zeros(0))
    losses = {}
    for temperature in (0.02, 0.1, 0.2, 0.4):
        scale = torch.tensor(-math.log(temperature), dtype=torch.float64)
        losses[temperature] = recipe.objective(readout, scale, options)["contrastive"].item()
    assert losses[0.02] == losses[0.1] == pytest.approx(losses[0.2], abs=1e-12)
    assert abs(losses[0.4] - losses[0.2]) > 0.01


# ------------------------------------------------------------------ guide


def test_a_guide_removes_negatives_that_it_finds_as_similar_as_a_pair():
    """x1 and x2 show one thing; the guide sees that the caption of either is true of both."""
    guide_vectors = {
        "x1": [1.0, 0.0],
        "x2": [0.96, 0.28],
        "y": [0.0, 1.0],
        "a": [0.98, 0.199],
        "b": [1.0, 0.0],
        "c": [0.1, 0.995],
    }

    def make_guided_anchor(role: str, record: str, key: str, names: tuple[str, ...]) -> Anchor:
        slices = []
        for name in names:
            part = tiny.random_image() if name[0] in "xy" else name
            features = {"cross": F.normalize(torch.tensor(guide_vectors[name]), dim=0)}
            slices.append(Slice(part, name, features))
        return Anchor(0, 1, role, record, key, tuple(slices))

    anchors = (
        make_guided_anchor("image", "1", "x1", ("x1",)),
        make_guided_anchor("text", "1", "a", ("a",)),
        make_guided_anchor("image", "2", "x2", ("x2",)),
        make_guided_anchor("text", "2", "b", ("b",)),
        make_guided_anchor("query", "3", "y", ("y",)),
        make_guided_anchor("positive", "3", "c", ("c",)),
        # The guide finds it nearer to y than c, but the record names it as a negative.
        make_guided_anchor("negative", "3", "y and x", ("y", "y")),
    )
    embeddings = draw_unit_vectors(len(anchors), 3)
    queries = embeddings[[0, 2, 4]]
    targets = embeddings[[1, 3, 5, 6]]
    positive_mask = torch.eye(3, 4, dtype=torch.bool)
    ignore_mask = torch.zeros_like(positive_mask)
    ignore_mask[0, 1] = True  # x1 and b are more similar than x1 and a, and than x2 and b
    ignore_mask[1, 0] = True  # x2 and a likewise
    guided = compute_loss(embeddings, anchors, guide="cross")
    expected = compute_reference_loss(queries, targets, 1.0, positive_mask, ignore_mask)
    assert guided == pytest.approx(expected, abs=1e-10)
    unguided = compute_loss(embeddings, anchors)
    expected = compute_reference_loss(queries, targets, 1.0, positive_mask)
    assert unguided == pytest.approx(expected, abs=1e-10)
    assert unguided > guided
