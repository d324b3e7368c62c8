"""Pages of single commands are safe files that show every text, image and cell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError

from helpers import pages, tiny
from vlduet.data.records import ImageRef, Record
from vlduet.inspect.alignment import Alignment
from vlduet.inspect.internals import AttentionMap, ContentReadings, ModelAnalysis, summarize
from vlduet.inspect.tokens import RecordInspection, TokenRow
from vlduet.reports.pages import (
    format_duration,
    write_alignment_page,
    write_analysis_page,
    write_page,
    write_record_page,
)

RECORD = Record(
    pages.HOSTILE, parts=("A cat.", tiny.random_image(1)), metadata={pages.HOSTILE: pages.HOSTILE}
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "page.html"


def read_page(path: Path) -> pages.Page:
    """Return the page after the checks that hold for every page."""
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no staging file is left"
    return pages.parse_checked_page(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------ one record


def test_record_page_shows_parts_metadata_and_sequences(path: Path) -> None:
    tokens = (
        TokenRow(0, 0, "<s>", supervised=False, anchors=(), image=None),
        TokenRow(0, 1, pages.HOSTILE, supervised=True, anchors=(), image=None),
        TokenRow(0, 2, ".", supervised=True, anchors=("text 1", "text 2"), image=None),
    )
    second = tuple(replace(row, sequence=1) for row in tokens[:2])
    write_record_page(path, RecordInspection(RECORD, tokens + second))
    page = read_page(path)
    # Twice in title and heading, twice in the metadata, twice in the tokens.
    assert page.text.count(pages.SCRIPT) == 6
    spans = [attributes for tag, attributes in page.tags if tag == "span"]
    assert [span["class"] for span in spans] == ["", "loss", "loss anchor", "", "loss"]
    assert [span["title"] for span in spans if span["title"]] == ["text 1, text 2"]
    assert "Sequence 1" in page.text and "24 x 24" in page.text
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 1


def test_record_page_without_a_model_has_no_sequences(path: Path) -> None:
    write_record_page(path, RecordInspection(RECORD, ()))
    assert "What the model sees" not in read_page(path).text


def test_broken_image_is_replaced_by_its_error(path: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    record = replace(RECORD, parts=(ImageRef(path=tmp_path / "x.png"),))
    write_record_page(path, RecordInspection(record, ()))
    page = read_page(path)
    assert len([a for _, a in page.tags if a.get("class") == "error"]) == 1
    assert "x.png" in page.text and not [tag for tag, _ in page.tags if tag == "img"]


# ------------------------------------------------------------------ two aligned records


def test_alignment_page_shades_cells_and_outlines_the_path(path: Path) -> None:
    image = tiny.random_image(0)
    alignment = Alignment(
        first=pages.HOSTILE,
        second="two",
        rows=(image, pages.HOSTILE),
        columns=("A cat.", image, "It rains."),
        source="the frozen encoders",
        cosines=[[0.9, 0.1, 0.2], [0.3, 0.8, 0.1]],
        posterior=[[0.8, 0.4, 0.0], [0.0, 0.5, 0.5]],
        gak=0.5,
        awm=0.6,
        mean=0.4,
        sigma=1.0,
    )
    write_alignment_page(path, alignment)
    page = read_page(path)
    styles = [(tag, a["style"]) for tag, a in page.tags if tag in ("i", "b") and "style" in a]
    cells = [style for tag, style in styles if tag == "i"]
    outlines = [style for tag, style in styles if tag == "b"]
    assert len(cells) == 6 and cells[0] == "opacity:1.00" and cells[1] == "opacity:0.04"
    assert outlines == ["opacity:1.00", "opacity:0.50", "opacity:1.00", "opacity:1.00"]
    assert [a["alt"] for tag, a in page.tags if tag == "img"] == [image.name, image.name]
    labels = [a["aria-label"] for _, a in page.tags if a.get("role") == "img"]
    assert labels == ["Alignment: 2 by 3, cosine from 0.10 to 0.90"]


# ------------------------------------------------------------------ analysed models


def analysis(name: str, *, with_texts: bool = True) -> ModelAnalysis:
    random = np.random.default_rng(len(name))
    readings = ContentReadings(random.normal(size=(6, 4)).astype(np.float32), random.random(6))
    pixels = np.full((4, 6, 3), 200, dtype=np.uint8)
    attention = AttentionMap(pixels, np.array([[0.0, 0.1], [0.2, 0.05]]), share=0.35, evenness=0.8)
    return ModelAnalysis(name, "abc", readings, readings if with_texts else None, (attention,))


def test_analysis_page_compares_two_models(path: Path) -> None:
    analyses = [analysis("before"), analysis("a < b")]
    numbers = summarize(analyses)
    write_analysis_page(
        path, analyses, summaries=numbers, source=Path("x.jsonl"), command="vlduet analyse"
    )
    page = read_page(path)
    assert page.text.count("Entropy, ") == 2 and page.text.count("Components, ") == 6
    assert len([tag for tag, a in page.tags if a.get("class") == "chart"]) == 4
    overlays = [a["aria-label"] for _, a in page.tags if a.get("class") == "overlay"]
    assert overlays == [f"attention of {a.name}, picture 1" for a in analyses]
    cells = [a["style"] for tag, a in page.tags if tag == "i" and "style" in a]
    assert cells[:4] == ["opacity:0.00", "opacity:0.30", "opacity:0.60", "opacity:0.15"]
    entropy = numbers[0]["images"]["entropy"]
    assert f"{entropy['mean']:.2f} ({entropy['low']:.2f} to {entropy['high']:.2f})" in page.text
    assert str(numbers[1]["texts"]["components"]["0.9"]) in page.text


def test_analysis_page_of_images_alone_has_no_rows_of_texts(path: Path) -> None:
    images_only = replace(analysis("model", with_texts=False), attention_maps=())
    write_analysis_page(
        path,
        [images_only],
        summaries=summarize([images_only]),
        source=Path("images"),
        command="vlduet analyse",
    )
    text = read_page(path).text
    assert "Entropy, images" in text and "Entropy, texts" not in text
    assert "Explained variance, texts" not in text
    assert "Where it looks" not in text and "Attention to the image" not in text


# ------------------------------------------------------------------ the frame


def test_missing_variable_of_a_template_is_an_error(path: Path) -> None:
    with pytest.raises(UndefinedError, match="alignment"):
        write_page(path, "align.html", {})
    assert not path.exists()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "< 1 s"), (59.4, "59 s"), (60, "1 min"), (75, "1 min 15 s"), (0, "< 1 s")],
)
def test_durations_are_rounded_to_seconds(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
