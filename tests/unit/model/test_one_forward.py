"""One forward, two readings: padding, packing, batching and caching never change what is read."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from helpers import tiny
from vlduet.data.batches import Batch, collate
from vlduet.data.records import Message
from vlduet.data.sequences import IGNORE_INDEX, trim
from vlduet.model.adapters import LoraSettings
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import pool_hidden_states

TEXTS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Z", "Cc"]), min_size=1, max_size=12
)
PICTURES = st.builds(tiny.random_image, st.integers(0, 5), width=st.sampled_from([16, 24, 40]))
ITEM = st.one_of(TEXTS, PICTURES, st.tuples(PICTURES, TEXTS))
QUICK = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def sequences(model, items):
    parts = [item if isinstance(item, tuple) else (item,) for item in items]
    return [
        model.renderer.embed(p, role="x", record=str(i), key=str(i)) for i, p in enumerate(parts)
    ] + [
        model.renderer.caption(tiny.random_image(9), "long " * (i + 1), record=f"c{i}")
        for i in range(2)
    ]


def read(model, batch: Batch):
    with torch.no_grad():
        readout = model(batch)
    order = sorted(range(len(readout.anchors)), key=lambda i: readout.anchors[i].record)
    return readout.embeddings[order], readout.nll.sort().values


@QUICK
@given(items=st.lists(ITEM, min_size=1, max_size=5), pack_to=st.integers(8, 60))
def test_alone_padded_either_side_and_packed_agree(model, items, pack_to):
    rows = sequences(model, items)
    right, nll = read(model, model.collate(rows))
    left, left_nll = read(model, model.collate(rows, side="left"))
    packed, packed_nll = read(model, model.collate(rows, pack_to=pack_to))
    alone = [read(model, model.collate([row])) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: rows[i].anchors[0].record)
    close = {"atol": 2e-6, "rtol": 1e-5}
    assert_close(left, right, **close)
    assert_close(packed, right, **close)
    assert_close(torch.cat([alone[i][0] for i in order]), right, **close)
    for other in (left_nll, packed_nll, torch.cat([n for _, n in alone]).sort().values):
        assert_close(other, nll, atol=2e-5, rtol=1e-5)


@QUICK
@given(pad=st.integers(0, 200), side=st.sampled_from(["left", "right"]))
def test_what_stands_on_padding_never_matters(model, pad, side):
    rows = sequences(model, ["a", "a longer text", (tiny.random_image(1), "x")])
    one = read(model, collate(rows, pad_id=0, padding_side=side))
    other = read(model, collate(rows, pad_id=pad, padding_side=side))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@QUICK
@given(items=st.lists(ITEM, min_size=1, max_size=4), labels=st.booleans())
def test_what_is_not_needed_changes_nothing(model, items, labels):
    whole = sequences(model, items)
    kept = [s for s in (trim(one, labels=labels, anchors=not labels) for one in whole) if s]
    everything, found = read(model, model.collate(whole)), read(model, model.collate(kept))
    close = {"atol": 2e-6, "rtol": 1e-5}
    if labels:
        assert not found[0].numel() and len(kept) == 2, "only the captions carry loss"
        assert_close(found[1], everything[1], atol=2e-5, rtol=1e-5)
    else:
        assert not found[1].numel() and sum(map(len, kept)) < sum(map(len, whole))
        assert_close(found[0], everything[0], **close)


def test_nothing_needed_is_nothing(model):
    chat = model.renderer.embed(("x",))
    assert trim(chat, labels=True, anchors=False) is None


def test_half_precision_reads_the_same_and_trains_in_full(model, tmp_path):
    """bfloat16 weights: embeddings near those of float32; what is trained stays float32 and comes back bit for bit."""
    half = DuetModel.from_pretrained(
        model.backbone.folder, dtype=torch.bfloat16, prompts=model.prompts
    )
    items = ["a red apple", tiny.random_image(1), (tiny.random_image(2), "and a text")]
    full = DuetModel.from_pretrained(model.backbone.folder, prompts=model.prompts)
    assert (half.encode(items) * full.encode(items)).sum(1).min() > 0.995
    half.make_trainable(lora=LoraSettings(rank=2, alpha=4), projector=True)
    trained = [p for p in half.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert half.lm_head_weight.dtype == torch.bfloat16
    readout = half(half.collate(sequences(half, items[:1])))
    assert readout.embeddings.dtype == readout.nll.dtype == torch.float32
    (readout.embeddings.sum() + readout.nll.mean()).backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in half.adapter_tensors().items()
    )
    half.save_pretrained(tmp_path / "half")
    again = DuetModel.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    for name, tensor in {**half.own_tensors(), **half.adapter_tensors()}.items():
        assert torch.equal(tensor, {**again.own_tensors(), **again.adapter_tensors()}[name]), name
    assert (
        again.generate((Message("user", (tiny.random_image(3), "what?")),), max_new_tokens=3)
    ) is not None


def test_nll_is_that_of_full_logits(model):
    rows = sequences(model, ["hello"])
    batch = model.collate(rows)
    with torch.no_grad():
        found = model(batch).nll
        logits = model.hidden_states(batch).double() @ model.lm_weight.double().T
    slow = [
        -torch.log_softmax(logits[b, t - 1], -1)[batch.labels[b, t]]
        for b in range(batch.ids.shape[0])
        for t in range(1, batch.ids.shape[1])
        if batch.labels[b, t] != IGNORE_INDEX
    ]
    assert_close(found.double(), torch.stack(slow), atol=1e-5, rtol=1e-5)


def test_hidden_states_are_those_of_plain_transformers(model):
    """What we embed is what a server of the same checkpoint would embed: the base model's last_hidden_state."""
    rows = [model.renderer.caption(tiny.random_image(2), "a red apple")]
    batch = model.collate(rows)
    with torch.no_grad():
        theirs = model.backbone.model.model(
            **tiny.transformers_inputs(model, batch.ids, batch.images)
        ).last_hidden_state
        assert_close(model.hidden_states(batch), theirs, atol=1e-5, rtol=1e-5)


