"""FROMAGe: images are read in the tower alone, texts at [RET], and nothing but maps, [RET] and temperature moves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from helpers import runs, tiny
from vlduet import config
from vlduet.data.batches import split_into_chunks
from vlduet.data.records import Message, Record
from vlduet.data.sequences import Sequence
from vlduet.data.stream import Sample
from vlduet.errors import ConfigError, DataError
from vlduet.inspect.tokens import list_record_tokens
from vlduet.logs import read_metrics
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import create_empty_readout
from vlduet.recipes import fromage
from vlduet.recipes.fromage import RET_TOKEN, FromageOptions, layout, objective
from vlduet.train import setup
from vlduet.train.gradcache import compute_cached_losses
from vlduet.train.loader import iterate_batches
from vlduet.train.loop import train
from vlduet.train.run import TrainingRun
from vlduet.train.step import forward_backward, optimizer_step
from vlduet.workflows.validation import make_validator

EXACT = {"atol": 1e-11, "rtol": 1e-9}


@pytest.fixture
def run(family: str, tmp_path: Path) -> Iterator[TrainingRun]:
    path = runs.write_run_config(tmp_path, family=family)
    made = setup.prepare_run(
        config.load_run_config(path, [*runs.FROMAGE_OVERRIDES, "train.projector=last"]),
        write_files=False,
    )
    yield made
    made.layout_executor.shutdown()


@pytest.fixture
def model(run: TrainingRun) -> DuetModel:
    """In double precision, one feature for all forwards: the cache keeps them in single."""
    assert isinstance(run.model, DuetModel)
    found = run.model.double()
    found.vision_features([found.prepare_image(tiny.random_image(i)) for i in range(6)])
    return found


def pairs() -> list[Record]:
    """Unequal captions; one stands at two images, one record has a long caption alone."""
    texts = ["a flower", "a cat on the sea", "a flower", None]
    made = [
        Record(f"p{i}", image=tiny.random_image(i), short=(text,) if text else ())
        for i, text in enumerate(texts[:3])
    ]
    made.append(Record("p3", image=tiny.random_image(3), long="only long"))
    return [
        *made,
        Record(
            "r",
            query=(tiny.random_image(4), "at night"),
            positive=(("a sea",),),
            negative=((tiny.random_image(5),),),
        ),
    ]


def laid_out(model: DuetModel) -> list[Sequence]:
    return [
        s
        for i, r in enumerate(pairs())
        for s in layout(Sample(r, i, 0), model.renderer, FromageOptions())
    ]


def losses_of(model: DuetModel, readout: Any) -> dict[str, torch.Tensor]:
    found = objective(readout, model.logit_scale, FromageOptions())
    return {"loss": found["contrastive"] + 0.7 * found["language"], **found}


def taken(model: DuetModel) -> dict[str, torch.Tensor]:
    grads = {
        n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return grads


def by_hand(model: DuetModel, sequences: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow twin: contrastive and language loss, a sequence at a time, with the formulas of the paper."""
    vectors: dict[str, list[torch.Tensor]] = {"left": [], "right": []}
    names: dict[str, list[tuple[str, str]]] = {"left": [], "right": []}
    nll: list[torch.Tensor] = []
    assert model.head.vision is not None
    for sequence in sequences:
        batch = model.collate([sequence])
        hidden = model.backbone.language_model(
            **model.language_model_inputs(batch), position_ids=batch.position_ids
        )
        states = hidden.last_hidden_state[0]
        for at in range(1, len(sequence)):
            if sequence.labels[at] != -100:
                nll.append(
                    -torch.log_softmax(states[at - 1] @ model.lm_head_weight.T, -1)[
                        sequence.labels[at]
                    ]
                )
        (anchor,) = sequence.anchors
        if sequence.token_ids[anchor.start] == model.renderer.image_token_id:
            (image,) = (
                image for at, image in sequence.images if at + image.feature_span[0] == anchor.start
            )
            vector = model.head.vision(
                model.vision_features([image])[:, : model.backbone.vision_width].double().mean(0)
            )
        else:
            vector = model.head.layers(states[anchor.end - 1])
        side = "left" if anchor.role in ("image", "query") else "right"
        vectors[side].append(vector / vector.norm())
        names[side].append((anchor.record_name.split(":")[1], anchor.role))
    left, right = torch.stack(vectors["left"]), torch.stack(vectors["right"])
    scores = left @ right.T * model.logit_scale.exp()
    same = [
        {"p0", "p2"},
        {"p1"},
        {"p0", "p2"},
        {"p3"},
        {"r"},
    ]  # what a query's right answers may belong to
    positive = torch.tensor(
        [[n in ok and role != "negative" for n, role in names["right"]] for ok in same]
    )
    across = [_loss(scores[i], positive[i]) for i in range(len(left))]
    down = [_loss(scores[:, j], positive[:, j]) for j in range(len(right)) if positive[:, j].any()]
    return 0.5 * (torch.stack(across).mean() + torch.stack(down).mean()), torch.stack(nll).mean()


