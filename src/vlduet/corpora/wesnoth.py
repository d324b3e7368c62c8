"""wesnoth: the units of The Battle for Wesnoth, each a portrait, a name and a paragraph of lore.

Units that share a portrait, whose portraits look alike, or that advance into each other, stand in one split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlduet.corpora import wml
from vlduet.corpora.build import (
    Corpus,
    CorpusImage,
    CorpusSample,
    PackageFolders,
    Watch,
    assign_split,
    normalize_caption,
    slugify,
)
from vlduet.corpora.packages import PACKAGES
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import UnionFind, find_near_duplicates, fingerprint_image

PACKAGE_NAME = "wesnoth-1.16-data"
DATA_FOLDER = "usr/share/games/wesnoth/1.16/data"
TEST_SHARE, VAL_SHARE = 0.15, 0.08

LICENCE = "GPL-2 or later"
ATTRIBUTION = (
    "The Battle for Wesnoth, copyright 2003-2022 David White and the contributors listed in the game's credits and in "
    "the package's documentation. The GNU General Public License, version 2 or later, holds for images and texts."
)


@dataclass(frozen=True, slots=True)
class WesnothUnit:
    """A kind of unit with everything that a record needs."""

    id: str
    name: str
    description: str
    portrait: str
    """Path below core/images."""
    source: Path
    advances_to: tuple[str, ...]
    metadata: dict[str, Any]


def build_samples(folders: PackageFolders, watch: Watch) -> Iterator[CorpusSample]:
    """All units as pairs, in the order of their files."""
    units = list(read_units(folders[PACKAGE_NAME] / DATA_FOLDER / "core"))
    splits = assign_unit_splits(units)
    for unit in units:
        record = {
            "id": unit.id,
            "image": CorpusImage(
                f"images/{slugify(unit.portrait.removesuffix('.png').replace('/', '__'))}.png",
                unit.source,
            ),
            "short": unit.name,
            "long": unit.description,
            "metadata": unit.metadata,
        }
        yield CorpusSample(record, splits[unit.id])


def read_units(core: Path) -> Iterator[WesnothUnit]:
    """Every unit with a portrait, a name and a description; the first of an id."""
    seen = set()
    for path in sorted((core / "units").rglob("*.cfg")):
        for block in wml.read_wml(path).find_blocks("unit_type"):
            identity, name, description = (
                block.get_text("id"),
                block.get_text("name"),
                block.get_text("description"),
            )
            portrait = parse_image_path(block.attributes.get("profile", ""))
            source = core / "images" / portrait
            if (
                not (identity and name and description and portrait and source.is_file())
                or identity in seen
            ):
                continue
            seen.add(identity)
            advances = tuple(
                x.strip()
                for x in block.get_text("advances_to").split(",")
                if x.strip() not in ("", "null")
            )
            yield WesnothUnit(
                identity, name, description, portrait, source, advances, _metadata(block)
            )


def _metadata(block: wml.WmlBlock) -> dict[str, Any]:
    facts: dict[str, Any] = {
        key: block.get_text(key) for key in ("race", "alignment", "usage") if block.get_text(key)
    }
    for key in ("level", "cost", "hitpoints", "movement"):
        if (value := block.get_text(key)).isdigit():
            facts[key] = int(value)
    attacks = [
        attack.get_text("description") or attack.get_text("name")
        for attack in block.children
        if attack.name == "attack"
    ]
    return facts | ({"attacks": attacks} if any(attacks) else {})


def parse_image_path(value: str) -> str:
    """``portraits/elf.png~CROP(0,0,9,9){MACRO}`` -> ``portraits/elf.png``."""
    return re.split(r"[~{]", value, maxsplit=1)[0].strip()


def assign_unit_splits(units: list[WesnothUnit]) -> dict[str, str]:
    """Unit id -> split; `campaigns` asks too, because it shows the same portraits."""
    groups = UnionFind(len(units))
    groups.union_equal(unit.portrait for unit in units)
    groups.union_equal(normalize_caption(unit.description) for unit in units)
    number = {unit.id: i for i, unit in enumerate(units)}
    for i, unit in enumerate(units):
        for other in unit.advances_to:
            if other in number:
                groups.union(i, number[other])
    looks = [fingerprint_image(ImageRef(path=unit.source)) for unit in units]
    for one, near in find_near_duplicates(looks):
        groups.union(one, near)
    found: dict[str, str] = {}
    for members in groups.groups():
        name = min(units[i].id for i in members)
        split = assign_split(f"wesnoth:{name}", test=TEST_SHARE, val=VAL_SHARE)
        found |= {units[i].id: split for i in members}
    return found


CORPUS = Corpus(
    name="wesnoth",
    title="The units of The Battle for Wesnoth: portrait, name (`short`) and a paragraph of lore (`long`).",
    licence=LICENCE,
    attribution=ATTRIBUTION,
    packages=(PACKAGES[PACKAGE_NAME],),
    split_by=(
        "Units that share a portrait, whose portraits nearly look alike, or that advance into each other, stand in one "
        "split. `metadata` holds race, alignment, level, cost, hitpoints, movement and attacks. Much of the text is lore "
        "that the portrait does not show."
    ),
    build=build_samples,
)
