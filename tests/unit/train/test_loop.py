"""The loop on a tiny model: it learns, drops bad records by name, stops on NaN, and plans without training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import runs
from vlduet import config
from vlduet.data.formats import read_records
from vlduet.errors import ConfigError, DataError, TrainingError
from vlduet.logs import read_metrics
from vlduet.model.duet import DuetModel
from vlduet.recipes import vladva
from vlduet.recipes.recipe import BoundRecipe
from vlduet.train import plan as planning
from vlduet.train import setup
from vlduet.train.loop import train
from vlduet.train.plan import plan_run
from vlduet.train.step import forward_backward, learning_rate_factor, optimizer_step
from vlduet.workflows.validation import make_validator


def test_it_learns_validates_and_saves(tmp_path: Path) -> None:
    settings = config.load_run_config(runs.write_run_config(tmp_path, steps=60, eval_every=30))
    assert settings.data.validation
    folder = train(settings, evaluate=make_validator(settings.data.validation, seed=0))
    rows = read_metrics(settings.out / "metrics.jsonl")
    first, *_, last = [row["loss"] for row in rows if "loss" in row]
    assert last < first - 1
    measured = [row for row in rows if "validation/caption_cross_entropy" in row]
    assert [row["step"] for row in measured] == [0, 30, 60]
    assert measured[-1]["validation/text_to_image/hit@5"] > 0
    assert (
        measured[-1]["validation/caption_cross_entropy"]
        < measured[0]["validation/caption_cross_entropy"]
    )
    assert all(0.0 <= row["validation/captions_ended"] <= 1.0 for row in measured)
    model = DuetModel.from_pretrained(folder)
    assert model.peft_model is not None and model.prompts.image == "<s>{image}"
    assert (settings.out / "config.yaml").is_file() and list(
        (settings.out / "tensorboard").iterdir()
    )


@pytest.mark.parametrize(
    "how",
    [{}, {"chunk_tokens": 64}, {"checkpointing": True}, {"fused": False}, {"soft_prompts": True}],
    ids=str,
)
def test_everything_that_is_trained_moves_and_nothing_else(
    tmp_path: Path, how: dict[str, object]
) -> None:
    settings = config.load_run_config(runs.write_run_config(tmp_path, steps=3, **how))
    run = setup.prepare_run(settings, write_files=False)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in run.model.named_buffers()}
    run.model.train()
    laid_out = setup.iterate_batches(run, 0)
    for step in range(3):
        forward_backward(run, next(laid_out)[1])
        if step == 1:  # B starts at zero, so A's gradient is zero in the first step only
            for name, p in run.model.adapter_tensors().items():
                assert p.grad is not None and bool(p.grad.abs().max() > 0), name
        optimizer_step(run, step)
    for name, p in run.model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    for name, buffer in run.model.named_buffers():  # batch norm statistics of the frozen tower
        assert torch.equal(buffer, buffers[name]), name


def test_a_fixed_temperature_stays(tmp_path: Path) -> None:
    run = setup.prepare_run(
        config.load_run_config(runs.write_run_config(tmp_path, steps=2, temperature=0.05)),
        write_files=False,
    )
    for step, (_, chunks) in enumerate(setup.iterate_batches(run, 0)):
        assert forward_backward(run, chunks)["temperature"] == pytest.approx(0.05)
        optimizer_step(run, step)
    assert all(p is not run.model.logit_scale for p in run.trainable_parameters())


def test_learned_prompts_go_on_from_a_model_that_brings_them(tmp_path: Path) -> None:
    path = runs.write_run_config(tmp_path, steps=1, soft_prompts=True)
    folder = train(config.load_run_config(path))
    further = [f"model.path={folder}", f"out={tmp_path / 'further'}"]
    with pytest.raises(ConfigError, match="the model brings learned prompts"):
        setup.prepare_run(config.load_run_config(path, further), write_files=False)
    run = setup.prepare_run(
        config.load_run_config(path, [*further, "model.prompts={}"]), write_files=False
    )
    saved = DuetModel.from_pretrained(folder)
    assert (
        run.model.prompts == saved.prompts
        and run.model.soft_prompts is not None
        and saved.soft_prompts is not None
    )
    assert run.model.soft_prompts.rows.requires_grad and torch.equal(
        run.model.soft_prompts.rows, saved.soft_prompts.rows
    )


def test_a_bad_record_is_named_and_dropped(tmp_path: Path) -> None:
    path = runs.write_run_config(tmp_path, steps=6)
    (tmp_path / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"id": "bad", "image": "0.png", "shrt": "x"}\n')
    settings = config.load_run_config(path)
    train(settings)
    dropped = [
        json.loads(line) for line in (settings.out / "quarantine.jsonl").read_text().splitlines()
    ]
    assert [row["id"] for row in dropped] == [None, "3"]
    assert (
        ":13" in dropped[0]["place"]
        and "shrt" in dropped[0]["message"]
        and "3.png" in dropped[1]["message"]
    )


def test_nan_stops_with_the_batch_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config.load_run_config(runs.write_run_config(tmp_path))
    real = setup.load_recipe

    def poisoned(config: object) -> BoundRecipe:
        recipe = real(config)  # type: ignore[arg-type]
        calls = iter(range(100))

        def objective(readout, scale):  # type: ignore[no-untyped-def]
            losses = recipe.objective(readout, scale)
            return {k: v * float("nan") if next(calls) >= 8 else v for k, v in losses.items()}

        return replace(recipe, objective=objective)

    monkeypatch.setattr(setup, "load_recipe", poisoned)
    with pytest.raises(TrainingError, match=r"step 4: .*not a number"):
        train(settings)
    saved = settings.out / "not-finite-4-rank0" / "records.jsonl"
    assert len(list(read_records(saved))) == 4
    monkeypatch.setattr(setup, "load_recipe", real)
    train(settings, resume=True)  # the model had not moved on the bad step
    steps = [row["step"] for row in read_metrics(settings.out / "metrics.jsonl")]
    assert steps == list(range(12))


def test_a_source_without_anything_to_learn_is_named_before_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = runs.write_run_config(tmp_path)
    typo = (
        tmp_path / "typo.jsonl"
    )  # a table of somebody else's, whose caption has a name that nobody knows
    typo.write_text(
        "".join(
            json.dumps({"id": str(i), "image": f"{i}.png", "captoin": "x"}) + "\n" for i in range(3)
        )
    )
    gone = tmp_path / "gone.jsonl"
    gone.write_text('{"id": "0", "image": "gone/0.png", "short": "x"}\n')
    for file, message in (
        (typo, r"none of its 3 .* an image without a caption"),
        (gone, r"none of its 1 .* no such im"),
    ):
        settings = config.load_run_config(path, [f"data.train=[{{path: {file}}}]"])
        with pytest.raises(DataError, match=message) as told:
            plan_run(settings)
        assert str(told.value).startswith(str(file))
        with pytest.raises(DataError, match=message):
            train(settings)
        # Beside another it is said: a control run may have no use for what the other run learns of.
        setup.prepare_run(
            config.load_run_config(path, [f"data.train.1.path={file}"]), write_files=False
        )
        assert f"warning: {file}: none of its" in caplog.text
    short = config.load_run_config(
        path, ["objectives={language: 1}", "recipe.split=length", "recipe.short_below=1000"]
    )
    with pytest.raises(DataError, match="has anything for language of vladva"):
        setup.prepare_run(short, write_files=False)


def test_a_step_without_anything_for_the_language_loss_passes(tmp_path: Path) -> None:
    """Alone, and not in chunks: a control run on data that another run learns of."""
    rows = [
        {"id": f"q{i}", "query": [{"text": f"q {i}"}], "positive": [[{"text": f"a {i}"}]]}
        for i in range(8)
    ]
    rows.append(
        {
            "id": "c",
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
        }
    )
    path = runs.write_run_config(tmp_path, batch_size=2, steps=5, lora={"rank": 2, "alpha": 2})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config.load_run_config(path, ["objectives={language: 1}", "data.validation=null"])
    train(settings)
    losses = [row["loss"] for row in read_metrics(settings.out / "metrics.jsonl")]
    assert losses.count(0.0) >= 3 and max(losses) > 0


def test_a_large_source_is_looked_at_here_and_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "MAX_PROBED_RECORDS", 3)
    path = runs.write_run_config(tmp_path)
    (tmp_path / "asked.jsonl").write_text(
        "".join(
            f'{{"id": "{i}", "query": [{{"text": "q"}}], "positive": [[{{"text": "a"}}]]}}\n'
            for i in range(40)
        )
    )
    real, seen = vladva.layout_retrieval_record, []
    monkeypatch.setattr(
        vladva,
        "retrieval",
        lambda sample, *rest, **more: seen.append(1) or real(sample, *rest, **more),
    )
    setup.prepare_run(
        config.load_run_config(
            path, ["objectives={language: 1}", f"data.train.1.path={tmp_path / 'asked.jsonl'}"]
        )
    )
    assert len(seen) == 3


def test_features_need_not_fill_the_disk(tmp_path: Path) -> None:
    settings = config.load_run_config(runs.write_run_config(tmp_path, steps=2))
    assert plan_run(settings)["vision features on disk, at most (GB)"] == 0.0  # a few kilobytes
    settings = config.load_run_config(tmp_path / "config.yaml", ["data.cache=false"])
    train(settings)
    assert not (settings.out / "features").exists()


def test_validation_leaves_out_an_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    settings = config.load_run_config(runs.write_run_config(tmp_path))
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    assert settings.data.validation
    model = setup.prepare_run(settings, write_files=False).model
    assert 0 <= make_validator(settings.data.validation, seed=0)(model)["text_to_image/hit@5"] <= 1


@pytest.mark.parametrize("broken", ["state.json", "trained.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_broken_state_is_named(tmp_path: Path, broken: str, how: str) -> None:
    settings = config.load_run_config(runs.write_run_config(tmp_path, steps=2))
    train(settings)
    file = settings.out / "state" / broken
    kept = file.read_bytes()[: file.stat().st_size // 2]
    file.unlink()
    if how == "cut":
        file.write_bytes(kept)
    with pytest.raises(
        TrainingError, match=f"{settings.out}/state: (broken state|nothing to resume)"
    ):
        train(settings, resume=True)


def test_a_plan_of_a_large_batch_lays_out_a_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = setup._sequences, []
    monkeypatch.setattr(
        setup, "_sequences", lambda run, samples: seen.extend(samples) or real(run, samples)
    )
    monkeypatch.setattr(planning, "MAX_PROBED_BATCH_SIZE", 24)
    part = plan_run(config.load_run_config(runs.write_run_config(tmp_path, batch_size=24)))
    whole = plan_run(config.load_run_config(tmp_path / "config.yaml", ["train.batch_size=240"]))
    assert len(seen) == 48
    for name in ("tokens a batch", "supervised tokens a batch", "embeddings a batch"):
        assert whole[name] == pytest.approx(10 * part[name], abs=10)
    assert whole["epochs"] == 10 * part["epochs"] and whole["padding"] == part["padding"]
    seen.clear()
    plan_run(
        config.load_run_config(tmp_path / "config.yaml", ["train.batch_size=4", "train.steps=2"])
    )
    assert len(seen) == 8


def test_the_plan_trains_nothing(tmp_path: Path) -> None:
    settings = config.load_run_config(runs.write_run_config(tmp_path))
    facts = plan_run(settings)
    assert (
        facts["records: pair"] == 12
        and facts["trainable parameters"] > 0
        and facts["tokens a batch"] > 0
    )
    assert not settings.out.exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.name=vladav", "Did you mean 'vladva'"),
        ("recipe.language_onn=any", "Did you mean 'language_on'"),
        ("objectives.contrastve=1", "Did you mean 'contrastive'"),
        ("objectives={contrastive: 0}", "no loss has a weight"),
        ("model.prompts.imagee=x", "Did you mean 'image'"),
    ],
)
def test_unknown_names_are_answered_with_the_closest(
    tmp_path: Path, override: str, message: str
) -> None:
    settings = config.load_run_config(runs.write_run_config(tmp_path), [override])
    with pytest.raises(ConfigError, match=message):
        setup.prepare_run(settings, write_files=False)


def test_learning_rate() -> None:
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == 1.0 and factors[-1] < 0.001
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(
        factors[10:], reverse=True
    )
