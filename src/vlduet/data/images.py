"""Images: decoding, encoding and comparing. Only this module imports PIL; all others pass
`DecodedImage` on, or use bytes and uint8[H, W, 3].

`load_image` takes an untrusted image through four steps. If one fails, the error names the image,
the cause and the remedy:

1. magic     the first bytes tell the format (`image_formats`); SVG, PSD and others are refused
2. header    width and height are checked before any pixel is decoded
3. decode    a truncated or broken file is an error, never a half-grey image
4. to RGB    first frame, upright as EXIF says, 8 bits, transparency on white
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import struct
import uuid
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, features

from vlduet.data.image_formats import (
    DECODED_FORMATS,
    HEAD_BYTES,
    HEIC_FIX,
    HEIC_FORMAT,
    HEIC_MESSAGE,
    IMAGE_SUFFIXES,
    can_decode_heic,
    detect_image_format,
)
from vlduet.data.records import ByteRange, ImageRef
from vlduet.errors import DataError, ImageError
from vlduet.structured_files import require_regular_file

DecodedImage = Image.Image
"""A decoded image, so that other modules need not import PIL for its type."""

Pixels = NDArray[np.uint8]
"""uint8[H, W, 3], RGB."""

MAX_IMAGE_PIXELS = 64_000_000
"""Largest width times height of an image that is decoded, as its header states them."""
MAX_IMAGE_BYTES = 512 * 2**20
"""Size of the largest encoded image that is read: `MAX_IMAGE_PIXELS` of 8 bytes are not larger."""
MISSING_IMAGE = "no such image"
"""Message of the error of a file that does not exist."""
TAIL_BYTES = 4096
"""Number of bytes at the end of a file in which its end marker is looked for."""
END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND", "GIF": b"\x00;"}
"""Bytes that end a file of a format, where a truncated one hardly has them."""
EXIF_ORIENTATION = 0x0112
STRIP_ROWS = 64
"""Number of rows of pixels that are scaled to 8 bits at a time."""

# Every exception that PIL's decoders raise on hostile bytes. Any other is our bug and propagates.
_FORMAT_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, RuntimeError)
_DECODER_ERRORS = (*_FORMAT_ERRORS, OverflowError, struct.error, zlib.error)


def read_bytes(ref: ImageRef) -> bytes:
    """Return the encoded bytes of an image: `ref.data`, or the content of its file or byte range.

    Raises:
        ImageError: the file is missing, no regular file, larger than `MAX_IMAGE_BYTES`, cannot be
            read, or (of a byte range) has changed.
    """
    if ref.data is not None:
        return ref.data
    if ref.byte_range is not None:
        return read_byte_range(ref.byte_range)
    assert ref.path is not None
    require_regular_file(ref.path, error_class=ImageError, max_bytes=MAX_IMAGE_BYTES)
    try:
        return ref.path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise _unreadable_file_error(error, ref.name) from None


def _unreadable_file_error(error: Exception, name: str) -> ImageError:
    if isinstance(error, FileNotFoundError) and os.path.islink(name):
        fix = "Correct the link, or mount the drive that it leads to"
        return ImageError("a link whose target does not exist", place=name, fix=fix)
    if isinstance(error, FileNotFoundError):
        fix = "Correct the path; relative paths start from the folder of the records' file"
        return ImageError(MISSING_IMAGE, place=name, fix=fix)
    message = f"cannot read the image ({getattr(error, 'strerror', None) or error})"
    return ImageError(message, place=name, fix="Check the path")


def read_byte_range(byte_range: ByteRange) -> bytes:
    """Return the bytes of a range, whose file is opened and closed again.

    Raises:
        ImageError: the file is missing, cannot be read, ends inside the range, or is of another
            version, so that the range would hold something else.
    """
    try:
        with byte_range.file.open("rb") as file:
            file.seek(byte_range.offset)
            data = file.read(byte_range.size)
            version = stat_file_version(file)
    except OSError as error:
        message = f"cannot read the file that contains it ({error.strerror})"
        fix = f"Leave {byte_range.file.name} alone while it is in use, and start again"
        raise ImageError(message, place=byte_range.name, fix=fix) from None
    if version != byte_range.version or len(data) != byte_range.size:
        message = "the file that contains it has changed since it was listed"
        fix = f"Leave {byte_range.file.name} alone while it is in use, and start again"
        raise ImageError(message, place=byte_range.name, fix=fix)
    return data


def stat_file_version(file: IO[bytes]) -> tuple[int, int]:
    """Return size and time of modification (ns) of an open file, as in `ByteRange.version`."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def write_image_file(ref: ImageRef, folder: Path) -> ImageRef:
    """Write an image that has no file of its own to `folder`, and return the file's reference.

    The name is 24 hex digits of the SHA-256 of its bytes, with the ending of its format (``.bin``
    for a format that is not in `IMAGE_SUFFIXES`). The folder is created. A file of this name is
    read, and replaced unless it has these bytes; several processes can share the folder. A `ref`
    with a path is returned unchanged.

    Raises:
        ImageError: a byte range cannot be read (`read_byte_range`).
        DataError: the file cannot be written.
    """
    if ref.path is not None:
        return ref
    data = read_bytes(ref)
    suffix = f".{detect_image_format(data[:HEAD_BYTES]).lower()}"
    if suffix not in IMAGE_SUFFIXES:
        suffix = ".bin"
    path = folder / (hashlib.sha256(data).hexdigest()[:24] + suffix)
    try:
        # A power failure or a full disk can leave zeros or less under the final name.
        if not (path.is_file() and path.read_bytes() == data):
            folder.mkdir(parents=True, exist_ok=True)
            # Other threads may be writing the same image.
            draft = path.with_name(f".{path.name}.{uuid.uuid4().int}.draft")
            try:
                draft.write_bytes(data)
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
    except OSError as error:
        message = f"cannot write an image ({error.strerror})"
        raise DataError(message, place=folder, fix="Make room, or name another folder") from None
    return ImageRef(path=path)