def test_the_image_is_seen(model):
    one, other = (model.encode([tiny.random_image(i)]) for i in (1, 2))
    assert abs(one - other).max() > 1e-5


def test_pool_is_the_mean_of_each_span():
    hidden = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    spans = torch.tensor([[0, 0, 1], [2, 3, 7], [1, 6, 7], [0, 1, 4], [1, 6, 7], [2, 0, 7]])
    slow = torch.stack([hidden[row, start:end].mean(0) for row, start, end in spans.tolist()])
    found = pool_hidden_states(hidden, spans)
    assert_close(found, slow)
    weights = torch.randn_like(slow)
    grads = [torch.autograd.grad((one * weights).sum(), hidden)[0] for one in (found, slow)]
    assert_close(*grads)
    assert_close(pool_hidden_states(hidden, spans[[0, 2, 4]]), slow[[0, 2, 4]])
    assert pool_hidden_states(hidden, spans[:0]).shape == (0, 4)


def test_each_distinct_image_goes_through_the_tower_once(model, monkeypatch):
    seen = []
    vision = model.backbone.vision
    monkeypatch.setattr(model.backbone, "vision", lambda chunk: seen.extend(chunk) or vision(chunk))
    model.encode([tiny.random_image(71), tiny.random_image(72), tiny.random_image(71)])
    model.encode([tiny.random_image(71)])
    assert len(seen) == 2


def test_encode_keeps_the_order_whatever_the_lengths(model):
    items = [
        "a",
        "a much longer text than the others",
        tiny.random_image(3),
        "bb",
        (tiny.random_image(4), "cc"),
    ]
    together = model.encode(items, batch_tokens=16)
    alone = torch.cat([torch.from_numpy(model.encode([item])) for item in items])
    assert_close(torch.from_numpy(together), alone, atol=2e-6, rtol=1e-5)
    assert_close(torch.from_numpy(together).norm(dim=1), torch.ones(5))


def test_the_frozen_tower_is_never_in_training(model, monkeypatch):
    """Not for a moment: another thread may be looking through it, and batch norms would learn."""
    tower, seen = model.backbone.tower, []
    monkeypatch.setattr(type(tower), "train", lambda self, mode=True: seen.append(mode) or self)
    model.train()
    assert not seen and not any(module.training for module in tower.modules())
    assert model.training and model.backbone.trunk.training and model.head.training
    model.eval()
    assert not any(module.training for module in model.modules())
