"""Lists of what the base model was trained on, and of what everything else trains on or tests with.

    python experiments/nano/lists.py --data data

writes the second list, ``lists/evaluated.*``: all images and short texts of every corpus and of
every split except ``base``. ``base.py`` writes the first, ``lists/base.*``, as it trains. The two
must have nothing in common (`find_overlaps`), which a test checks on the committed files.

A list has two files. ``NAME.npz`` has three numbers for each distinct image, sorted by the first:
``file_hashes`` uint64[N], the first 64 bits of the SHA-256 of the file; ``perceptual_hashes``
uint64[N] and ``colours`` uint8[N, 192], both of `fingerprint_image`. ``NAME.txt.gz`` has a text in
each line, sorted, as `caption_key` returns it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlduet.corpora.build import BASE_SPLIT
from vlduet.corpora.catalog import CORPORA, fetch_corpus
from vlduet.data.formats import read_jsonl
from vlduet.data.records import ImageRef, Record, iter_labelled_parts
from vlduet.data.tools.duplicates import (
    ImageFingerprint,
    find_near_duplicates,
    fingerprint_image,
)
from vlduet.demo.prepare import caption_key
from vlduet.logs import install_log_handler, logger, track_progress

LISTS = Path(__file__).parent / "lists"
EVALUATED = LISTS / "evaluated"
"""List of what demo, configs, experiments and benchmarks train on or test with, without suffix."""
BASE = LISTS / "base"
"""List of what the base model was trained on, without suffix."""
MAX_TEXT_CHARS = 60
"""Longest text of a document that is listed; captions and names of any length are."""
ANSWER_FIELDS = (
    "name", "capital", "territory", "regions", "place",
    "group", "subgroup", "category", "race", "alignment", "kind",
)  # fmt: skip
"""Metadata that the built-in benchmarks ask for."""


@dataclass(frozen=True, slots=True)
class ItemList:
    """Images and texts of some data, for comparisons with other data."""

    file_hashes: frozenset[int]
    """First 64 bits of the SHA-256 of every image file."""
    fingerprints: list[ImageFingerprint]
    """Appearance of every image, in the order of its file hash."""
    captions: frozenset[str]
    """Captions, names, labels and short texts, as `caption_key` returns them."""


# ------------------------------------------------------------------ files


def load_evaluated_list() -> ItemList:
    """Return the committed list of what the base must not contain."""
    return read_item_list(EVALUATED)


def write_seen_list(images: Iterable[ImageRef], texts: Iterable[str]) -> None:
    """Write the list of what the base is trained on, replacing an earlier one.

    Args:
        images: Image files; one that appears twice is listed once.
        texts: Captions, names, words and questions, in any form; `caption_key` is applied.

    Raises:
        ImageError: An image cannot be decoded.
    """
    write_item_list(BASE, images, texts)


def write_item_list(path: Path, images: Iterable[ImageRef], texts: Iterable[str]) -> None:
    """Write the two files of a list, see the module. The same content gives the same bytes.

    Args:
        path: Path without suffix; its folder is created.
        images: Image files, decoded for their fingerprints; progress is logged.
        texts: Texts to normalise; those of which nothing is left are dropped.

    Raises:
        AssertionError: An image is not a file.
        ImageError: An image cannot be decoded.
    """
    fingerprints: dict[int, ImageFingerprint] = {}
    for ref in track_progress(list(images), label=f"fingerprints of {path.name}"):
        assert ref.path is not None, "only image files are listed"
        file_hash = hash_file(ref.path)
        if file_hash not in fingerprints:
            fingerprints[file_hash] = fingerprint_image(ref)
    ordered = sorted(fingerprints)
    colours = b"".join(fingerprints[file_hash].colours for file_hash in ordered)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path.with_suffix(".npz"),
        file_hashes=np.array(ordered, np.uint64),
        perceptual_hashes=np.array([fingerprints[key].hash for key in ordered], np.uint64),
        colours=np.frombuffer(colours, np.uint8).reshape(len(ordered), 192),
    )
    keys = sorted({caption_key(text) for text in texts} - {""})
    content = "".join(f"{key}\n" for key in keys).encode()
    path.with_suffix(".txt.gz").write_bytes(gzip.compress(content, mtime=0))
    logger.info(f"{path}: {len(ordered)} images, {len(keys)} texts")


def read_item_list(path: Path) -> ItemList:
    """Return the list in the two files of `path`, a path without suffix.

    Raises:
        FileNotFoundError: One of the files is missing.
    """
    with np.load(path.with_suffix(".npz")) as arrays:
        file_hashes = arrays["file_hashes"].tolist()
        perceptual_hashes = arrays["perceptual_hashes"].tolist()
        colours = arrays["colours"]
    fingerprints = [
        ImageFingerprint(perceptual_hash, row.tobytes())
        for perceptual_hash, row in zip(perceptual_hashes, colours, strict=True)
    ]
    text = gzip.decompress(path.with_suffix(".txt.gz").read_bytes()).decode()
    return ItemList(frozenset(file_hashes), fingerprints, frozenset(text.splitlines()))


def hash_file(path: Path) -> int:
    """Return the first 64 bits of the SHA-256 of a file."""
    return int.from_bytes(hashlib.sha256(path.read_bytes()).digest()[:8], "big")


# ------------------------------------------------------------------ comparison


def find_overlaps(base: ItemList, evaluated: ItemList) -> list[str]:
    """Return a line for every image or text that two lists have in common; [] if they have none.

    Images are compared by the hashes of their files, and by `find_near_duplicates`.
    """
    equal_files = sorted(base.file_hashes & evaluated.file_hashes)
    near = find_near_duplicates(base.fingerprints, evaluated.fingerprints)
    return [
        *(f"the image file {file_hash:016x} is in both lists" for file_hash in equal_files),
        *(f"image {i} of the base looks like image {j} of the evaluated ones" for i, j in near),
        *(
            f"the text '{text}' is in both lists"
            for text in sorted(base.captions & evaluated.captions)
        ),
    ]


# ------------------------------------------------------------------ corpora


def list_texts(record: Record) -> Iterator[str]:
    """Yield the captions of a record, its short texts, and the answers in its metadata.

    Texts of other fields than captions are left out if they have over `MAX_TEXT_CHARS` characters.
    """
    for label, part in iter_labelled_parts(record):
        if isinstance(part, str) and (label == "short" or len(part) <= MAX_TEXT_CHARS):
            yield part
    for field in ANSWER_FIELDS:
        value = record.metadata.get(field, ())
        yield from [value] if isinstance(value, str) else value
    # Stamps are asked for the first folder of their category.
    yield str(record.metadata.get("category", "")).split("/")[0]


def read_evaluated_records(data: Path) -> Iterator[Record]:
    """Yield all records of all corpora, the split ``base`` excepted.

    Corpora that ``data`` lacks are written first. Raises as `fetch_corpus`.
    """
    for name in CORPORA:
        summary = fetch_corpus(name, data)
        for split in summary.counts:
            if split != BASE_SPLIT:
                yield from read_jsonl(summary.folder / f"{split}.jsonl")


def main() -> None:
    """Write the list of what demo, configs, experiments and benchmarks train on or test with."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora")
    options = parser.parse_args()
    install_log_handler()
    records = list(read_evaluated_records(options.data))
    refs = [ref for record in records for ref in record.images()]
    texts = [text for record in records for text in list_texts(record)]
    write_item_list(EVALUATED, refs, texts)


if __name__ == "__main__":
    main()
