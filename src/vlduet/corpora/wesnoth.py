"""Corpus wesnoth: units of The Battle for Wesnoth, each with portrait, name and description.

Units that share a portrait or a description, whose portraits look alike, or that advance into each
other, are in one split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlduet.corpora import build
from vlduet.corpora.build import CorpusImage, CorpusSample, PackageFolders
from vlduet.corpora.wml import WmlBlock, read_wml
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import UnionFind, fingerprint_image

PACKAGE_NAME = "wesnoth-1.16-data"
DATA_FOLDER = "usr/share/games/wesnoth/1.16/data"
"""Folder of the game's data in every wesnoth package."""
TEST_SHARE = 0.15
VAL_SHARE = 0.08


@dataclass(frozen=True, slots=True)
class WesnothUnit:
    """A type of unit, with everything that its record needs."""

    id: str
    name: str
    description: str
    portrait: str
    """Path of the portrait below core/images."""
    source: Path
    """Portrait file."""
    advances_to: tuple[str, ...]
    """Ids of the units that this one can become."""
    metadata: dict[str, Any]


def build_samples(folders: PackageFolders) -> Iterator[CorpusSample]:
    """Yield a pair for every unit, in the order of `read_units`.

    The image is ``images/SLUG.png``, where SLUG is the slug of the portrait's path below
    ``core/images`` with ``__`` for ``/``, so that units can share it. Raises ImageError for a
    broken portrait, and KeyError if `folders` lacks the package.
    """
    units = list(read_units(folders[PACKAGE_NAME] / DATA_FOLDER / "core"))
    splits = assign_unit_splits(units)
    for unit in units:
        image_name = build.slugify(unit.portrait.removesuffix(".png").replace("/", "__"))
        record = {
            "id": unit.id,
            "image": CorpusImage(f"images/{image_name}.png", unit.source),
            "short": unit.name,
            "long": unit.description,
            "metadata": unit.metadata,
        }
        yield CorpusSample(record, splits[unit.id])


def read_units(core: Path) -> Iterator[WesnothUnit]:
    """Yield every unit with a portrait file, a name and a description, in the order of the files.

    All others are left out. Of complete units with the same id, only the first is read.

    Args:
        core: The game's ``core`` folder; one without units gives nothing.
    """
    ids = set()
    for path in sorted((core / "units").rglob("*.cfg")):
        for block in read_wml(path).find_blocks("unit_type"):
            unit_id = block.get_text("id")
            name = block.get_text("name")
            description = block.get_text("description")
            portrait = parse_image_path(block.attributes.get("profile", ""))
            source = core / "images" / portrait
            is_complete = unit_id and name and description and portrait and source.is_file()
            if not is_complete or unit_id in ids:
                continue
            ids.add(unit_id)
            targets = (target.strip() for target in block.get_text("advances_to").split(","))
            advances_to = tuple(target for target in targets if target not in ("", "null"))
            yield WesnothUnit(
                id=unit_id,
                name=name,
                description=description,
                portrait=portrait,
                source=source,
                advances_to=advances_to,
                metadata=_read_metadata(block),
            )


def _read_metadata(block: WmlBlock) -> dict[str, Any]:
    """Return the facts of a unit that its block states; the others are missing.

    ``race``, ``alignment`` and ``usage`` are texts; ``level``, ``cost``, ``hitpoints`` and
    ``movement`` are ints, missing if the block has anything but digits; ``attacks`` is the list of
    the attacks' descriptions, else names, with "" for an attack with neither.
    """
    texts = {key: block.get_text(key) for key in ("race", "alignment", "usage")}
    metadata: dict[str, Any] = {key: text for key, text in texts.items() if text}
    for key in ("level", "cost", "hitpoints", "movement"):
        value = block.get_text(key)
        if value.isdigit():
            metadata[key] = int(value)
    attacks = [
        child.get_text("description") or child.get_text("name")
        for child in block.children
        if child.name == "attack"
    ]
    if any(attacks):
        metadata["attacks"] = attacks
    return metadata


def parse_image_path(value: str) -> str:
    """Return an image path without image functions and macros.

    ``portraits/elf.png~CROP(0,0,9,9){MACRO}`` becomes ``portraits/elf.png``.
    """
    return re.split(r"[~{]", value, maxsplit=1)[0].strip()


def assign_unit_splits(units: list[WesnothUnit]) -> dict[str, str]:
    """Return the split of every unit by its id, in their order.

    Units are in one split if they have the same portrait or description, portraits that look alike,
    or if one advances to the other. Raises ImageError if a portrait cannot be decoded.

    The corpus campaigns calls it too, because it shows the same portraits.
    """
    groups = UnionFind(len(units))
    groups.union_equal(unit.portrait for unit in units)
    groups.union_equal(build.normalize_caption(unit.description) for unit in units)
    index_by_id = {unit.id: i for i, unit in enumerate(units)}
    for i, unit in enumerate(units):
        for target in unit.advances_to:
            if target in index_by_id:
                groups.union(i, index_by_id[target])
    groups.union_near_duplicates([fingerprint_image(ImageRef(path=u.source)) for u in units])
    ids = [unit.id for unit in units]
    splits = build.assign_group_splits(
        groups, ids, corpus="wesnoth", test=TEST_SHARE, val=VAL_SHARE
    )
    return dict(zip(ids, splits, strict=True))
