"""Corpus campaigns: illustrated stories of Wesnoth, one interleaved record per scenario.

Story screens with their backgrounds come first, then the dialogue, with each speaker's portrait
before the first of his lines. A whole campaign is in one split. A picture that several campaigns or
the corpus wesnoth share is shown in one split only; elsewhere the text stays without the picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlduet.corpora import build
from vlduet.corpora.build import CorpusImage, CorpusSample, PackageFolders
from vlduet.corpora.wesnoth import (
    DATA_FOLDER,
    PACKAGE_NAME,
    assign_unit_splits,
    parse_image_path,
    read_units,
)
from vlduet.corpora.wml import WmlBlock, read_wml
from vlduet.data.image_formats import IMAGE_SUFFIXES
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import ImageFingerprint, UnionFind, fingerprint_image
from vlduet.errors import ImageError
from vlduet.logs import track_progress

TEST_SHARE = 0.15
VAL_SHARE = 0.12
MIN_TEXTS = 3
"""Number of texts below which a scenario is left out."""

# Speakers without a name of their own.
_ANONYMOUS = frozenset({"", "narrator", "unit", "second_unit"})


@dataclass(frozen=True, slots=True)
class Scene:
    """One text, and the picture that the player sees with it."""

    text: str
    image: Path | None


@dataclass(frozen=True, slots=True)
class Scenario:
    """The story of one scenario of a campaign."""

    campaign: str
    """Name of the campaign's folder."""
    name: str
    """Name of the scenario's file without suffix."""
    title: str
    scenes: tuple[Scene, ...]


@dataclass(frozen=True, slots=True)
class Character:
    """A character who speaks in a campaign."""

    name: str
    """Name to show before his lines; may be empty."""
    portrait: Path | None


def build_samples(folders: PackageFolders) -> Iterator[CorpusSample]:
    """Yield an interleaved record for every scenario with `MIN_TEXTS` texts and one shown picture.

    They come in the order of packages, campaigns and scenario files; the game's tutorial is left
    out. Its parts are the title, then each text after its picture, which is left out if it is the
    one shown last or belongs to another split. All files are read before the first record, and
    progress is logged.

    Args:
        folders: Unpacked packages of the campaigns, and the one of the corpus wesnoth.

    Raises:
        KeyError: The package of wesnoth is missing.
        ImageError: A portrait of wesnoth cannot be decoded.
    """
    core = folders[PACKAGE_NAME] / DATA_FOLDER / "core"
    portraits = {unit.id: unit.source for unit in read_units(core)}
    scenarios: list[Scenario] = []
    for name in track_progress(sorted(folders), label="reading campaigns"):
        for main_file in sorted((folders[name] / DATA_FOLDER / "campaigns").glob("*/_main.cfg")):
            if main_file.parent.name != "tutorial":  # it explains the game and tells no story
                scenarios += read_campaign(main_file.parent, core, portraits)
    image_splits = _assign_image_splits(scenarios, core)
    for scenario in scenarios:
        split = _campaign_split(scenario.campaign)
        parts: list[dict[str, Any]] = [{"text": scenario.title}] if scenario.title else []
        num_images = 0
        previous_image = None
        for scene in scenario.scenes:
            image = scene.image
            if image and image != previous_image and image_splits.get(image) == split:
                parts.append({"image": _make_image(image)})
                num_images += 1
                previous_image = image
            parts.append({"text": scene.text})
        if num_images and len(scenario.scenes) >= MIN_TEXTS:
            metadata = {"campaign": scenario.campaign, "images": num_images}
            record_id = f"{scenario.campaign}/{scenario.name}"
            yield CorpusSample({"id": record_id, "parts": parts, "metadata": metadata}, split)


def _campaign_split(campaign: str) -> str:
    """Return the split of a whole campaign."""
    return build.assign_split(f"campaigns:{campaign}", test=TEST_SHARE, val=VAL_SHARE)