def load_image(ref: ImageRef) -> DecodedImage:
    """Return an image decoded: first frame, upright, RGB with 8 bits, transparency on white.

    Raises:
        ImageError: the image is missing, empty, not one of `DECODED_FORMATS`, larger than
            `MAX_IMAGE_PIXELS`, truncated or broken. Format and size are checked before any pixel
            is decoded.
    """
    data = read_bytes(ref)
    kind = _check_format(data, ref.name)
    with warnings.catch_warnings():
        # Broken EXIF and our own pixel limit are handled here; PIL's warnings would repeat them.
        warnings.simplefilter("ignore")
        image = _open_image(io.BytesIO(data), kind, ref.name)
        try:
            image.load()
            # In place, and scaled to 8 bits first: fewer copies of large images are in memory.
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
        except Image.DecompressionBombError:
            raise _too_large_error("a frame larger than its header says", ref.name) from None
        except _DECODER_ERRORS as error:
            raise _broken_image_error(kind, error, ref.name) from None


def _open_image(file: IO[bytes], kind: str, name: str) -> Image.Image:
    """Return an image whose header is read and whose pixels are not.

    Raises:
        ImageError: at the place `name`, for a broken header or more than MAX_IMAGE_PIXELS.
    """
    try:
        image = Image.open(file, formats=[_find_decoder(kind, name)])
    except Image.DecompressionBombError:
        raise _too_large_error("far more pixels than any photo", name) from None
    except _DECODER_ERRORS as error:
        raise _broken_image_error(kind, error, name) from None
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise _too_large_error(f"{image.width} x {image.height} pixels", name)
    return image


