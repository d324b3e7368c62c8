"""The whole demo from its first to its last step, with a tiny model and a few records."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from helpers import tiny
from vlduet.demo import measure, prepare, run, use

if TYPE_CHECKING:
    from vlduet.model.duet import DuetModel


def build_tiny_model(to: Path, *, seed: int) -> DuetModel:
    """Build the tiny model in place of the default one."""
    tiny.build_duet_model(to / "nano")
    return prepare.open_model(to, "nano")


def test_the_demo_writes_model_index_and_report(
    tmp_path: Path,
    tiny_demo: prepare.DemoData,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="vlduet")
    monkeypatch.setattr(run, "clear_demo_folder", lambda to: None)
    monkeypatch.setattr(run, "download_packages", lambda: None)
    monkeypatch.setattr(run, "prepare_data", lambda to: tiny_demo)
    monkeypatch.setattr(run, "build_model", build_tiny_model)
    monkeypatch.setattr(run, "scale_training_steps", lambda minutes: 2)
    monkeypatch.setattr(measure, "MAX_CAPTION_TOKENS", 3)
    monkeypatch.setattr(measure, "NUM_CAPTION_DRAFTS", 2)
    monkeypatch.setattr(use, "MAX_ANSWER_TOKENS", 2)

    summary = run.run_demo(tmp_path, seed=1, full=True, command="make demo")

    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["gallery"] == len(tiny_demo.held_out)
    assert 0 <= summary["changes"]["text → image, hit@10"]["after"]["mean"] <= 1
    names = ("start", "language loss alone", "contrastive loss alone", "all losses")
    assert tuple(summary["trade_off"]) == names
    assert all(point["is_of_this_run"] for point in summary["trade_off"].values())
    for name in ("model", "index", "dual", "language/model", "contrastive/model"):
        assert (tmp_path / name).is_dir()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "make demo" in page
    steps = [message for message in caplog.messages if message.startswith("[")]
    assert steps[0] == "[1/10] download"
    assert steps[-1] == "[10/10] report"
    assert str(tmp_path / "report.html") in caplog.messages[-1]
    assert "text → image, hit@10" in caplog.messages[-2]


def test_published_points_of_single_losses_are_not_of_this_run() -> None:
    points = measure.read_published_points()
    assert [point.name for point in points] == ["language loss alone", "contrastive loss alone"]
    assert not any(point.is_of_this_run for point in points)
    assert all(0 < point.hit_rate < 1 and point.nats > 0 for point in points)
