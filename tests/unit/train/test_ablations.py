"""Presets of VladVA's ablations: what each changes, what it trains, and what its losses are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import runs, tiny
from helpers.infonce_reference import compute_reference_loss
from helpers.precision import compute_in_double
from vlduet import config
from vlduet.config import RunConfig
from vlduet.data.records import ImageRef, Part, Record
from vlduet.model.duet import DuetModel
from vlduet.recipes.registry import RECIPES
from vlduet.train.loader import iterate_batches
from vlduet.train.plan import plan_run
from vlduet.train.run import TrainingRun
from vlduet.train.setup import prepare_run
from vlduet.train.step import forward_backward, optimizer_step

SUBSET = {"data.train", "train.epochs", "train.steps"}
"""Settings of all rows on a million records."""
CONTRASTIVE_ONLY = SUBSET | {"objectives.language", "data.max_dropped"}
CHANGED_SETTINGS = {
    "ablations/vladva-both": SUBSET,
    "ablations/vladva-without-language": CONTRASTIVE_ONLY,
    "ablations/vladva-soft-prompts-only": CONTRASTIVE_ONLY | {"train.lora"},
    "ablations/vladva-lora-only": CONTRASTIVE_ONLY | {"train.soft_prompts"},
    "ablations/vladva-contrastive-on-long": SUBSET | {"recipe.contrastive_on", "data.max_dropped"},
    "ablations/vladva-language-on-short": SUBSET | {"recipe.language_on", "data.max_dropped"},
    "vladva-qwen2-vl-2b": {"model.path", "model.max_image_tokens"},
    "vladva-llava-13b": {"model.path", "train.chunk_tokens"},
}
"""Preset -> the settings in which it differs from the preset vladva, besides its folder."""
LOSSES = {
    name: {"contrastive"} if "objectives.language" in changed else {"contrastive", "language"}
    for name, changed in CHANGED_SETTINGS.items()
}
LONG = "a text of more than thirty tokens, which says what is in picture number {}"


def list_differences(tree: Any, other: Any, prefix: str = "") -> set[str]:
    """Return the dotted names of all settings in which two configs differ."""
    if not (isinstance(tree, dict) and isinstance(other, dict)):
        return set() if tree == other else {prefix}
    names = set()
    for key in tree.keys() | other.keys():
        name = f"{prefix}.{key}" if prefix else key
        names |= list_differences(tree.get(key), other.get(key), name)
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tiny checkpoints and with images with captions of both lengths."""
    folder = tmp_path_factory.mktemp("ablations")
    for family in ("llava", "qwen2_vl"):
        tiny.FAMILY_BUILDERS[family](folder / family)
    rows = []
    for i in range(6):
        runs.write_image(folder / f"{i}.png", i)
        rows.append({"image": f"{i}.png", "short": f"picture {i}", "long": LONG.format(i)})
    rows.append({"image": "0.png", "short": "a short caption alone"})
    rows.append({"image": "1.png", "long": LONG.format("alone")})
    runs.write_rows(folder / "train.jsonl", rows)
    return folder


def load_tiny_preset(name: str, folder: Path) -> RunConfig:
    """Return a preset on the tiny checkpoint and the eight records of a folder."""
    family = "qwen2_vl" if "qwen" in name else "llava"
    overrides = [f"model.path={folder / family}", f"data.train.0.path={folder / 'train.jsonl'}"]
    overrides += ["train.epochs=1", "train.batch_size=8", "data.cache=false", "out=nowhere"]
    return config.load_run_config(name, overrides)


def prepare_double_run(run_config: RunConfig) -> TrainingRun:
    """Prepare a run in float64, with an adapter that changes what the model computes."""
    run = prepare_run(run_config, write_files=False)
    assert isinstance(run.model, DuetModel)
    run.model.double().eval()
    compute_in_double(run.model.backbone)
    generator = torch.Generator().manual_seed(0)
    for tensor in run.model.adapter_tensors().values():
        with torch.no_grad():
            tensor.normal_(0, 0.3, generator=generator)
    return run


def first_step_values(run: TrainingRun) -> dict[str, float]:
    """Return the values of the first step, whose gradients stay."""
    ((_, batches),) = iterate_batches(run, 0, 1)
    return forward_backward(run, batches)


def first_step_records(run: TrainingRun) -> list[Record]:
    """Return the records of the first step; the tiny data is small enough for each to be once."""
    records = [sample.record for sample in run.mixture.step_samples(0, 8)]
    assert len({record.id for record in records}) == len(run.mixture.sources[0]) == 8
    return records


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize("name", CHANGED_SETTINGS)
def test_a_preset_differs_from_vladva_in_the_settings_of_its_row_alone(name: str) -> None:
    preset = config.load_run_config(name)
    parent = config.load_run_config("vladva")
    differences = list_differences(preset.model_dump(mode="json"), parent.model_dump(mode="json"))
    assert differences == CHANGED_SETTINGS[name] | {"out", "preset"}
    assert preset.out == Path("runs") / name and preset.preset == name


def test_there_is_no_other_preset_of_vladva_ablations() -> None:
    names = {name for name in config.list_presets() if name.startswith("ablations/vladva")}
    assert names == {name for name in CHANGED_SETTINGS if name.startswith("ablations/")}


