"""Sequences that begin alike are read as if each stood alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from helpers import tiny
from vlduet.data import prefix_sharing
from vlduet.data.records import Message
from vlduet.data.sequences import IGNORE_INDEX

FAMILIES = tuple(tiny.FAMILY_BUILDERS)
WORDS = st.text("ab ", min_size=1, max_size=10)
QUESTIONS = st.lists(
    st.tuples(
        st.lists(st.one_of(WORDS, st.integers(0, 2)), min_size=1, max_size=4),
        st.lists(WORDS, min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=4,
)
"""Parts of a prompt (a number is a picture) and the options after it."""
FEW = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def asked(model, questions):
    def parts(prompt):
        return tuple(tiny.random_image(part) if isinstance(part, int) else part for part in prompt)

    return [
        model.renderer.chat(
            (Message("user", parts(prompt)), Message("assistant", (option,))), answer=False
        )
        for prompt, options in questions
        for option in options
    ]


@pytest.fixture(scope="module", params=FAMILIES)
def any_model(request, tmp_path_factory):
    return tiny.build_duet_model(tmp_path_factory.mktemp(request.param), family=request.param)


@FEW
@given(questions=QUESTIONS)
def test_options_cost_what_they_cost_alone(any_model, questions):
    model = any_model
    sequences = asked(model, questions)
    found = model.nll(sequences)
    for sequence, (nats, tokens) in zip(sequences, found, strict=True):
        alone = slow(model, sequence)
        assert tokens == len(alone)
        assert_close(torch.tensor(nats), alone.double().sum().float(), atol=1e-4, rtol=1e-5)


def slow(model, sequence):
    """One sequence, padded to its own length: no mask, no sharing."""
    with torch.no_grad():
        return model(model.collate([sequence])).nll


@FEW
@given(questions=QUESTIONS, budget=st.integers(20, 400))
def test_rows_hold_every_sequence_once_in_order_and_within_the_budget(model, questions, budget):
    sequences = asked(model, questions)
    rows = prefix_sharing.build_rows(sequences, budget)
    assert [s for row in rows for s in row.sequences] == sequences
    for row in rows:
        assert len(row) <= budget or len(row.sequences) == 1
        for sequence in row.sequences:
            assert (
                sequence.token_ids[: row.prefix_length]
                == row.sequences[0].token_ids[: row.prefix_length]
            )
            assert (
                set(sequence.labels[: row.prefix_length]) <= {IGNORE_INDEX}
                or len(row.sequences) == 1
            )
        batch = prefix_sharing.collate_shared_prefixes([row], pad_id=0)
        assert batch.num_tokens == len(row) and batch.num_supervised_tokens == sum(
            label != IGNORE_INDEX for s in row.sequences for label in s.labels
        )
    seen = [i for chosen, _ in prefix_sharing.group_rows(sequences, budget) for i in chosen]
    assert sorted(seen) == list(range(len(sequences)))


def test_options_of_a_question_share_its_prompt(model):
    prompt = (tiny.random_image(0), "which of them is it? " * 4)
    sequences = [
        model.renderer.chat(
            (Message("user", prompt), Message("assistant", (option,))), answer=False
        )
        for option in ("one", "two", "three")
    ]
    (row,) = prefix_sharing.build_rows(sequences, 4096)
    batch = prefix_sharing.collate_shared_prefixes([row], pad_id=0)
    assert len(batch.images) == 1 and len(row) < 2 * len(sequences[0])


def test_another_picture_ends_the_trunk(model):
    def question(*pictures):
        prompt = (
            "a long beginning that both have",
            *(tiny.random_image(n) for n in pictures),
            "what?",
        )
        return model.renderer.chat(
            (Message("user", prompt), Message("assistant", ("this",))), answer=False
        )

    one, other, shorter = question(0, 1), question(0, 2), question(0)
    (first, image), (second, _) = one.images
    assert prefix_sharing.shared_prefix_length(one, one) > second
    assert prefix_sharing.shared_prefix_length(one, other) == second, (
        "the tokens are alike, what fills them is not"
    )
    assert first + image.num_tokens <= prefix_sharing.shared_prefix_length(one, shorter) <= second


def test_a_label_is_predicted_in_its_own_branch(model):
    one, other = (model.renderer.caption(tiny.random_image(0), text) for text in ("same", "same"))
    first = next(t for t, label in enumerate(one.labels) if label != IGNORE_INDEX)
    assert prefix_sharing.shared_prefix_length(one, other) in (first - 1, one.images[0][0]), (
        "before what predicts it, or before the image"
    )


def test_what_shares_little_stands_alone(model):
    sequences = asked(model, [(["a"], ["b" * 10]), (["b"], ["a" * 10])])
    assert [len(row.sequences) for row in prefix_sharing.build_rows(sequences, 4096)] == [1, 1]
