"""maps: the maps of KGeography, their regions one by one, and flags, each with a caption and what the atlas knows of it.

Three kinds of records, told apart by `metadata.kind`:

map      a whole map                         "A map of France, divided into departments"
region   a map that shows one region in red  "Ain in France"                 with its capital and its place in the picture
flag     a country's or a region's flag      "The flag of Norway"            with its capital

Everything of one country stands in one split: its maps, their regions, its flags and its regions' flags. Maps of several
countries are in train, and there show only countries of train.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import UnionFind, find_near_duplicates, fingerprint_image

PACKAGE_NAME = "kgeography-data"
ROOT = "usr/share/kgeography"
TEST_SHARE, VAL_SHARE = 0.2, 0.08

MAX_SIDE = 256
"""Pixels of the longer side of a map with a red region: thousands of them, and no finer detail is asked for."""
MIN_REGION_SHARE = 0.001
"""Of a map's pixels: a smaller region is not shown, because nobody could see it (about 300 pixels of 500 x 600)."""
MIN_SHARE_IN_PLACE = 0.8
"""Share of a region's pixels that must lie in one ninth of the picture for it to be called its place."""
RED = (214, 39, 40)
FADED_CONTRAST = 0.3
"""What is left of the contrast of everything that is not red."""
GREY_STEP = 8
"""Steps between the greys: fewer shades make files of half the size."""
PLACE_GRID = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)

MAPS_WITHOUT_COUNTRIES = frozenset({"waters_world-class", "world_continents"})
"""Maps of the world whose regions are no countries, by file name."""
MULTI_COUNTRY_MAPS = MAPS_WITHOUT_COUNTRIES | {
    "africa",
    "asia",
    "caribbean",
    "europe",
    "ncamerica",
    "oceania",
    "southamerica",
    "world",
}
"""Maps of more than one country, by file name."""
TERRITORY_NAMES = {
    "World": "the world",
    "World continents": "the world",
    "Waters": "the world",
    "USA": "the United States of America",
    "Caribbean": "the Caribbean",
    "Netherlands": "the Netherlands",
    "New-Zealand": "New Zealand",
    "Sri-Lanka": "Sri Lanka",
}
COUNTRY_SYNONYMS = {
    "usa": "united states of america",
    "great britain": "united kingdom",
    "uk": "united kingdom",
    "nl": "netherlands",
    "republic of ireland": "ireland",
    "northern ireland": "united kingdom",
    "republic of korea": "south korea",
    "democratic people s republic of korea": "north korea",
    "bosnia herzegovina": "bosnia and herzegovina",
    "republic of china": "taiwan",
}
"""Names of one country, as `plain` writes them."""


@dataclass(frozen=True, slots=True)
class MapRegion:
    """A division of a map."""

    name: str
    capital: str
    flag: str
    """Path below flags/; empty without one."""
    colour: int
    """0xRRGGBB of all its pixels."""


@dataclass(frozen=True, slots=True)
class AtlasMap:
    """One .kgm file: a picture in which every region has a colour of its own."""

    id: str
    name: str
    divisions: str
    picture: Path
    regions: tuple[MapRegion, ...]
    """Those that the game asks for."""

    @property
    def territory(self) -> str:
        """What it is a map of, without the kind of its regions: "Greece (Prefectures)" -> "Greece"."""
        name = re.sub(r"\s*\(.*|\s+by\s.*|\s+(Districts|Provinces)\b.*", "", self.name)
        return name.removeprefix("The ")

    @property
    def display_name(self) -> str:
        """The territory within a sentence."""
        return TERRITORY_NAMES.get(self.territory, self.territory)


def build_samples(folders: PackageFolders, watch: Watch) -> Iterator[CorpusSample]:
    """Maps, regions and flags as pairs, in the order of their files."""
    root = folders[PACKAGE_NAME] / ROOT
    maps = read_maps(root)
    flags = collect_flags(maps)
    split = assign_country_splits(maps, flags, root)
    for one in watch(maps, "reading maps"):
        pixels = images.to_pixels(images.load_image(ImageRef(path=one.picture)))
        labels, faded = encode_colours(pixels), fade_map(pixels)
        several = one.id in MULTI_COUNTRY_MAPS
        own = "train" if several else split[normalize_country(one.territory)]
        yield CorpusSample(_map_record(one), own)
        named: dict[str, int] = {}
        for region in one.regions:
            where = split.get(normalize_country(region.name), "train") if several else own
            mask = labels == region.colour
            if where == own and mask.mean() >= MIN_REGION_SHARE:
                name = slugify(region.name)
                named[name] = named.get(name, 0) + 1
                identity = name if named[name] == 1 else f"{name}-{named[name]}"
                yield CorpusSample(
                    _region_record(
                        one, region, mask, identity=identity, shown=render_region(faded, mask)
                    ),
                    own,
                )
    for flag in flags:
        yield CorpusSample(_flag_record(flag, root), split[flag.country])


