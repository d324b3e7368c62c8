"""Corpus clipart, from a small package made here; the real one is behind ``-m network``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from helpers.small_corpora import build_samples, write_stamp_package, write_text
from vlduet.corpora import catalog, clipart, stamps
from vlduet.corpora.build import CorpusSample
from vlduet.data import images
from vlduet.data.formats import read_jsonl
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import find_near_duplicates, fingerprint_image

SVG = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="http://purl.org/dc/elements/1.1/"
 width="100" height="100"><metadata><dc:title>{title}</dc:title>
<dc:creator><dc:title>{artist}</dc:title></dc:creator></metadata>{shapes}</svg>"""


def draw_squares(seed: int) -> str:
    """Return 8 x 8 squares of random colours, those of `write_noise_png` with the same seed."""
    colours = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return "".join(
        f'<rect x="{10 * x}" y="{10 * y}" width="10" height="10" fill="#{colour.tobytes().hex()}"/>'
        for y, row in enumerate(colours)
        for x, colour in enumerate(row)
    )


def write_drawing(
    root: Path, name: str, title: str, *, seed: int, artist: str = "Jo", shapes: str = ""
) -> None:
    """Write a drawing of `draw_squares`, or of the given shapes, below the package's folder."""
    shapes = shapes or draw_squares(seed)
    path = root / f"usr/share/openclipart/svg/{name}.svg"
    write_text(path, SVG.format(title=title, artist=artist, shapes=shapes))


@pytest.fixture
def samples(tmp_path: Path) -> dict[str, CorpusSample]:
    """All samples of a small package by their ids."""
    root = tmp_path / "clipart"
    write_drawing(root, "animals/red_fox_jo_01", "Red Fox", seed=101)
    write_drawing(root, "animals/red_fox_jo_02", "Fox again", seed=101)
    write_drawing(root, "animals/cat_jo_01", "cat 2", seed=102)
    write_drawing(root, "animals/bird_jo_01", "Bird", seed=7)  # looks like the stamp bird7
    write_drawing(root, "signs/white_jo_01", "White", seed=0, shapes="<g/>")
    write_drawing(root, "signs_and_symbols/flags/norway", "Norway", seed=103)
    write_drawing(
        root, "signs/gallo_01", "Gallo", seed=104, artist="Architetto Francesco Rollandin"
    )
    for i in range(clipart.MAX_SERIES + 1):
        write_drawing(root, f"icons/hotel_icon_{i}", f"Hotel icon {'abcdefg'[i]}", seed=110 + i)
    write_text(root / "usr/share/openclipart/svg/broken/kettle_01.svg", "<svg><dc:title>Kettle")
    folders = {
        clipart.PACKAGE_NAME: root,
        stamps.PACKAGE_NAME: write_stamp_package(tmp_path / "stamps"),
    }
    return build_samples("clipart", folders)


def test_only_distinct_drawings_with_a_usable_title_are_taken_and_all_are_tested(
    samples: dict[str, CorpusSample],
) -> None:
    assert sorted(samples) == ["animals/cat_jo_01", "animals/red_fox_jo_01"]
    assert {sample.split for sample in samples.values()} == {"test"}


def test_a_record_has_the_title_as_caption_and_the_image_without_margins(
    samples: dict[str, CorpusSample],
) -> None:
    record = samples["animals/red_fox_jo_01"].record
    assert record["short"] == "Red fox."
    assert record["metadata"] == {"category": "animals", "title": "Red Fox", "artist": "Jo"}
    assert record["image"].name == "images/animals__red_fox_jo_01.png"
    image = images.load_image(ImageRef(data=record["image"].encode()))
    assert image.size == (clipart.MAX_SIDE, clipart.MAX_SIDE)
    assert images.to_pixels(image)[-1, -1].min() < clipart.WHITE, "the page was larger"


@pytest.mark.parametrize(
    ("title", "caption"),
    [
        ("Dog On Leash", "Dog on leash."),
        ("arrow-down_Blue 01", "Arrow down blue."),
        ("bee3", "Bee."),
        ("Horse #1", "Horse."),
        ("PointingHand", "Pointing hand."),
        ("USB Memory Stick", "USB memory stick."),
        ("Nikon Coolpix 4500", "Nikon coolpix 4500."),
        ("45 rpm record", "45 rpm record."),
        ("Crawfish (B and W)", "Crawfish (black and white)."),
        ("sleeping bear | circle", "Sleeping bear."),
        ("books-aj.svg", "Books aj."),
        ("Squeek!", "Squeek!"),
        ("2005", ""),
        ("", ""),
    ],
)
def test_titles_become_sentences(title: str, caption: str) -> None:
    assert clipart.clean_title(title) == caption


@pytest.mark.parametrize(
    ("title", "stem", "is_usable"),
    [
        ("Bison", "bison_leif_lodahl_01", True),
        ("Copper the Beagle", "beagle_copper_ganson", True),
        ("tux", "tux_01", True),
        ("contour_chipmunk", "cheetah_02", False),
        ("jo@example.org", "jo_example", False),
        ("Jo", "jo_01", False),
        ("Lemon SVG theme", "lemon", False),
        ("Clipart by Jo - lemon", "lemon", False),
        ("Lézard", "lezard_01", False),
        ("A very long title of a drawing that shows a lemon", "lemon_01", False),
        ("Ox", "ox", False),
    ],
)
def test_titles_that_do_not_name_the_drawing_are_not_usable(
    title: str, stem: str, is_usable: bool
) -> None:
    caption = clipart.clean_title(title)
    drawing = clipart.Drawing(stem, caption, title, "Jo", Path(f"{stem}.svg"))
    assert clipart.has_usable_title(drawing) == is_usable


def test_a_white_page_has_no_content() -> None:
    white = np.full((4, 5, 3), 255, np.uint8)
    assert clipart.crop_margins(white).shape == (0, 0, 3)
    white[1:3, 2] = 0
    assert clipart.crop_margins(white).shape == (2, 1, 3)


@pytest.mark.network
@pytest.mark.slow
def test_the_real_clipart_has_no_near_duplicates(tmp_path: Path) -> None:
    summary = catalog.fetch_corpus("clipart", tmp_path)
    assert summary.counts["test"] >= 1200 and summary.counts["train"] == 0
    records = list(read_jsonl(summary.folder / "test.jsonl"))
    fingerprints = [fingerprint_image(record.image) for record in records if record.image]
    assert not find_near_duplicates(fingerprints)
    categories = Counter(str(record.metadata["category"]).split("/")[0] for record in records)
    assert len(categories) >= 10
