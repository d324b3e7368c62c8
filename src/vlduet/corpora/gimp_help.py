"""gimp-help: the chapters of GIMP's user manual as interleaved records, paragraphs and screenshots in reading order.

Pages that share an image, directly or through other pages, stand in one split. Icons are no images here, and neither are
pictures that a great many pages share (one photo of the Taj Mahal would make one group of a third of the manual).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

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
from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import UnionFind, find_near_duplicates, fingerprint_image
from vlduet.errors import ImageError

PACKAGE_NAME = "gimp-help-en"
TEST_SHARE, VAL_SHARE = 0.15, 0.08
MIN_IMAGES = 2
MIN_SIDE = 64
"""Pixels of the shorter side below which an image is an icon."""
MAX_PAGES = 8
"""Pages that may share an image before it is taken for decoration."""

# Boilerplate around every page, and lists of links.
_SKIPPED_CLASSES = frozenset(
    {"navheader", "navfooter", "toc", "indexterm", "note", "tip", "warning", "caution", "important"}
)
_SKIPPED_TAGS = frozenset({"script", "style", "head", "pre"})
_BLOCKS = frozenset(
    {
        "p",
        "li",
        "dt",
        "dd",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "td",
        "th",
        "div",
        "tr",
        "table",
        "dl",
        "ul",
        "ol",
    }
)
_VOID = frozenset({"img", "br", "hr", "meta", "link", "input", "col"})


@dataclass(slots=True)
class ManualPage:
    """One page: texts, and images by their path below the page's folder."""

    name: str
    title: str = ""
    parts: list[str | Path] = field(default_factory=list)


class _Reader(HTMLParser):
    """Collects paragraphs and images in their order; whatever stands inside a skipped element is left out."""

    def __init__(self, page: ManualPage, root: Path):
        super().__init__(convert_charrefs=True)
        self.page, self.root = page, root
        self.open: list[str] = []
        self.skipping = 0
        """How many elements were open when the skipped one began; 0 when nothing is skipped."""
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        if tag in _BLOCKS or tag == "br":
            self.flush()
        if tag not in _VOID:
            self.open.append(tag)
            skipped = tag in _SKIPPED_TAGS or not _SKIPPED_CLASSES.isdisjoint(
                values.get("class", "").split()
            )
            if skipped and not self.skipping:
                self.skipping = len(self.open)
        elif tag == "img" and not self.skipping:
            path = self.root / values.get("src", "")
            # Inline pictures are buttons in the middle of a sentence.
            if "guiicon" not in values.get("class", "") and path.is_file():
                self.flush()
                self.page.parts.append(path)

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS:
            self.flush()
        if tag in self.open:
            while self.open.pop() != tag:
                pass
            if len(self.open) < self.skipping:
                self.skipping = 0

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.words.append(data)

    def flush(self) -> None:
        """End the paragraph."""
        text = " ".join("".join(self.words).split())
        self.words.clear()
        if len(text) > 1:
            self.page.parts.append(text)


def read_page(path: Path) -> ManualPage:
    """The paragraphs and images of one page."""
    page = ManualPage(path.stem)
    reader = _Reader(page, path.parent)
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    reader.flush()
    return page


def build_samples(folders: PackageFolders, watch: Watch) -> Iterator[CorpusSample]:
    """All pages with at least two real images, in the order of their names."""
    root = folders[PACKAGE_NAME] / "usr/share/gimp/2.0/help/en"
    pages = [read_page(path) for path in sorted(root.glob("*.html"))]
    keys = _content(pages, watch)
    shared = Counter(key for page in pages for key in {keys[p] for p in page.parts if p in keys})
    kept = {path for path, key in keys.items() if shared[key] <= MAX_PAGES}
    pages = [
        page for page in pages if len({keys[p] for p in page.parts if p in kept}) >= MIN_IMAGES
    ]
    for page, split in zip(pages, _splits(pages, keys, kept), strict=True):
        parts: list[dict[str, Any]] = []
        for part in page.parts:
            if isinstance(part, str):
                parts.append({"text": part})
            elif part in kept:
                parts.append({"image": _picture(part, root)})
        num_images = sum("image" in part for part in parts)
        yield CorpusSample(
            {"id": page.name, "parts": parts, "metadata": {"images": num_images}}, split
        )


def _content(pages: list[ManualPage], watch: Watch) -> dict[Path, str]:
    """Image -> hash of its content, icons and undecodable ones left out."""
    found: dict[Path, str] = {}
    for path in watch(
        sorted({part for page in pages for part in page.parts if isinstance(part, Path)}),
        "reading images",
    ):
        try:
            if min(images.load_image(ImageRef(path=path)).size) >= MIN_SIDE:
                found[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        except ImageError:
            continue  # the manual holds an animation that nobody could decode
    return found


def _splits(pages: list[ManualPage], keys: dict[Path, str], kept: set[Path]) -> list[str]:
    """The split of each page, by connected component of shared and near-duplicate images."""
    groups = UnionFind(len(pages))
    holders: dict[str, int] = {}
    paths: dict[str, Path] = {}
    for i, page in enumerate(pages):
        for part in page.parts:
            if isinstance(part, Path) and part in kept:
                groups.union(holders.setdefault(keys[part], i), i)
                paths.setdefault(keys[part], part)
    names = sorted(paths)
    for one, other in find_near_duplicates(
        [fingerprint_image(ImageRef(path=paths[name])) for name in names]
    ):
        groups.union(holders[names[one]], holders[names[other]])
    split: dict[int, str] = {}
    for members in groups.groups():
        name = min(pages[i].name for i in members)
        split |= dict.fromkeys(
            members, assign_split(f"gimp-help:{name}", test=TEST_SHARE, val=VAL_SHARE)
        )
    return [split[i] for i in range(len(pages))]


def _picture(path: Path, root: Path) -> CorpusImage:
    inside = path.relative_to(root)
    name = slugify(inside.with_suffix("").as_posix().removeprefix("images/").replace("/", "__"))
    return CorpusImage(
        f"images/{name}.{'jpg' if path.suffix in ('.jpg', '.jpeg') else 'png'}", path
    )


CORPUS = Corpus(
    name="gimp-help",
    title="Pages of GIMP's user manual with at least two images: paragraphs and screenshots in reading order.",
    licence="GFDL 1.2 or later",
    attribution=(
        "GNU Image Manipulation Program User Manual, copyright 2002-2022 the GIMP Documentation Team. Permission is "
        "granted to copy, distribute and modify it under the terms of the GNU Free Documentation License, version 1.2 or "
        "any later version, with no Invariant Sections, no Front-Cover Texts and no Back-Cover Texts."
    ),
    packages=(PACKAGES[PACKAGE_NAME],),
    split_by=(
        "Pages that share an image or hold near-duplicate ones, directly or through other pages, stand in one split. "
        f"Icons (under {MIN_SIDE} pixels) and images that more than {MAX_PAGES} pages share are left out."
    ),
    build=build_samples,
)
