"""Whole workflows on families other than the default model's.

Captioning, mining, every recipe in one comparison, export, analysis.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from helpers import runs, tiny
from vlduet import config
from vlduet.data.formats import read_records
from vlduet.data.quarantine import Quarantine
from vlduet.inspect import internals
from vlduet.model.duet import DuetModel
from vlduet.workflows.captioning import build_caption_specs, write_missing_captions
from vlduet.workflows.compare import run_comparison
from vlduet.workflows.mining import mine_hard_negatives

CHUNKED = "train.chunk_tokens=120"


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
def test_family_supports_every_workflow(family: str, tmp_path: Path) -> None:
    base = runs.write_run_config(
        tmp_path, family=family, count=6, steps=1, batch_size=4, eval_every=1
    )
    model = DuetModel.from_pretrained(tmp_path / "base")
    check_captioning(model, tmp_path, family)
    check_mining(model, tmp_path)
    recipes = check_comparison(base, tmp_path)
    check_export(recipes, tmp_path)
    check_analysis(tmp_path)


def check_captioning(model: DuetModel, folder: Path, family: str) -> None:
    """Caption three bare images, each with a short and a long caption."""
    photos = folder / "photos"
    photos.mkdir()
    for i, width in enumerate((16, 24, 40)):
        (photos / f"{i}.png").write_bytes(tiny.random_image(i, width=width).data or b"")
    report = write_missing_captions(
        model,
        photos,
        output=folder / "captioned.jsonl",
        specs=build_caption_specs(short=4, long=6),
        model_name=family,
    )
    assert (report.records, report.generated, report.dropped) == (3, 6, 0)


def check_mining(model: DuetModel, folder: Path) -> None:
    """Mine one hard negative for each of six training records."""
    output = folder / "mined.jsonl"
    report = mine_hard_negatives(
        model, folder / "train.jsonl", output=output, num_negatives=1, margin=0.0
    )
    assert report.records == 6
    assert {record.kind for record in read_records(output)} == {"pair"}


def check_comparison(base: Path, folder: Path) -> list[str]:
    """Train every recipe for a step on the mined records and return the names of the runs."""
    encoder_folders = tiny.build_frozen_encoders(folder / "encoders")
    encoders = [f"encoders.{role}={path}" for role, path in encoder_folders.items()]
    prompts = [f"model.prompts.{kind}=<s>{{{kind}}} sum" for kind in ("image", "text", "parts")]
    overrides: dict[str, list[str]] = {
        "vladva": ["train.soft_prompts=true", CHUNKED, *prompts],
        "joint-naive": ["train.fused=false"],
        "contrastive": ["objectives={contrastive: 1}", "train.pack=90"],
        "sft": ["objectives={language: 1}", "train.checkpointing=true"],
        "fromage": [*runs.FROMAGE_OVERRIDES, "train.projector=last", CHUNKED],
        "sugar": [
            "recipe={name: sugar}",
            "objectives={structure: 1, language: 1}",
            "model.prompts.image_pool=mean",
            *encoders,
        ],
    }
    comparison: dict[str, Any] = {
        "base": str(base),
        "out": str(folder / "compared"),
        "runs": overrides,
        "overrides": [f"data.train.1.path={folder / 'mined.jsonl'}"],
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(comparison, sort_keys=False))
    results = run_comparison(config.load_comparison_config(path))["runs"]
    assert list(results) == ["before training", *overrides]
    for name, run in results.items():
        for metric, values in run["values"].items():
            if "seconds" not in metric:
                assert np.isfinite(values).all(), f"{name}: {metric}"
    assert not list((folder / "compared").rglob("quarantine*.jsonl"))
    return list(overrides)


def check_export(recipes: list[str], folder: Path) -> None:
    """Compare the embeddings of each trained model with those of its merged export."""
    items = ["a text", tiny.random_image(7, width=40), (tiny.random_image(8), "both")]
    for name in recipes:
        trained = DuetModel.from_pretrained(folder / "compared" / name / "seed-0" / "model")
        embeddings = trained.encode(items)
        trained.save_merged(folder / "merged" / name)
        merged = DuetModel.from_pretrained(folder / "merged" / name)
        np.testing.assert_allclose(merged.encode(items), embeddings, atol=2e-5)


def check_analysis(folder: Path) -> None:
    """Analyse two exported models on four training records."""
    items = internals.collect_items(folder / "train.jsonl", limit=4, dropped=Quarantine(None))
    for name in ("vladva", "fromage"):
        model = DuetModel.from_pretrained(folder / "merged" / name)
        analysis = internals.analyse_model(model, items, name=name, num_attention_maps=1)
        assert analysis.images is not None
        assert len(analysis.images.entropy) == 4
        assert len(analysis.attention_maps) == 1
        np.testing.assert_allclose(
            analysis.images.embeddings, model.encode(items.images), atol=1e-5
        )