def _loss(scores: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Mean of -log p of every right answer, each against itself and the wrong ones."""
    each = [
        score - torch.cat([score[None], scores[~positive]]).logsumexp(0)
        for score in scores[positive]
    ]
    return -torch.stack(each).mean()


def test_the_losses_are_the_paper_s_and_chunks_and_packing_change_nothing(model: DuetModel) -> None:
    sequences = laid_out(model)
    contrastive, language = by_hand(model, sequences)
    (contrastive + 0.7 * language).backward()
    slow = taken(model)
    # The layout fits the reference above: every query has the answers that `same` says.
    readout = model(model.collate(sequences))
    found = losses_of(model, readout)
    assert_close(found["contrastive"], contrastive, **EXACT)
    assert_close(found["language"], language, **EXACT)
    found["loss"].backward()
    grads = taken(model)
    assert (
        grads.keys() == slow.keys()
        and {"logit_scale", "soft_prompts.rows", "head.vision.weight"} <= grads.keys()
    )
    for pack_to in (None, 60):
        chunks = [
            model.collate(part, pack_to=pack_to)
            for part in split_into_chunks(sequences, 60, pack_to=pack_to)
        ]
        nothing = create_empty_readout(model.dim, like=model.logit_scale.detach())
        told = compute_cached_losses(
            model, chunks, compute_losses=lambda readout: losses_of(model, readout), empty=nothing
        )
        assert_close(told["loss"], found["loss"].detach(), **EXACT)
        for name, grad in taken(model).items():
            # Gemma's norm of image features is in single precision, whatever the others are in.
            close = {"atol": 1e-6, "rtol": 1e-5} if "mm_soft_emb_norm" in name else EXACT
            assert_close(grad, slow[name], **close, msg=lambda m, name=name: f"{name}: {m}")
            assert_close(grads[name], slow[name], **close, msg=lambda m, name=name: f"{name}: {m}")


def test_the_language_model_does_not_see_an_image_that_is_only_embedded(model: DuetModel) -> None:
    rows: list[int] = []
    trunk: Any = model.backbone.language_model
    trunk.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["inputs_embeds"])), with_kwargs=True
    )
    items = [tiny.random_image(0), "a flower", (tiny.random_image(1), "and more")]
    alone = model.encode(items[:1])
    assert not rows, "an image alone has no row"
    together = model.encode(items)
    assert rows in ([1], [2]), "the text and the mixture share a row, where that is long enough"
    assert_close(
        np.concatenate([alone, *(model.encode([item]) for item in items[1:])]),
        together,
        atol=1e-6,
        rtol=0,
    )
    assert rows[1:] == [1, 1]
    left = model(
        model.collate(
            [model.renderer.render_embedding((item,)) for item in items[:2]], padding_side="left"
        )
    ).embeddings
    assert_close(left.detach().float().numpy(), together[:2], atol=1e-6, rtol=0)


def test_a_step_moves_maps_ret_and_temperature_alone(run: TrainingRun) -> None:
    model = run.model
    assert isinstance(model, DuetModel) and model.soft_prompts is not None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step, (_, chunks) in zip(range(2), iterate_batches(run, 0), strict=False):
        forward_backward(run, chunks)
        optimizer_step(run, step)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    linear = [
        n for n, m in model.backbone.projector.named_modules() if isinstance(m, torch.nn.Linear)
    ]
    of_projector = {
        name for name in changed if any(n in name for n in ("projector", "merger", "connector"))
    }
    last = (
        f".{linear[-1]}." if linear else ".multi_modal_projector."
    )  # Gemma's is one matrix and a norm
    assert of_projector and all(last in f".{name}" for name in of_projector)
    heads = {f"head.{kind}.{name}" for kind in ("layers", "vision") for name in ("weight", "bias")}
    assert changed - of_projector == heads | {"soft_prompts.rows", "logit_scale"}
    mean = model.backbone.token_embedding.weight.norm(dim=1).mean()
    assert_close(model.soft_prompts.rows.norm(dim=1), mean[None], atol=1e-6, rtol=1e-5)


def test_it_learns_is_saved_and_goes_on(tmp_path: Path) -> None:
    path = runs.write_run_config(tmp_path, steps=24)
    made = config.load_run_config(
        path, [*runs.FROMAGE_OVERRIDES, "train.projector=last", "train.eval_every=24"]
    )
    assert made.data.validation is not None
    folder = train(made, evaluate=make_validator(made.data.validation, seed=0))
    rows = read_metrics(made.out / "metrics.jsonl")
    for name in (
        "contrastive",
        "language",
    ):  # little: nothing in a random language model is worth a linear map
        losses = [row[name] for row in rows if name in row]
        assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert (
        "validation/caption_cross_entropy" in rows[-1]
        and rows[-1]["validation/image_to_text/hit@5"] > 0
    )
    model = DuetModel.from_pretrained(folder)
    assert (
        model.prompts.text.endswith(RET_TOKEN)
        and model.peft_model is None
        and "head.vision.weight" in model.own_tensors()
    )
    items = ["number 1", tiny.random_image(1), (tiny.random_image(2), "what?")]
    vectors = model.encode(items)
    shown = [row.text for row in list_record_tokens(next(iter(pairs())), folder)]
    assert RET_TOKEN in shown
    onward = setup.prepare_run(
        config.load_run_config(
            path, [*runs.FROMAGE_OVERRIDES, f"model.path={folder}", "model.prompts={}"]
        ),
        write_files=False,
    )
    assert isinstance(onward.model, DuetModel)
    assert np.array_equal(onward.model.encode(items), vectors), (
        "the maps and [RET] of the first run"
    )
    model.save_merged(tmp_path / "merged")
    assert_close(
        DuetModel.from_pretrained(tmp_path / "merged").encode(items), vectors, atol=1e-6, rtol=0
    )


def test_d_alone_has_no_image_in_the_language_model(tmp_path: Path) -> None:
    path = runs.write_run_config(tmp_path, steps=1, batch_size=6)
    run = setup.prepare_run(
        config.load_run_config(path, [*runs.FROMAGE_OVERRIDES, "objectives={contrastive: 1}"]),
        write_files=False,
    )
    (_, chunks), *_ = iterate_batches(run, 0)
    assert isinstance(run.model, DuetModel)
    inner = [
        chunk.drop_anchors(tower)
        for chunk in chunks
        if (tower := run.model.vision_anchor_mask(chunk)) is not None
    ]
    assert sum(len(chunk.images) for chunk in chunks) == 6 and not any(
        chunk.images for chunk in inner
    )
    assert forward_backward(run, chunks).keys() >= {"contrastive", "grad_norm"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lora={rank: 2}", r"train.lora: .*frozen. Set it to null"),
        ("train.soft_prompts=false", r"train.soft_prompts: \[RET\] is a learned token"),
        ("model.head=mlp", "model.head: "),
        ("model.prompts.chat=true", "model.prompts.chat: .*last token"),
    ],
)
def test_settings_of_another_method_are_refused(
    tmp_path: Path, override: str, message: str
) -> None:
    path = runs.write_run_config(tmp_path)
    with pytest.raises(ConfigError, match=message):
        setup.prepare_run(
            config.load_run_config(path, [*runs.FROMAGE_OVERRIDES, override]), write_files=False
        )


def test_other_recipes_do_not_read_the_tower_by_a_prompt(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"image_pool is vision, and the head is mlp"):
        setup.prepare_run(
            config.load_run_config(
                runs.write_run_config(tmp_path), ["model.prompts.image_pool=vision"]
            ),
            write_files=False,
        )


def test_records_without_a_pair_are_refused(run: TrainingRun) -> None:
    chat = Record("c", messages=(Message("user", ("hi",)), Message("assistant", ("ho",))))
    for record in (
        chat,
        Record("i", parts=("one", tiny.random_image(0))),
        Record("p", image=tiny.random_image(0)),
    ):
        with pytest.raises(DataError, match="no image with a caption"):
            layout(Sample(record, 0, 0), run.model.renderer, FromageOptions())


def test_ret_starts_as_the_mean_of_the_table(model: DuetModel) -> None:
    assert model.soft_prompts is not None
    mean = model.backbone.token_embedding.weight.mean(0)
    assert_close(
        F.cosine_similarity(model.soft_prompts.rows[0], mean, dim=0),
        torch.tensor(1.0).double(),
        atol=1e-6,
        rtol=0,
    )
    fromage.rescale_ret_token(model)