def _make_image(source: Path) -> CorpusImage:
    """Return a picture under its name in the corpus: ``images/CAMPAIGN/PATH.png`` or ``.jpg``.

    CAMPAIGN is the slug of the folder that holds ``images/``, and PATH the slug of the path below
    it with ``__`` for ``/``. JPEG files end in ``.jpg``, all others in ``.png``.
    """
    folder, _, name = source.as_posix().rpartition("/images/")
    stem = build.slugify(Path(name).with_suffix("").as_posix().replace("/", "__"))
    suffix = ".jpg" if source.suffix.lower() in (".jpg", ".jpeg") else ".png"
    return CorpusImage(f"images/{build.slugify(Path(folder).name)}/{stem}{suffix}", source)


# --------------------------------------------------------------------- reading


def read_campaign(folder: Path, core: Path, portraits: dict[str, Path]) -> Iterator[Scenario]:
    """Yield the story of each scenario file of a campaign, in the order of their paths.

    The title is the name of the file's first scenario or cutscene, "" without one. A file without
    texts gives a story without scenes.

    Args:
        folder: The campaign's folder.
        core: The game's ``core`` folder, where images are looked up second.
        portraits: Portrait of each unit type of the game by its id.
    """
    blocks = {path: read_wml(path) for path in sorted(folder.glob("scenarios/**/*.cfg"))}
    roots = (folder / "images", core / "images")
    characters = _read_characters(folder, list(blocks.values()), roots, portraits)
    for path, block in blocks.items():
        titles = [child.get_text("name") for child in block.find_blocks("scenario", "cutscene")]
        scenes = tuple(_read_scenes(block, roots, characters))
        yield Scenario(folder.name, path.stem, titles[0] if titles else "", scenes)


def _read_characters(
    folder: Path,
    blocks: Sequence[WmlBlock],
    roots: tuple[Path, ...],
    unit_portraits: Mapping[str, Path],
) -> dict[str, Character]:
    """Return the characters of a campaign by their ids, from every side and unit of it.

    The portrait of a character is the first of: the profile of his block, a portrait file of the
    campaign with his id as its name, the portrait of his unit type. Of several blocks with one id,
    the first that has a name (or a portrait) gives it; blocks without id are skipped. Each portrait
    file whose capitalised name is no id yet adds a character with it as id and name.

    Args:
        folder: The campaign's folder, whose unit types are read too.
        blocks: Root blocks of its scenario files.
        roots: Folders in which images are looked up, the first one first.
        unit_portraits: Portrait of each unit type of the game by its id; it has priority over a
            type of the campaign with the same id.
    """
    files: dict[str, Path] = {}
    for path in sorted((folder / "images").glob("portraits/**/*")):
        if path.suffix in IMAGE_SUFFIXES:
            files[path.stem.lower()] = path
    type_portraits = dict(unit_portraits)
    for path in sorted(folder.glob("units/**/*.cfg")):
        for unit in read_wml(path).find_blocks("unit_type"):
            portrait = _find_image(unit.attributes.get("profile", ""), roots)
            if portrait is not None:
                type_portraits.setdefault(unit.get_text("id"), portrait)
    characters: dict[str, Character] = {}
    for unit in (unit for block in blocks for unit in _find_units(block)):
        unit_id = unit.get_text("id")
        if not unit_id:
            continue
        portrait = (
            _find_image(unit.attributes.get("profile", ""), roots)
            or files.get(unit_id.lower().replace(" ", "-"))
            or files.get(unit_id.lower())
            or type_portraits.get(unit.get_text("type"))
        )
        earlier = characters.get(unit_id, Character("", None))
        characters[unit_id] = Character(
            earlier.name or unit.get_text("name"), earlier.portrait or portrait
        )
    for stem, path in files.items():
        name = stem.capitalize()
        characters.setdefault(name, Character(name, path))
    return characters


def _find_units(block: WmlBlock) -> Iterator[WmlBlock]:
    """Yield all blocks that may introduce a character, at any depth, also inside each other."""
    for child in block.children:
        if child.name in ("side", "unit", "leader", "hero"):
            yield child
        yield from _find_units(child)


