"""What all corpora share: samples with pictures, splits by content, SVG rendering, and the writing of the folder.

A builder turns unpacked packages into `Sample`s. `write` makes of them

    train.jsonl  val.jsonl  test.jsonl    records, images by path relative to the file
    images/...                            PNG or JPEG, at most MAX_SIDE pixels a side; SVG drawings rendered on white
    COPYRIGHT-*.txt                       what the packages say of their artists and licences
    README.md                             what it is, licence, attribution, source, counts, how it was split
    manifest.json                         packages with their hashes, and the SHA-256 of every file

with the same bytes every time.
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
from typing import Any, Protocol, TypeVar

from vlduet.corpora.packages import Package
from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.errors import ImageError, MissingExtraError

MAX_IMAGE_SIDE = 512
DEFAULT_SVG_HEIGHT = 256
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class CorpusImage:
    """An image of a corpus that is still in its package."""

    name: str
    """Its path in the corpus, ``images/....png``."""
    source: Path | bytes
    """A file of the package, or encoded PNG."""
    height: int = DEFAULT_SVG_HEIGHT
    """Pixels that an SVG drawing is rendered to."""

    def encode(self) -> bytes:
        """PNG or JPEG bytes as they will be written."""
        return (
            self.source
            if isinstance(self.source, bytes)
            else encode_image(self.source, height=self.height)
        )


@dataclass(frozen=True, slots=True)
class CorpusSample:
    """One record in JSON form, with `Picture`s where paths will stand, and the split it belongs to."""

    record: dict[str, Any]
    split: str

    def images(self) -> list[CorpusImage]:
        """Every picture of the record."""
        found: list[CorpusImage] = []

        def walk(value: Any) -> None:
            if isinstance(value, CorpusImage):
                found.append(value)
            elif isinstance(value, Mapping):
                for item in value.values():
                    walk(item)
            elif isinstance(value, list | tuple):
                for item in value:
                    walk(item)

        walk(self.record)
        return found


PackageFolders = Mapping[str, Path]
"""Package name -> its unpacked folder."""

T = TypeVar("T")


class Watch(Protocol):
    """Wraps a long loop, for a progress bar: gives back the items it is given."""

    def __call__(self, items: Sequence[T], label: str) -> Iterable[T]: ...


def unwatched(items: Sequence[T], label: str) -> Iterable[T]:
    """No progress bar."""
    return items


@dataclass(frozen=True)
class Corpus:
    """A real corpus and where it comes from."""

    name: str
    title: str
    """What it is, in one sentence."""
    licence: str
    attribution: str
    packages: tuple[Package, ...]
    split_by: str
    """How leakage between the splits is kept out, in one sentence."""
    build: Callable[[PackageFolders, Watch], Iterable[CorpusSample]] = field(repr=False)
    version: int = 1
    """Raised whenever the builder makes other bytes of the same packages."""
    optional: tuple[Package, ...] = ()
    """Left out where they cannot be fetched."""


@dataclass(frozen=True, slots=True)
class CorpusSummary:
    """What `fetch` wrote."""

    name: str
    folder: Path
    counts: Mapping[str, int]
    """Records by split."""
    num_images: int
    licence: str
    reused: bool
    """True when the folder was there, complete and made of the same packages."""


# --- splits ----------------------------------------------------------------------------------------


def assign_split(group: str, *, test: float, val: float) -> str:
    """train, val or test for a whole group, from the hash of its name: no seed, no order, no neighbours matter."""
    place = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    return "test" if place < test else "val" if place < test + val else "train"


def normalize_caption(text: str) -> str:
    """A caption for comparing: case, punctuation and white space given up."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w$€£¥%+=<>≤≥≠÷×−-]+", " ", text).split())


def slugify(text: str) -> str:
    """A file name that every system takes: lower-case ASCII letters, digits, - and _."""
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9_]+", "-", text).strip("-") or "x"


# --- pictures --------------------------------------------------------------------------------------


