"""A dry run describes a run and writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import runs
from vlduet import config
from vlduet.data.sequences import Sequence
from vlduet.data.stream import Sample
from vlduet.train import loader, plan
from vlduet.train.plan import plan_run
from vlduet.train.run import TrainingRun


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    run_config = config.load_run_config(runs.write_run_config(tmp_path))
    facts = plan_run(run_config)
    assert facts["records: pair"] == 12
    assert facts["trainable parameters"] > 0 and facts["tokens a batch"] > 0
    assert facts["vision features on disk, at most (GB)"] == 0.0  # a few kilobytes
    assert not run_config.out.exists()


def test_numbers_of_a_large_batch_are_scaled_up_from_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[Sample] = []
    render_samples = loader._render_samples

    def record(run: TrainingRun, samples: list[Sample]) -> list[Sequence]:
        rendered.extend(samples)
        return render_samples(run, samples)

    monkeypatch.setattr(loader, "_render_samples", record)
    monkeypatch.setattr(plan, "MAX_PROBED_BATCH_SIZE", 24)
    path = runs.write_run_config(tmp_path, batch_size=24)
    small = plan_run(config.load_run_config(path))
    large = plan_run(config.load_run_config(path, ["train.batch_size=240"]))
    assert len(rendered) == 48
    for name in ("tokens a batch", "supervised tokens a batch", "embeddings a batch"):
        assert large[name] == pytest.approx(10 * small[name], abs=10)
    assert large["epochs"] == 10 * small["epochs"] and large["padding"] == small["padding"]
    rendered.clear()
    plan_run(config.load_run_config(path, ["train.batch_size=4", "train.steps=2"]))
    assert len(rendered) == 8
