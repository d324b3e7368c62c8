"""FROMAGe: losses against the paper's formulas, and what is trained, frozen, saved and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from helpers import runs, tiny
from vlduet import config
from vlduet.config import RunConfig
from vlduet.data.batches import split_into_chunks
from vlduet.data.records import Message, Record
from vlduet.data.sequences import IGNORE_INDEX, Sequence
from vlduet.data.stream import Sample
from vlduet.errors import ConfigError, DataError
from vlduet.inspect.tokens import list_record_tokens
from vlduet.logs import read_metrics
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import Readout, create_empty_readout
from vlduet.recipes.fromage import RET_TOKEN, FromageOptions, layout, objective
from vlduet.train import setup
from vlduet.train.gradcache import compute_cached_losses
from vlduet.train.loader import iterate_batches
from vlduet.train.loop import train
from vlduet.train.run import TrainingRun
from vlduet.train.step import forward_backward, optimizer_step
from vlduet.workflows.validation import make_config_validator

EXACT = {"atol": 1e-11, "rtol": 1e-9}
LANGUAGE_WEIGHT = 0.7


def load_config(path: Path, *overrides: str) -> RunConfig:
    """Return the config of a FROMAGe run."""
    return config.load_run_config(path, [*runs.FROMAGE_OVERRIDES, *overrides])


@pytest.fixture
def run(family: str, tmp_path: Path) -> TrainingRun:
    """Return a FROMAGe run with both losses on a tiny model of every family."""
    path = runs.write_run_config(tmp_path, family=family)
    return setup.prepare_run(load_config(path, "train.projector=last"), write_files=False)


@pytest.fixture
def model(run: TrainingRun) -> DuetModel:
    """Return the model in float64. Its vision features are cached first, in float32."""
    assert isinstance(run.model, DuetModel)
    double_model = run.model.double()
    images = [double_model.prepare_image(tiny.random_image(i)) for i in range(6)]
    double_model.vision_features(images)
    return double_model


def make_records() -> list[Record]:
    """Return four pairs, of which p0 and p2 share their caption, and a retrieval record r."""
    return [
        Record("p0", image=tiny.random_image(0), short=("a flower",)),
        Record("p1", image=tiny.random_image(1), short=("a cat on the sea",)),
        Record("p2", image=tiny.random_image(2), short=("a flower",)),
        Record("p3", image=tiny.random_image(3), long="only long"),
        Record(
            "r",
            query=(tiny.random_image(4), "at night"),
            positive=(("a sea",),),
            negative=((tiny.random_image(5),),),
        ),
    ]


POSITIVE_RECORDS = [{"p0", "p2"}, {"p1"}, {"p0", "p2"}, {"p3"}, {"r"}]
"""Records of the positives of every query of `make_records`."""


def layout_records(model: DuetModel) -> list[Sequence]:
    sequences = []
    for position, record in enumerate(make_records()):
        sample = Sample(record, position, 0)
        sequences += layout(sample, model.renderer, FromageOptions())
    return sequences


def compute_losses(model: DuetModel, readout: Readout) -> dict[str, Tensor]:
    losses = objective(readout, model.logit_scale, FromageOptions())
    total = losses["contrastive"] + LANGUAGE_WEIGHT * losses["language"]
    return {"loss": total, **losses}


def pop_gradients(model: DuetModel) -> dict[str, Tensor]:
    """Return the gradients of the trained parameters by name, and clear them."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            gradients[name] = parameter.grad
    model.zero_grad(set_to_none=True)
    return gradients


# ------------------------------------------------------------------ losses


def compute_row_loss(scores: Tensor, is_positive: Tensor) -> Tensor:
    """Return the mean of -log p of every positive, each against itself and the negatives."""
    losses = []
    for score in scores[is_positive]:
        candidates = torch.cat([score[None], scores[~is_positive]])
        losses.append(candidates.logsumexp(0) - score)
    return torch.stack(losses).mean()


