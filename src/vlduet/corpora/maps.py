"""Corpus maps: KGeography's maps, their regions one by one, and flags, with captions and facts.

There are three kinds of records, distinguished by ``metadata.kind``:

map      a whole map                         "A map of France, divided into departments"
region   a map that shows one region in red  "Ain in France"       with capital and place in it
flag     flag of a country or of a region    "The flag of Norway"   with capital

Everything of one country is in one split: its maps, their regions, and all of their flags.
Maps of several countries are in train, and show single regions only of countries in train.
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

from vlduet.corpora import build
from vlduet.corpora.build import CorpusImage, CorpusSample, PackageFolders
from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import UnionFind, find_near_duplicates, fingerprint_image
from vlduet.logs import track_progress

PACKAGE_NAME = "kgeography-data"
ROOT = "usr/share/kgeography"
TEST_SHARE = 0.2
VAL_SHARE = 0.08

MAX_SIDE = 256
"""Pixels of the longer side of a region's picture: there are thousands, and no need for detail."""
MIN_REGION_SHARE = 0.001
"""Share of a map's pixels below which a region is left out, because nobody could see it."""
MIN_SHARE_IN_PLACE = 0.8
"""Share of a region's pixels that must be in one ninth of the picture to name that as its place."""
RED = (214, 39, 40)
FADED_CONTRAST = 0.3
"""Factor on the contrast of everything that is not red."""
GREY_STEP = 8
"""Step between the grey values: with fewer of them, the files have half the size."""
PLACE_GRID = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
"""Name of each ninth of a picture, by row and column."""

MAPS_WITHOUT_COUNTRIES = frozenset({"waters_world-class", "world_continents"})
"""File names of the maps of the world whose regions are not countries."""
MULTI_COUNTRY_MAPS = MAPS_WITHOUT_COUNTRIES | {
    "africa", "asia", "caribbean", "europe", "ncamerica", "oceania", "southamerica", "world",
}  # fmt: skip
"""File names of the maps of more than one country."""
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
"""Territories whose name is written differently within a sentence."""
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
"""Other names of countries, normalised like captions, and the name that replaces them."""


@dataclass(frozen=True, slots=True)
class MapRegion:
    """One division of a map."""

    name: str
    capital: str
    """Name of its capital; may be empty."""
    flag: str
    """Path of its flag below flags/; empty without one."""
    colour: int
    """Colour 0xRRGGBB that all its pixels have on the map."""


@dataclass(frozen=True, slots=True)
class AtlasMap:
    """One .kgm file: a picture in which every region has a colour of its own."""

    id: str
    """File name without suffix."""
    name: str
    divisions: str
    """Kind of the regions, such as ``Departments``."""
    picture: Path
    regions: tuple[MapRegion, ...]
    """Regions that the game asks for, without water and borders."""

    @property
    def territory(self) -> str:
        """Name of the mapped territory: ``Greece (Prefectures)`` gives ``Greece``."""
        name = re.sub(r"\s*\(.*|\s+by\s.*|\s+(Districts|Provinces)\b.*", "", self.name)
        return name.removeprefix("The ")

    @property
    def display_name(self) -> str:
        """Name of the territory within a sentence, with its article."""
        return TERRITORY_NAMES.get(self.territory, self.territory)

    @property
    def division_names(self) -> str:
        """Kind of the regions in lower case and plural (the package has one ``District``)."""
        return self.divisions.lower() + ("s" if self.divisions == "District" else "")


@dataclass(frozen=True, slots=True)
class Flag:
    """One picture of a flag."""

    file: str
    """Path below flags/."""
    name: str
    """Country or region."""
    country: str
    """Country that it belongs to, as `normalize_country` writes it."""
    capital: str
    within: str
    """Territory that the region is part of; empty for the flag of a country."""


