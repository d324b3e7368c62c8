"""campaigns: the illustrated stories of Wesnoth's campaigns, one interleaved record a scenario.

Story screens with their backgrounds come first, then the dialogue, each speaker's portrait before his first line. A whole
campaign stands in one split. Portraits that several campaigns or the `wesnoth` corpus share are shown in one split only:
elsewhere the text stays and the picture is left out.
"""

from __future__ import annotations

import hashlib
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
    slugify,
)
from vlduet.corpora.packages import PACKAGES
from vlduet.corpora.wesnoth import (
    ATTRIBUTION,
    DATA_FOLDER,
    LICENCE,
    PACKAGE_NAME,
    assign_unit_splits,
    parse_image_path,
    read_units,
)
from vlduet.data.images import IMAGE_SUFFIXES
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import (
    ImageFingerprint,
    UnionFind,
    find_near_duplicates,
    fingerprint_image,
)
from vlduet.errors import ImageError

CAMPAIGN_PACKAGES = tuple(
    p for name, p in PACKAGES.items() if name.startswith("wesnoth-1.16-") and name != PACKAGE_NAME
)
TEST_SHARE, VAL_SHARE = 0.15, 0.12
MIN_TEXTS = 3

_NOBODY = frozenset({"", "narrator", "unit", "second_unit"})


@dataclass(frozen=True, slots=True)
class Scene:
    """One text, and what is seen with it."""

    text: str
    image: Path | None


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario."""

    campaign: str
    name: str
    title: str
    scenes: tuple[Scene, ...]


def build_samples(folders: PackageFolders, watch: Watch) -> Iterator[CorpusSample]:
    """All scenarios with pictures, campaign by campaign."""
    core = folders[PACKAGE_NAME] / DATA_FOLDER / "core"
    profiles = {unit.id: unit.source for unit in read_units(core)}
    stories = [
        story
        for name in watch(sorted(folders), "reading campaigns")
        for campaign in sorted((folders[name] / DATA_FOLDER / "campaigns").glob("*/_main.cfg"))
        if campaign.parent.name != "tutorial"  # how to play, and no story
        for story in read_campaign(campaign.parent, core, profiles)
    ]
    owners = _owners(stories, core)
    for story in stories:
        split = _split(story.campaign)
        parts: list[dict[str, Any]] = [{"text": story.title}] if story.title else []
        num_images, last = 0, None
        for scene in story.scenes:
            if scene.image is not None and scene.image != last and owners.get(scene.image) == split:
                parts.append({"image": _picture(scene.image)})
                num_images, last = num_images + 1, scene.image
            parts.append({"text": scene.text})
        if num_images and len(story.scenes) >= MIN_TEXTS:
            metadata = {"campaign": story.campaign, "images": num_images}
            yield CorpusSample(
                {"id": f"{story.campaign}/{story.name}", "parts": parts, "metadata": metadata},
                split,
            )


def _split(campaign: str) -> str:
    return assign_split(f"campaigns:{campaign}", test=TEST_SHARE, val=VAL_SHARE)


def _picture(source: Path) -> CorpusImage:
    inside = source.as_posix().rpartition("/images/")
    campaign = Path(inside[0]).name
    kind = ".jpg" if source.suffix.lower() in (".jpg", ".jpeg") else ".png"
    return CorpusImage(
        f"images/{slugify(campaign)}/{slugify(Path(inside[2]).with_suffix('').as_posix().replace('/', '__'))}{kind}",
        source,
    )


def read_campaign(folder: Path, core: Path, profiles: dict[str, Path]) -> Iterator[Scenario]:
    """The stories of one campaign, by the names of its scenario files."""
    files = sorted(folder.glob("scenarios/**/*.cfg"))
    blocks = {path: wml.read_wml(path) for path in files}
    roots = (folder / "images", core / "images")
    faces = _faces(folder, [*blocks.values()], roots, profiles)
    for path, block in blocks.items():
        titles = [b.get_text("name") for b in block.find_blocks("scenario", "cutscene")]
        scenes = tuple(_scenes(block, roots, faces))
        yield Scenario(folder.name, path.stem, titles[0] if titles else "", scenes)


def _faces(
    folder: Path, blocks: list[wml.WmlBlock], roots: tuple[Path, ...], profiles: dict[str, Path]
) -> dict[str, tuple[str, Path | None]]:
    """Character's id -> (name, portrait), from every side and unit of the campaign."""
    portraits = {
        p.stem.lower(): p
        for p in sorted((folder / "images").glob("portraits/**/*"))
        if p.suffix in IMAGE_SUFFIXES
    }
    kinds = dict(profiles)
    for path in sorted(folder.glob("units/**/*.cfg")):
        for unit in wml.read_wml(path).find_blocks("unit_type"):
            if (own := _find(unit.attributes.get("profile", ""), roots)) is not None:
                kinds.setdefault(unit.get_text("id"), own)
    found: dict[str, tuple[str, Path | None]] = {}
    for block in blocks:
        for unit in _units(block):
            identity = unit.get_text("id")
            if not identity:
                continue
            face = _find(unit.attributes.get("profile", ""), roots) or portraits.get(
                identity.lower().replace(" ", "-")
            )
            face = face or portraits.get(identity.lower()) or kinds.get(unit.get_text("type"))
            name, known = found.get(identity, ("", None))
            found[identity] = (name or unit.get_text("name"), known or face)
    for stem, path in portraits.items():
        found.setdefault(stem.capitalize(), (stem.capitalize(), path))
    return found


