"""endless-sky: ships, outfits and planets of the space game, each a picture, a name and a description.

Entries that share a picture, whose pictures look alike, or whose texts are the same, stand in one split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

PACKAGE_NAME = "endless-sky-data"
TEST_SHARE, VAL_SHARE = 0.15, 0.08

_WORD = re.compile(r"`([^`]*)`|\"([^\"]*)\"|(\S+)")
_PICTURE = {"ship": ("thumbnail", "sprite"), "outfit": ("thumbnail",), "planet": ("landscape",)}
# Sprites are animated: name.png, or name+0.png, name-0.png, name~0.png, ... with the blending mode between.
_FRAMES = (
    "{}.png",
    "{}.jpg",
    "{}+0.png",
    "{}-0.png",
    "{}~0.png",
    "{}=0.png",
    "{}+.png",
    "{}-00.png",
    "{}+00.png",
)


@dataclass(slots=True)
class DataNode:
    """One line and the lines indented below it."""

    tokens: list[str]
    children: list[DataNode] = field(default_factory=list)

    def first_value(self, key: str) -> str:
        """The value of the first child that begins with `key`; empty if there is none."""
        return next(
            (
                child.tokens[1]
                for child in self.children
                if child.tokens[0] == key and len(child.tokens) > 1
            ),
            "",
        )


@dataclass(frozen=True, slots=True)
class GameEntry:
    """A ship, an outfit or a planet."""

    kind: str
    name: str
    description: str
    source: Path
    metadata: dict[str, Any]


def build_samples(folders: PackageFolders, watch: Watch) -> Iterator[CorpusSample]:
    """All entries as pairs, in the order of their files."""
    root = folders[PACKAGE_NAME] / "usr/share/games/endless-sky"
    entries = list(read_entries(root))
    groups = UnionFind(len(entries))
    groups.union_equal(entry.source for entry in entries)
    groups.union_equal(normalize_caption(entry.description) for entry in entries)
    looks = [
        fingerprint_image(ImageRef(path=entry.source)) for entry in watch(entries, "reading images")
    ]
    # "Marauder Falcon" nearly equals "Falcon", text and picture.
    groups.union_equal((entry.kind, _model(entry.name)) for entry in entries)
    for one, other in find_near_duplicates(looks):
        groups.union(one, other)
    split: dict[int, str] = {}
    for members in groups.groups():
        name = min(f"{entries[i].kind}:{entries[i].name}" for i in members)
        split |= dict.fromkeys(
            members, assign_split(f"endless-sky:{name}", test=TEST_SHARE, val=VAL_SHARE)
        )
    for i, entry in enumerate(entries):
        yield CorpusSample(_record(entry, root), split[i])


def _record(entry: GameEntry, root: Path) -> dict[str, Any]:
    inside = entry.source.relative_to(root / "images")
    name = f"images/{slugify(inside.with_suffix('').as_posix().replace('/', '__'))}{inside.suffix}"
    return {
        "id": f"{entry.kind}/{entry.name}",
        "image": CorpusImage(name, entry.source),
        "short": entry.name,
        "long": entry.description,
        "metadata": {"kind": entry.kind, **entry.metadata},
    }


def _model(name: str) -> str:
    return re.sub(r"^Marauder | \([^)]*\)$", "", name)


def read_entries(root: Path) -> Iterator[GameEntry]:
    """Every ship, outfit and planet with a picture and a description; the first of a name."""
    seen = set()
    for path in sorted((root / "data").rglob("*.txt")):
        for node in parse_nodes(path.read_text(encoding="utf-8", errors="replace")):
            # Two names are a variant of a ship: the same picture and text under another outfit.
            if (
                node.tokens[0] not in _PICTURE
                or len(node.tokens) != 2
                or tuple(node.tokens) in seen
            ):
                continue
            kind, name = node.tokens
            texts = [
                c.tokens[1]
                for c in node.children
                if c.tokens[0] == "description" and len(c.tokens) > 1
            ]
            description = "\n\n".join(" ".join(text.split()) for text in texts if text.strip())
            source = _source(root / "images", node, kind)
            if not description or source is None:
                continue
            seen.add((kind, name))
            yield GameEntry(kind, name, description, source, _metadata(node, kind))


def _source(images: Path, node: DataNode, kind: str) -> Path | None:
    names = [value for key in _PICTURE[kind] if (value := node.first_value(key))]
    files = (images / pattern.format(name) for name in names for pattern in _FRAMES)
    return next((path for path in files if path.is_file()), None)


def _metadata(node: DataNode, kind: str) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if kind == "planet":
        facts["attributes"] = [
            w for c in node.children if c.tokens[0] == "attributes" for w in c.tokens[1:]
        ]
    inner = (
        next((c for c in node.children if c.tokens[0] == "attributes"), node)
        if kind == "ship"
        else node
    )
    if category := inner.first_value("category"):
        facts["category"] = category
    if re.fullmatch(r"\d+", inner.first_value("cost")):
        facts["cost"] = int(inner.first_value("cost"))
    return {key: value for key, value in facts.items() if value}


def parse_nodes(text: str) -> list[DataNode]:
    """The top-level nodes of a data file. Depth is the number of leading white-space characters; # begins a comment."""
    root = DataNode([])
    stack: list[tuple[int, DataNode]] = [(-1, root)]
    for line in text.splitlines():
        bare = line.lstrip()
        if not bare or bare.startswith("#"):
            continue
        depth = len(line) - len(bare)
        words = [a or b or c for a, b, c in _WORD.findall(bare)]
        while stack[-1][0] >= depth:
            stack.pop()
        node = DataNode(words)
        stack[-1][1].children.append(node)
        stack.append((depth, node))
    return root.children


CORPUS = Corpus(
    name="endless-sky",
    title="Ships, outfits and planets of Endless Sky: picture, name (`short`) and description (`long`).",
    licence="CC BY-SA 4.0 and others (images), GPL-3 or later (texts)",
    attribution=(
        "Endless Sky, copyright Michael Zahniser and contributors. Pictures are under CC BY-SA 4.0, CC BY-SA 3.0 or in "
        "the public domain; COPYRIGHT-endless-sky-data.txt names the artist and the licence of each file. "
        "Texts: GNU General Public License, version 3 or later."
    ),
    packages=(PACKAGES[PACKAGE_NAME],),
    split_by=(
        "Entries that share a picture or a text, or whose pictures nearly look alike, stand in one split (many planets "
        "share a landscape). `metadata.kind` is ship, outfit or planet."
    ),
    build=build_samples,
)
