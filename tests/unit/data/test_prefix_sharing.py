"""Sequences with a common prefix have the likelihoods that each has alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from helpers import tiny
from vlduet.data import prefix_sharing
from vlduet.data.records import Message
from vlduet.data.sequences import IGNORE_INDEX, Sequence
from vlduet.model.duet import DuetModel

TEXTS = st.text("ab ", min_size=1, max_size=10)
PROMPTS = st.lists(st.one_of(TEXTS, st.integers(0, 2)), min_size=1, max_size=4)
OPTIONS = st.lists(TEXTS, min_size=1, max_size=5)
QUESTIONS = st.lists(st.tuples(PROMPTS, OPTIONS), min_size=1, max_size=4)
"""Parts of a prompt (a number is the seed of an image), and the options that may follow it."""
FEW_EXAMPLES = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def render_options(model: DuetModel, questions: list[Any]) -> list[Sequence]:
    """Return one chat for every option of every question, the option supervised."""
    sequences = []
    for prompt, options in questions:
        parts = tuple(tiny.random_image(p) if isinstance(p, int) else p for p in prompt)
        for option in options:
            messages = (Message("user", parts), Message("assistant", (option,)))
            sequences.append(model.renderer.render_chat(messages, add_generation_prompt=False))
    return sequences


@pytest.fixture(scope="module", params=tuple(tiny.FAMILY_BUILDERS))
def any_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DuetModel]:
    """A tiny model of every supported family."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    yield tiny.build_duet_model(folder, family=request.param)


@FEW_EXAMPLES
@given(questions=QUESTIONS)
def test_likelihoods_equal_those_of_single_sequences(
    any_model: DuetModel, questions: list[Any]
) -> None:
    sequences = render_options(any_model, questions)
    results = any_model.compute_sequence_nll(sequences)
    for sequence, (nats, num_labels) in zip(sequences, results, strict=True):
        with torch.no_grad():  # one sequence of its own length: no mask, no sharing
            expected = any_model(any_model.collate([sequence])).nll
        assert num_labels == len(expected) == sequence.num_labels
        assert_close(torch.tensor(nats), expected.double().sum().float(), atol=1e-4, rtol=1e-5)


@FEW_EXAMPLES
@given(questions=QUESTIONS, max_tokens=st.integers(20, 400))
def test_rows_hold_every_sequence_once_in_order_and_within_the_limit(
    model: DuetModel, questions: list[Any], max_tokens: int
) -> None:
    sequences = render_options(model, questions)
    rows = prefix_sharing.build_rows(sequences, max_tokens)
    assert [s for row in rows for s in row.sequences] == sequences
    for row in rows:
        assert len(row) <= max_tokens or len(row.sequences) == 1
        prefix = slice(row.prefix_length)
        for sequence in row.sequences:
            assert sequence.token_ids[prefix] == row.sequences[0].token_ids[prefix]
            assert len(row.sequences) == 1 or set(sequence.labels[prefix]) <= {IGNORE_INDEX}
        batch = prefix_sharing.collate_shared_prefixes([row], pad_token_id=0)
        assert batch.num_tokens == len(row)
        assert batch.num_supervised_tokens == sum(s.num_labels for s in row.sequences)
    groups = prefix_sharing.group_rows(sequences, max_tokens)
    indices = [i for group_indices, _ in groups for i in group_indices]
    assert sorted(indices) == list(range(len(sequences)))


def test_options_of_a_question_share_its_prompt(model: DuetModel) -> None:
    prompt = [0, "which of them is it? " * 4]
    sequences = render_options(model, [(prompt, ["one", "two", "three"])])
    (row,) = prefix_sharing.build_rows(sequences, 4096)
    batch = prefix_sharing.collate_shared_prefixes([row], pad_token_id=0)
    assert len(batch.images) == 1 and len(row) < 2 * len(sequences[0])


def test_a_prefix_ends_before_a_different_image(model: DuetModel) -> None:
    beginning = "a long beginning that both have"
    first, second, shorter = render_options(
        model, [([beginning, *images, "what?"], ["this"]) for images in ([0, 1], [0, 2], [0])]
    )
    (start, image), (second_start, _) = first.images
    assert prefix_sharing.shared_prefix_length(first, first) > second_start
    assert prefix_sharing.shared_prefix_length(first, second) == second_start, (
        "the tokens of the second images are equal, their features are not"
    )
    shared_with_shorter = prefix_sharing.shared_prefix_length(first, shorter)
    assert start + image.num_tokens <= shared_with_shorter <= second_start


def test_a_prefix_ends_before_the_token_that_predicts_the_first_label(model: DuetModel) -> None:
    first, second = (model.renderer.render_caption(tiny.random_image(0), "same") for _ in range(2))
    labels = [t for t, label in enumerate(first.labels) if label != IGNORE_INDEX]
    length = prefix_sharing.shared_prefix_length(first, second)
    # An image that would end after that token is not shared at all.
    assert length in (labels[0] - 1, first.images[0][0])


def test_sequences_with_a_short_common_prefix_have_rows_of_their_own(model: DuetModel) -> None:
    sequences = render_options(model, [(["a"], ["b" * 10]), (["b"], ["a" * 10])])
    rows = prefix_sharing.build_rows(sequences, 4096)
    assert [len(row.sequences) for row in rows] == [1, 1]
