"""Functions of a model for evaluations: embeddings of mixtures, answers, messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import tiny
from vlduet.data.records import ImageRef, Message, Parts
from vlduet.encoders.frozen import FrozenEncoder
from vlduet.harness.builtin import as_embedder, chat_messages, generate_answers
from vlduet.model.backbone import Backbone
from vlduet.model.generation import offline
from vlduet.model.generation.inputs import PrefillInputs

IMAGE = tiny.random_image(1)
VECTORS: dict[str | ImageRef, list[float]] = {
    IMAGE: [0.0, 8.0, 0.0],
    "a": [2.0, 0.0, 0.0],
    "b": [0.0, 0.0, 0.5],
    ".": [1.0, 1.0, 1.0],  # by which an encoder measures its width
}
"""Vectors of a stub encoder, of unequal length."""


def encode(parts: list[Any]) -> Tensor:
    return torch.tensor([VECTORS[part] for part in parts])


def make_encoder(*modalities: str) -> FrozenEncoder:
    functions = dict.fromkeys(modalities, encode)
    return FrozenEncoder(Path("encoder"), modalities, lambda: functions, "fingerprint")


def test_a_mixture_is_the_direction_of_the_mean_of_unit_vectors() -> None:
    items: list[Parts] = [(IMAGE,), ("a", IMAGE), ("a", "a", "b"), ("b",)]
    embeddings = as_embedder(make_encoder("image", "text"))(items, False)
    expected = np.array([[0, 1, 0], [1, 1, 0], [2, 0, 1], [0, 0, 1]], dtype=np.float64)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(embeddings, expected, atol=1e-6)


def test_parts_of_other_modalities_do_not_count() -> None:
    embeddings = as_embedder(make_encoder("text"))([("a", IMAGE, "b"), (IMAGE,)], True)
    np.testing.assert_allclose(embeddings[0], [0.5**0.5, 0, 0.5**0.5], atol=1e-6)
    assert np.isnan(embeddings[1]).all()


def test_answers_are_in_the_order_of_the_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build_duet_model(tmp_path / "base")

    def count_tokens(backbone: Backbone, inputs: PrefillInputs, max_new_tokens: int) -> list[str]:
        """Return the number of tokens of every prompt as its answer."""
        return [str(count) for count in inputs.attention_mask.sum(1).tolist()]

    monkeypatch.setattr(offline, "generate_texts", count_tokens)
    prompts: list[Parts] = [
        ("a long question",), (IMAGE,), ("a",), (IMAGE, "and a question"), ("short",),
    ]  # fmt: skip
    expected = [generate_answers(model, [prompt], 4, system="be brief")[0] for prompt in prompts]
    assert len(set(expected)) == len(prompts)
    assert generate_answers(model, prompts, 4, system="be brief") == expected
    assert generate_answers(model, [], 4) == []


def test_the_system_message_is_the_first_turn() -> None:
    user = Message("user", (IMAGE, "what?"))
    assert chat_messages(user.parts, system="be brief") == (
        Message("system", ("be brief",)),
        user,
    )
    assert chat_messages(user.parts, system=None) == (user,)