def _find_decoder(kind: str, name: str) -> str:
    """Return PIL's name of a format of `DECODED_FORMATS` after loading what decodes it.

    Raises:
        ImageError: at the place `name`: the extra ``heic`` is needed, or a newer Pillow for AVIF.
    """
    if kind == HEIC_FORMAT:
        if not can_decode_heic():
            raise ImageError(HEIC_MESSAGE, place=name, fix=HEIC_FIX)
        import pillow_heif

        pillow_heif.register_heif_opener()
        return "HEIF"
    if kind == "AVIF" and not features.check("avif"):
        fix = "Update Pillow to 11.3 or later, or convert it to JPEG"
        raise ImageError("an AVIF image, which this Pillow cannot decode", place=name, fix=fix)
    return kind


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What can be said about an image without decoding it."""

    size: tuple[int, int]
    """Width and height in pixels, upright as EXIF says."""
    has_end: bool
    """Whether the file ends as its format does. Other files are truncated, or have data behind the
    image: decoding tells."""


def read_image_header(ref: ImageRef) -> ImageHeader:
    """Return size and completeness of an image; only the start and the end of a file are read.

    Raises:
        ImageError: as `load_image`, for what the header shows.
    """
    if ref.path is not None:
        require_regular_file(ref.path, error_class=ImageError, max_bytes=MAX_IMAGE_BYTES)
    try:
        # A range of a larger file is read as a whole: it is small.
        file = io.BytesIO(read_bytes(ref)) if ref.path is None else ref.path.open("rb")
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in load_image
            head = file.read(HEAD_BYTES)
            kind = _check_format(head, ref.name)
            num_bytes = file.seek(0, os.SEEK_END)
            file.seek(max(0, num_bytes - TAIL_BYTES))
            has_end = kind in END_MARKERS and END_MARKERS[kind] in file.read()
            if kind == "WEBP":  # it has no end marker, but states its length
                has_end = int.from_bytes(head[4:8], "little") + 8 <= num_bytes
            file.seek(0)
            image = _open_image(file, kind, ref.name)
            try:
                # PIL decodes a PNG to look for EXIF behind the pixels.
                has_exif = kind != "PNG" or "exif" in image.info
                orientation = image.getexif().get(EXIF_ORIENTATION) if has_exif else None
            except _DECODER_ERRORS as error:
                raise _broken_image_error(kind, error, ref.name) from None
            is_on_its_side = orientation in (5, 6, 7, 8)
            size = (image.height, image.width) if is_on_its_side else image.size
            return ImageHeader(size, has_end=has_end)
    except (OSError, ValueError) as error:
        raise _unreadable_file_error(error, ref.name) from None


def _check_format(data: bytes, name: str) -> str:
    """Return the format of encoded bytes, one of `DECODED_FORMATS`.

    Raises:
        ImageError: at the place `name`, if there are no bytes or the format is another one.
    """
    if not data:
        fix = "Copy or download it again"
        raise ImageError("the image is empty (0 bytes)", place=name, fix=fix)
    kind = detect_image_format(data[:HEAD_BYTES])
    if kind not in DECODED_FORMATS:
        description = "an unknown kind of file" if kind == "unknown" else kind
        fix = f"Convert it to one of {', '.join(DECODED_FORMATS)}"
        raise ImageError(f"the image is {description}, which is refused", place=name, fix=fix)
    return kind


def _too_large_error(cause: str, name: str) -> ImageError:
    fix = f"Scale it down: the limit is {MAX_IMAGE_PIXELS / 1e6:g} megapixels"
    return ImageError(f"the image is too large to decode: {cause}", place=name, fix=fix)


def _broken_image_error(kind: str, error: BaseException, name: str) -> ImageError:
    # Pillow names its buffer or file: the same image must give the same message every time.
    cause = re.sub(r"\s*<_io\.[^>]*>", "", str(error))
    message = f"truncated or broken {kind} ({cause})"
    return ImageError(message, place=name, fix="Copy or download it again")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return a new RGB image of any decoded mode, with transparency composited on white.

    Modes of more than 8 bits are scaled as in `_to_8_bits`. The copy has no metadata.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    # A palette or a grey image may declare one colour transparent instead of having an alpha.
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    # Copying the pixels drops EXIF, the palette and the file handle.
    return Image.frombytes("RGB", image.size, image.convert("RGB").tobytes())


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return a grey image of 16 bits, 32 bits or floats as a grey image of 8 bits.

    Integers that are all from 0 to 65535 are divided by 257. Other values are stretched so that
    the least is 0 and the greatest 255 (if all are equal, they are only clipped); NaN and infinity
    count as 0.
    """
    pixels = np.asarray(image)
    strips = [
        pixels[start : start + STRIP_ROWS] for start in range(0, len(pixels), STRIP_ROWS)
    ]  # float64 values of one strip at a time are in memory
    ranges = [(values.min(), values.max()) for values in map(_to_finite, strips)]
    low, high = float(min(low for low, _ in ranges)), float(max(high for _, high in ranges))
    scaled = np.empty(pixels.shape, dtype=np.uint8)
    for start, strip in zip(range(0, len(pixels), STRIP_ROWS), strips, strict=True):
        values = _to_finite(strip)
        if image.mode != "F" and low >= 0 and high <= 65535:
            values = values / 257.0
        elif high > low:
            values = (values - low) * (255.0 / (high - low))
        scaled[start : start + STRIP_ROWS] = np.clip(np.rint(values), 0, 255)
    return Image.fromarray(scaled)


def _to_finite(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return values of any type as float64, with 0 for NaN and infinity."""
    return np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def image_key(ref: ImageRef) -> str:
    """Return the SHA-256 of the encoded bytes in hexadecimal: equal keys mean equal files.

    Raises:
        ImageError: as `read_bytes`.
    """
    return hashlib.sha256(read_bytes(ref)).hexdigest()


# --- pixels and encoded bytes, so that other modules need not import PIL


def to_pixels(image: DecodedImage) -> Pixels:
    """Return the pixels of an image, uint8[H, W, 3]."""
    return np.asarray(image.convert("RGB"))


def from_pixels(pixels: Pixels) -> DecodedImage:
    """Return uint8[H, W, 3] as an image; any other shape or type fails an assertion."""
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, "uint8[H, W, 3]"
    return Image.fromarray(np.ascontiguousarray(pixels))


def scale_down(image: DecodedImage, max_side: int) -> DecodedImage:
    """Return a copy with the longer side `max_side` pixels, in the same proportions.

    An image that is not larger is returned itself, not copied. No side gets shorter than 1 pixel.
    """
    factor = max_side / max(image.size)
    if factor >= 1:
        return image
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def resize_pixels(image: DecodedImage, width: int, height: int) -> Pixels:
    """Return uint8[height, width, 3], averaged over boxes; the proportions are not kept."""
    return to_pixels(image.resize((width, height), Image.Resampling.BOX, reducing_gap=2.0))


def encode_png(image: DecodedImage) -> bytes:
    """Return the image as PNG bytes; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6, pnginfo=PngImagePlugin.PngInfo())
    return buffer.getvalue()


