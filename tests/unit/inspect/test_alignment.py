"""Two aligned records: cosines are those of the structure loss, and the path follows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from helpers import pages, tiny
from vlduet.cli.main import app
from vlduet.config import load_run_config
from vlduet.data.records import Record
from vlduet.encoders.frozen import FrozenEncoders, make_slice
from vlduet.encoders.loading import open_encoder
from vlduet.errors import ConfigError, DataError
from vlduet.inspect import alignment
from vlduet.model.feature_cache import FeatureCache
from vlduet.reports.terminal import format_alignment

STORY = Record("one", parts=(tiny.random_image(0), "A <b>cat</b> sleeps.", "It rains."))
OTHER = Record("two", parts=("A cat sleeps.", tiny.random_image(0)))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folders = tiny.build_frozen_encoders(tmp_path_factory.mktemp("encoders"))
    return {role: str(folder) for role, folder in folders.items()}


def write_config(folder: Path, encoders: dict[str, str], **recipe: object) -> Path:
    """Write a config of recipe sugar with some options of the recipe."""
    tree = {
        "out": "runs/x",
        "recipe": {"name": "sugar", **recipe},
        "objectives": {"structure": 1.0},
        "model": {"path": "nowhere"},
        "encoders": encoders,
        "data": {"train": [{"path": "nowhere.jsonl"}]},
        "train": {"steps": 1},
    }
    path = folder / "sugar.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def write_records(folder: Path) -> Path:
    """Write an interleaved record and a pair as JSON lines."""
    (folder / "0.png").write_bytes(tiny.random_image(0).data or b"")
    parts = [{"image": "0.png"}, {"text": "A <b>cat</b> sleeps. It rains."}]
    rows = [
        {"id": "one", "parts": parts},
        {"id": "two", "image": "0.png", "short": "A cat sleeps."},
    ]
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("triple", [True, False])
def test_cosines_are_those_of_the_encoder_for_each_pair_of_kinds(
    triple: bool, encoders: dict[str, str], tmp_path: Path
) -> None:
    parts = (*STORY.parts, *OTHER.parts)
    config = load_run_config(write_config(tmp_path, encoders, triple=triple))
    cosines = alignment.config_encoder_cosines(parts, config)
    opened = {role: open_encoder(Path(folder)) for role, folder in encoders.items()}
    frozen = FrozenEncoders(opened, cache=FeatureCache(None))
    slices = frozen.encode_slices([make_slice(part) for part in parts])
    for i, a in enumerate(slices):
        for j, b in enumerate(slices):
            own_role = "text" if isinstance(a.part, str) else "vision"
            is_same_kind = isinstance(a.part, str) == isinstance(b.part, str)
            role = own_role if triple and is_same_kind else "cross"
            expected = float(a.features[role] @ b.features[role])
            assert float(cosines[i, j]) == pytest.approx(expected, abs=1e-5)


def test_equal_documents_align_along_the_diagonal() -> None:
    cosines = torch.full((6, 6), 0.1)
    for i in range(6):
        cosines[i, i] = cosines[i, (i + 3) % 6] = 1.0
    aligned = alignment.align_records(STORY, STORY, cosines=cosines, source="x", delta=0.4)
    assert aligned.gak == pytest.approx(1.0)
    assert aligned.mean == pytest.approx(0.4) and aligned.awm > 0.8
    for i, row in enumerate(aligned.posterior):
        assert row[i] > 0.9
    text = format_alignment(aligned)
    assert text.count("*") == 4, "one star per row, and the legend"
    assert "It rains." in text and "by x" in text


def test_single_slice_aligns_with_every_slice() -> None:
    record = Record("a", parts=("x",))
    aligned = alignment.align_records(record, OTHER, cosines=torch.eye(3), source="x", delta=1.0)
    assert aligned.posterior == [pytest.approx([1.0, 1.0])]
    assert 0 < aligned.gak <= 1


def test_record_without_slices_is_an_error() -> None:
    with pytest.raises(DataError, match="record 'b' is an empty sequence"):
        alignment.align_records(OTHER, Record("b"), cosines=torch.eye(2), source="x", delta=1.0)


def test_slices_are_images_and_single_sentences() -> None:
    pair = Record("pair", image=tiny.random_image(0), short=("A cat. It sleeps.",))
    assert alignment.split_into_slices(pair) == (pair.image, "A cat.", "It sleeps.")
    assert alignment.split_into_slices(STORY) == STORY.parts


def test_command_prints_json_and_writes_a_page(encoders: dict[str, str], tmp_path: Path) -> None:
    records = write_records(tmp_path)
    config = write_config(tmp_path, encoders, delta=0.5)
    path, figure = tmp_path / "page.html", tmp_path / "figure.svg"
    arguments = ["align", f"{records}:0", f"{records}:1", "--config", str(config)]
    arguments += ["--html", str(path), "--figure", str(figure)]
    printed = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout
    content = json.loads(printed)
    assert (content["first"], content["second"]) == ("one", "two")
    assert content["rows"][1:] == ["A <b>cat</b> sleeps.", "It rains."]
    assert content["columns"] == [f"[{tmp_path / '0.png'}]", "A cat sleeps."]
    assert content["judge"] == f"the encoders of {config}"
    assert content["cosines"][0][0] == pytest.approx(1.0, abs=1e-5)
    assert content["sigma"] == pytest.approx(0.5 * 2.5**0.5)
    html = path.read_text()
    pages.parse_checked_page(html)
    assert html.count("data:image/") == 2
    assert "&lt;b&gt;cat&lt;/b&gt;" in html and "<b>cat" not in html
    assert figure.read_text().count("A cat sleeps.") == 1
    printed = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    assert "A cat sleeps." in printed and printed.endswith(f"{path}\n{figure}\n")


def test_command_compares_by_the_embeddings_of_a_model(tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    records = write_records(tmp_path)
    arguments = ["align", str(records), f"{records}:1", "--model", str(tmp_path / "model")]
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    vectors = model.encode([tiny.random_image(0), "A cat sleeps."])
    cosine = json.loads(done.stdout)["cosines"][0][1]
    assert cosine == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5)


def test_command_refuses_another_format_of_a_figure_before_it_computes(tmp_path: Path) -> None:
    arguments = ["align", "missing", "missing", "--model", "missing", "--figure", "figure.pdf"]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, ConfigError) and "figure.pdf: no format of a figure" in str(error)


@pytest.mark.parametrize("with_both", [False, True])
def test_command_needs_either_a_config_or_a_model(
    with_both: bool, encoders: dict[str, str], tmp_path: Path
) -> None:
    records = str(write_records(tmp_path))
    config = write_config(tmp_path, encoders)
    options = ["--config", str(config), "--model", "x"] if with_both else []
    done = CliRunner().invoke(app, ["align", records, records, *options])
    assert isinstance(done.exception, ConfigError)
    assert "either --config or --model" in str(done.exception)


def test_command_names_the_valid_record_numbers(encoders: dict[str, str], tmp_path: Path) -> None:
    records = str(write_records(tmp_path))
    config = write_config(tmp_path, encoders)
    arguments = ["align", f"{records}:2", records, "--config", str(config)]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, DataError) and "Use 0 to 1" in str(done.exception)