@pytest.mark.parametrize("name", [n for n in CHANGED_SETTINGS if n.startswith("ablations/")])
def test_rows_have_seven_epochs_of_a_million_records(name: str) -> None:
    preset = config.load_run_config(name)
    (source,) = preset.data.train
    assert source.max_records == 1_000_000
    assert preset.train.steps is None and preset.train.epochs == 7


# ------------------------------------------------------------------ one real step


@pytest.mark.parametrize("name", CHANGED_SETTINGS)
def test_a_preset_trains_its_parts_by_its_losses(name: str, folder: Path) -> None:
    run_config = load_tiny_preset(name, folder)
    assert plan_run(run_config)["steps"] == 1
    run = prepare_run(run_config, write_files=False)
    assert isinstance(run.model, DuetModel)
    before = {key: tensor.detach().clone() for key, tensor in run.model.named_parameters()}
    values = first_step_values(run)
    assert values.keys() - {"loss", "grad_norm", "temperature"} == LOSSES[name]
    assert values["loss"] == pytest.approx(sum(values[loss] for loss in LOSSES[name]))
    run.optimizer.param_groups[0]["initial_lr"] = 1.0
    optimizer_step(run, 0)
    moved = {key for key, tensor in run.model.named_parameters() if not tensor.equal(before[key])}
    has_lora = name != "ablations/vladva-soft-prompts-only"
    has_soft_prompts = name != "ablations/vladva-lora-only"
    assert any("lora_" in key for key in moved) == has_lora
    assert (run.model.peft_model is not None) == has_lora
    assert any(key.startswith("soft_prompts.") for key in moved) == has_soft_prompts
    assert (run.model.soft_prompts is not None) == has_soft_prompts
    others = {key for key in moved if "lora_" not in key and not key.startswith("soft_prompts.")}
    assert others == {"logit_scale"}


def embed_one_by_one(model: DuetModel, contents: list[Part]) -> Tensor:
    """Return the unit hidden states of the last tokens of contents, each alone: float64[N, D]."""
    states = []
    for content in contents:
        sequence = model.renderer.render_embedding((content,))
        with torch.no_grad():
            states.append(model.hidden_states(model.collate([sequence]))[0, -1])
    return F.normalize(torch.stack(states), dim=1)


def list_captioned(records: list[Record], length: str) -> list[tuple[ImageRef, str]]:
    """Return (image, caption) of the pairs with a caption of a length, `short` or `long`."""
    captioned = []
    for record in records:
        caption = record.long if length == "long" else " ".join(record.short)
        if caption and record.image is not None:
            captioned.append((record.image, caption))
    return captioned


@pytest.mark.parametrize(
    ("name", "length"),
    [("ablations/vladva-both", "short"), ("ablations/vladva-contrastive-on-long", "long")],
)
def test_the_contrastive_loss_is_that_of_captions_of_one_length(
    name: str, length: str, folder: Path
) -> None:
    run = prepare_double_run(load_tiny_preset(name, folder))
    values = first_step_values(run)
    model = run.model
    assert isinstance(model, DuetModel)
    captioned = list_captioned(first_step_records(run), length)
    images = embed_one_by_one(model, [image for image, _ in captioned])
    texts = embed_one_by_one(model, [caption for _, caption in captioned])
    # A picture is in the data twice, and both of its captions are positives of both.
    names = np.array([str(image.path) for image, _ in captioned])
    positive_mask = torch.from_numpy(names[:, None] == names)
    assert len(names) == 7 and positive_mask.sum() == 9
    expected = compute_reference_loss(images, texts, model.logit_scale.item(), positive_mask)
    assert values["contrastive"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "length"),
    [("ablations/vladva-both", "long"), ("ablations/vladva-language-on-short", "short")],
)
def test_the_language_loss_is_that_of_captions_of_one_length(
    name: str, length: str, folder: Path
) -> None:
    run = prepare_double_run(load_tiny_preset(name, folder))
    values = first_step_values(run)
    model = run.model
    assert isinstance(model, DuetModel)
    nats: list[Tensor] = []
    for image, caption in list_captioned(first_step_records(run), length):
        prompt = model.renderer.render_embedding((image,)).token_ids
        sequence = model.renderer.render_caption(image, caption)
        assert sequence.token_ids[: len(prompt)] == prompt
        num_tokens = len(sequence) - len(prompt)
        with torch.no_grad():
            states = model.hidden_states(model.collate([sequence]))[0]
            log_probabilities = F.log_softmax(states @ model.lm_head_weight.T, dim=1)
        # The state at one token predicts the next.
        answer = torch.tensor(sequence.token_ids[-num_tokens:])
        nats += list(-log_probabilities[-num_tokens - 1 : -1].gather(1, answer[:, None])[:, 0])
    text = "".join(LONG) if length == "long" else "picture 0"
    assert len(nats) > 7 * (len(text) - 3)
    assert values["language"] == pytest.approx(float(torch.stack(nats).mean()), rel=1e-9)


def test_the_defaults_of_the_recipe_are_the_settings_of_the_paper() -> None:
    options = RECIPES["vladva"].options()
    preset = config.load_run_config("vladva").recipe
    for key in ("contrastive_on", "language_on"):
        assert getattr(options, key) == preset[key]
