"""Sugar through the training loop: from configs and documents on disk to models that open."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import runs, tiny
from vlduet import config
from vlduet.data.formats import read_records
from vlduet.encoders import loading
from vlduet.errors import ConfigError
from vlduet.logs import read_metrics
from vlduet.model.duet import DuetModel
from vlduet.train.loop import train
from vlduet.train.plan import plan_run
from vlduet.train.setup import prepare_run

PRESETS = sorted(config.PRESETS_FOLDER.glob("**/sugar*.yaml"))
GUIDED_VLADVA = ["recipe={name: vladva, guide: triple}", "objectives={contrastive: 1}"]


@pytest.mark.parametrize("family", ["fast_vlm", "llava", "qwen2_vl"])
def test_both_losses_fall(family: str, encoders: dict[str, str], tmp_path: Path) -> None:
    overrides = ["train.steps=40", "train.projector=true", "train.lora.targets=all"]
    run_config = runs.make_sugar_config(tmp_path, encoders, *overrides, family=family)
    folder = train(run_config)
    rows = [row for row in read_metrics(run_config.out / "metrics.jsonl") if "structure" in row]
    structure = [row["structure"] for row in rows]
    language = [row["language"] for row in rows]
    assert np.mean(structure[-3:]) < 0.5 * np.mean(structure[:3])
    assert np.mean(language[-3:]) < np.mean(language[:3])
    model = DuetModel.from_pretrained(folder)
    records = read_records(run_config.data.train[0].path)
    documents = [record.parts for record in records if record.kind == "interleaved"]
    assert model.encode(documents).shape == (2, 8)


def test_alpha_zero_needs_no_encoder(tmp_path: Path) -> None:
    run_config = runs.make_sugar_config(tmp_path, {}, "objectives.structure=0")
    train(run_config)
    rows = read_metrics(run_config.out / "metrics.jsonl")
    assert len(rows) == 4
    assert all("structure" not in row and row["language"] > 0 for row in rows)
    features = (run_config.out / "features").rglob("*.npy")
    assert all(np.load(path).ndim == 2 for path in features), "only the vision tower has run"


def test_frozen_encoders_guide_the_contrastive_loss(
    encoders: dict[str, str], tmp_path: Path
) -> None:
    without_encoders = runs.make_sugar_config(tmp_path, {}, *GUIDED_VLADVA)
    message = r"vladva compares slices with a frozen vision encoder, and none is given"
    with pytest.raises(ConfigError, match=message):
        prepare_run(without_encoders, write_files=False)
    run_config = runs.make_sugar_config(tmp_path, encoders, *GUIDED_VLADVA)
    rows = [{"id": str(i), "image": f"{i}.png", "short": f"number {i}"} for i in range(4)]
    runs.write_rows(run_config.data.train[0].path, rows)
    train(run_config)
    losses = [row["contrastive"] for row in read_metrics(run_config.out / "metrics.jsonl")]
    assert len(losses) == 4 and min(losses) > 0


def test_a_missing_encoder_is_named(encoders: dict[str, str], tmp_path: Path) -> None:
    without_cross = runs.make_sugar_config(tmp_path, {**encoders, "cross": None})
    with pytest.raises(ConfigError, match=r"encoders.cross: .*none is given. Name its folder"):
        prepare_run(without_cross, write_files=False)
    only_cross = {"cross": encoders["cross"]}
    run_config = runs.make_sugar_config(tmp_path, only_cross, "recipe.triple=false")
    assert list(prepare_run(run_config, write_files=False).encoders.by_role) == ["cross"]


def test_a_slice_without_finite_features_costs_its_record_only(
    encoders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_text_encoder = loading.load_text_encoder

    def load_broken_encoder(folder: Path, **options: Any) -> Callable[[list[str]], torch.Tensor]:
        encode = load_text_encoder(folder, **options)

        def encode_with_nan(texts: list[str]) -> torch.Tensor:
            is_rain = torch.tensor([text == "Rain." for text in texts])
            return encode(texts).masked_fill(is_rain[:, None], torch.nan)

        return encode_with_nan

    monkeypatch.setattr(loading, "load_text_encoder", load_broken_encoder)
    run_config = runs.make_sugar_config(tmp_path, encoders)
    train(run_config)
    lines = (run_config.out / "quarantine.jsonl").read_text().splitlines()
    quarantined = [json.loads(line) for line in lines]
    assert {row["id"] for row in quarantined} == {"two"}
    assert "NaN for 'Rain.'" in quarantined[0]["message"]


@pytest.mark.parametrize(
    "path", PRESETS, ids=lambda path: str(path.relative_to(config.PRESETS_FOLDER))
)
def test_presets_can_be_planned(path: Path, tmp_path: Path, encoders: dict[str, str]) -> None:
    """With their folders replaced by tiny ones."""
    tiny.build_llava(tmp_path / "base")
    documents = runs.write_documents(tmp_path)
    preset = config.load_run_config(path, [])
    overrides = [
        f"model.path={tmp_path / 'base'}",
        f"model.prompts.image_pool={preset.recipe.get('pool', 'mean')}",
        f"out={tmp_path / 'run'}",
        "data.validation=null",
        "data.cache=null",
        "data.max_dropped=0.25",  # one of the four records is a chat, without structure
    ]
    overrides += [f"data.train.{i}.path={documents}" for i in range(len(preset.data.train))]
    roles = [role for role, folder in preset.encoders if folder is not None]
    overrides += [f"encoders.{role}={encoders[role]}" for role in roles]
    facts = plan_run(config.load_run_config(path, overrides))
    assert facts["records dropped"] == (path.name == "sugar-structure-only.yaml")
    has_labels = path.name != "sugar-structure-only.yaml"
    has_embeddings = path.name != "sugar-alpha-0.yaml"
    assert (facts["supervised tokens a batch"] > 0) == has_labels
    assert (facts["embeddings a batch"] > 0) == has_embeddings


def test_there_are_presets_of_sugar() -> None:
    names = {path.stem for path in PRESETS}
    assert {"sugar", "sugar-structure-only", "sugar-alpha-0"} <= names
