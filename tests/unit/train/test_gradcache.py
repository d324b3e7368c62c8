"""Chunks, passes and recomputed layers change memory and time, never a loss or a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from helpers import runs, tiny
from precision import compute_in_double
from vlduet import config
from vlduet.data.batches import Batch, collate, split_into_chunks
from vlduet.data.records import Message
from vlduet.data.sequences import Anchor, PreparedImage, Sequence
from vlduet.model.adapters import LoraSettings
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import Readout, concatenate_readouts, create_empty_readout
from vlduet.objectives.language import language_loss
from vlduet.recipes.contrast import compute_contrastive_loss
from vlduet.train import setup
from vlduet.train.gradcache import compute_cached_losses
from vlduet.train.step import forward_backward

Found = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
EXACT = {"atol": 1e-11, "rtol": 1e-9}


@pytest.fixture
def trainable(tmp_path: Path, family: str) -> DuetModel:
    """A model in training, in double precision throughout, with dropout in front of LoRA."""
    model = tiny.build_duet_model(tmp_path / "base", family=family).double()
    model.make_trainable(lora=LoraSettings(rank=2, alpha=4, dropout=0.3), projector=True)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model = model.double().train()
    compute_in_double(model.backbone)
    with torch.no_grad():
        model(
            model.collate(sequences(model))
        )  # the cache keeps features in single precision: the same ones for all
    return model


def sequences(model: DuetModel) -> list[Sequence]:
    """Images with captions of unequal length, texts, several images in one sequence, and chats that embed nothing."""
    renderer, rows = model.renderer, []
    for i in range(4):
        pictured = renderer.render_caption(
            tiny.random_image(i), "some words " * (1 + 2 * i), record_name=f"p{i}"
        )
        end = Anchor(
            len(pictured) - 1,
            len(pictured),
            role="query",
            record_name=f"p{i}",
            content_key=f"both {i}",
        )
        rows.append(replace(pictured, anchors=(*pictured.anchors, end)))
        rows.append(
            renderer.render_embedding(
                (f"text {i % 3}",), role="text", record_name=f"p{i}", content_key=f"text {i % 3}"
            )
        )
    rows.append(
        renderer.render_embedding(
            (tiny.random_image(7), "and", tiny.random_image(8)),
            role="query",
            record_name="r",
            content_key="q",
        )
    )
    rows.append(
        renderer.render_embedding(("an answer",), role="positive", record_name="r", content_key="a")
    )
    for i in range(3):
        turns = (Message("user", ("hello",)), Message("assistant", ("good day " * (i + 1),)))
        rows.append(renderer.render_chat(turns, add_generation_prompt=False))
    return rows


def losses_of(model: DuetModel) -> Callable[[Readout], dict[str, torch.Tensor]]:
    def losses(readout: Readout) -> dict[str, torch.Tensor]:
        found = {
            "contrastive": compute_contrastive_loss(
                readout, model.logit_scale, min_temperature=0.01
            ),
            "language": language_loss(readout.nll, global_token_count=len(readout.nll)),
        }
        return {"loss": found["contrastive"] + 0.7 * found["language"], **found}

    return losses


def at_once(model: DuetModel, batches: list[Batch]) -> Found:
    """The slow twin: the graphs of all batches live until the one backward."""
    losses = losses_of(model)(concatenate_readouts([model(batch) for batch in batches]))
    losses["loss"].backward()
    return _taken(model, losses)


def by_chunk(model: DuetModel, batches: list[Batch]) -> Found:
    nothing = create_empty_readout(model.dim, like=model.logit_scale.detach())
    return _taken(
        model, compute_cached_losses(model, batches, compute_losses=losses_of(model), empty=nothing)
    )


def _taken(model: DuetModel, losses: dict[str, torch.Tensor]) -> Found:
    grads = {
        n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return {name: loss.detach() for name, loss in losses.items()}, grads


def same(one: Found, other: Found, **close: float) -> None:
    assert one[1].keys() == other[1].keys() and "logit_scale" in one[1]
    for ours, theirs in zip(one, other, strict=True):
        for name, value in ours.items():
            assert_close(value, theirs[name], msg=lambda m, name=name: f"{name}: {m}", **close)


@pytest.mark.parametrize("family", sorted(tiny.FAMILY_BUILDERS))
def test_in_double_a_model_computes_what_it_computes_in_single(tmp_path: Path, family: str) -> None:
    """Every norm that names float32, and all of the trunk, give the same numbers with more digits."""
    single = tiny.scale_up_weights(tiny.build_duet_model(tmp_path / "base", family=family))
    double = tiny.scale_up_weights(tiny.build_duet_model(tmp_path / "base", family=family)).double()
    batch = single.collate(sequences(single))
    norms = [n for n, m in single.named_modules() if type(m).__name__.endswith("RMSNorm")]
    widths = {n: len(next(single.get_submodule(n).parameters(), torch.empty(32))) for n in norms}
    inputs = {n: torch.sin(torch.arange(3.0 * width)).view(3, width) for n, width in widths.items()}
    with torch.no_grad():
        rough = {n: single.get_submodule(n)(x) for n, x in inputs.items()}
        rough["trunk"] = single.hidden_states(batch)
    compute_in_double(double.backbone)
    double.backbone.model.set_experts_implementation("eager")  # the default knows no float64
    with torch.no_grad():
        fine = {n: double.get_submodule(n)(x.double()) for n, x in inputs.items()}
        fine["trunk"] = double.hidden_states(batch)
    for name, value in fine.items():
        close = {"atol": 1e-4, "rtol": 1e-4} if name == "trunk" else {"atol": 2e-6, "rtol": 2e-6}
        assert_close(value.float(), rough[name], **close)
        assert value.dtype == torch.float64
        assert not torch.equal(value.float().double(), value), f"{name} was rounded to float32"


def test_with_dropout_the_gradients_are_those_of_all_chunks_at_once(trainable: DuetModel) -> None:
    chunks = [trainable.collate(part) for part in split_into_chunks(sequences(trainable), 90)]
    assert len(chunks) > 4
    torch.manual_seed(11)
    slow = at_once(trainable, chunks)
    after = torch.get_rng_state()
    torch.manual_seed(11)
    same(by_chunk(trainable, chunks), slow, **EXACT)
    assert torch.equal(torch.get_rng_state(), after), (
        "what is drawn next must not repeat what was drawn"
    )
    torch.manual_seed(12)
    with pytest.raises(
        AssertionError
    ):  # else there was no dropout, and this test would prove nothing
        same(by_chunk(trainable, chunks), slow, **EXACT)


@pytest.mark.parametrize("pack_to", [None, 70])
def test_without_dropout_they_are_those_of_one_batch(
    trainable: DuetModel, pack_to: int | None
) -> None:
    trainable.eval()
    rows = sequences(trainable)
    chunks = [
        trainable.collate(part, pack_to=pack_to)
        for part in split_into_chunks(rows, 140, pack_to=pack_to)
    ]
    assert len(chunks) > 2
    same(by_chunk(trainable, chunks), at_once(trainable, [trainable.collate(rows)]), **EXACT)


def test_the_first_pass_has_no_head_and_skips_what_embeds_nothing(trainable: DuetModel) -> None:
    seen: list[tuple[bool, int, int]] = []

    def counting(batch: Batch) -> Readout:
        seen.append((torch.is_grad_enabled(), batch.num_supervised_tokens, len(batch.anchors)))
        return trainable(batch)

    chunks = [trainable.collate(part) for part in split_into_chunks(sequences(trainable), 90)]
    nothing = create_empty_readout(trainable.dim, like=trainable.logit_scale.detach())
    compute_cached_losses(counting, chunks, compute_losses=losses_of(trainable), empty=nothing)
    first, second = ([call for call in seen if call[0] is graph] for graph in (False, True))
    assert [call[2] for call in first] == [len(c.anchors) for c in chunks if c.anchors]
    assert not any(supervised for _, supervised, _ in first)
    assert len(second) == len(chunks) > len(first)


def test_layers_that_are_computed_again_give_the_same_gradients(trainable: DuetModel) -> None:
    batch = [trainable.collate(sequences(trainable))]
    calls: list[int] = []
    layer = trainable.backbone.language_model.layers[0].self_attn  # type: ignore[union-attr, index]
    layer.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[operator, union-attr]
    torch.manual_seed(11)
    slow = at_once(trainable, batch)
    assert len(calls) == 1
    trainable.backbone.enable_gradient_checkpointing()
    torch.manual_seed(11)
    found = at_once(trainable, batch)
    assert len(calls) == 3, "forward, and again in backward"
    same(found, slow, **EXACT)
    assert all(bool(grad.abs().max() > 0) for name, grad in found[1].items() if "lora_" in name)
    torch.manual_seed(11)
    same(by_chunk(trainable, batch), slow, **EXACT)


@pytest.mark.parametrize(
    "how", [{"chunk_tokens": 100}, {"fused": False}, {"fused": False, "chunk_tokens": 100}], ids=str
)
def test_a_step_has_the_numbers_of_the_plain_one(tmp_path: Path, how: dict[str, object]) -> None:
    """By the config, from records on disk: chunks, and one pass for each loss (the way of most joint trainers)."""
    lora = {"rank": 2, "alpha": 2, "dropout": 0.0}
    path = runs.write_run_config(tmp_path, steps=1, batch_size=8, lora=lora)
    measured, grads, passes = [], [], []
    for changed in ({}, how):
        overrides = [f"train.{key}={value}" for key, value in changed.items()]
        run = setup.prepare_run(
            config.load_run_config(path, [*overrides, f"data.cache={tmp_path / 'features'}"]),
            write_files=False,
        )
        for name, parameter in run.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.1)
        (_, chunks), *_ = setup.iterate_batches(run, 0)
        measured.append(forward_backward(run, chunks))
        grads.append([p.grad for p in run.trainable_parameters()])
        passes.append(chunks)
    assert measured[1] == pytest.approx(measured[0], rel=1e-4)
    assert_close(grads[1], grads[0], atol=2e-5, rtol=1e-3)
    assert len(passes[0]) == 1 < len(passes[1])
    images = [sum(len(chunk.images) for chunk in chunks) for chunks in passes]
    assert images[1] > images[0] if "fused" in how else images[1] == images[0]


def test_pixels_of_a_chunked_batch_do_not_wait_for_their_chunk(tmp_path: Path) -> None:
    path = runs.write_run_config(tmp_path, steps=1, batch_size=8)
    found = []
    for cut in ("null", "60"):
        run = setup.prepare_run(
            config.load_run_config(path, [f"train.chunk_tokens={cut}", f"out={tmp_path / cut}"])
        )
        (_, chunks), *_ = setup.iterate_batches(run, 0)
        images = [image for chunk in chunks for image in chunk.images]
        found.append({name for image in images for name in image.inputs})
        assert len(images) == 8
    assert found == [{"pixel_values"}, {"features"}]


@settings(max_examples=30, deadline=None)
@example(lengths=[(n, False, False) for n in (1, 1, 8, 1, 2)], budget=22, pack_to=12)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.booleans()), max_size=12),
    budget=st.integers(1, 120),
    pack_to=st.none() | st.integers(8, 60),
)
def test_chunks_hold_every_sequence_once_within_the_budget(
    lengths: list[tuple[int, bool, bool]], budget: int, pack_to: int | None
) -> None:
    image = PreparedImage({}, 1, "k")
    rows = [
        Sequence(
            (i,) * length,
            (-100,) * length,
            (Anchor(0, 1, "text", str(i), str(i)),) if anchored else (),
            ((0, image),) if pictured else (),
        )
        for i, (length, anchored, pictured) in enumerate(lengths)
    ]
    parts = list(split_into_chunks(rows, budget, pack_to=pack_to))
    assert sorted(map(id, rows)) == sorted(id(row) for part in parts for row in part)
    for part in parts:
        batch = collate(part, pad_id=0, pack_to=pack_to)
        assert batch.token_ids.numel() <= budget or len(batch.token_ids) == 1
        assert len({bool(row.anchors) for row in part}) == 1
        assert int(batch.image_mask.sum()) == len(batch.images)
