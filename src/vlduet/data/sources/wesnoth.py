"""wesnoth: the units of The Battle for Wesnoth, each a portrait, a name and a paragraph of lore.

Units that share a portrait, whose portraits look alike, or that advance into each other, stand in one split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlduet.data.duplicates import Groups, fingerprint, near_duplicates
from vlduet.data.records import ImageRef
from vlduet.data.sources import wml
from vlduet.data.sources.build import Corpus, Folders, Picture, Sample, Watch, plain, slug, split_of
from vlduet.packages import PACKAGES

PACKAGE = "wesnoth-1.16-data"
DATA = "usr/share/games/wesnoth/1.16/data"
TEST, VAL = 0.15, 0.08

LICENCE = "GPL-2 or later"
ATTRIBUTION = (
    "The Battle for Wesnoth, copyright 2003-2022 David White and the contributors listed in the game's credits and in "
    "the package's documentation. The GNU General Public License, version 2 or later, holds for images and texts."
)


@dataclass(frozen=True, slots=True)
class Unit:
    """A kind of unit with everything that a record needs."""

    id: str
    name: str
    description: str
    portrait: str
    """Path below core/images."""
    source: Path
    advances_to: tuple[str, ...]
    metadata: dict[str, Any]


def build(folders: Folders, watch: Watch) -> Iterator[Sample]:
    """All units as pairs, in the order of their files."""
    units = list(read_units(folders[PACKAGE] / DATA / "core"))
    splits = splits_of(units)
    for unit in units:
        record = {
            "id": unit.id,
            "image": Picture(f"images/{slug(unit.portrait.removesuffix('.png').replace('/', '__'))}.png", unit.source),
            "short": unit.name,
            "long": unit.description,
            "metadata": unit.metadata,
        }
        yield Sample(record, splits[unit.id])


def read_units(core: Path) -> Iterator[Unit]:
    """Every unit with a portrait, a name and a description; the first of an id."""
    seen = set()
    for path in sorted((core / "units").rglob("*.cfg")):
        for block in wml.read(path).walk("unit_type"):
            identity, name, description = block.text("id"), block.text("name"), block.text("description")
            portrait = image_path(block.values.get("profile", ""))
            source = core / "images" / portrait
            if not (identity and name and description and portrait and source.is_file()) or identity in seen:
                continue
            seen.add(identity)
            advances = tuple(x.strip() for x in block.text("advances_to").split(",") if x.strip() not in ("", "null"))
            yield Unit(identity, name, description, portrait, source, advances, _metadata(block))


def _metadata(block: wml.Block) -> dict[str, Any]:
    facts: dict[str, Any] = {key: block.text(key) for key in ("race", "alignment", "usage") if block.text(key)}
    for key in ("level", "cost", "hitpoints", "movement"):
        if (value := block.text(key)).isdigit():
            facts[key] = int(value)
    attacks = [attack.text("description") or attack.text("name") for attack in block.blocks if attack.name == "attack"]
    return facts | ({"attacks": attacks} if any(attacks) else {})


def image_path(value: str) -> str:
    """``portraits/elf.png~CROP(0,0,9,9){MACRO}`` -> ``portraits/elf.png``."""
    return re.split(r"[~{]", value, maxsplit=1)[0].strip()


def splits_of(units: list[Unit]) -> dict[str, str]:
    """Unit id -> split; `campaigns` asks too, because it shows the same portraits."""
    groups = Groups(len(units))
    groups.unite_equal(unit.portrait for unit in units)
    groups.unite_equal(plain(unit.description) for unit in units)
    number = {unit.id: i for i, unit in enumerate(units)}
    for i, unit in enumerate(units):
        for other in unit.advances_to:
            if other in number:
                groups.unite(i, number[other])
    looks = [fingerprint(ImageRef(path=unit.source)) for unit in units]
    for one, near in near_duplicates(looks):
        groups.unite(one, near)
    found: dict[str, str] = {}
    for members in groups.members():
        name = min(units[i].id for i in members)
        split = split_of(f"wesnoth:{name}", test=TEST, val=VAL)
        found |= {units[i].id: split for i in members}
    return found


CORPUS = Corpus(
    name="wesnoth",
    title="The units of The Battle for Wesnoth: portrait, name (`short`) and a paragraph of lore (`long`).",
    licence=LICENCE,
    attribution=ATTRIBUTION,
    packages=(PACKAGES[PACKAGE],),
    split_by=(
        "Units that share a portrait, whose portraits nearly look alike, or that advance into each other, stand in one "
        "split. `metadata` holds race, alignment, level, cost, hitpoints, movement and attacks. Much of the text is lore "
        "that the portrait does not show."
    ),
    build=build,
)