def encode_jpeg(image: DecodedImage) -> bytes:
    """Return the image as JPEG bytes of quality 90, at which photos show no loss."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, optimize=True)
    return buffer.getvalue()


def encode_thumbnail_data_url(image: DecodedImage, side: int) -> str:
    """Return a ``data:`` URL of an RGB image for HTML pages, as base64 (see `_encode_small`)."""
    data, media_type = _encode_small(image, side)
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def encode_preview(ref: ImageRef, max_side: int) -> tuple[bytes, str]:
    """Return an image for web pages without metadata, as bytes and media type.

    It is decoded under the limits of `load_image`, and encoded as `_encode_small` says.

    Raises:
        ImageError: as `load_image`.
    """
    return _encode_small(load_image(ref), max_side)


def _encode_small(image: DecodedImage, max_side: int) -> tuple[bytes, str]:
    """Return an RGB image as bytes and their media type.

    The image is scaled down to at most `max_side` pixels on its longer side, and encoded as PNG if
    it then has at most 256 colours, else as JPEG of quality 85.
    """
    small = scale_down(image, max_side)
    # Photos are ten times smaller as JPEG; drawings have few colours and blur as JPEG.
    kind = "PNG" if small.getcolors(256) is not None else "JPEG"
    options: dict[str, Any] = {"optimize": True} if kind == "PNG" else {"quality": 85}
    buffer = io.BytesIO()
    small.save(buffer, kind, **options)
    return buffer.getvalue(), f"image/{kind.lower()}"


# --- similarity of images, see data.tools.duplicates


def _dct_rows(count: int, size: int) -> NDArray[np.float64]:
    """Return float[count, size]: the first `count` rows of the DCT-II matrix."""
    k, n = np.arange(count)[:, None], np.arange(size)[None, :]
    return cast("NDArray[np.float64]", np.cos(np.pi * k * (2 * n + 1) / (2 * size)))


_DCT = _dct_rows(8, 32)


def compute_perceptual_hash(image: DecodedImage) -> int:
    """Return the pHash of an image, an integer of 64 bits that describe its appearance in grey.

    The bits are the signs of its 8 x 8 lowest frequencies against their median. Scaled or
    re-encoded copies differ in a few bits, unrelated images in about 32. Unlike dHash, it keeps
    its bits balanced on drawings on a plain background.
    """
    small = image.convert("L").resize((32, 32), Image.Resampling.BOX)
    low = (_DCT @ np.asarray(small, dtype=np.float64) @ _DCT.T).ravel()  # [64]
    low[0] = 0.0  # the mean brightness does not describe the shape
    bits = low > np.median(low)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def compute_thumbnail_colours(image: DecodedImage) -> bytes:
    """Return the image as 8 x 8 RGB, 192 bytes.

    It tells a red hat from the same hat in blue, which `compute_perceptual_hash` does not.
    """
    return resize_pixels(image, 8, 8).tobytes()


def measure_texture(ref: ImageRef) -> tuple[float, int]:
    """Return two numbers that tell a drawn cut-out from a photographed one.

    Returns:
        (share of horizontal neighbours that are equal, from 0 to 1; number of distinct colours
        with 6 bits per channel), both over pixels with alpha above 250 only; (0.0, 0) for a fully
        transparent image.

    Raises:
        ImageError: as `load_image`.
    """
    load_image(ref)  # for its checks
    image = Image.open(io.BytesIO(read_bytes(ref))).convert("RGBA")
    pixels = np.asarray(image).astype(np.int32)  # [H, W, 4]
    opaque = pixels[..., 3] > 250  # [H, W]
    neighbours = opaque[:, 1:] & opaque[:, :-1]  # [H, W - 1]
    equal = (pixels[:, 1:, :3] == pixels[:, :-1, :3]).all(-1) & neighbours
    colours = (pixels[..., :3] >> 2)[opaque] @ np.array([1 << 12, 1 << 6, 1])  # 18 bits each
    return float(equal.sum() / max(1, neighbours.sum())), len(np.unique(colours))