def build_samples(folders: PackageFolders) -> Iterator[CorpusSample]:
    """Yield pairs: each map and then its regions, by file name of the map; then the flags.

    A map of several countries is in train, and shows regions only of countries in train or of no
    country. Progress is logged. Raises ImageError for a broken picture, and KeyError if `folders`
    lacks the package.
    """
    root = folders[PACKAGE_NAME] / ROOT
    maps = read_maps(root)
    flags = collect_flags(maps)
    splits = assign_country_splits(maps, flags, root)
    for atlas_map in track_progress(maps, label="reading maps"):
        if atlas_map.id in MULTI_COUNTRY_MAPS:
            regions = [
                region
                for region in atlas_map.regions
                if splits.get(normalize_country(region.name), "train") == "train"
            ]
            split = "train"
        else:
            regions = list(atlas_map.regions)
            split = splits[normalize_country(atlas_map.territory)]
        yield CorpusSample(_make_map_record(atlas_map), split)
        for record in _make_region_records(atlas_map, regions):
            yield CorpusSample(record, split)
    for flag in flags:
        yield CorpusSample(_make_flag_record(flag, root), splits[flag.country])


# --------------------------------------------------------------------- reading


def read_maps(root: Path) -> list[AtlasMap]:
    """Return every map (``root/*.kgm``) of the package, in the order of file names.

    Divisions that the game never asks for (water, borders) are left out. Pictures are not opened.
    Raises ElementTree.ParseError for a broken file.
    """
    maps = []
    for path in sorted(root.glob("*.kgm")):
        # The file is part of a package with a pinned hash, so its XML is safe to parse.
        tree = ET.parse(path).getroot()
        regions = tuple(
            MapRegion(
                name=_read_text(division, "name"),
                capital=_read_text(division, "capital"),
                flag=_read_text(division, "flag"),
                colour=_read_colour(division),
            )
            for division in tree.findall("division")
            if _read_text(division, "ignore") != "yes"
        )
        atlas_map = AtlasMap(
            id=path.stem,
            name=_read_text(tree, "name"),
            divisions=_read_text(tree, "divisionsName"),
            picture=root / _read_text(tree, "mapFile"),
            regions=regions,
        )
        maps.append(atlas_map)
    return maps


def _read_text(element: ET.Element, tag: str) -> str:
    """Return the text of a child element on one line; empty if there is none."""
    return " ".join((element.findtext(tag) or "").split())


def _read_colour(division: ET.Element) -> int:
    """Return the colour of a division as 0xRRGGBB; missing components are 0."""
    channels = ("red", "green", "blue")
    red, green, blue = (int(division.findtext(f"color/{name}") or 0) for name in channels)
    return red << 16 | green << 8 | blue


def collect_flags(maps: Sequence[AtlasMap]) -> list[Flag]:
    """Return each flag of the maps' regions once, sorted by file.

    If several regions have the same flag, name and capital are those of the region with the
    shortest name. It is the flag of a country if a map of `MULTI_COUNTRY_MAPS` shows it; else
    `country` and `within` are the territory of that region's map.
    """
    owners: dict[str, list[tuple[MapRegion, AtlasMap]]] = {}
    for atlas_map in maps:
        for region in atlas_map.regions:
            if region.flag:
                owners.setdefault(region.flag, []).append((region, atlas_map))
    flags = []
    for file, pairs in sorted(owners.items()):
        region, atlas_map = min(pairs, key=lambda pair: (len(pair[0].name), pair[0].name))
        is_national = any(owner_map.id in MULTI_COUNTRY_MAPS for _, owner_map in pairs)
        flag = Flag(
            file=file,
            name=region.name.removeprefix("The "),
            country=normalize_country(region.name if is_national else atlas_map.territory),
            capital=region.capital,
            within="" if is_national else atlas_map.display_name,
        )
        flags.append(flag)
    return flags


def normalize_country(name: str) -> str:
    """Return the one spelling of a country's name, without its article.

    A name in parentheses replaces the territory before it: ``Hawaii (USA)`` is ``united states of
    america``; after ``Republic of China`` it is dropped. The result is in lower case, with blanks
    for hyphens, and `COUNTRY_SYNONYMS` applied.
    """
    parenthesis = re.search(r"\(([^)]*)\)", name)
    if parenthesis is not None and not name.startswith("Republic of China"):
        name = parenthesis.group(1)
    name = build.normalize_caption(re.sub(r"\(.*?\)|-", " ", name)).removeprefix("the ")
    return COUNTRY_SYNONYMS.get(name, name)


