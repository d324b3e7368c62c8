"""Corpus clipart: drawings of the Open Clip Art Library with their titles as short captions.

It is for evaluation only: every record is in the split ``test``. Drawings that look like a stamp
are left out, and so are flags, maps, patterns and icon themes, which have one title for hundreds.
A title counts if it names what is drawn; see `clean_title` and `has_usable_title`.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlduet.corpora import build, stamps
from vlduet.corpora.build import CorpusImage, CorpusSample, PackageFolders
from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import (
    ImageFingerprint,
    UnionFind,
    find_near_duplicates,
    fingerprint_image,
)
from vlduet.errors import ImageError
from vlduet.logs import logger, track_progress

PACKAGE_NAME = "openclipart-svg"
MAX_SERIES = 6
"""Largest number of drawings whose titles begin with the same two words: more are a collection."""
MAX_CAPTION_CHARS = 60
RENDER_HEIGHT = 512
"""Pixels of the height that a page is rendered to; then its white margins are cut off."""
MAX_SIDE = 256
"""Pixels of the longer side above which the rest is scaled down."""
MIN_SIDE = 16
"""Shortest longer side, in pixels, of a drawing on its page; smaller ones are left out."""
WHITE = 250
"""Smallest value of all three channels of a pixel that counts as margin."""

EXCLUDED_FOLDERS = (
    "computer/icons/",
    "geography/",
    "logos/",
    "shapes/",
    "signs_and_symbols/flags/",
    "signs_and_symbols/led/",
    "special/",
)
"""Folders whose drawings are flags, maps, patterns, letters, brands, or icons of themes."""
EXCLUDED_ARTISTS = (
    "rollandin",
    "balin",
    "guillou",
    "silva",
    "doucet",
    "tanguy",
    "olivo",
    "boitel",
    "starexterminator",
)
"""Parts of the names of artists whose titles are mostly not English."""

_TITLE = re.compile(r"<(?:dc:)?title[^>]*>([^<]*)</(?:dc:)?title>")
_CREATOR = re.compile(r"<dc:creator[^>]*>.*?<dc:title[^>]*>([^<]*)</dc:title>", re.DOTALL)
_JUNK = re.compile(
    r"@|://|\bHASH\(|\bclip ?arts?\b|\bthemes?\b|[^\x20-\x7e]|\bsexy\b|\bstripper\b", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Drawing:
    """One drawing of the package with a usable title."""

    name: str
    """Path in the package without suffix."""
    caption: str
    title: str
    """Title as the artist wrote it."""
    artist: str
    """Name of the artist; empty if the file does not say it."""
    path: Path


@dataclass(frozen=True, slots=True)
class RenderedDrawing:
    """A drawing and its image."""

    drawing: Drawing
    png: bytes
    fingerprint: ImageFingerprint


def build_samples(folders: PackageFolders) -> Iterator[CorpusSample]:
    """Yield a pair for every distinct drawing with a usable title, in the order of their paths.

    Of near-duplicates only the first is used, and of those of a stamp none. Everything is rendered
    before the first pair; progress, and the number of drawings left out, is logged.

    Args:
        folders: Unpacked packages of this corpus and of `stamps`; KeyError if one is missing.

    Raises:
        MissingExtraError: resvg-py is not installed.
        ImageError: A stamp cannot be decoded or rendered.
    """
    drawings = read_drawings(folders[PACKAGE_NAME] / "usr/share/openclipart/svg")
    rendered = list(_render_drawings(drawings))
    fingerprints = [item.fingerprint for item in rendered]
    groups = UnionFind(len(rendered))
    groups.union_near_duplicates(fingerprints)
    stamp_root = folders[stamps.PACKAGE_NAME] / "usr/share/tuxpaint/stamps"
    stamp_fingerprints = [stamp.fingerprint for stamp in stamps.read_stamps(stamp_root)]
    pairs = find_near_duplicates(fingerprints, stamp_fingerprints)
    like_stamps = {groups.find(i) for i, _ in pairs}
    first_members = [members[0] for members in groups.groups()]
    logger.info(
        f"{len(rendered)} drawings, {len(first_members)} distinct, {len(like_stamps)} like a stamp"
    )
    for i in first_members:
        if i not in like_stamps:
            yield CorpusSample(_make_record(rendered[i]), "test")


def _make_record(rendered: RenderedDrawing) -> dict[str, Any]:
    """Return the pair record of one drawing, with its name as id and image ``images/SLUG.png``."""
    drawing = rendered.drawing
    slug = build.slugify(drawing.name.replace("/", "__"))
    metadata = {
        "category": drawing.name.rpartition("/")[0],
        "title": drawing.title,
        "artist": drawing.artist,
    }
    image = CorpusImage(f"images/{slug}.png", rendered.png)
    return {"id": drawing.name, "image": image, "short": drawing.caption, "metadata": metadata}


# --------------------------------------------------------------------- drawings


def read_drawings(root: Path) -> list[Drawing]:
    """Return all drawings with a usable title below a folder, in the order of their paths.

    Of files with equal bytes only the first counts. Series are left out: all drawings whose titles
    begin with the same two words, if there are more than `MAX_SERIES`.
    """
    drawings = []
    hashes = set()
    for path in sorted(root.rglob("*.svg"), key=lambda path: path.as_posix()):
        data = path.read_bytes()
        digest = hashlib.sha256(data).digest()
        name = path.relative_to(root).with_suffix("").as_posix()
        if digest in hashes or name.startswith(EXCLUDED_FOLDERS):
            continue
        hashes.add(digest)
        text = data.decode("utf-8", errors="replace")
        title = _search(_TITLE, text)
        artist = _search(_CREATOR, text)
        drawings.append(Drawing(name, clean_title(title), title, artist, path))
    series = Counter(_series_key(drawing.caption) for drawing in drawings)
    return [
        drawing
        for drawing in drawings
        if series[_series_key(drawing.caption)] <= MAX_SERIES and has_usable_title(drawing)
    ]


def _search(pattern: re.Pattern[str], text: str) -> str:
    """Return the first group of the first match without entities and white space around, or ''."""
    match = pattern.search(text)
    if match is None:
        return ""
    # Some titles were escaped twice.
    return " ".join(html.unescape(html.unescape(match[1])).split())


def _series_key(caption: str) -> str:
    """Return the first two words of a caption for comparisons."""
    return " ".join(build.normalize_caption(caption).split()[:2])


def clean_title(title: str) -> str:
    """Return a title as a sentence: ``arrow_Left 01`` becomes ``Arrow left.``

    Words are separated by white space, ``_``, ``-`` or a capital letter within (``FlowerPot``).
    Numbers of versions at the end, and zero-padded ones, are dropped, and all words but those with
    further capitals (``USB``) are lower-cased. A title without a letter gives an empty text.
    """
    text = title.partition("|")[0]
    text = re.sub(r"[_\s]+|(?<=[A-Za-z])-(?=[A-Za-z])", " ", text)
    text = re.sub(r"(?<=[a-z]{3})(?=[A-Z])", " ", text)
    text = re.sub(r"\b(b and w|b w|bw|b ?& ?w)\b", "black and white", text, flags=re.IGNORECASE)
    text = re.sub(r"\.svg$", "", text.strip(), flags=re.IGNORECASE)
    text = re.sub(r"\s*#?\b0\d+\b|\s*#?(?<!\d)\d{1,2}$|(?<=[A-Za-z]{3})\d{1,2}\b", "", text)
    text = text.strip(" .,:;-#")
    words = [word.lower() if re.fullmatch(r"\W*[A-Z]?[a-z'.,]+\W*", word) else word
             for word in text.split()]  # fmt: skip
    text = " ".join(words)
    if not re.search("[A-Za-z]", text):
        return ""
    text = text[0].upper() + text[1:]
    return text if text.endswith(("!", "?")) else f"{text}."


def has_usable_title(drawing: Drawing) -> bool:
    """Return whether the title of a drawing seems to say what is drawn, in English.

    It has one to eight words, at most `MAX_CAPTION_CHARS` characters, and a word of three letters;
    no address, no name of a collection, and no characters beyond ASCII. It is not the artist's name
    nor one of `EXCLUDED_ARTISTS`'. The file is named after it: a word of four letters, or the
    title itself, is in the file's name, which is not so where a title was copied.
    """
    caption = drawing.caption
    words = re.findall("[a-z]{3,}", caption.lower())
    if not words or len(caption.split()) > 8 or len(caption) > MAX_CAPTION_CHARS:
        return False
    artist = drawing.artist.casefold()
    if _JUNK.search(drawing.title) or drawing.title.casefold() in ("untitled", artist):
        return False
    if any(name in artist or name in drawing.title.casefold() for name in EXCLUDED_ARTISTS):
        return False
    stem = re.sub("[^a-z]", "", drawing.path.stem.lower())
    squeezed = re.sub("[^a-z]", "", caption.lower())
    return stem.startswith(squeezed) or any(len(word) > 3 and word in stem for word in words)


def _render_drawings(drawings: Iterable[Drawing]) -> Iterator[RenderedDrawing]:
    """Yield all drawings with their images, without the white margins of their pages.

    Those that cannot be rendered, or of which hardly anything is visible, are left out and logged.
    Raises MissingExtraError if resvg-py is not installed.
    """
    for drawing in track_progress(list(drawings), label="rendering drawings"):
        try:
            page = build.render_svg(drawing.path, height=RENDER_HEIGHT)
            pixels = crop_margins(images.to_pixels(images.load_image(ImageRef(data=page))))
        except ImageError as error:
            logger.info(f"{drawing.name} is left out: {error}")
            continue
        if max(pixels.shape[:2]) < MIN_SIDE:
            logger.info(f"{drawing.name} is left out: its page is white")
            continue
        png = images.encode_png(images.scale_down(images.from_pixels(pixels), MAX_SIDE))
        yield RenderedDrawing(drawing, png, fingerprint_image(ImageRef(data=png)))


def crop_margins(pixels: images.Pixels) -> images.Pixels:
    """Return uint8[H, W, 3] pixels without the white rows and columns at the four sides.

    An image that is white all over gives [0, 0, 3].
    """
    is_drawn: NDArray[np.bool_] = pixels.min(axis=2) < WHITE  # [H, W]
    rows = np.flatnonzero(is_drawn.any(axis=1))
    columns = np.flatnonzero(is_drawn.any(axis=0))
    if not rows.size:
        return pixels[:0, :0]
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
