"""Corpus gimp-help: pages of GIMP's user manual, paragraphs and screenshots in reading order.

Pages that share an image, directly or through other pages, are in one split. Icons do not count as
images, and neither do pictures on many pages: one photo of the Taj Mahal would put a third of the
manual into one group.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from vlduet.corpora import build
from vlduet.corpora.build import CorpusImage, CorpusSample, PackageFolders
from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import UnionFind, find_near_duplicates, fingerprint_image
from vlduet.errors import ImageError
from vlduet.logs import track_progress

PACKAGE_NAME = "gimp-help-en"
TEST_SHARE = 0.15
VAL_SHARE = 0.08
MIN_IMAGES = 2
"""Number of distinct images below which a page is left out."""
MIN_SIDE = 64
"""Pixels of the shorter side below which an image is an icon."""
MAX_PAGES = 8
"""Number of pages above which an image that they share counts as decoration."""

# Navigation, notes beside the text, and lists of links.
_SKIPPED_CLASSES = frozenset(
    {"navheader", "navfooter", "toc", "indexterm", "note", "tip", "warning", "caution", "important"}
)
_SKIPPED_TAGS = frozenset({"script", "style", "head", "pre"})
_BLOCK_TAGS = frozenset(
    {"p", "li", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "h6", "td", "th", "div", "tr", "table"}
    | {"dl", "ul", "ol"}
)
# Elements without an end tag.
_VOID_TAGS = frozenset({"img", "br", "hr", "meta", "link", "input", "col"})


@dataclass(slots=True)
class ManualPage:
    """One HTML page of the manual."""

    name: str
    """File name without suffix."""
    parts: list[str | Path] = field(default_factory=list)
    """Paragraphs, and image files, in reading order."""


class _PageParser(HTMLParser):
    """HTML parser that appends paragraphs and images to a page, without skipped elements."""

    def __init__(self, page: ManualPage, root: Path):
        """Prepare for `feed`, which modifies `page`; image paths are relative to `root`."""
        super().__init__(convert_charrefs=True)
        self.page = page
        self.root = root
        self.open_tags: list[str] = []
        self.skip_depth = 0
        """Number of open elements, with the skipped one itself; 0 outside a skipped element."""
        self.fragments: list[str] = []
        """Text of the current paragraph so far."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin an element: end the paragraph at blocks and line breaks, append images.

        An image is appended if its file exists, unless it is a button (class guiicon) or inside an
        element of `_SKIPPED_TAGS` or `_SKIPPED_CLASSES`, whose content is ignored until it ends.
        """
        attributes = {key: value or "" for key, value in attrs}
        classes = attributes.get("class", "")
        if tag in _BLOCK_TAGS or tag == "br":
            self.end_paragraph()
        if tag not in _VOID_TAGS:
            self.open_tags.append(tag)
            is_skipped_class = not _SKIPPED_CLASSES.isdisjoint(classes.split())
            if (tag in _SKIPPED_TAGS or is_skipped_class) and not self.skip_depth:
                self.skip_depth = len(self.open_tags)
        elif tag == "img" and not self.skip_depth:
            path = self.root / attributes.get("src", "")
            # Images of the class guiicon are buttons in the middle of a sentence.
            if "guiicon" not in classes and path.is_file():
                self.end_paragraph()
                self.page.parts.append(path)

    def handle_endtag(self, tag: str) -> None:
        """End an element, and all unclosed elements inside it.

        A block ends the paragraph. An end tag without a begin is otherwise ignored.
        """
        if tag in _BLOCK_TAGS:
            self.end_paragraph()
        if tag in self.open_tags:
            while self.open_tags.pop() != tag:
                pass
            if len(self.open_tags) < self.skip_depth:
                self.skip_depth = 0

    def handle_data(self, data: str) -> None:
        """Add text to the current paragraph."""
        if not self.skip_depth:
            self.fragments.append(data)

    def end_paragraph(self) -> None:
        """Append the paragraph to the page unless it has fewer than two characters; begin anew."""
        text = " ".join("".join(self.fragments).split())
        self.fragments.clear()
        if len(text) > 1:
            self.page.parts.append(text)


def read_page(path: Path) -> ManualPage:
    """Return the paragraphs and images of one HTML file, named after its stem.

    Navigation, notes, code and images that do not exist are left out; an empty page has no parts.
    Raises OSError for a missing file and UnicodeDecodeError for one that is not UTF-8.
    """
    page = ManualPage(path.stem)
    parser = _PageParser(page, path.parent)
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    parser.end_paragraph()
    return page


def build_samples(folders: PackageFolders) -> Iterator[CorpusSample]:
    """Yield an interleaved record for every page with `MIN_IMAGES` distinct images, by file name.

    Icons, broken images and images on more than `MAX_PAGES` pages do not count and are left out.
    All pages and images are read before the first record, and progress is logged. Raises KeyError
    if `folders` lacks the package.
    """
    root = folders[PACKAGE_NAME] / "usr/share/gimp/2.0/help/en"
    pages = [read_page(path) for path in sorted(root.glob("*.html"))]
    hashes = _hash_images(pages)
    num_pages = Counter(key for page in pages for key in _index_page_images(page, hashes))
    # Without the images that too many pages share.
    hashes = {path: key for path, key in hashes.items() if num_pages[key] <= MAX_PAGES}
    pages = [page for page in pages if len(set(_index_page_images(page, hashes))) >= MIN_IMAGES]
    for page, split in zip(pages, _assign_page_splits(pages, hashes), strict=True):
        parts: list[dict[str, Any]] = []
        for part in page.parts:
            if isinstance(part, str):
                parts.append({"text": part})
            elif part in hashes:
                parts.append({"image": _make_image(part, root)})
        num_images = sum("image" in part for part in parts)
        record = {"id": page.name, "parts": parts, "metadata": {"images": num_images}}
        yield CorpusSample(record, split)


def _hash_images(pages: list[ManualPage]) -> dict[Path, str]:
    """Return the SHA-256 of every image file, without icons and images that cannot be decoded.

    The files are in the order of their paths. Progress is logged.
    """
    paths = {part for page in pages for part in page.parts if isinstance(part, Path)}
    hashes: dict[Path, str] = {}
    for path in track_progress(sorted(paths), label="reading images"):
        try:
            size = images.load_image(ImageRef(path=path)).size
        except ImageError:
            continue  # the manual contains an animation that cannot be decoded
        if min(size) >= MIN_SIDE:
            hashes[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


def _index_page_images(page: ManualPage, hashes: dict[Path, str]) -> dict[str, Path]:
    """Return the first file of each distinct image of a page by its hash, in reading order.

    Files that are not in `hashes` are left out.
    """
    paths: dict[str, Path] = {}
    for part in page.parts:
        if isinstance(part, Path) and part in hashes:
            paths.setdefault(hashes[part], part)
    return paths


def _assign_page_splits(pages: list[ManualPage], hashes: dict[Path, str]) -> list[str]:
    """Return the split of each page, in their order, the same for pages that images connect.

    Equal images and near-duplicate ones connect the pages that contain them. Images that are not in
    `hashes` do not count; the others are opened, and a missing or broken one raises ImageError.
    """
    groups = UnionFind(len(pages))
    first_page: dict[str, int] = {}
    first_path: dict[str, Path] = {}
    for i, page in enumerate(pages):
        for key, path in _index_page_images(page, hashes).items():
            groups.union(first_page.setdefault(key, i), i)
            first_path.setdefault(key, path)
    keys = sorted(first_path)
    fingerprints = [fingerprint_image(ImageRef(path=first_path[key])) for key in keys]
    for i, j in find_near_duplicates(fingerprints):
        groups.union(first_page[keys[i]], first_page[keys[j]])
    names = [page.name for page in pages]
    return build.assign_group_splits(
        groups, names, corpus="gimp-help", test=TEST_SHARE, val=VAL_SHARE
    )


def _make_image(path: Path, root: Path) -> CorpusImage:
    """Return an image of the manual under its name in the corpus.

    The name is ``images/SLUG.jpg`` for JPEG files, else ``images/SLUG.png``. SLUG is the slug of
    the path below `root` (the manual's folder) without ``images/``, with ``__`` for ``/``.
    """
    relative = path.relative_to(root).with_suffix("").as_posix()
    name = build.slugify(relative.removeprefix("images/").replace("/", "__"))
    suffix = "jpg" if path.suffix in (".jpg", ".jpeg") else "png"
    return CorpusImage(f"images/{name}.{suffix}", path)
