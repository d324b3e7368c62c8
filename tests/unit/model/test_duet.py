"""One forward pass, two readings: padding, packing and trimming never change what is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from helpers import tiny
from vlduet.data.batches import Batch, collate
from vlduet.data.sequences import IGNORE_INDEX, Sequence, trim
from vlduet.model.adapters import LoraSettings
from vlduet.model.duet import DuetModel

TEXTS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Z", "Cc"]), min_size=1, max_size=12
)
IMAGES = st.builds(tiny.random_image, st.integers(0, 5), width=st.sampled_from([16, 24, 40]))
ITEMS = st.one_of(TEXTS, IMAGES, st.tuples(IMAGES, TEXTS))
FEW_EXAMPLES = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
EMBEDDING_TOLERANCE = {"atol": 2e-6, "rtol": 1e-5}
NLL_TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}


def render_sequences(model: DuetModel, items: list[Any]) -> list[Sequence]:
    """Return one embedding sequence for each item, and two captions with labels."""
    sequences = []
    for i, item in enumerate(items):
        parts = item if isinstance(item, tuple) else (item,)
        sequences.append(
            model.renderer.render_embedding(parts, record_name=str(i), content_key=str(i))
        )
    for i in range(2):
        caption = "long " * (i + 1)
        sequences.append(
            model.renderer.render_caption(tiny.random_image(9), caption, record_name=f"c{i}")
        )
    return sequences


def read_sorted(model: DuetModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return embeddings sorted by record name, and negative log-likelihoods sorted by value."""
    with torch.no_grad():
        readout = model(batch)
    names = [anchor.record_name for anchor in readout.anchors]
    order = sorted(range(len(names)), key=names.__getitem__)
    return readout.embeddings[order], readout.nll.sort().values


@FEW_EXAMPLES
@given(items=st.lists(ITEMS, min_size=1, max_size=5), pack_to=st.integers(8, 60))
def test_padding_side_and_packing_change_no_reading(
    model: DuetModel, items: list[Any], pack_to: int
) -> None:
    sequences = render_sequences(model, items)
    embeddings, nll = read_sorted(model, model.collate(sequences))
    left_padded, left_nll = read_sorted(model, model.collate(sequences, padding_side="left"))
    packed, packed_nll = read_sorted(model, model.collate(sequences, pack_to=pack_to))
    by_name = sorted(sequences, key=lambda s: s.anchors[0].record_name)
    single = [read_sorted(model, model.collate([sequence])) for sequence in by_name]
    assert_close(left_padded, embeddings, **EMBEDDING_TOLERANCE)
    assert_close(packed, embeddings, **EMBEDDING_TOLERANCE)
    assert_close(torch.cat([vectors for vectors, _ in single]), embeddings, **EMBEDDING_TOLERANCE)
    single_nll = torch.cat([values for _, values in single]).sort().values
    for other in (left_nll, packed_nll, single_nll):
        assert_close(other, nll, **NLL_TOLERANCE)


@FEW_EXAMPLES
@given(pad_token_id=st.integers(0, 200), padding_side=st.sampled_from(["left", "right"]))
def test_the_padding_token_never_matters(
    model: DuetModel, pad_token_id: int, padding_side: str
) -> None:
    sequences = render_sequences(model, ["a", "a longer text", (tiny.random_image(1), "x")])
    expected = read_sorted(model, collate(sequences, pad_token_id=0, padding_side=padding_side))
    readings = read_sorted(
        model, collate(sequences, pad_token_id=pad_token_id, padding_side=padding_side)
    )
    assert torch.equal(readings[0], expected[0])
    assert torch.equal(readings[1], expected[1])


@FEW_EXAMPLES
@given(items=st.lists(ITEMS, min_size=1, max_size=4), labels=st.booleans())
def test_trimmed_sequences_have_the_same_readings(
    model: DuetModel, items: list[Any], labels: bool
) -> None:
    sequences = render_sequences(model, items)
    trimmed = [
        short
        for s in sequences
        if (short := trim(s, labels=labels, anchors=not labels)) is not None
    ]
    embeddings, nll = read_sorted(model, model.collate(sequences))
    trimmed_embeddings, trimmed_nll = read_sorted(model, model.collate(trimmed))
    if labels:
        assert not trimmed_embeddings.numel() and len(trimmed) == 2, "only captions have labels"
        assert_close(trimmed_nll, nll, **NLL_TOLERANCE)
    else:
        assert not trimmed_nll.numel() and sum(map(len, trimmed)) < sum(map(len, sequences))
        assert_close(trimmed_embeddings, embeddings, **EMBEDDING_TOLERANCE)