def render_svg(source: Path, *, height: int = DEFAULT_SVG_HEIGHT) -> bytes:
    """An SVG drawing of a trusted package -> PNG bytes on white. System fonts are not used: equal bytes everywhere.

    Raises:
        ImageError: it cannot be rendered.
    """
    try:
        import resvg_py
    except ImportError:
        raise MissingExtraError(
            "rendering SVG needs resvg-py", fix="pip install resvg-py"
        ) from None
    try:
        # Without dpi, sizes in mm and pt come out as nothing and some drawings fail.
        data = resvg_py.svg_to_bytes(
            svg_path=str(source),
            height=height,
            dpi=96,
            background="#ffffff",
            skip_system_fonts=True,
        )
    except ValueError as error:
        raise ImageError(f"the drawing cannot be rendered ({error})", place=source) from None
    return bytes(data)


def encode_image(source: Path, *, height: int = DEFAULT_SVG_HEIGHT) -> bytes:
    """A package's image as PNG or JPEG bytes: copied as it is where that is small enough, else scaled."""
    if source.suffix == ".svg":
        return render_svg(source, height=height)
    data = source.read_bytes()
    image = images.load_image(ImageRef(path=source))
    kind = images.detect_image_format(data[:512])
    if max(image.size) <= MAX_IMAGE_SIDE and kind in ("PNG", "JPEG"):
        return data
    small = images.scale_down(image, MAX_IMAGE_SIDE)
    return images.encode_jpeg(small) if kind == "JPEG" else images.encode_png(small)


# --- the folder ------------------------------------------------------------------------------------


def write_corpus(
    corpus: Corpus,
    samples: Sequence[CorpusSample],
    *,
    packages: Sequence[Package],
    folder: Path,
    notices: Mapping[str, bytes] | None = None,
    watch: Watch = unwatched,
) -> CorpusSummary:
    """Write the whole folder.

    Args:
        samples: in the order of their records.
        packages: those that were really used.
        folder: new or empty.
        notices: more files, by name: the packages' own copyright files.
        watch: wraps the loop over pictures.
    """
    hashes: dict[str, str] = {}

    def put(name: str, data: bytes) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        hashes[name] = hashlib.sha256(data).hexdigest()

    pictures = {picture.name: picture for sample in samples for picture in sample.images()}
    assert len({name.lower() for name in pictures}) == len(pictures), (
        "names differ in more than case"
    )
    for picture in watch(list(pictures.values()), f"writing {corpus.name}"):
        put(picture.name, picture.encode())
    counts = Counter(sample.split for sample in samples)
    for split in SPLITS:
        lines = [_line(sample.record) for sample in samples if sample.split == split]
        put(f"{split}.jsonl", "".join(lines).encode())
    for name, data in (notices or {}).items():
        put(name, data)
    put("README.md", _readme(corpus, packages, counts, len(pictures)).encode())
    manifest = {
        **describe_origin(corpus, packages),
        "records": {split: counts[split] for split in SPLITS},
        "images": len(pictures),
        "files": dict(sorted(hashes.items())),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return summarize_manifest(corpus, folder, manifest, reused=False)


def describe_origin(corpus: Corpus, packages: Sequence[Package]) -> dict[str, Any]:
    """The part of the manifest that says what a folder was made of."""
    made_of = [
        {"kind": p.kind, "name": p.name, "version": p.version, "sha256": p.sha256} for p in packages
    ]
    return {
        "corpus": corpus.name,
        "version": corpus.version,
        "licence": corpus.licence,
        "packages": made_of,
    }


def summarize_manifest(
    corpus: Corpus, folder: Path, manifest: Mapping[str, Any], *, reused: bool
) -> CorpusSummary:
    """What a manifest says, for people and for --json."""
    return CorpusSummary(
        corpus.name, folder, manifest["records"], manifest["images"], corpus.licence, reused
    )


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, default=lambda picture: picture.name) + "\n"


def _readme(
    corpus: Corpus, packages: Sequence[Package], counts: Counter[str], num_images: int
) -> str:
    rows = "\n".join(f"| {split} | {counts[split]} |" for split in SPLITS)
    sources = "\n".join(f"- {package} (SHA-256 `{package.sha256}`)" for package in packages)
    return f"""# {corpus.name}

{corpus.title}

Written by `vlduet data fetch {corpus.name}`; the same packages give the same bytes. `manifest.json` holds the
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
