"""Figure of two aligned records: its texts, images and links, and what cannot be drawn."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import font_manager
from PIL import Image

from helpers import tiny
from vlduet.data.records import Parts
from vlduet.errors import ConfigError
from vlduet.inspect.alignment import Alignment
from vlduet.reports import charts
from vlduet.reports.alignment_figure import (
    MAX_SLICES,
    TEXT_COLUMNS,
    TEXT_LINES,
    count_columns,
    draw_alignment,
    wrap_text,
    write_alignment_figure,
)

IMAGE = tiny.random_image(0)
SVG = "{http://www.w3.org/2000/svg}"


def align(rows: Parts, columns: Parts, posterior: list[list[float]]) -> Alignment:
    """Return an alignment of two records with these slices and this posterior."""
    return Alignment(
        first="one",
        second="二",
        rows=rows,
        columns=columns,
        source="a model",
        cosines=posterior,
        posterior=posterior,
        gak=0.25,
        awm=0.5,
        mean=0.125,
        sigma=1.0,
    )


def draw(alignment: Alignment) -> ElementTree.Element:
    """Return the parsed SVG of an alignment."""
    return ElementTree.fromstring(draw_alignment(alignment, "svg"))


def texts_of(svg: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in svg.iter(f"{SVG}text")]


def find_links(svg: ElementTree.Element) -> list[tuple[float, float, float]]:
    """Return (width, x of the upper end, x of the lower end) of every link, in points.

    They are in the order of drawing; the three lines of the note are left out.
    """
    links = []
    for path in svg.iter(f"{SVG}path"):
        style = path.attrib.get("style", "")
        if "stroke-dasharray" in style:
            width = re.search(r"stroke-width: ([\d.]+)", style)
            assert width is not None
            _, upper, _, _, lower, _ = path.attrib["d"].split()
            links.append((float(width.group(1)), float(upper), float(lower)))
    return links[:-3]


def test_figure_has_both_records_and_links_as_wide_as_their_weights() -> None:
    weights = [[1.0 + 1e-12, 0.0], [0.04, 0.3], [0.0, 0.8]]
    svg = draw(align((IMAGE, "$5 <b>or</b> $6?", "\x1b[31mBye.\n"), ("好。", IMAGE), weights))
    texts = texts_of(svg)
    assert {"one", "二", "$5 <b>or</b> $6?", "好。"} <= set(texts)
    assert any(text.endswith("[31mBye.") for text in texts)
    assert "alignment kernel 0.250 · alignment-weighted mean 0.500 · mean 0.125" in texts
    assert "by a model" in texts
    assert len(list(svg.iter(f"{SVG}image"))) == 2
    page_width = 4.8 * 72
    links = [  # 0.04 is below the least weight, and the strongest link is drawn last
        (1.1, page_width * 3 / 6, page_width * 3 / 4),
        (2.1, page_width * 5 / 6, page_width * 3 / 4),
        (2.5, page_width * 1 / 6, page_width * 1 / 4),
    ]
    np.testing.assert_allclose(find_links(svg), links, atol=0.01)


def test_single_slice_and_many_slices_have_one_box_each() -> None:
    svg = draw(align(("A.",), ("B.",), [[1.0]]))
    assert len(find_links(svg)) == 1 and {"A.", "B."} <= set(texts_of(svg))
    many = tuple(f"n{i}" for i in range(MAX_SLICES))
    svg = draw(align(many, ("B.",), [[1.0]] * MAX_SLICES))
    assert set(many) <= set(texts_of(svg)) and len(find_links(svg)) == MAX_SLICES
    with pytest.raises(ConfigError, match=f"'二' has {MAX_SLICES + 1} slices, more than"):
        draw(align(("B.",), (*many, "more"), [[1.0] * (MAX_SLICES + 1)]))


def test_file_has_the_format_of_its_ending_and_is_reproducible(tmp_path: Path) -> None:
    alignment = align(("A long sentence. " * 20, IMAGE), ("مرحبا", "B."), [[1.0, 0.2], [0.0, 1.0]])
    for name in ("new/a.svg", "a.PNG"):
        write_alignment_figure(tmp_path / name, alignment)
        data = (tmp_path / name).read_bytes()
        write_alignment_figure(tmp_path / name, alignment)
        assert (tmp_path / name).read_bytes() == data
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG" and image.width == round(4.8 * charts.PNG_DPI)
    for name in ("a.pdf", "a", "svg"):
        with pytest.raises(ConfigError, match=r"no format of a figure.*\.svg or \.png"):
            write_alignment_figure(tmp_path / name, alignment)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.PNG", "new"]


def test_characters_without_a_font_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alignment = replace(align(("A.",), ("B.",), [[1.0]]), second="two")
    assert draw_alignment(alignment, "png") and not caplog.records
    fonts = [font for font in font_manager.fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    assert draw_alignment(replace(alignment, columns=("水 a 一",)), "png")
    (record,) = caplog.records
    assert "no font of this computer has 2 of the characters, such as 一水" in record.getMessage()


def test_fonts_that_have_the_missing_characters_are_used() -> None:
    families = [entry.name for entry in font_manager.fontManager.ttflist]
    mathematical = "𝒜"
    found = charts._find_font_families(f"a {mathematical}")
    assert found[0] == "DejaVu Sans" and len(found) <= 2 and set(found) <= set(families)


@given(st.text(), st.integers(2, 30), st.integers(1, 8))
def test_wrapped_text_fits_its_box(text: str, columns: int, max_lines: int) -> None:
    lines = wrap_text(text, columns, max_lines).split("\n")
    assert len(lines) <= max_lines
    assert all(count_columns(line) <= columns for line in lines)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [""]),
        ("a bb  ccc", ["a bb", "ccc"]),
        ("abcdefgh ij", ["abcdef", "gh ij"]),
        ("日本語です。", ["日本語", "です。"]),
        ("日本語。", ["日本", "語。"]),
        ("ab cd ef gh ij kl", ["ab cd", "ef gh", "ij kl"]),
        ("ab cd ef gh ij klm no", ["ab cd", "ef gh", "ij kl…"]),
        ("e\u0301" * 6, ["e\u0301" * 6]),
    ],
)
def test_text_is_broken_at_blanks_and_between_wide_characters(text: str, lines: list[str]) -> None:
    assert wrap_text(text, 6, 3).split("\n") == lines


def test_a_long_text_ends_with_an_ellipsis() -> None:
    lines = wrap_text("word " * 100, TEXT_COLUMNS, TEXT_LINES).split("\n")
    assert len(lines) == TEXT_LINES and lines[-1].endswith("word…")
    assert max(map(count_columns, lines)) <= TEXT_COLUMNS
