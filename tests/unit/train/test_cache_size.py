"""The cache of vision features says how large it becomes, and stays within its limit."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from helpers import runs
from vlduet import config
from vlduet.errors import ConfigError
from vlduet.train import loop
from vlduet.train.cache_size import CacheSize, limit_feature_cache, measure_cache_size
from vlduet.train.plan import plan_run
from vlduet.train.run import TrainingRun
from vlduet.train.setup import prepare_run


def prepare(path: Path, *overrides: str) -> TrainingRun:
    """Return the run of a config file with overrides."""
    return prepare_run(config.load_run_config(path, overrides))


def count_features(folder: Path) -> tuple[int, int]:
    """Return the number of the files of features in a folder, and the bytes of the features."""
    files = list(folder.rglob("*.npy"))
    return len(files), sum(file.stat().st_size - 128 for file in files)  # a header of 128 bytes


def test_the_size_is_that_of_the_features_of_all_distinct_images(tmp_path: Path) -> None:
    path = runs.write_run_config(tmp_path, count=9, steps=5)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    again = [{**row, "id": f"again {row['id']}"} for row in rows]
    runs.write_rows(tmp_path / "train.jsonl", [*rows, *again])
    size = measure_cache_size(prepare(path))
    assert size is not None and size.num_images == 9 and not size.exceeds_limit
    loop.train(config.load_run_config(path, ["data.validation=null"]))
    # The saved model has embedded an image of its own, for its later checks.
    assert count_features(tmp_path / "run" / "features") == (9 + 1, 10 / 9 * size.num_bytes)


def test_a_short_run_does_not_see_all_images(tmp_path: Path) -> None:
    path = runs.write_run_config(tmp_path, count=12, steps=2, batch_size=3)
    size = measure_cache_size(prepare(path))
    assert size is not None and size.num_images == 6


def test_images_that_cannot_be_decoded_are_passed_over(tmp_path: Path) -> None:
    path = runs.write_run_config(tmp_path, count=4)
    expected = measure_cache_size(prepare(path))
    (tmp_path / "0.png").write_bytes(b"no image")
    assert measure_cache_size(prepare(path)) == expected
    for i in range(1, 4):
        (tmp_path / f"{i}.png").unlink()
    assert measure_cache_size(prepare(path)) is None


def test_a_run_stores_features_up_to_the_limit_and_none_above(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = runs.write_run_config(tmp_path, steps=2, batch_size=4)
    caplog.set_level(logging.INFO, "vlduet")
    size = measure_cache_size(prepare(path))
    assert size is not None
    metrics = []
    for name, limit in (("at", int(size.num_bytes)), ("below", int(size.num_bytes) - 1)):
        caplog.clear()
        out = tmp_path / name
        overrides = [f"out={out}", f"data.cache_limit={limit}", "data.validation=null"]
        loop.train(config.load_run_config(path, overrides))
        messages = [message for message in caplog.messages if "vision features of" in message]
        assert len(messages) == 1 and "8 images" in messages[0]
        assert count_features(out)[0] == (8 if name == "at" else 0)
        assert ("are not stored" in messages[0]) == (name == "below")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        metrics.append([row["loss"] for row in rows])
    assert metrics[0] == metrics[1]


def test_features_in_the_folder_are_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = runs.write_run_config(tmp_path, count=4, steps=4)
    cache = f"data.cache={tmp_path / 'shared'}"
    loop.train(config.load_run_config(path, [cache, "data.validation=null"]))
    run = prepare(path, cache, f"out={tmp_path / 'second'}", "data.cache_limit=0")
    limit_feature_cache(run)

    def encode_again(images: object) -> None:
        pytest.fail("the vision tower ran again")

    monkeypatch.setattr(run.model.backbone, "compute_vision_features", encode_again)
    images = [record.image for record in run.mixture.sources[0]]
    assert len(run.model.encode([image for image in images if image])) == 4


@pytest.mark.parametrize("overrides", [["data.cache=false"], runs.FROMAGE_OVERRIDES])
def test_a_dry_run_tells_the_size_and_what_exceeds_it(tmp_path: Path, overrides: list[str]) -> None:
    path = runs.write_run_config(tmp_path)
    is_off = overrides == ["data.cache=false"]
    plan = plan_run(config.load_run_config(path, [*overrides, "data.cache_limit=100"]))
    warnings = [text for text in plan["warnings"] if "data.cache_limit (100 bytes)" in text]
    assert len(warnings) == (not is_off)
    assert plan["vision features on disk, at most (GB)"] == 0.0


def test_sizes_are_in_plain_units() -> None:
    size = CacheSize(8_100_000, 576 * 1024 * 4, 64 * 10**9)
    assert size.exceeds_limit and str(size) == (
        "the vision features of 8,100,000 images (2.36 MB an image) would take 19.1 TB, which is "
        "more than data.cache_limit (64 GB): they are not stored, and images go through the "
        "vision tower in every epoch"
    )
    small = CacheSize(400, 576 * 1024 * 4, 64 * 10**9)
    assert str(small) == (
        "the vision features of 400 images (2.36 MB an image) take 944 MB of disk"
    )


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("500 MB", 5 * 10**8), ("1.5 GB", 1.5e9), ("2 GiB", 2**31), ("7", 7)]
)
def test_the_limit_has_a_unit_or_is_in_bytes(tmp_path: Path, text: str, num_bytes: float) -> None:
    path = runs.write_run_config(tmp_path)
    loaded = config.load_run_config(path, [f"data.cache_limit={text}"])
    assert loaded.data.cache_limit == num_bytes
    config.save_run_config(loaded, tmp_path / "saved.yaml")
    assert config.load_run_config(tmp_path / "saved.yaml") == loaded
    assert config.load_run_config(path).data.cache_limit == 64 * 10**9
    for wrong in ("-1", "much", "5 XB"):
        with pytest.raises(ConfigError, match=r"data\.cache_limit"):
            config.load_run_config(path, [f"data.cache_limit={wrong}"])