def _units(block: wml.WmlBlock) -> Iterator[wml.WmlBlock]:
    """All blocks that may introduce a character, nested ones too."""
    for inner in block.children:
        if inner.name in ("side", "unit", "leader", "hero"):
            yield inner
        yield from _units(inner)


def _scenes(
    block: wml.WmlBlock, roots: tuple[Path, ...], faces: dict[str, tuple[str, Path | None]]
) -> Iterator[Scene]:
    told, spoken = set(), set()
    for found in block.find_blocks("story", "message"):
        if found.name == "story":
            for part in found.find_blocks("part"):
                text = part.get_text("story")
                if text and text not in told and "$" not in text:
                    told.add(text)
                    yield Scene(text, _background(part, roots))
            continue
        text = found.get_text("message")
        if not text or text in told or "$" in text:  # a variable is known to the game alone
            continue
        told.add(text)
        speaker = found.get_text("speaker") or found.get_text("id")
        name, face = faces.get(speaker, ("", None))
        face = _find(found.attributes.get("image", ""), roots) or face
        # A portrait belongs before the first line of its speaker, not before each.
        seen = face in spoken
        spoken.add(face)
        name = (
            found.get_text("caption")
            or name
            or ("" if speaker in _NOBODY or "$" in speaker else speaker)
        )
        yield Scene(f"{name}: {text}" if name else text, None if seen else face)


def _background(part: wml.WmlBlock, roots: tuple[Path, ...]) -> Path | None:
    candidates = [part.attributes.get("background", "")]
    candidates += [
        inner.attributes.get("image", "") for inner in part.find_blocks("background_layer")
    ]
    candidates += [inner.attributes.get("file", "") for inner in part.find_blocks("image")]
    found = (_find(value, roots) for value in candidates)
    return next((path for path in found if path is not None), None)


def _find(value: str, roots: tuple[Path, ...]) -> Path | None:
    path = parse_image_path(value)
    if not path or Path(path).suffix.lower() not in IMAGE_SUFFIXES or ".." in path:
        return None
    return next((root / path for root in roots if (root / path).is_file()), None)


def _owners(stories: list[Scenario], core: Path) -> dict[Path, str]:
    """Image -> the one split that shows it: that of `wesnoth` where it is one of its portraits, else its campaign's.

    Of images that look alike and would stand in several splits, the ones of the split that is listed first stay.
    """
    units = list(read_units(core))
    fixed = assign_unit_splits(units)
    wanted: dict[Path, set[str]] = {unit.source: {fixed[unit.id]} for unit in units}
    known = set(wanted)
    for story in stories:
        for scene in story.scenes:
            if scene.image is not None and scene.image not in known:
                wanted.setdefault(scene.image, set()).add(_split(story.campaign))
    looks: dict[Path, ImageFingerprint] = {}
    for path in sorted(wanted):
        try:
            looks[path] = fingerprint_image(ImageRef(path=path))
        except ImageError:
            continue  # not a picture that anyone could show
    paths = list(looks)
    groups = UnionFind(len(paths))
    groups.union_equal(hashlib.sha256(path.read_bytes()).digest() for path in paths)
    for one, other in find_near_duplicates(list(looks.values())):
        groups.union(one, other)
    owners: dict[Path, str] = {}
    for members in groups.groups():
        named = {split for i in members if paths[i] in known for split in wanted[paths[i]]}
        named = named or {split for i in members for split in wanted[paths[i]]}
        owner = next(split for split in ("test", "val", "train") if split in named)
        owners |= {paths[i]: owner for i in members}
    return owners


CORPUS = Corpus(
    name="campaigns",
    title="Illustrated stories of The Battle for Wesnoth: story screens and dialogue with backgrounds and portraits.",
    licence=LICENCE,
    attribution=ATTRIBUTION,
    packages=(PACKAGES[PACKAGE_NAME],),
    optional=CAMPAIGN_PACKAGES,
    split_by=(
        "A campaign stands in one split. Pictures that several campaigns share, or that the corpus `wesnoth` holds too, "
        "are shown in one split only (the one where `wesnoth` has them); elsewhere the text stays without the picture."
    ),
    build=build_samples,
)
