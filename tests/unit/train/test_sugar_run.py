"""Sugar and the dual encoder through the training loop: from configs and documents on disk to models that open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from helpers import tiny
from vlduet import config
from vlduet.cli.main import app
from vlduet.data.formats import read_records
from vlduet.encoders.dual import DualEncoder, open_dual_as_encoder, open_embedder
from vlduet.encoders.loading import open_encoder
from vlduet.errors import ConfigError, ModelError
from vlduet.logs import read_metrics
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache
from vlduet.train import setup
from vlduet.train.loop import train
from vlduet.train.plan import plan_run
from vlduet.workflows.validation import make_validator

CONFIGS = config.PRESETS_FOLDER


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        role: str(folder)
        for role, folder in tiny.build_frozen_encoders(tmp_path_factory.mktemp("encoders")).items()
    }


def documents(folder: Path) -> Path:
    """Two documents, a pair and a chat."""
    for i in range(4):
        (folder / f"{i}.png").write_bytes(tiny.random_image(i).data or b"")
    rows: list[dict[str, Any]] = [
        {
            "id": "one",
            "parts": [
                {"image": "0.png"},
                {"text": "A cat. It sleeps."},
                {"image": "1.png"},
                {"text": "A dog."},
            ],
        },
        {"id": "two", "parts": [{"text": "Rain."}, {"image": "2.png"}, {"text": "And sun."}]},
        {"id": "three", "image": "3.png", "short": "a flower"},
        {
            "id": "four",
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
        },
    ]
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(
    folder: Path, encoders: dict[str, str], *overrides: str, family: str = "fast_vlm"
) -> config.RunConfig:
    tiny.FAMILY_BUILDERS[family](folder / "base")
    tree = {
        "out": str(folder / "run"),
        "recipe": {"name": "sugar"},
        "objectives": {"structure": 1.0, "language": 1.0},
        "model": {
            "path": str(folder / "base"),
            "head": "mlp",
            "dim": 8,
            "prompts": tiny.PLAIN_PROMPTS.to_dict(),
        },
        "encoders": encoders,
        "data": {"train": [{"path": str(documents(folder))}]},
        "train": {
            "steps": 4,
            "batch_size": 4,
            "lr": 1e-2,
            "lora": {"rank": 2, "alpha": 2},
            "log_every": 1,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return config.load_run_config(path, overrides)


@pytest.mark.parametrize("family", ["fast_vlm", "llava", "qwen2_vl"])
def test_it_learns_the_structure(family: str, encoders: dict[str, str], tmp_path: Path) -> None:
    made = settings(
        tmp_path,
        encoders,
        "train.steps=40",
        "train.projector=true",
        "train.lora.targets=all",
        family=family,
    )
    folder = train(made)
    rows = [row for row in read_metrics(made.out / "metrics.jsonl") if "structure" in row]
    first, last = (
        [np.mean([row[name] for row in part]) for name in ("structure", "language")]
        for part in (rows[:3], rows[-3:])
    )
    assert last[0] < 0.5 * first[0] and last[1] < first[1]
    model = DuetModel.from_pretrained(folder)
    (cat, *_), (rain, *_) = (
        record.parts
        for record in read_records(made.data.train[0].path)
        if record.kind == "interleaved"
    )
    assert model.encode([cat, rain]).shape == (2, 8)


def test_alpha_zero_asks_no_encoder(tmp_path: Path) -> None:
    made = settings(tmp_path, {}, "objectives.structure=0")
    train(made)
    rows = read_metrics(made.out / "metrics.jsonl")
    assert len(rows) == 4 and all("structure" not in row and row["language"] > 0 for row in rows)
    assert not [p for p in (made.out / "features").rglob("*.npy") if np.load(p).ndim == 1]


def test_frozen_encoders_guide_the_contrastive_loss(
    encoders: dict[str, str], tmp_path: Path
) -> None:
    guided = ["recipe={name: vladva, guide: triple}", "objectives={contrastive: 1}"]
    made = settings(tmp_path, encoders, *guided)
    with pytest.raises(
        ConfigError, match=r"vladva compares slices with a frozen vision encoder, and none is given"
    ):
        setup.prepare_run(settings(tmp_path, {}, *guided), write_files=False)
    rows = [{"id": str(i), "image": f"{i}.png", "short": f"number {i}"} for i in range(4)]
    made.data.train[0].path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(made)
    assert [row["contrastive"] > 0 for row in read_metrics(made.out / "metrics.jsonl")] == [
        True
    ] * 4


def test_a_missing_encoder_is_named(encoders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"encoders.cross: .*none is given. Name its folder"):
        setup.prepare_run(settings(tmp_path, {**encoders, "cross": None}), write_files=False)  # type: ignore[dict-item]
    only = {"cross": encoders["cross"]}
    run = setup.prepare_run(settings(tmp_path, only, "recipe.triple=false"), write_files=False)
    assert list(run.encoders.by_role) == ["cross"]


def test_a_slice_that_an_encoder_cannot_see_costs_its_record_only(
    encoders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlduet.encoders import loading as module

    real = module.load_text_encoder

    def broken(folder: Path, **options: Any) -> Any:
        encode = real(folder, **options)
        return lambda texts: torch.stack(
            [
                v * (float("nan") if t == "Rain." else 1.0)
                for t, v in zip(texts, encode(texts), strict=True)
            ]
        )

    monkeypatch.setattr(module, "load_text_encoder", broken)
    made = settings(tmp_path, encoders)
    train(made)
    dropped = [
        json.loads(line) for line in (made.out / "quarantine.jsonl").read_text().splitlines()
    ]
    assert {row["id"] for row in dropped} == {"two"} and "NaN for 'Rain.'" in dropped[0]["message"]


# ---------------------------------------------------------------------- the shipped configs


def ready(name: str, folder: Path, encoders: dict[str, str]) -> config.RunConfig:
    """A shipped config with its folders put here."""
    tiny.build_llava(folder / "base")
    data, shipped = documents(folder), config.load_run_config(CONFIGS / name, [])
    overrides = [
        f"model.path={folder / 'base'}",
        f"model.prompts.image_pool={shipped.recipe.get('pool', 'mean')}",
        f"out={folder / 'run'}",
        "data.validation=null",
        "data.cache=null",
    ]
    overrides += [f"data.train.{i}.path={data}" for i in range(len(shipped.data.train))]
    overrides += [
        f"encoders.{role}={encoders[role]}" for role, given in shipped.encoders if given is not None
    ]
    return config.load_run_config(CONFIGS / name, overrides)


@pytest.mark.parametrize(
    "name", [str(path.relative_to(CONFIGS)) for path in sorted(CONFIGS.glob("**/sugar*.yaml"))]
)
def test_the_shipped_configs_plan(name: str, tmp_path: Path, encoders: dict[str, str]) -> None:
    facts = plan_run(ready(name, tmp_path, encoders))
    assert facts["records dropped"] == 0
    assert (facts["supervised tokens a batch"] > 0) == (
        name != "ablations/sugar-structure-only.yaml"
    )
    assert (facts["embeddings a batch"] > 0) == (name != "ablations/sugar-alpha-0.yaml")


# ---------------------------------------------------------------------- the dual encoder


@pytest.fixture
def dual(tmp_path: Path, encoders: dict[str, str]) -> Path:
    rows = []
    for i in range(8):
        (tmp_path / f"pair{i}.png").write_bytes(tiny.random_image(10 + i).data or b"")
        rows.append({"id": str(i), "image": f"pair{i}.png", "short": f"number {i}"})
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = yaml.safe_load((CONFIGS / "clip-nano.yaml").read_text())
    tree["data"] = {"train": [{"path": str(pairs)}], "validation": str(pairs)}
    tree |= {
        "out": str(tmp_path / "clip"),
        "encoders": {role: encoders[role] for role in ("vision", "text")},
    }
    tree["train"] |= {"steps": 200, "batch_size": 8, "eval_every": 200, "log_every": 20, "lr": 3e-3}
    made = config.validate_run_config(tree, place="test")
    assert plan_run(made)["trainable parameters"] > 0
    return train(made, evaluate=make_validator(pairs, seed=0))


def test_the_dual_encoder_learns_pairs(dual: Path) -> None:
    rows = read_metrics(dual.parent / "metrics.jsonl")
    losses = [row["contrastive"] for row in rows if "contrastive" in row]
    assert losses[-1] < losses[0] / 2
    measured = [row for row in rows if "validation/text_to_image/hit@1" in row]
    assert (
        measured[-1]["validation/text_to_image/hit@1"] > 0.9
        and "validation/caption_cross_entropy" not in measured[-1]
    )


def test_a_dual_encoder_opens_as_it_was_saved(dual: Path, tmp_path: Path) -> None:
    model = DualEncoder.from_pretrained(dual)
    vectors = model.encode([tiny.random_image(10), "number 0", "number 1"])
    assert vectors.shape == (3, 256) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    manifest = json.loads((dual / "dual.json").read_text())
    manifest["encoders"]["text"]["fingerprint"] = "other"
    (dual / "dual.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"the text encoder .* is another one now"):
        DualEncoder.from_pretrained(dual)
    (dual / "dual.json").write_text("{}")
    with pytest.raises(ModelError, match="no dual encoder"):
        DualEncoder.from_pretrained(dual)


def test_sugar_takes_a_dual_encoder_for_cross(
    dual: Path, encoders: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "sugar").mkdir()
    run = setup.prepare_run(
        settings(tmp_path / "sugar", {**encoders, "cross": str(dual)}), write_files=False
    )
    (_, [batch]), *_ = setup.iterate_batches(run, 3)
    cross = [one.features["cross"] for anchor in batch.anchors for one in anchor.slices]
    assert {len(vector) for vector in cross} == {256}
    again = DualEncoder.from_pretrained(dual).encode([batch.anchors[0].slices[0].part])
    assert np.allclose(again[0], cross[0].numpy(), atol=1e-6)
    assert (
        open_encoder(Path(encoders["vision"])).fingerprint
        != run.encoders.by_role["cross"].fingerprint
    )


def test_a_dual_encoder_reads_one_slice(dual: Path) -> None:
    from vlduet.errors import DataError

    with pytest.raises(DataError, match="one image or one text"):
        DualEncoder.from_pretrained(dual).encode([(tiny.random_image(1), "what?")])


def test_a_dual_encoder_searches_and_does_not_answer(dual: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in (10, 11):
        (photos / f"{i}.png").write_bytes(tiny.random_image(i).data or b"")
    words = ["index", str(dual), str(photos), "--to", str(tmp_path / "index")]
    assert CliRunner().invoke(app, words).exit_code == 0
    found = CliRunner().invoke(app, ["search", str(tmp_path / "index"), "number 1", "--json"])
    assert [hit["id"] for hit in json.loads(found.stdout)["hits"]] == ["11.png", "10.png"]
    with pytest.raises(ModelError, match=r"a dual encoder's is for what only embeds"):
        CliRunner().invoke(app, ["ask", str(tmp_path / "index"), "what?"], catch_exceptions=False)
    rows = [
        {"id": str(i), "image": f"photos/{i}.png", "short": f"number {i - 10}"} for i in (10, 11)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "mine",
        str(dual),
        str(tmp_path / "pairs.jsonl"),
        "--to",
        str(tmp_path / "mined.jsonl"),
        "-k",
        "1",
    ]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert [r.negative for r in read_records(tmp_path / "mined.jsonl")] == [
        (("number 1",),),
        (("number 0",),),
    ]
    aligned = CliRunner().invoke(
        app, ["align", *[f"{tmp_path / 'pairs.jsonl'}:{i}" for i in (0, 1)], "--model", str(dual)]
    )
    assert aligned.exit_code == 0
    model = open_embedder(dual)
    assert model.fingerprint == open_dual_as_encoder(dual, cache=FeatureCache(None)).fingerprint
