"""What training measures now and then, where no other test does."""

from __future__ import annotations

import pytest
import torch

from helpers import tiny
from vlduet.data.records import Record
from vlduet.model.duet import DuetModel
from vlduet.workflows import validation

RECORDS = [Record(str(i), image=tiny.random_image(i), short=(f"thing {i}",)) for i in range(5)]


def biased(model: DuetModel, monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    """Make the end of an answer likelier."""
    bias = torch.zeros(model.lm_head_weight.shape[0])
    bias[model.renderer.eos_token_ids] = by
    real = model.backbone.lm_head.forward
    monkeypatch.setattr(model.backbone.lm_head, "forward", lambda hidden: real(hidden) + bias)


@pytest.mark.parametrize(("by", "share"), [(100.0, 1.0), (-100.0, 0.0)])
def test_captions_that_do_not_end_are_seen(
    model: DuetModel, monkeypatch: pytest.MonkeyPatch, by: float, share: float
) -> None:
    before = validation.compute_validation_metrics(model, RECORDS, seed=0)
    biased(model, monkeypatch, by)
    values = validation.compute_validation_metrics(model, RECORDS, seed=0)
    assert 0.0 <= before["captions_ended"] <= 1.0 and values["captions_ended"] == share
    entropy = "caption_cross_entropy"  # it reads the weights themselves
    assert values[entropy] == pytest.approx(before[entropy])


def test_whether_a_caption_ends_is_measured_on_some_within_twice_the_longest(
    model: DuetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def written(_: object, start: validation.generation.Start, most: int) -> list[tuple[str, bool]]:
        asked.append((len(start.attention_mask), most))
        return [("", i % 4 == 0) for i in range(len(start.attention_mask))]

    monkeypatch.setattr(validation.generation, "generate_with_finish_reason", written)
    many = [
        Record(str(i), image=tiny.random_image(i % 3), short=(f"thing {i % 3}",)) for i in range(40)
    ]
    assert validation.compute_caption_end_rate(model, many, max_caption_tokens=9) == 0.25
    assert validation.compute_caption_end_rate(model, many[:4], max_caption_tokens=900) == 0.25
    assert asked == [(16, 18), (4, 256)]
