"""Validation metrics that no other test covers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import tiny
from vlduet import config
from vlduet.data import images
from vlduet.data.records import Record
from vlduet.errors import ConfigError, DataError
from vlduet.model.duet import DuetModel
from vlduet.workflows import validation

RECORDS = [Record(str(i), image=tiny.random_image(i), short=(f"thing {i}",)) for i in range(5)]


def bias_end_of_text(model: DuetModel, monkeypatch: pytest.MonkeyPatch, bias: float) -> None:
    """Add `bias` to the logits of the tokens that end an answer, in generation only."""
    biases = torch.zeros(model.lm_head_weight.shape[0])
    biases[model.renderer.eos_token_ids] = bias
    forward = model.backbone.lm_head.forward
    monkeypatch.setattr(model.backbone.lm_head, "forward", lambda hidden: forward(hidden) + biases)


@pytest.mark.parametrize(("bias", "rate"), [(100.0, 1.0), (-100.0, 0.0)])
def test_captions_ended_is_the_share_of_captions_with_an_end(
    model: DuetModel, monkeypatch: pytest.MonkeyPatch, bias: float, rate: float
) -> None:
    before = validation.compute_validation_metrics(model, RECORDS, seed=0)
    bias_end_of_text(model, monkeypatch, bias)
    metrics = validation.compute_validation_metrics(model, RECORDS, seed=0)
    assert 0.0 <= before["captions_ended"] <= 1.0 and metrics["captions_ended"] == rate
    # The cross entropy is computed from the weights, not by the biased forward.
    name = "caption_cross_entropy"
    assert metrics[name] == pytest.approx(before[name])


def test_the_cross_entropy_is_that_of_the_long_caption_or_else_the_short_one(
    tmp_path: Path,
) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    records = [
        Record("a", image=tiny.random_image(1), short=("thing",), long="A long text of it."),
        Record("b", image=tiny.random_image(2), short=("another", "second caption")),
    ]
    metrics = validation.compute_validation_metrics(model, records, seed=0)
    assert records[0].image is not None and records[1].image is not None
    pairs = [(records[0].image, "A long text of it."), (records[1].image, "another")]
    total_nats, num_tokens = map(sum, zip(*model.compute_caption_nll(pairs), strict=True))
    assert metrics["caption_cross_entropy"] == pytest.approx(total_nats / num_tokens, rel=1e-5)


def test_captions_that_are_cut_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    records = [
        Record("a", image=tiny.random_image(1), short=("word " * model.max_text_tokens,)),
        Record("b", image=tiny.random_image(2), short=("another",)),
    ]
    result = validation.measure_retrieval(model, records)
    assert len(result.captions) == 2
    assert any("retrieval: 1 text was cut" in message for message in caplog.messages)


def test_the_end_rate_is_measured_on_evenly_spaced_images_and_within_a_limit(
    model: DuetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []  # number of prompts, length limit

    def generate(_: object, inputs: Any, limit: int) -> list[tuple[str, str]]:
        num_prompts = len(inputs.attention_mask)
        calls.append((num_prompts, limit))
        return [("", "stop" if i % 4 == 0 else "length") for i in range(num_prompts)]

    monkeypatch.setattr(validation.offline, "generate_with_finish_reason", generate)
    records = [RECORDS[i % 3] for i in range(40)]
    rate = validation.compute_caption_end_rate(model, records, max_caption_tokens=9)
    rate_of_few = validation.compute_caption_end_rate(model, records[:4], max_caption_tokens=900)
    assert rate == rate_of_few == 0.25
    assert calls == [(16, 18), (4, 256)]


def test_a_validator_uses_the_first_usable_pairs_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [{"id": "gone", "image": "gone.png", "short": "x"}]
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(images.read_bytes(tiny.random_image(i)))
        rows.append({"id": str(i), "image": f"{i}.png", "short": f"thing {i}"})
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    ids: list[str] = []

    def compute(model: object, records: list[Record], *, seed: int) -> dict[str, float]:
        ids.extend(record.id for record in records)
        return {"seed": seed}

    monkeypatch.setattr(validation, "compute_validation_metrics", compute)
    monkeypatch.setattr(validation, "MAX_VALIDATION_RECORDS", 2)
    validate = validation.make_validator(path, seed=3)
    assert validate(None) == {"seed": 3} and ids == ["0", "1"]  # type: ignore[arg-type]
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="no pair with an image and a short caption"):
        validation.make_validator(path, seed=0)


def test_a_config_without_validation_records_is_refused() -> None:
    section = {"path": "x.jsonl"}
    run_config = config.validate_run_config(
        {
            "out": "x",
            "recipe": {"name": "vladva"},
            "objectives": {"language": 1},
            "model": {},
            "data": {"train": [section]},
            "train": {"steps": 1},
        },
        place="test",
    )
    with pytest.raises(ConfigError, match=r"data.validation: there are no records\. Name a source"):
        validation.make_config_validator(run_config, seed=0)
