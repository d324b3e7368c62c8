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

from vlduet.corpora.build import (
    Corpus,
    CorpusImage,
    CorpusSample,
    PackageFolders,
    Watch,
    assign_split,
    encode_image,
    normalize_caption,
    slugify,
    unwatched,
)
from vlduet.corpora.packages import PACKAGES
from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import (
    ImageFingerprint,
    UnionFind,
    find_near_duplicates,
    fingerprint_image,
)

PACKAGE_NAME = "tuxpaint-stamps-default"
TEST_SHARE, VAL_SHARE = 0.21, 0.08
"""Shares of the groups; with this package's content they give at least 128 test images."""

# A cut-out photo has noise: hardly any two neighbours are equal, and hundreds of colours.
PHOTO_MAX_EQUAL = 0.12
PHOTO_MIN_COLOURS = 400


@dataclass(frozen=True, slots=True)
class TuxPaintStamp:
    """One stamp as it stands in the package."""

    name: str
    """CATEGORY/SUB/NAME"""
    caption: str
    png: bytes
    """Encoded PNG."""
    is_drawing: bool
    """Made as SVG."""
    fingerprint: ImageFingerprint

    @property
    def category(self) -> str:
        return self.name.rpartition("/")[0]


def build_samples(folders: PackageFolders, watch: Watch) -> Iterator[CorpusSample]:
    """All stamps as pairs, in the order of their paths."""
    stamps = list(
        _distinct(read_stamps(folders[PACKAGE_NAME] / "usr/share/tuxpaint/stamps", watch))
    )
    groups = UnionFind(len(stamps))
    groups.union_equal(normalize_caption(stamp.caption) for stamp in stamps)
    for one, other in find_near_duplicates([stamp.fingerprint for stamp in stamps]):
        groups.union(one, other)
    split: dict[int, str] = {}
    for members in groups.groups():
        # The group's name is content, not a position: other stamps may come and go without moving it.
        name = min(normalize_caption(stamps[i].caption) for i in members)
        split |= dict.fromkeys(
            members, assign_split(f"stamps:{name}", test=TEST_SHARE, val=VAL_SHARE)
        )
    for i, stamp in enumerate(stamps):
        yield CorpusSample(_record(stamp), split[i])


def _record(stamp: TuxPaintStamp) -> dict[str, Any]:
    picture = CorpusImage(f"images/{slugify(stamp.name.replace('/', '__'))}.png", stamp.png)
    metadata = {"category": stamp.category, "photo": not stamp.is_drawing and is_photo(stamp)}
    return {"id": stamp.name, "image": picture, "short": stamp.caption, "metadata": metadata}


def read_stamps(root: Path, watch: Watch = unwatched) -> Iterator[TuxPaintStamp]:
    """Every stamp with an English caption and an image, letters left out."""
    for text in watch(
        sorted(root.rglob("*.txt"), key=lambda path: path.as_posix()), "reading stamps"
    ):
        name = text.relative_to(root).with_suffix("").as_posix()
        # The first line is English; the others are translations, one LANG.utf8=... each.
        caption = text.read_text(encoding="utf-8").partition("\n")[0].strip()
        source = _image_of(text)
        if source is None or not caption or "/alphabets/" in f"/{name}":
            continue
        data = encode_image(source)
        yield TuxPaintStamp(
            name, caption, data, source.suffix == ".svg", fingerprint_image(ImageRef(data=data))
        )


def _image_of(text: Path) -> Path | None:
    """The drawing where there is one: it is sharper. But letters in it would need a font of the system."""
    svg, png = text.with_suffix(".svg"), text.with_suffix(".png")
    if svg.exists() and not (png.exists() and b"<text" in svg.read_bytes()):
        return svg
    return png if png.exists() else None


def _distinct(stamps: Iterator[TuxPaintStamp]) -> Iterator[TuxPaintStamp]:
    """Without the stamps that stand in two categories."""
    seen = set()
    for stamp in stamps:
        key = (hashlib.sha256(stamp.png).digest(), normalize_caption(stamp.caption))
        if key not in seen:
            seen.add(key)
            yield stamp


def is_photo(stamp: TuxPaintStamp) -> bool:
    """A guess, right for about nine in ten: many colours, few equal neighbours, and not filed under cartoons."""
    if "cartoon" in stamp.category:
        return False
    equal, colours = images.measure_texture(ImageRef(data=stamp.png))
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
    packages=(PACKAGES[PACKAGE_NAME],),
    split_by=(
        "Stamps with the same caption (case and punctuation aside) or nearly the same image stand in one split; the "
        "split is the hash of the group's caption. Letters of alphabets are left out. `metadata.category` is the "
        "folder in the package, `metadata.photo` a guess from the pixels."
    ),
    build=build_samples,
)