# ------------------------------------------------------------------ reading


def read_maps(root: Path) -> list[AtlasMap]:
    """Every map of the package, by file name. Divisions that the game never asks for (water, borders) are left out."""
    found = []
    for path in sorted(root.glob("*.kgm")):
        tree = ET.parse(path).getroot()  # a file of a package whose hash is pinned
        regions = tuple(
            MapRegion(_text(d, "name"), _text(d, "capital"), _text(d, "flag"), _colour(d))
            for d in tree.findall("division")
            if _text(d, "ignore") != "yes"
        )
        picture = root / _text(tree, "mapFile")
        found.append(
            AtlasMap(path.stem, _text(tree, "name"), _text(tree, "divisionsName"), picture, regions)
        )
    return found


def _text(element: ET.Element, key: str) -> str:
    return " ".join((element.findtext(key) or "").split())


def _colour(division: ET.Element) -> int:
    red, green, blue = (
        int(division.findtext(f"color/{name}") or 0) for name in ("red", "green", "blue")
    )
    return red << 16 | green << 8 | blue


@dataclass(frozen=True, slots=True)
class Flag:
    """One picture of a flag."""

    file: str
    """Path below flags/."""
    name: str
    country: str
    """As `country` writes it."""
    capital: str
    within: str
    """Where the region lies; empty for a country's flag."""


def collect_flags(maps: Sequence[AtlasMap]) -> list[Flag]:
    """Every flag once, by file; where several territories fly one flag, it is named after the shortest name."""
    found: dict[str, list[tuple[str, str, AtlasMap]]] = {}
    for one in maps:
        for region in one.regions:
            if region.flag:
                found.setdefault(region.flag, []).append((region.name, region.capital, one))
    flags = []
    for file, named in sorted(found.items()):
        name, capital, one = min(named, key=lambda told: (len(told[0]), told[0]))
        national = any(map_.id in MULTI_COUNTRY_MAPS for _, _, map_ in named)
        of = normalize_country(name if national else one.territory)
        flags.append(
            Flag(file, name.removeprefix("The "), of, capital, "" if national else one.display_name)
        )
    return flags


def normalize_country(name: str) -> str:
    """One spelling of a country's name: no article, and the land behind an island ("Hawaii (USA)" -> USA's)."""
    inside = re.search(r"\(([^)]*)\)", name)
    if inside is not None and not name.startswith("Republic of China"):
        name = inside.group(1)
    name = normalize_caption(re.sub(r"\(.*?\)|-", " ", name)).removeprefix("the ")
    return COUNTRY_SYNONYMS.get(name, name)


# ------------------------------------------------------------------ splits


def assign_country_splits(
    maps: Sequence[AtlasMap], flags: Sequence[Flag], root: Path
) -> dict[str, str]:
    """Country -> split. Countries whose maps or flags look alike, or of which one is a region of the other, go together."""
    alone = [one for one in maps if one.id not in MULTI_COUNTRY_MAPS]
    own = {normalize_country(one.territory) for one in alone}
    shown = {
        normalize_country(region.name)
        for one in maps
        if one.id in MULTI_COUNTRY_MAPS - MAPS_WITHOUT_COUNTRIES
        for region in one.regions
    }
    names = sorted(own | shown | {flag.country for flag in flags})
    number = {name: i for i, name in enumerate(names)}
    groups = UnionFind(len(names))
    for one in maps:
        for region in one.regions:
            # Goa is a region of India and has a map; so has "Puerto Rico (USA)" of the Caribbean.
            outer = normalize_country(
                region.name if one.id in MULTI_COUNTRY_MAPS else one.territory
            )
            if (
                inner := normalize_caption(re.sub(r"\(.*?\)", "", region.name))
            ) in own and outer in number:
                groups.union(number[outer], number[inner])
    pictures = [(normalize_country(one.territory), one.picture) for one in alone]
    pictures += [(flag.country, root / "flags" / flag.file) for flag in flags]
    looks = [fingerprint_image(ImageRef(path=path)) for _, path in pictures]
    for i, j in find_near_duplicates(looks):
        groups.union(number[pictures[i][0]], number[pictures[j][0]])
    found: dict[str, str] = {}
    for members in groups.groups():
        split = assign_split(f"maps:{names[members[0]]}", test=TEST_SHARE, val=VAL_SHARE)
        found |= {names[i]: split for i in members}
    return found


# ------------------------------------------------------------------ pictures and records


