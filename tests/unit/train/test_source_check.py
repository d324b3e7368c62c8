"""Records are looked at before the first step: losses of data are refused or named."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import runs, tiny
from vlduet import config, distributed
from vlduet.config import RunConfig
from vlduet.data.images import DecodedImage, load_image
from vlduet.data.records import ImageRef, Record
from vlduet.errors import DataError
from vlduet.train import image_probe, source_check
from vlduet.train.image_probe import ImageProbe
from vlduet.train.loop import train
from vlduet.train.plan import plan_run
from vlduet.train.setup import prepare_run
from vlduet.train.source_check import check_sources, describe_data, describe_risks
from vlduet.train.usage import CUT_TEXT, NOTHING_TO_LEARN

BROKEN = b"\x89PNG\r\n\x1a\n broken"


def write_run(folder: Path, rows: list[dict[str, Any]], *overrides: str) -> RunConfig:
    """Write a run whose only source has these rows, with numbers as ids and images."""
    path = runs.write_run_config(folder, count=40, steps=6)
    runs.write_rows(
        folder / "train.jsonl",
        [{"id": str(i), "image": f"{i}.png", **row} for i, row in enumerate(rows)],
    )
    return config.load_run_config(path, overrides)


def check(run_config: RunConfig) -> tuple[str, list[str]]:
    """Return what is said about the data of a config, and the warnings."""
    run = prepare_run(run_config, write_files=False)
    result = check_sources(run)
    return describe_data(run, result), describe_risks(run, result)


# --------------------------------------------------------------------- sources without a use


@pytest.mark.parametrize(
    ("row", "message"),
    [
        # A misspelt caption, as in a table from elsewhere whose columns have other names.
        ({"captoin": "x"}, r"none of its 3 .* an image without a caption"),
        ({"image": "gone/0.png", "short": "x"}, r"3 of 3 records .*3 x no such im"),
    ],
    ids=["no caption", "no image"],
)
def test_a_useless_source_is_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    run_config = write_run(tmp_path, [row] * 3)
    with pytest.raises(DataError, match=message) as error:
        plan_run(run_config)
    assert str(error.value).startswith(str(tmp_path / "train.jsonl"))
    with pytest.raises(DataError, match=message):
        train(run_config)


def test_a_loss_whose_records_are_missing_is_a_warning(tmp_path: Path) -> None:
    """Pairs have embeddings, but none that the structure loss compares."""
    encoders = tiny.build_frozen_encoders(tmp_path / "encoders")
    overrides = [f"encoders.{role}={folder}" for role, folder in encoders.items()]
    overrides += ["recipe={name: duet}", "objectives={contrastive: 1, structure: 1}"]
    _, warnings = check(write_run(tmp_path, [{"short": "x"}, {"short": "y"}], *overrides))
    (warning,) = [text for text in warnings if text.startswith("objectives.")]
    assert warning.startswith("objectives.structure is 1, and there are no embeddings")
    assert "documents of images and texts in reading order, or chats" in warning


@pytest.mark.parametrize("recipe", ["split=fields", "split=length"])
def test_a_source_without_a_use_is_a_warning_next_to_another(tmp_path: Path, recipe: str) -> None:
    """A control run may have sources for a loss that it leaves out."""
    caption = {"short": "x" * 40, "long": "y" * 40}
    useless = runs.write_rows(tmp_path / "x.jsonl", [{"id": "c", "image": "0.png", "long": "x"}])
    overrides = [f"recipe.{recipe}", "recipe.short_below=39", "objectives={language: 1}"]
    if recipe == "split=fields":
        overrides[-1] = "objectives={contrastive: 1}"
    run_config = write_run(tmp_path, [caption] * 3, *overrides, f"data.train.1.path={useless}")
    _, risks = check(run_config)
    (warning,) = (risk for risk in risks if "none of its" in risk)
    assert str(useless) in warning and "50% of every batch" in warning


def test_records_without_the_only_loss_are_refused(tmp_path: Path) -> None:
    overrides = ["objectives={language: 1}", "recipe.split=length", "recipe.short_below=1000"]
    run_config = config.load_run_config(runs.write_run_config(tmp_path), overrides)
    with pytest.raises(DataError, match="has anything for language of vladva"):
        check(run_config)


# --------------------------------------------------------------------- the share that is lost


def test_more_than_a_tenth_is_refused_by_cause_unless_it_is_allowed(tmp_path: Path) -> None:
    rows = [{"short": f"thing {i}"} if i > 4 else {} for i in range(40)]
    run_config = write_run(tmp_path, rows)
    for name in ("8.png", "9.png"):
        (tmp_path / name).write_bytes(BROKEN)
    with pytest.raises(DataError, match="7 of 40 records would be dropped or cut") as error:
        train(run_config)
    assert "5 x an image without a caption, 2 x truncated or broken PNG" in error.value.message
    assert error.value.fix and "vlduet caption" in error.value.fix
    assert error.value.fix.endswith("data.max_dropped=0.18")
    listing = (run_config.out / "quarantine.jsonl").read_text().splitlines()
    assert len(listing) == 7 and not (run_config.out / "state").exists()
    # Corrected images are not counted again, and what is left is allowed.
    runs.write_image(tmp_path / "8.png", 8)
    train(config.load_run_config(tmp_path / "config.yaml", ["data.max_dropped=0.18"]))
    listing = (run_config.out / "quarantine.jsonl").read_text().splitlines()
    assert len(listing) == 6


def test_broken_rows_and_cut_texts_count(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"short": "x", "long": "y" * 20} for _ in range(10)]
    rows[0]["long"] = "y" * 400
    rows[1]["shrt"] = "x"
    overrides = ["data.max_tokens=100"]
    with pytest.raises(DataError, match=f"2 of 10 .*1 x {CUT_TEXT}") as error:
        check(write_run(tmp_path, rows, *overrides))
    assert "unknown key" in error.value.message
    text, _ = check(write_run(tmp_path, rows, *overrides, "data.max_dropped=0.2"))
    assert "1 left out (1 x unknown key" in text
    assert f"of 9 looked at, 1 are dropped or cut (1 x {CUT_TEXT})" in text


def test_rows_that_cannot_be_read_count_in_the_share_of_all_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"short": "x", "long": "y"} for _ in range(10)]
    rows[0] = {"shrt": "x"}
    text, _ = check(write_run(tmp_path, rows))  # one tenth, which is allowed
    assert "1 left out (1 x unknown key" in text
    with pytest.raises(DataError, match="1 of 9 records would be dropped"):
        check(write_run(tmp_path, rows[:-1]))
    rows[1]["long"] = "y" * 400
    with pytest.raises(DataError, match="2 of 10 records would be dropped"):
        check(write_run(tmp_path, rows, "data.max_tokens=100", "data.max_dropped=0.19"))


def test_a_record_without_a_long_caption_counts_as_dropped(tmp_path: Path) -> None:
    """`split: length` is decided by tokens, so that fields do not show it."""
    rows = [{"short": "x" * 50} for _ in range(9)] + [{"short": "x"}]
    overrides = ["recipe.split=length", "objectives={language: 1}"]
    text, _ = check(write_run(tmp_path, rows, *overrides))
    assert f"1 are dropped or cut (1 x {NOTHING_TO_LEARN})" in text


def test_the_first_records_of_the_order_stand_for_a_large_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_check, "MAX_PROBED_RECORDS", 20)
    rows = [{"short": f"thing {i}"} for i in range(40)]
    run_config = write_run(tmp_path, rows, "train.steps=2")
    run = prepare_run(run_config, write_files=False)
    assert check_sources(run).by_source[0].num_records == 20
    for position in range(20):
        sample = run.mixture[position]
        (tmp_path / f"{sample.record.id}.png").unlink()
    with pytest.raises(DataError, match="about 100% of 40 records would be dropped"):
        check(run_config)
    unlooked = {str(i) for i in range(40)} - {run.mixture[p].record.id for p in range(20)}
    for i in range(40):
        runs.write_image(tmp_path / f"{i}.png", i)
    for name in unlooked:
        (tmp_path / f"{name}.png").unlink()
    assert "of 20 looked at, 0 are dropped" in check(run_config)[0]


def test_all_ranks_raise_the_error_of_the_main_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare_run(write_run(tmp_path, [{"short": "x"}] * 3), write_files=False)
    error = DataError("none is usable")
    monkeypatch.setattr(distributed, "is_main_process", lambda: False)
    monkeypatch.setattr(distributed, "all_gather_objects", lambda outcome: [(None, error), outcome])
    with pytest.raises(DataError, match="none is usable"):
        check_sources(run)


# --------------------------------------------------------------------- images


def test_placeholders_have_the_tokens_of_the_images_that_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_probe, "MAX_DECODED_PIXELS", 60 * 90 + 120 * 60)
    renderer = tiny.build_duet_model(tmp_path / "base", family="qwen2_vl").renderer
    probe = ImageProbe(renderer.prepare_image)
    probing_renderer = renderer.with_options(prepare_image=probe.prepare_image)
    decoded: list[ImageRef] = []

    def load(ref: ImageRef) -> DecodedImage:
        decoded.append(ref)
        return load_image(ref)

    monkeypatch.setattr("vlduet.data.images.load_image", load)
    sizes = [(60, 90), (120, 60), (60, 90), (120, 60), (60, 90)]
    lengths = []
    for number, (width, height) in enumerate(sizes):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        record = Record(str(number), image=ImageRef(data=buffer.getvalue()), short=("x",))
        placeholder = probe.replace_images(record).image
        assert record.image is not None and placeholder is not None
        num_decoded = len(decoded)
        length = len(probing_renderer.render_embedding((placeholder,)))
        assert len(decoded) == num_decoded  # laying out decodes nothing
        lengths.append((length, len(renderer.render_embedding((record.image,)))))
        del decoded[num_decoded:]
    assert all(length == true_length for length, true_length in lengths)
    assert len(dict(lengths)) == 2
    assert (probe.num_images, probe.num_decoded, len(decoded)) == (5, 2, 2)


@pytest.mark.parametrize("damage", ["truncated", "missing", "no image", "empty"])
def test_broken_images_are_seen_in_files_that_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(image_probe, "MAX_DECODED_PIXELS", 1)
    run_config = write_run(tmp_path, [{"short": f"thing {i}"} for i in range(20)])
    assert "; 1 of 20 images were decoded for it" in check(run_config)[0]
    monkeypatch.setattr(image_probe, "MAX_DECODED_PIXELS", 24 * 24)
    path = tmp_path / "7.png"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        new_content = {"truncated": content[: len(content) // 2], "no image": b"<html>"}
        path.write_bytes(new_content.get(damage, b""))
    text, _ = check(run_config)
    assert "of 20 looked at, 1 are dropped or cut" in text


# --------------------------------------------------------------------- warnings


def test_a_sane_plan_has_no_warning(tmp_path: Path) -> None:
    run_config = write_run(tmp_path, [{"short": f"x{i}", "long": "a b."} for i in range(40)])
    assert check(run_config)[1] == []
    assert plan_run(run_config)["warnings"] == []


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["train.steps=550"], ["55 epochs", "trained on 55 times", "train.epochs=10"]),
        (["train.batch_size=64"], ["a batch of 64 is larger than the 40 records"]),
        (["train.steps=1"], ["warm-up takes all of the 1 steps"]),
        (["train.steps=3", "train.warmup=0.9"], ["warm-up takes all of the 3 steps"]),
        (["data.validation=0.01"], ["held out for validation, whose numbers will say little"]),
        (
            ["objectives.language=0.5"],
            ["objectives.language is 0.5", "no supervised tokens in any record", "language_on=any"],
        ),
    ],
)
def test_a_plan_that_the_data_cannot_give_is_a_warning(
    tmp_path: Path, overrides: list[str], fragments: list[str]
) -> None:
    run_config = write_run(tmp_path, [{"short": f"x{i}"} for i in range(40)], *overrides)
    _, risks = check(run_config)
    (warning,) = (risk for risk in risks if fragments[0] in risk)
    assert all(fragment in warning for fragment in fragments)


def test_a_loss_without_records_says_what_it_needs(tmp_path: Path) -> None:
    rows = [{"long": f"a long text {i}."} for i in range(10)]
    _, risks = check(write_run(tmp_path, rows))
    (warning,) = risks
    assert "objectives.contrastive is 1, and there are no embeddings" in warning
    assert "it needs an image with a short caption" in warning


def test_training_logs_what_the_dry_run_shows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"short": f"x{i}"} for i in range(8)]
    run_config = write_run(tmp_path, rows, "train.steps=1", "train.batch_size=8")
    plan = plan_run(run_config)
    assert plan["warnings"]
    with caplog.at_level(logging.INFO, logger="vlduet"):
        train(run_config)
    lines = caplog.text.splitlines()
    assert any(plan["data"] in line for line in lines)
    for warning in plan["warnings"]:
        assert any(f"warning: {warning}" in line for line in lines)
    assert json.loads(json.dumps(plan))["steps"] == 1
