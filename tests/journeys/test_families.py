"""From bare images to a searched model on families other than the default model's: captions, hard negatives, every recipe
side by side, export, analysis."""

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
def test_everything_that_the_default_model_does(family: str, tmp_path: Path) -> None:
    base = runs.write_run_config(
        tmp_path, family=family, count=6, steps=1, batch_size=4, eval_every=1
    )
    model = DuetModel.from_pretrained(tmp_path / "base")

    photos = tmp_path / "photos"
    photos.mkdir()
    for i, width in enumerate((16, 24, 40)):
        (photos / f"{i}.png").write_bytes(tiny.random_image(i, width=width).data or b"")
    told = write_missing_captions(
        model,
        photos,
        output=tmp_path / "captioned.jsonl",
        specs=build_caption_specs(short=4, long=6),
        model_name=family,
    )
    assert told.records == 3 and told.generated == 6 and told.dropped == 0

    mined = mine_hard_negatives(
        model,
        tmp_path / "train.jsonl",
        output=tmp_path / "mined.jsonl",
        num_negatives=1,
        margin=0.0,
    )
    assert mined.records == 6
    assert all(record.kind == "pair" for record in read_records(tmp_path / "mined.jsonl"))

    judges = [
        f"encoders.{role}={folder}"
        for role, folder in tiny.build_frozen_encoders(tmp_path / "judges").items()
    ]
    mean = "model.prompts.image_pool=mean"
    written = [f"model.prompts.{kind}=<s>{{{kind}}} sum" for kind in ("image", "text", "parts")]
    rows: dict[str, list[str]] = {
        "vladva": ["train.soft_prompts=true", CHUNKED, *written],
        "joint-naive": ["train.fused=false"],
        "contrastive": ["objectives={contrastive: 1}", "train.pack=90"],
        "sft": ["objectives={language: 1}", "train.checkpointing=true"],
        "fromage": [*runs.FROMAGE_OVERRIDES, "train.projector=last", CHUNKED],
        "sugar": ["recipe={name: sugar}", "objectives={structure: 1, language: 1}", mean, *judges],
    }
    tree: dict[str, Any] = {"base": str(base), "out": str(tmp_path / "compared"), "runs": rows}
    tree["overrides"] = [f"data.train.1.path={tmp_path / 'mined.jsonl'}"]
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    found = run_comparison(config.load_comparison_config(tmp_path / "compare.yaml"))
    assert list(found["runs"]) == ["before training", *rows]
    for name, run in found["runs"].items():
        assert all(
            np.isfinite(v)
            for m, values in run["values"].items()
            if "seconds" not in m
            for v in values
        ), name
    assert not list((tmp_path / "compared").rglob("quarantine*.jsonl"))

    items = ["a text", tiny.random_image(7, width=40), (tiny.random_image(8), "both")]
    for name in rows:
        trained = DuetModel.from_pretrained(tmp_path / "compared" / name / "seed-0" / "model")
        vectors = trained.encode(items)
        trained.save_merged(tmp_path / "merged" / name)
        np.testing.assert_allclose(
            DuetModel.from_pretrained(tmp_path / "merged" / name).encode(items), vectors, atol=2e-5
        )

    seen = internals.collect_items(tmp_path / "train.jsonl", limit=4, dropped=Quarantine(None))
    for name in ("vladva", "fromage"):
        trained = DuetModel.from_pretrained(tmp_path / "merged" / name)
        measured = internals.analyse_model(trained, seen, name=name, num_attention_maps=1)
        assert (
            measured.images is not None
            and len(measured.images.entropy) == 4
            and len(measured.attention_maps) == 1
        )
        np.testing.assert_allclose(
            measured.images.embeddings, trained.encode(seen.images), atol=1e-5
        )