# --------------------------------------------------------------------- splits


def assign_country_splits(
    maps: Sequence[AtlasMap], flags: Sequence[Flag], root: Path
) -> dict[str, str]:
    """Return the split of every country by its normalised name, in sorted order.

    Countries are the territories of maps of one country, the regions of maps of several countries,
    and the countries of flags. Two are in the same split if one is a region of the other, or if
    maps or flags of them look alike.

    Args:
        root: The package's folder, with the pictures of the flags.

    Raises:
        ImageError: A map of one country or a flag cannot be decoded.
    """
    country_maps = [m for m in maps if m.id not in MULTI_COUNTRY_MAPS]
    mapped = {normalize_country(m.territory) for m in country_maps}
    regions_of_world_maps = {
        normalize_country(region.name)
        for m in maps
        if m.id in MULTI_COUNTRY_MAPS - MAPS_WITHOUT_COUNTRIES
        for region in m.regions
    }
    names = sorted(mapped | regions_of_world_maps | {flag.country for flag in flags})
    index_by_name = {name: i for i, name in enumerate(names)}
    groups = UnionFind(len(names))
    for atlas_map in maps:
        for region in atlas_map.regions:
            # Goa is a region of India and has its own map; so has "Puerto Rico (USA)" in the
            # Caribbean.
            is_country = atlas_map.id in MULTI_COUNTRY_MAPS
            outer = normalize_country(region.name if is_country else atlas_map.territory)
            inner = build.normalize_caption(re.sub(r"\(.*?\)", "", region.name))
            if inner in mapped and outer in index_by_name:
                groups.union(index_by_name[outer], index_by_name[inner])
    pictures = [(normalize_country(m.territory), m.picture) for m in country_maps]
    pictures += [(flag.country, root / "flags" / flag.file) for flag in flags]
    fingerprints = [fingerprint_image(ImageRef(path=path)) for _, path in pictures]
    for i, j in find_near_duplicates(fingerprints):
        groups.union(index_by_name[pictures[i][0]], index_by_name[pictures[j][0]])
    splits = build.assign_group_splits(groups, names, corpus="maps", test=TEST_SHARE, val=VAL_SHARE)
    return dict(zip(names, splits, strict=True))


# --------------------------------------------------------------------- pictures


