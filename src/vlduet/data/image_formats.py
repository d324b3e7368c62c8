"""Formats of images by their first bytes and by the names of files; nothing is decoded here.

The bytes decide what an image is. Names only save the opening of files: a name that ends as images
do is taken for an image, and one that ends as texts and tables do is not. Other files are opened.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

HEAD_BYTES = 512
"""Number of first bytes of a file that tell its format."""
HEIC_FORMAT = "HEIC"
"""Format that is decoded only with the extra ``heic``, which `can_decode_heic` looks for."""
DECODED_FORMATS = ("AVIF", "BMP", "GIF", HEIC_FORMAT, "JPEG", "PNG", "TIFF", "WEBP")
"""Names of `detect_image_format` that are decoded; all others are refused."""
HEIC_MESSAGE = "a HEIC image, which needs the extra vlduet[heic]"
"""Message of the error of a HEIC or HEIF image without the extra."""
HEIC_FIX = 'Run: pip install "vlduet[heic]", or convert it to JPEG'
"""What helps against a HEIC or HEIF image without the extra."""
HEIC_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
"""Endings of file names, in lower case, that mean HEIC or HEIF, though cameras and people err."""
IMAGE_SUFFIXES = HEIC_SUFFIXES | frozenset(
    {
        *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib"),
        *(".tif", ".tiff", ".avif"),
    }
)
"""Endings of file names, in lower case, that mean an image in a folder or an archive."""
UNOPENED_SUFFIXES = frozenset(
    {
        # Texts, tables and archives: there may be one beside every image.
        *(".txt", ".caption", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".md", ".xml", ".xmp"),
        *(".yaml", ".yml", ".html", ".parquet", ".arrow", ".feather", ".tar", ".gz", ".tgz"),
        *(".zip", ".npy", ".npz", ".safetensors", ".py"),
        # Raw photos: they begin as a TIFF, in which only a thumbnail would be found.
        *(".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".sr2", ".srf", ".srw", ".orf"),
        *(".pef", ".raf", ".rw2", ".rwl", ".raw", ".3fr", ".fff", ".iiq", ".erf", ".kdc", ".dcr"),
        *(".mef", ".mos", ".mrw", ".x3f", ".gpr"),
        # Thumbnails of videos, copies that an editor keeps, and incomplete downloads.
        *(".thm", ".jpg_original", ".part", ".partial", ".crdownload", ".download", ".tmp"),
    }
)
"""Endings of file names, in lower case, that are no images whatever the content looks like."""

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"8BPS", "PSD"),
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"%PDF", "PDF"),
    (b"\x1f\x8b", "gzip"),
)
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_BMP_HEADER_SIZES = (12, 16, 40, 52, 56, 64, 108, 124)


def detect_image_format(head: bytes) -> str:
    """Return the format that the first bytes of a file announce; `HEAD_BYTES` are enough.

    Returns:
        One of `DECODED_FORMATS`; ``PSD``, ``EPS``, ``PDF``, ``gzip``, ``MP4`` (also of other
        videos in this container), ``SVG`` or ``XML``; ``unknown`` for anything else, no bytes
        included. ``HEIC`` stands for HEIF as well.
    """
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return _detect_container_format(head)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    is_markup = text.startswith((b"<?xml", b"<!doctype", b"<!--"))
    if text.startswith(b"<svg") or (is_markup and b"<svg" in text):
        return "SVG"
    return "XML" if text.startswith((b"<?xml", b"<!doctype")) else "unknown"


def _detect_container_format(head: bytes) -> str:
    """Return AVIF, HEIC or MP4: the brands of an ISO media file, which begins with ``ftyp``."""
    box = head[8 : max(12, int.from_bytes(head[:4], "big"))]
    brands = [box[:4], *(box[start : start + 4] for start in range(8, len(box), 4))]
    for brand in brands:  # the major brand first: an AVIF also has the brand mif1
        if brand in _AVIF_BRANDS:
            return "AVIF"
    return HEIC_FORMAT if any(brand in _HEIC_BRANDS for brand in brands) else "MP4"


def can_decode_heic() -> bool:
    """Return whether the extra ``heic`` is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


def needs_heic_extra(path: Path) -> bool:
    """Return whether a file holds a HEIC image by its first bytes, and the extra is missing."""
    return not can_decode_heic() and detect_image_format(_read_head(path)) == HEIC_FORMAT


def is_image_file(path: Path) -> bool:
    """Return whether a regular file is an image, by its ending or else by its first bytes.

    A file that cannot be opened is none. Formats with weak marks (BMP, TIFF) count only where the
    bytes behind the mark fit or the name has no ending.
    """
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return True
    if suffix in UNOPENED_SUFFIXES:
        return False
    head = _read_head(path)
    kind = detect_image_format(head)
    if kind == "BMP":  # two letters, with which a text may begin
        return int.from_bytes(head[14:18], "little") in _BMP_HEADER_SIZES
    if kind == "TIFF":  # many formats of cameras and instruments contain TIFF
        return not re.search("[a-z]", suffix)
    return kind in DECODED_FORMATS


def _read_head(path: Path) -> bytes:
    """Return the first `HEAD_BYTES` of a file; none if it is no regular one or cannot be read."""
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            return b""
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except (OSError, ValueError):
        return b""
