"""Corpus stamps: Tux Paint's clip art and photo cut-outs, each with a short English caption.

Stamps with the same caption, and near-duplicate images, are always in one split. The letters of the
alphabets are left out: with hundreds of "The letter a." a captioner learns to write nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlduet.corpora import build
from vlduet.corpora.build import CorpusImage, CorpusSample, PackageFolders
from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import ImageFingerprint, UnionFind, fingerprint_image
from vlduet.logs import track_progress

PACKAGE_NAME = "tuxpaint-stamps-default"
TEST_SHARE = 0.21
VAL_SHARE = 0.08
"""Expected shares of the groups; with this package they give at least 128 test images."""

# A cut-out photo is noisy: it has hundreds of colours, and hardly any two neighbours are equal.
PHOTO_MAX_EQUAL = 0.12
"""Largest share of equal neighbouring pixels in a photo."""
PHOTO_MIN_COLOURS = 400
"""Smallest number of distinct colours in a photo."""


@dataclass(frozen=True, slots=True)
class TuxPaintStamp:
    """One stamp of the package."""

    name: str
    """Path in the package without suffix, ``CATEGORY/.../NAME``."""
    caption: str
    png: bytes
    """PNG file."""
    is_drawing: bool
    """True if the package has the stamp as SVG."""
    fingerprint: ImageFingerprint

    @property
    def category(self) -> str:
        """Folder of the stamp in the package, such as ``animals/birds``."""
        return self.name.rpartition("/")[0]


def build_samples(folders: PackageFolders) -> Iterator[CorpusSample]:
    """Yield a pair for every distinct stamp (image and caption), in the order of their paths.

    All stamps are read before the first pair, and progress is logged. Raises as `read_stamps`, and
    KeyError if `folders` lacks the package.
    """
    root = folders[PACKAGE_NAME] / "usr/share/tuxpaint/stamps"
    stamps = list(_drop_repeated(read_stamps(root)))
    captions = [build.normalize_caption(stamp.caption) for stamp in stamps]
    groups = UnionFind(len(stamps))
    groups.union_equal(captions)
    groups.union_near_duplicates([stamp.fingerprint for stamp in stamps])
    splits = build.assign_group_splits(
        groups, captions, corpus="stamps", test=TEST_SHARE, val=VAL_SHARE
    )
    for stamp, split in zip(stamps, splits, strict=True):
        yield CorpusSample(_make_record(stamp), split)


def _make_record(stamp: TuxPaintStamp) -> dict[str, Any]:
    """Return the pair record of one stamp, with its name as id.

    The image is ``images/SLUG.png``, where SLUG is the slug of the name with ``__`` for ``/``.
    """
    image = CorpusImage(f"images/{build.slugify(stamp.name.replace('/', '__'))}.png", stamp.png)
    metadata = {"category": stamp.category, "photo": not stamp.is_drawing and is_photo(stamp)}
    return {"id": stamp.name, "image": image, "short": stamp.caption, "metadata": metadata}


def read_stamps(root: Path) -> Iterator[TuxPaintStamp]:
    """Yield every stamp that has an English caption and an image, in the order of their paths.

    Letters of alphabets are left out. Progress is logged; a folder without stamps gives nothing.

    Args:
        root: Folder with a caption file ``CATEGORY/.../NAME.txt`` beside the image of each stamp.

    Raises:
        ImageError, MissingExtraError: As `build.encode_image`.
    """
    paths = sorted(root.rglob("*.txt"), key=lambda path: path.as_posix())
    for path in track_progress(paths, label="reading stamps"):
        name = path.relative_to(root).with_suffix("").as_posix()
        # The first line is English; the others are translations, each with its language code.
        caption = path.read_text(encoding="utf-8").partition("\n")[0].strip()
        source = _find_image(path)
        if source is None or not caption or "/alphabets/" in f"/{name}":
            continue
        png = build.encode_image(source)
        fingerprint = fingerprint_image(ImageRef(data=png))
        yield TuxPaintStamp(name, caption, png, source.suffix == ".svg", fingerprint)


def _find_image(caption_file: Path) -> Path | None:
    """Return the image beside a caption file: the SVG, else the PNG, else None.

    SVG is sharper, but a drawing with letters would need a system font, so it is used only where
    there is no PNG.
    """
    svg = caption_file.with_suffix(".svg")
    png = caption_file.with_suffix(".png")
    if svg.exists() and not (png.exists() and b"<text" in svg.read_bytes()):
        return svg
    return png if png.exists() else None


def _drop_repeated(stamps: Iterable[TuxPaintStamp]) -> Iterator[TuxPaintStamp]:
    """Yield the stamps in their order, without those that repeat an earlier image and caption.

    Images are compared by their bytes, captions after `build.normalize_caption`.
    """
    keys = set()
    for stamp in stamps:
        key = (hashlib.sha256(stamp.png).digest(), build.normalize_caption(stamp.caption))
        if key not in keys:
            keys.add(key)
            yield stamp


def is_photo(stamp: TuxPaintStamp) -> bool:
    """Guess from the pixels whether a stamp is a photo; right for about nine stamps in ten.

    A photo has many colours and few equal neighbouring pixels, and its category does not contain
    ``cartoon``. Raises ImageError if its image cannot be decoded.
    """
    if "cartoon" in stamp.category:
        return False
    equal_share, num_colours = images.measure_texture(ImageRef(data=stamp.png))
    return equal_share <= PHOTO_MAX_EQUAL and num_colours >= PHOTO_MIN_COLOURS