def encode_colours(pixels: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Return the colour 0xRRGGBB of every pixel, uint32[H, W], from uint8[H, W, 3].

    Pixels with the same number belong to the same region.
    """
    channels = pixels.astype(np.uint32)
    colours = channels[..., 0] << 16 | channels[..., 1] << 8 | channels[..., 2]
    return np.asarray(colours, dtype=np.uint32)


def fade_map(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a map in few pale greys, uint8[h, w, 3], from uint8[H, W, 3].

    A larger map is scaled down so that its longer side has MAX_SIDE pixels.
    """
    grey = 255 - FADED_CONTRAST * (255 - pixels.mean(2, keepdims=True))
    image = images.from_pixels(grey.repeat(3, 2).astype(np.uint8))
    faded = images.to_pixels(images.scale_down(image, MAX_SIDE))
    return faded // GREY_STEP * GREY_STEP + GREY_STEP - 1


def render_region(faded: NDArray[np.uint8], mask: NDArray[np.bool_]) -> bytes:
    """Return a pale map with one region in red, as the bytes of a PNG file of w x h pixels.

    Args:
        faded: uint8[h, w, 3], from `fade_map`.
        mask: bool[H, W], the pixels of the region at the map's original size.
    """
    mask_image = images.from_pixels(np.repeat(mask[..., None], 3, 2).astype(np.uint8) * 255)
    height, width = faded.shape[:2]
    # Scaling the mask smoothly gives the region an anti-aliased border.
    weight = images.resize_pixels(mask_image, width, height) / 255  # [h, w, 3]
    pixels = weight * np.array(RED) + (1 - weight) * faded
    return images.encode_png(images.from_pixels(pixels.round().astype(np.uint8)))


def locate_region(mask: NDArray[np.bool_]) -> str:
    """Return the ninth of the picture, from `PLACE_GRID`, that contains most of a region.

    Args:
        mask: bool[H, W], the pixels of the region; at least one (else ``top left``).

    Returns:
        The name, or an empty string if less than MIN_SHARE_IN_PLACE of the pixels are in it. Of
        ninths with equal shares, the upper and left one counts.
    """
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    counts = np.zeros((3, 3), dtype=np.int64)
    np.add.at(counts, (rows * 3 // height, columns * 3 // width), 1)
    row, column = divmod(int(counts.argmax()), 3)
    if counts[row, column] < MIN_SHARE_IN_PLACE * len(rows):
        return ""
    return PLACE_GRID[row][column]


# --------------------------------------------------------------------- records


def _make_map_record(atlas_map: AtlasMap) -> dict[str, Any]:
    """Return the pair record ``map/ID`` of a whole map, with ``images/maps/SLUG.png``.

    The metadata list the names of all regions, in the order of the file.
    """
    territory = atlas_map.display_name
    divisions = atlas_map.division_names
    return {
        "id": f"map/{atlas_map.id}",
        "image": CorpusImage(f"images/maps/{build.slugify(atlas_map.id)}.png", atlas_map.picture),
        "short": f"A map of {territory}, divided into {divisions}",
        "metadata": {
            "kind": "map",
            "territory": territory,
            "divisions": divisions,
            "regions": [region.name for region in atlas_map.regions],
        },
    }


def _make_region_records(
    atlas_map: AtlasMap, regions: Sequence[MapRegion]
) -> Iterator[dict[str, Any]]:
    """Yield the pair record ``region/MAP/NAME`` of each region of `MIN_REGION_SHARE` or more.

    NAME is the region's slug, with ``-2``, ``-3``, ... if it repeats; the image is
    ``images/regions/MAP/NAME.png``. Empty facts are missing from the metadata. Raises ImageError if
    the map's picture cannot be decoded.
    """
    pixels = images.to_pixels(images.load_image(ImageRef(path=atlas_map.picture)))
    colours = encode_colours(pixels)
    faded = fade_map(pixels)
    name_counts: dict[str, int] = {}
    for region in regions:
        mask = colours == region.colour
        if mask.mean() < MIN_REGION_SHARE:
            continue
        name = build.slugify(region.name)
        name_counts[name] = name_counts.get(name, 0) + 1
        if name_counts[name] > 1:
            name = f"{name}-{name_counts[name]}"
        path = f"images/regions/{build.slugify(atlas_map.id)}/{name}.png"
        metadata = {
            "kind": "region",
            "name": region.name,
            "map": atlas_map.id,
            "territory": atlas_map.display_name,
            "divisions": atlas_map.division_names,
            "capital": region.capital,
            "place": locate_region(mask),
        }
        yield {
            "id": f"region/{atlas_map.id}/{name}",
            "image": CorpusImage(path, render_region(faded, mask)),
            "short": f"{region.name} in {atlas_map.display_name}",
            "metadata": _drop_empty(metadata),
        }


def _make_flag_record(flag: Flag, root: Path) -> dict[str, Any]:
    """Return the pair record ``flag/FILE`` of a flag, with ``images/flags/FILE.png``.

    FILE is without ``.png``, and in slugs in the image's path. Empty facts are missing from the
    metadata. `root` is the package's folder with the pictures, which are not opened.
    """
    name = flag.file.removesuffix(".png")
    path = "/".join(build.slugify(part) for part in name.split("/"))
    metadata = {
        "kind": "flag",
        "name": flag.name,
        "territory": flag.within,
        "capital": flag.capital,
    }
    return {
        "id": f"flag/{name}",
        "image": CorpusImage(f"images/flags/{path}.png", root / "flags" / flag.file),
        "short": f"The flag of {flag.name}" + (f" in {flag.within}" if flag.within else ""),
        "metadata": _drop_empty(metadata),
    }


def _drop_empty(metadata: dict[str, str]) -> dict[str, str]:
    """Return the metadata without the facts that the package does not state."""
    return {key: value for key, value in metadata.items() if value}
