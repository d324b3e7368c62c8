"""Corpus endless-sky: ships, outfits and planets of the game, with picture, name and description.

Entries that share a picture, whose pictures look alike, or whose texts are the same, are in one
split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlduet.corpora import build
from vlduet.corpora.build import CorpusImage, CorpusSample, PackageFolders
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import UnionFind, fingerprint_image
from vlduet.logs import track_progress

PACKAGE_NAME = "endless-sky-data"
TEST_SHARE = 0.15
VAL_SHARE = 0.08

_TOKEN = re.compile(r"`([^`]*)`|\"([^\"]*)\"|(\S+)")
# Keys that name the picture of each kind of entry, in the order of preference.
_PICTURE_KEYS = {
    "ship": ("thumbnail", "sprite"),
    "outfit": ("thumbnail",),
    "planet": ("landscape",),
}
# Sprites are animated: the first frame's number may follow the name, after the blending mode.
_FIRST_FRAMES = (
    "{}.png", "{}.jpg", "{}+0.png", "{}-0.png", "{}~0.png", "{}=0.png", "{}+.png", "{}-00.png",
    "{}+00.png",
)  # fmt: skip


@dataclass(slots=True)
class DataNode:
    """One line of a data file, and the lines that are indented below it."""

    tokens: list[str]
    """Words of the line, without the quotes around them."""
    children: list[DataNode] = field(default_factory=list)

    def first_value(self, key: str) -> str:
        """Return the second token of the first child line with that key; empty if none has one."""
        values = (c.tokens[1] for c in self.children if c.tokens[0] == key and len(c.tokens) > 1)
        return next(values, "")


@dataclass(frozen=True, slots=True)
class GameEntry:
    """A ship, an outfit or a planet."""

    kind: str
    """``ship``, ``outfit`` or ``planet``."""
    name: str
    description: str
    source: Path
    """Picture file."""
    metadata: dict[str, Any]


def build_samples(folders: PackageFolders) -> Iterator[CorpusSample]:
    """Yield a pair for every entry, in the order of `read_entries`.

    All pictures are read before the first pair, and progress is logged. Raises ImageError for a
    broken one, and KeyError if `folders` lacks the package.
    """
    root = folders[PACKAGE_NAME] / "usr/share/games/endless-sky"
    entries = list(read_entries(root))
    groups = UnionFind(len(entries))
    groups.union_equal(entry.source for entry in entries)
    groups.union_equal(build.normalize_caption(entry.description) for entry in entries)
    # "Marauder Falcon" nearly equals "Falcon", in text and picture.
    groups.union_equal((entry.kind, _strip_variant(entry.name)) for entry in entries)
    fingerprints = [
        fingerprint_image(ImageRef(path=entry.source))
        for entry in track_progress(entries, label="reading images")
    ]
    groups.union_near_duplicates(fingerprints)
    names = [f"{entry.kind}:{entry.name}" for entry in entries]
    splits = build.assign_group_splits(
        groups, names, corpus="endless-sky", test=TEST_SHARE, val=VAL_SHARE
    )
    for entry, split in zip(entries, splits, strict=True):
        yield CorpusSample(_make_record(entry, root), split)


def _make_record(entry: GameEntry, root: Path) -> dict[str, Any]:
    """Return the pair record of one entry, with the id ``KIND/NAME``.

    Its image is ``images/SLUG.SUFFIX``: the slug of the picture's path below ``root/images`` with
    ``__`` for ``/``, and the picture's own suffix. `root` is the game's folder.
    """
    path = entry.source.relative_to(root / "images")
    image_name = build.slugify(path.with_suffix("").as_posix().replace("/", "__"))
    return {
        "id": f"{entry.kind}/{entry.name}",
        "image": CorpusImage(f"images/{image_name}{path.suffix}", entry.source),
        "short": entry.name,
        "long": entry.description,
        "metadata": {"kind": entry.kind, **entry.metadata},
    }


def _strip_variant(name: str) -> str:
    """Return a ship's name without the prefix Marauder and without a variant in parentheses."""
    return re.sub(r"^Marauder | \([^)]*\)$", "", name)


def read_entries(root: Path) -> Iterator[GameEntry]:
    """Yield every ship, outfit and planet that has a picture and a description.

    The order is that of the sorted files. Variants of ships, which have two names, are left out.
    Of entries with the same kind and name, only the first complete one is read. Invalid UTF-8 is
    replaced; a missing folder gives nothing.

    Args:
        root: The game's folder, with ``data`` and ``images``.
    """
    names = set()
    for path in sorted((root / "data").rglob("*.txt")):
        for node in parse_nodes(path.read_text(encoding="utf-8", errors="replace")):
            # A ship with two names is a variant: the same picture and text with other outfits.
            if node.tokens[0] not in _PICTURE_KEYS or len(node.tokens) != 2:
                continue
            kind, name = node.tokens
            description = _read_description(node)
            source = _find_picture(root / "images", node, kind)
            if (kind, name) in names or not description or source is None:
                continue
            names.add((kind, name))
            yield GameEntry(kind, name, description, source, _read_metadata(node, kind))


def _read_description(node: DataNode) -> str:
    """Return the description lines of an entry as paragraphs, with an empty line in between.

    An entry without any gives "".
    """
    lines = [c for c in node.children if c.tokens[0] == "description" and len(c.tokens) > 1]
    paragraphs = [" ".join(line.tokens[1].split()) for line in lines]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _find_picture(image_folder: Path, node: DataNode, kind: str) -> Path | None:
    """Return the picture of an entry, the first frame of an animated one.

    It is the first existing file for the keys that `_PICTURE_KEYS` lists for `kind`; None if there
    is none.
    """
    for key in _PICTURE_KEYS[kind]:
        value = node.first_value(key)
        for pattern in _FIRST_FRAMES:
            path = image_folder / pattern.format(value)
            if value and path.is_file():
                return path
    return None


def _read_metadata(node: DataNode, kind: str) -> dict[str, Any]:
    """Return the facts that an entry states; what it does not state is missing.

    The keys are ``category``, ``cost`` (int; only if it consists of digits) and, for a planet,
    ``attributes`` (list of texts). A ship states them in its block ``attributes``.
    """
    metadata: dict[str, Any] = {}
    attributes = [child for child in node.children if child.tokens[0] == "attributes"]
    if kind == "planet":
        metadata["attributes"] = [token for child in attributes for token in child.tokens[1:]]
    facts = attributes[0] if kind == "ship" and attributes else node
    metadata["category"] = facts.first_value("category")
    cost = facts.first_value("cost")
    if re.fullmatch(r"\d+", cost):
        metadata["cost"] = int(cost)
    return {key: value for key, value in metadata.items() if value}


def parse_nodes(text: str) -> list[DataNode]:
    """Return the top-level nodes of a data file.

    The depth of a line is the number of its leading white-space characters; a line is a child of
    the nearest line above that is less deep. Empty lines and lines that begin with # are ignored.
    Never raises; an empty text gives [].
    """
    root = DataNode([])
    stack: list[tuple[int, DataNode]] = [(-1, root)]
    for line in text.splitlines():
        content = line.lstrip()
        if not content or content.startswith("#"):
            continue
        depth = len(line) - len(content)
        # Each match has one non-empty group: the text in backquotes, in quotes, or without.
        node = DataNode([a or b or c for a, b, c in _TOKEN.findall(content)])
        while stack[-1][0] >= depth:
            stack.pop()
        stack[-1][1].children.append(node)
        stack.append((depth, node))
    return root.children