def compute_reference_losses(model: DuetModel, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
    """Return L_c and L_CE by the formulas of the paper, one sequence at a time."""
    assert model.head.vision is not None
    queries: list[Tensor] = []
    targets: list[Tensor] = []
    target_facts: list[tuple[str, str]] = []
    nll: list[Tensor] = []
    for sequence in sequences:
        batch = model.collate([sequence])
        inputs = model.language_model_inputs(batch)
        outputs = model.backbone.language_model(**inputs, position_ids=batch.position_ids)
        states = outputs.last_hidden_state[0]
        for position, label in enumerate(sequence.labels):
            if label != IGNORE_INDEX:
                logits = states[position - 1] @ model.lm_head_weight.T
                nll.append(-torch.log_softmax(logits, -1)[label])
        (anchor,) = sequence.anchors
        if sequence.token_ids[anchor.start] == model.renderer.image_token_id:
            image_at = {first + image.feature_span[0]: image for first, image in sequence.images}
            features = model.vision_features([image_at[anchor.start]])
            pooled = features[:, : model.backbone.vision_width].double().mean(0)
            vector = model.head.vision(pooled)
        else:
            vector = model.head.layers(states[anchor.end - 1])
        vector = vector / vector.norm()
        if anchor.role in ("image", "query"):
            queries.append(vector)
        else:
            targets.append(vector)
            target_facts.append((anchor.record_name.split(":")[1], anchor.role))
    scores = torch.stack(queries) @ torch.stack(targets).T * model.logit_scale.exp()
    is_positive = torch.zeros(scores.shape, dtype=torch.bool)
    for i, records in enumerate(POSITIVE_RECORDS):
        for j, (record, role) in enumerate(target_facts):
            is_positive[i, j] = record in records and role != "negative"
    row_losses = [compute_row_loss(scores[i], is_positive[i]) for i in range(len(queries))]
    column_losses = []
    for j in range(len(targets)):
        if is_positive[:, j].any():
            column_losses.append(compute_row_loss(scores[:, j], is_positive[:, j]))
    contrastive = torch.stack(row_losses).mean() + torch.stack(column_losses).mean()
    return 0.5 * contrastive, torch.stack(nll).mean()


def assert_gradients_equal(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        # Gemma's norm of image features computes in float32, whatever the model's dtype is.
        tolerance = {"atol": 1e-6, "rtol": 1e-5} if "mm_soft_emb_norm" in name else EXACT
        message = f"gradient of {name}"
        assert_close(gradient, expected[name], **tolerance, msg=lambda m, at=message: f"{at}: {m}")


def test_losses_and_gradients_equal_the_formulas_also_in_chunks_and_packed(
    model: DuetModel,
) -> None:
    sequences = layout_records(model)
    contrastive, language = compute_reference_losses(model, sequences)
    (contrastive + LANGUAGE_WEIGHT * language).backward()
    expected = pop_gradients(model)
    assert {"logit_scale", "soft_prompts.rows", "head.vision.weight"} <= expected.keys()
    losses = compute_losses(model, model(model.collate(sequences)))
    assert_close(losses["contrastive"], contrastive, **EXACT)
    assert_close(losses["language"], language, **EXACT)
    losses["loss"].backward()
    assert_gradients_equal(pop_gradients(model), expected)
    for pack_to in (None, 60):
        chunks = []
        for part in split_into_chunks(sequences, 60, pack_to=pack_to):
            chunks.append(model.collate(part, pack_to=pack_to))
        cached_losses = compute_cached_losses(
            model,
            chunks,
            compute_losses=lambda readout: compute_losses(model, readout),
            empty=create_empty_readout(model.dim, like=model.logit_scale.detach()),
        )
        assert_close(cached_losses["loss"], losses["loss"].detach(), **EXACT)
        assert_gradients_equal(pop_gradients(model), expected)


# ------------------------------------------------------------------ forward pass


def test_an_image_that_is_only_embedded_does_not_enter_the_language_model(
    model: DuetModel,
) -> None:
    batch_sizes: list[int] = []
    language_model: Any = model.backbone.language_model
    language_model.register_forward_pre_hook(
        lambda _, __, inputs: batch_sizes.append(len(inputs["inputs_embeds"])), with_kwargs=True
    )
    items = [tiny.random_image(0), "a flower", (tiny.random_image(1), "and more")]
    image_embedding = model.encode(items[:1])
    assert not batch_sizes
    together = model.encode(items)
    assert batch_sizes in ([1], [2]), "text and mixture share a row that is long enough"
    alone = [image_embedding, *(model.encode([item]) for item in items[1:])]
    assert_close(np.concatenate(alone), together, atol=1e-6, rtol=0)
    assert batch_sizes[1:] == [1, 1]


def test_left_padding_equals_right_padding(model: DuetModel) -> None:
    items = [tiny.random_image(0), "a flower"]
    sequences = [model.renderer.render_embedding((item,)) for item in items]
    left = model(model.collate(sequences, padding_side="left")).embeddings
    assert_close(left.detach().float().numpy(), model.encode(items), atol=1e-6, rtol=0)


def test_without_language_loss_no_image_enters_the_language_model(tmp_path: Path) -> None:
    path = runs.write_run_config(tmp_path, steps=1, batch_size=6)
    run_config = load_config(path, "objectives={contrastive: 1}")
    run = setup.prepare_run(run_config, write_files=False)
    assert isinstance(run.model, DuetModel)
    (_, chunks), *_ = iterate_batches(run, 0)
    assert sum(len(chunk.images) for chunk in chunks) == 6
    for chunk in chunks:
        mask = run.model.vision_anchor_mask(chunk)
        if mask is not None:
            assert not chunk.drop_anchors(mask).images
    assert forward_backward(run, chunks).keys() >= {"contrastive", "grad_norm"}


# ------------------------------------------------------------------ training


def test_steps_change_only_the_maps_ret_and_the_temperature(run: TrainingRun) -> None:
    model = run.model
    assert isinstance(model, DuetModel)
    assert model.soft_prompts is not None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step, (_, chunks) in zip(range(2), iterate_batches(run, 0), strict=False):
        forward_backward(run, chunks)
        optimizer_step(run, step)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    in_projector = set()
    for name in changed:
        if any(module in name for module in ("projector", "merger", "connector")):
            in_projector.add(name)
    last_linear = "multi_modal_projector"  # Gemma's is one matrix and a norm
    for name, module in model.backbone.projector.named_modules():
        if isinstance(module, torch.nn.Linear):
            last_linear = name
    assert in_projector
    assert all(f".{last_linear}." in f".{name}" for name in in_projector)
    assert changed - in_projector == {
        "head.layers.weight",
        "head.layers.bias",
        "head.vision.weight",
        "head.vision.bias",
        "soft_prompts.rows",
        "logit_scale",
    }
    mean_norm = model.backbone.token_embedding.weight.norm(dim=1).mean()
    assert_close(model.soft_prompts.rows.norm(dim=1), mean_norm[None], atol=1e-6, rtol=1e-5)


def test_ret_starts_as_the_mean_of_the_embedding_table(model: DuetModel) -> None:
    assert model.soft_prompts is not None
    mean = model.backbone.token_embedding.weight.mean(0)
    cosine = F.cosine_similarity(model.soft_prompts.rows[0], mean, dim=0)
    assert float(cosine.detach()) == pytest.approx(1.0, abs=1e-6)


def test_training_lowers_both_losses_and_its_model_can_be_opened_and_trained_further(
    tmp_path: Path,
) -> None:
    path = runs.write_run_config(tmp_path, steps=24)
    run_config = load_config(path, "train.projector=last", "train.eval_every=24")
    folder = train(run_config, evaluate=make_config_validator(run_config, seed=0))
    rows = read_metrics(run_config.out / "metrics.jsonl")
    for name in ("contrastive", "language"):
        # By little: a linear map can do little with a random language model.
        losses = [row[name] for row in rows if name in row]
        assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert "validation/caption_cross_entropy" in rows[-1]
    assert rows[-1]["validation/image_to_text/hit@5"] > 0
    model = DuetModel.from_pretrained(folder)
    assert model.prompts.text.endswith(RET_TOKEN)
    assert model.peft_model is None
    assert "head.vision.weight" in model.own_tensors()
    items = ["number 1", tiny.random_image(1), (tiny.random_image(2), "what?")]
    vectors = model.encode(items)
    assert RET_TOKEN in [row.text for row in list_record_tokens(make_records()[0], folder)]
    further = setup.prepare_run(
        load_config(path, f"model.path={folder}", "model.prompts={}"), write_files=False
    )
    assert isinstance(further.model, DuetModel)
    assert np.array_equal(further.model.encode(items), vectors)
    model.save_merged(tmp_path / "merged")
    merged = DuetModel.from_pretrained(tmp_path / "merged")
    assert_close(merged.encode(items), vectors, atol=1e-6, rtol=0)


# ------------------------------------------------------------------ errors


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
    run_config = load_config(runs.write_run_config(tmp_path), override)
    with pytest.raises(ConfigError, match=message):
        setup.prepare_run(run_config, write_files=False)


def test_other_recipes_cannot_pool_in_the_vision_tower(tmp_path: Path) -> None:
    path = runs.write_run_config(tmp_path)
    run_config = config.load_run_config(path, ["model.prompts.image_pool=vision"])
    with pytest.raises(ConfigError, match=r"image_pool is vision, and the head is mlp"):
        setup.prepare_run(run_config, write_files=False)


def test_records_without_an_image_and_caption_are_refused(run: TrainingRun) -> None:
    messages = (Message("user", ("hi",)), Message("assistant", ("ho",)))
    records = [
        Record("chat", messages=messages),
        Record("interleaved", parts=("one", tiny.random_image(0))),
        Record("image", image=tiny.random_image(0)),
    ]
    for record in records:
        with pytest.raises(DataError, match="no image with a caption"):
            layout(Sample(record, 0, 0), run.model.renderer, FromageOptions())