def test_trimming_to_an_output_that_is_absent_leaves_nothing(model: DuetModel) -> None:
    unlabelled = model.renderer.render_embedding(("x",))
    assert trim(unlabelled, labels=True, anchors=False) is None


def test_half_precision_embeds_alike_and_trains_in_float32(
    model: DuetModel, tmp_path: Path
) -> None:
    """Trained tensors stay float32 beside bfloat16 weights, and are saved bit for bit."""
    folder, prompts = model.backbone.folder, model.prompts
    half = DuetModel.from_pretrained(folder, dtype=torch.bfloat16, prompts=prompts)
    full = DuetModel.from_pretrained(folder, prompts=prompts)
    items = ["a red apple", tiny.random_image(1), (tiny.random_image(2), "and a text")]
    assert (half.encode(items) * full.encode(items)).sum(1).min() > 0.995
    half.make_trainable(lora=LoraSettings(rank=2, alpha=4), projector=True)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    assert half.lm_head_weight.dtype == torch.bfloat16
    readout = half(half.collate(render_sequences(half, items[:1])))
    assert readout.embeddings.dtype == readout.nll.dtype == torch.float32
    (readout.embeddings.sum() + readout.nll.mean()).backward()
    for name, parameter in half.adapter_tensors().items():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
    half.save_pretrained(tmp_path / "half")
    reopened = DuetModel.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    reopened_tensors = {**reopened.own_tensors(), **reopened.adapter_tensors()}
    for name, tensor in {**half.own_tensors(), **half.adapter_tensors()}.items():
        assert torch.equal(tensor, reopened_tensors[name]), name
    images = [tiny.random_image(3)]
    captions = [m.caption_images(images, max_new_tokens=3) for m in (half.eval(), reopened)]
    assert captions[0] == captions[1] and len(captions[0]) == 1


def test_nll_equals_that_of_full_logits(model: DuetModel) -> None:
    batch = model.collate(render_sequences(model, ["hello"]))
    with torch.no_grad():
        nll = model(batch).nll
        logits = model.hidden_states(batch).double() @ model.lm_head_weight.double().T
    expected = []
    for row, labels in enumerate(batch.labels.tolist()):
        for position, label in enumerate(labels):
            if label != IGNORE_INDEX:
                expected.append(-torch.log_softmax(logits[row, position - 1], -1)[label])
    assert_close(nll.double(), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_hidden_states_equal_those_of_plain_transformers(model: DuetModel) -> None:
    """A server of the same checkpoint embeds what we embed: the base model's last hidden state."""
    batch = model.collate([model.renderer.render_caption(tiny.random_image(2), "a red apple")])
    inputs = tiny.transformers_inputs(model, batch.token_ids, batch.images)
    with torch.no_grad():
        expected = model.backbone.model.model(**inputs).last_hidden_state
        assert_close(model.hidden_states(batch), expected, atol=1e-5, rtol=1e-5)


def test_different_images_have_different_embeddings(model: DuetModel) -> None:
    first, second = model.encode([tiny.random_image(1), tiny.random_image(2)])
    assert abs(first - second).max() > 1e-5


def test_the_vision_tower_is_never_in_training_mode(
    model: DuetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for a moment: another thread may be using it, and its batch norms would learn."""
    vision_tower = model.backbone.vision_tower
    modes: list[bool] = []

    def record_mode(module: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
        modes.append(mode)
        return module

    monkeypatch.setattr(type(vision_tower), "train", record_mode)
    try:
        model.train()
        assert not modes
        assert not any(module.training for module in vision_tower.modules())
        assert model.training and model.backbone.language_model.training and model.head.training
    finally:
        model.eval()
    assert not any(module.training for module in model.modules())
