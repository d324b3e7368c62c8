"""Batches of a step: what they hold in memory, and which records are left out."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from helpers import runs
from vlduet import config
from vlduet.train import loader
from vlduet.train.loader import iterate_batches
from vlduet.train.loop import train
from vlduet.train.setup import prepare_run


@pytest.mark.parametrize(
    ("chunk_tokens", "inputs"), [("null", {"pixel_values"}), ("60", {"features"})]
)
def test_images_wait_for_their_chunk_as_features_not_as_pixels(
    tmp_path: Path, chunk_tokens: str, inputs: set[str]
) -> None:
    path = runs.write_run_config(tmp_path, steps=1, batch_size=8)
    run = prepare_run(config.load_run_config(path, [f"train.chunk_tokens={chunk_tokens}"]))
    ((_, batches),) = iterate_batches(run, 0)
    images = [image for batch in batches for image in batch.images]
    assert len(images) == 8
    assert {name for image in images for name in image.inputs} == inputs


def test_bad_records_are_left_out_by_name(tmp_path: Path) -> None:
    path = runs.write_run_config(tmp_path, count=24, steps=6)
    (tmp_path / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"id": "typo", "image": "0.png", "shrt": "x"}\n')
    run_config = config.load_run_config(path)
    train(run_config)
    lines = (run_config.out / "quarantine.jsonl").read_text().splitlines()
    parse_error, image_error = map(json.loads, lines)
    assert parse_error["id"] is None and ":25" in parse_error["place"]
    assert "shrt" in parse_error["message"]
    assert image_error["id"] == "3" and "3.png" in image_error["message"]


def test_the_share_of_dropped_and_cut_records_is_logged_as_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loader, "USAGE_LOG_RECORDS", 12)
    path = runs.write_run_config(tmp_path)  # 12 records
    overrides = ["data.max_dropped=1", "data.max_tokens=40", "train.steps=6"]
    run = prepare_run(config.load_run_config(path, overrides), write_files=False)
    (tmp_path / "3.png").unlink()
    with caplog.at_level(logging.INFO, logger="vlduet"):
        list(iterate_batches(run, 0))
    messages = [message for message in caplog.messages if message.startswith("so far, ")]
    first, second = messages
    assert " of 12 records dropped or cut" in first and " of 24 records dropped or cut" in second
    assert "1 x no such image" in first and "2 x no such image" in second
    assert "x a text cut to the limit of tokens" in first
    assert run.usage.causes["no such image"] == 2
    run.usage.num_records = 36
    assert not run.usage.has_news()


def test_samples_of_a_source_for_another_loss_are_not_counted_as_dropped(tmp_path: Path) -> None:
    path = runs.write_run_config(tmp_path)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    chats = runs.write_rows(tmp_path / "chats.jsonl", [{"id": "c", "messages": turns}])
    overrides = ["objectives={contrastive: 1}", f"data.train.1.path={chats}"]
    run = prepare_run(config.load_run_config(path, overrides), write_files=False)
    list(iterate_batches(run, 0))
    assert 12 < run.usage.num_records < 36 and not run.usage.causes