def encode_colours(pixels: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """uint8[H, W, 3] -> uint32[H, W], 0xRRGGBB: equal numbers are one region."""
    wide = pixels.astype(np.uint32)
    return np.asarray(wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2], dtype=np.uint32)


def fade_map(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8[h, w, 3]: a map in pale grey, its longer side at most SIDE."""
    grey = 255 - FADED_CONTRAST * (255 - pixels.mean(2, keepdims=True))
    small = images.to_pixels(
        images.scale_down(images.from_pixels(grey.repeat(3, 2).astype(np.uint8)), MAX_SIDE)
    )
    return small // GREY_STEP * GREY_STEP + GREY_STEP - 1


def render_region(faded: NDArray[np.uint8], mask: NDArray[np.bool_]) -> bytes:
    """PNG of a pale map with one region in red.

    Args:
        faded: uint8[h, w, 3], from `pale`.
        mask: bool[H, W], the region at the map's own size.
    """
    whole = images.from_pixels(np.repeat(mask[..., None], 3, 2).astype(np.uint8) * 255)
    weight = images.resize_pixels(whole, faded.shape[1], faded.shape[0]) / 255  # [h, w, 3]
    shown = weight * np.array(RED) + (1 - weight) * faded
    return images.encode_png(images.from_pixels(shown.round().astype(np.uint8)))


def locate_region(mask: NDArray[np.bool_]) -> str:
    """The ninth of the picture that holds most of a region; empty where it holds less than MIN_INSIDE of it."""
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    counts = np.zeros((3, 3), dtype=np.int64)
    np.add.at(counts, (rows * 3 // height, columns * 3 // width), 1)
    row, column = divmod(int(counts.argmax()), 3)
    return PLACE_GRID[row][column] if counts[row, column] >= MIN_SHARE_IN_PLACE * len(rows) else ""


def _told(facts: dict[str, str]) -> dict[str, str]:
    """Facts without those that the package does not tell."""
    return {key: value for key, value in facts.items() if value}


def _map_record(one: AtlasMap) -> dict[str, Any]:
    facts = {"kind": "map", "territory": one.display_name, "divisions": _many(one.divisions)}
    return {
        "id": f"map/{one.id}",
        "image": CorpusImage(f"images/maps/{slugify(one.id)}.png", one.picture),
        "short": f"A map of {one.display_name}, divided into {_many(one.divisions)}",
        "metadata": facts | {"regions": [region.name for region in one.regions]},
    }


def _many(divisions: str) -> str:
    """Departments -> departments; the package's District is meant as districts."""
    return divisions.lower() + ("s" if divisions == "District" else "")


def _region_record(
    one: AtlasMap, region: MapRegion, mask: NDArray[np.bool_], *, identity: str, shown: bytes
) -> dict[str, Any]:
    picture = CorpusImage(f"images/regions/{slugify(one.id)}/{identity}.png", shown)
    facts = {"kind": "region", "name": region.name, "map": one.id, "territory": one.display_name}
    facts |= {
        "divisions": _many(one.divisions),
        "capital": region.capital,
        "place": locate_region(mask),
    }
    return {
        "id": f"region/{one.id}/{identity}",
        "image": picture,
        "short": f"{region.name} in {one.display_name}",
        "metadata": _told(facts),
    }


def _flag_record(flag: Flag, root: Path) -> dict[str, Any]:
    name = flag.file.removesuffix(".png")
    facts = {"kind": "flag", "name": flag.name, "territory": flag.within, "capital": flag.capital}
    return {
        "id": f"flag/{name}",
        "image": CorpusImage(
            f"images/flags/{'/'.join(slugify(part) for part in name.split('/'))}.png",
            root / "flags" / flag.file,
        ),
        "short": f"The flag of {flag.name}" + (f" in {flag.within}" if flag.within else ""),
        "metadata": _told(facts),
    }


CORPUS = Corpus(
    name="maps",
    title="Maps, their regions in red, and flags of KGeography, with capitals and places (`short` and `metadata`).",
    licence="GPL-2 or later",
    attribution=(
        "KGeography, copyright 2004-2008 Albert Astals Cid and the authors of the maps, who are named in the package's "
        "files and documentation; packaged for Debian as kgeography-data. The GNU General Public License, version 2 or "
        "later, holds for maps, flags and names. Region pictures are made from the maps: one region red, the rest grey."
    ),
    packages=(PACKAGES[PACKAGE_NAME],),
    split_by=(
        "Everything of one country stands in one split: its maps, regions and flags, those of its regions, and those of "
        "countries whose flags or maps look alike. Maps of several countries are in train and show only countries of "
        "train. Regions under a thousandth of their map are left out. Names, borders and capitals are the package's, of "
        "2022 and before. The flags of `emoji` are the same flags drawn otherwise: a model trained on them has met these."
    ),
    build=build_samples,
)