def _read_scenes(
    block: WmlBlock, roots: tuple[Path, ...], characters: dict[str, Character]
) -> Iterator[Scene]:
    """Yield the story screens and messages of a scenario file, in file order.

    Repeated and empty texts are left out, and so are texts with a variable ($), whose value only
    the running game knows. A message is ``NAME: TEXT`` with its caption, else the name of its
    character, else the id of its speaker; ``TEXT`` alone if that is a narrator or unknown. Its
    picture is its own image, else its character's portrait, and is given with the first message
    that has it only. A story screen has its background.
    """
    texts: set[str] = set()
    introduced: set[Path | None] = set()
    for child in block.find_blocks("story", "message"):
        if child.name == "story":
            for part in child.find_blocks("part"):
                text = part.get_text("story")
                if text and text not in texts and "$" not in text:
                    texts.add(text)
                    yield Scene(text, _find_background(part, roots))
            continue
        text = child.get_text("message")
        if not text or text in texts or "$" in text:
            continue
        texts.add(text)
        speaker = child.get_text("speaker") or child.get_text("id")
        character = characters.get(speaker, Character("", None))
        portrait = _find_image(child.attributes.get("image", ""), roots) or character.portrait
        name = child.get_text("caption") or character.name
        if not name and speaker not in _ANONYMOUS and "$" not in speaker:
            name = speaker
        line = f"{name}: {text}" if name else text
        yield Scene(line, None if portrait in introduced else portrait)
        introduced.add(portrait)


def _find_background(part: WmlBlock, roots: tuple[Path, ...]) -> Path | None:
    """Return the first picture of a story screen that exists below `roots`, or None.

    The order is: the background, its layers, other images.
    """
    values = [part.attributes.get("background", "")]
    values += [c.attributes.get("image", "") for c in part.find_blocks("background_layer")]
    values += [c.attributes.get("file", "") for c in part.find_blocks("image")]
    paths = (_find_image(value, roots) for value in values)
    return next((path for path in paths if path is not None), None)


def _find_image(value: str, roots: tuple[Path, ...]) -> Path | None:
    """Return the image file that an attribute names, below the first root that has it.

    None if there is no such file, if it is no image, or if the path leads upwards.
    """
    path = parse_image_path(value)
    if not path or Path(path).suffix.lower() not in IMAGE_SUFFIXES or ".." in path:
        return None
    return next((root / path for root in roots if (root / path).is_file()), None)


# --------------------------------------------------------------------- splits


def _assign_image_splits(scenarios: list[Scenario], core: Path) -> dict[Path, str]:
    """Return the only split that may show each image.

    A portrait of the corpus wesnoth has its split there, any other image that of its campaign.
    Images that are equal or look alike share one split: that of a wesnoth portrait among them,
    otherwise the first of test, val and train in which one of them occurs. Images of scenarios that
    cannot be decoded are missing; a portrait of wesnoth that cannot raises ImageError.
    """
    units = list(read_units(core))
    unit_splits = assign_unit_splits(units)
    splits: dict[Path, set[str]] = {unit.source: {unit_splits[unit.id]} for unit in units}
    unit_images = set(splits)
    for scenario in scenarios:
        for scene in scenario.scenes:
            if scene.image is not None and scene.image not in unit_images:
                splits.setdefault(scene.image, set()).add(_campaign_split(scenario.campaign))
    fingerprints: dict[Path, ImageFingerprint] = {}
    for path in sorted(splits):
        try:
            fingerprints[path] = fingerprint_image(ImageRef(path=path))
        except ImageError:
            continue
    paths = list(fingerprints)
    groups = UnionFind(len(paths))
    groups.union_equal(hashlib.sha256(path.read_bytes()).digest() for path in paths)
    groups.union_near_duplicates(list(fingerprints.values()))
    image_splits: dict[Path, str] = {}
    for members in groups.groups():
        members_of_wesnoth = [i for i in members if paths[i] in unit_images]
        candidates = set[str]().union(*(splits[paths[i]] for i in members_of_wesnoth or members))
        split = next(split for split in ("test", "val", "train") if split in candidates)
        for i in members:
            image_splits[paths[i]] = split
    return image_splits
