"""stamps: Tux Paint's clip art and photo cut-outs, each with a short English caption.

Drawings and photos of one caption, and near-duplicate images, always stand in one split. The letters of several
alphabets are left out: hundreds of "The letter a." teach a captioner to say nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlduet.data import images
from vlduet.data.duplicates import Fingerprint, Groups, fingerprint, near_duplicates
from vlduet.data.records import ImageRef
from vlduet.data.sources.build import (
    Corpus,
    Folders,
    Picture,
    Sample,
    Watch,
    plain,
    portable,
    slug,
    split_of,
    unwatched,
)
from vlduet.packages import PACKAGES

PACKAGE = "tuxpaint-stamps-default"
TEST, VAL = 0.21, 0.08
"""Shares of the groups; with this package's content they give at least 128 test images."""

# A cut-out photo has noise: hardly any two neighbours are equal, and hundreds of colours.
PHOTO_MAX_EQUAL = 0.12
PHOTO_MIN_COLOURS = 400


@dataclass(frozen=True, slots=True)
class Stamp:
    """One stamp as it stands in the package."""

    name: str
    """CATEGORY/SUB/NAME"""
    caption: str
    data: bytes
    """Encoded PNG."""
    drawing: bool
    """Made as SVG."""
    print: Fingerprint

    @property
    def category(self) -> str:
        return self.name.rpartition("/")[0]


def build(folders: Folders, watch: Watch) -> Iterator[Sample]:
    """All stamps as pairs, in the order of their paths."""
    stamps = list(_distinct(read_stamps(folders[PACKAGE] / "usr/share/tuxpaint/stamps", watch)))
    groups = Groups(len(stamps))
    groups.unite_equal(plain(stamp.caption) for stamp in stamps)
    for one, other in near_duplicates([stamp.print for stamp in stamps]):
        groups.unite(one, other)
    split: dict[int, str] = {}
    for members in groups.members():
        # The group's name is content, not a position: other stamps may come and go without moving it.
        name = min(plain(stamps[i].caption) for i in members)
        split |= dict.fromkeys(members, split_of(f"stamps:{name}", test=TEST, val=VAL))
    for i, stamp in enumerate(stamps):
        yield Sample(_record(stamp), split[i])


def _record(stamp: Stamp) -> dict[str, Any]:
    picture = Picture(f"images/{slug(stamp.name.replace('/', '__'))}.png", stamp.data)
    metadata = {"category": stamp.category, "photo": not stamp.drawing and looks_photographed(stamp)}
    return {"id": stamp.name, "image": picture, "short": stamp.caption, "metadata": metadata}


def read_stamps(root: Path, watch: Watch = unwatched) -> Iterator[Stamp]:
    """Every stamp with an English caption and an image, letters left out."""
    for text in watch(sorted(root.rglob("*.txt"), key=lambda path: path.as_posix()), "reading stamps"):
        name = text.relative_to(root).with_suffix("").as_posix()
        # The first line is English; the others are translations, one LANG.utf8=... each.
        caption = text.read_text(encoding="utf-8").partition("\n")[0].strip()
        source = _image_of(text)
        if source is None or not caption or "/alphabets/" in f"/{name}":
            continue
        data = portable(source)
        yield Stamp(name, caption, data, source.suffix == ".svg", fingerprint(ImageRef(data=data)))


def _image_of(text: Path) -> Path | None:
    """The drawing where there is one: it is sharper. But letters in it would need a font of the system."""
    svg, png = text.with_suffix(".svg"), text.with_suffix(".png")
    if svg.exists() and not (png.exists() and b"<text" in svg.read_bytes()):
        return svg
    return png if png.exists() else None


def _distinct(stamps: Iterator[Stamp]) -> Iterator[Stamp]:
    """Without the stamps that stand in two categories."""
    seen = set()
    for stamp in stamps:
        key = (hashlib.sha256(stamp.data).digest(), plain(stamp.caption))
        if key not in seen:
            seen.add(key)
            yield stamp


def looks_photographed(stamp: Stamp) -> bool:
    """A guess, right for about nine in ten: many colours, few equal neighbours, and not filed under cartoons."""
    if "cartoon" in stamp.category:
        return False
    equal, colours = images.texture(ImageRef(data=stamp.data))
    return equal <= PHOTO_MAX_EQUAL and colours >= PHOTO_MIN_COLOURS


CORPUS = Corpus(
    name="stamps",
    title="Clip art and photo cut-outs of Tux Paint, each with a short English caption (`short`).",
    licence="GPL-2",
    attribution=(
        "Tux Paint Stamps, copyright 2002-2022 Bill Kendrick and the artists named in the package's documentation; "
        "packaged for Debian as tuxpaint-stamps-default. The GNU General Public License, version 2, holds for the "
        "images and the captions."
    ),
    packages=(PACKAGES[PACKAGE],),
    split_by=(
        "Stamps with the same caption (case and punctuation aside) or nearly the same image stand in one split; the "
        "split is the hash of the group's caption. Letters of alphabets are left out. `metadata.category` is the "
        "folder in the package, `metadata.photo` a guess from the pixels."
    ),
    build=build,
)
