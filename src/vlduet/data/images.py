"""Images: the only module that knows PIL. Everybody else sees an opaque image, bytes, or uint8[H, W, 3].

`load` takes an untrusted image through four steps, and names the image, the cause and the fix when one fails:

1. magic     the first bytes say what it is; SVG, EPS, PSD and all else are refused
2. header    width and height are read and checked, before any pixel is decoded
3. decode    a truncated or broken file is an error, never a half-grey image
4. to RGB    first frame, upright as EXIF says, 8 bits, transparency on white
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from vlduet.data.records import ImageRef
from vlduet.errors import ImageError

DecodedImage = Image.Image
"""A decoded image, which others pass on without importing PIL."""

Pixels = NDArray[np.uint8]
"""uint8[H, W, 3]"""

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
"""File names that are taken for images when a folder or an archive is read."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What is decoded at all."""

    max_pixels: int = 64_000_000
    """Width times height, as the header says."""
    min_side: int = 1
    """Shorter side, in pixels."""
    formats: frozenset[str] = frozenset({"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"})


DEFAULT_LIMITS = ImageLimits()

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

# Everything PIL's decoders raise on hostile bytes; anything else is our bug and shows its traceback.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)


def detect_image_format(head: bytes) -> str:
    """The format that the first 512 bytes of a file announce: PNG, JPEG, ..., SVG, or 'unknown'."""
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return "HEIC or AVIF"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"<svg") or (
        text.startswith((b"<?xml", b"<!doctype", b"<!--")) and b"<svg" in text
    ):
        return "SVG"
    return "XML" if text.startswith((b"<?xml", b"<!doctype")) else "unknown"


def read_bytes(ref: ImageRef) -> bytes:
    """The encoded bytes. Raises ImageError where the file is missing or unreadable."""
    if ref.data is not None:
        return ref.data
    assert ref.path is not None
    try:
        return ref.path.read_bytes()
    except FileNotFoundError:
        fix = "Mend the path; relative paths start from the folder of the records' file"
        raise ImageError("no such image", place=ref.name, fix=fix) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        what = getattr(error, "strerror", None) or error
        raise ImageError(
            f"cannot read the image ({what})", place=ref.name, fix="Check the path"
        ) from None


def load_image(ref: ImageRef, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """One image, decoded, upright, RGB, 8 bits, on white.

    Args:
        ref: a path or encoded bytes.
        limits: checked on the header, before any pixel is decoded.

    Raises:
        ImageError: missing, empty, refused, too large, truncated or broken; names the image, the cause and the fix.
    """
    data = read_bytes(ref)
    kind = _check_magic(data, ref.name, limits)
    with warnings.catch_warnings():
        # Broken EXIF and our own pixel limit are dealt with here; PIL's warnings would only repeat them.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=[kind])
        except Image.DecompressionBombError:
            raise _too_large("far more pixels than any photo", ref.name, limits) from None
        except _BROKEN as error:
            raise _broken(kind, error, ref.name) from None
        _check_size(image.size, ref.name, limits)
        try:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
        except Image.DecompressionBombError:
            raise _too_large("a frame larger than its header says", ref.name, limits) from None
        except _BROKEN as error:
            raise _broken(kind, error, ref.name) from None


def _check_magic(data: bytes, name: str, limits: ImageLimits) -> str:
    if not data:
        raise ImageError(
            "the image is empty (0 bytes)", place=name, fix="Copy or download it again"
        )
    kind = detect_image_format(data[:512])
    if kind not in limits.formats:
        known = ", ".join(sorted(limits.formats))
        what = "an unknown kind of file" if kind == "unknown" else kind
        raise ImageError(
            f"the image is {what}, which is refused",
            place=name,
            fix=f"Convert it to one of {known}",
        )
    return kind


def _check_size(size: tuple[int, int], name: str, limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise _too_large(f"{width} x {height} pixels", name, limits)
    if min(size) < max(1, limits.min_side):
        least = f"Leave it out, or use images of at least {limits.min_side} pixels a side"
        raise ImageError(
            f"the image is too small: {width} x {height} pixels", place=name, fix=least
        )


def _too_large(what: str, name: str, limits: ImageLimits) -> ImageError:
    fix = f"Scale it down: the limit is {limits.max_pixels / 1e6:g} megapixels"
    return ImageError(f"the image is too large to decode: {what}", place=name, fix=fix)


def _broken(kind: str, error: BaseException, name: str) -> ImageError:
    # Pillow names its buffer by its address: the same image must give the same message every time.
    cause = re.sub(r"\s*<[^>]* at 0x[0-9a-f]+>", "", str(error))
    return ImageError(
        f"truncated or broken {kind} ({cause})", place=name, fix="Copy or download it again"
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any decoded mode -> RGB, transparency composited on white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    # A palette or a grey image may name one colour transparent instead of carrying an alpha channel.
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    # A fresh image: no EXIF, no palette, no file handle travels on.
    return Image.frombytes("RGB", image.size, image.convert("RGB").tobytes())


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16- and 32-bit grey, and float: 16 bits keep their scale, wider ones are stretched to their own range."""
    values = np.asarray(image).astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode != "F" and low >= 0 and high <= 65535:
        values = values / 257.0
    elif high > low:
        values = (values - low) * (255.0 / (high - low))
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def image_key(ref: ImageRef) -> str:
    """SHA-256 of the encoded bytes, in hex: equal keys are the same file. Raises ImageError where it cannot be read."""
    return hashlib.sha256(read_bytes(ref)).hexdigest()


# --- what others need of pixels, so that they never import PIL -------------------------------------


def to_pixels(image: Image.Image) -> Pixels:
    """Image -> uint8[H, W, 3]."""
    return np.asarray(image.convert("RGB"))


def from_pixels(pixels: Pixels) -> Image.Image:
    """uint8[H, W, 3] -> image."""
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, "uint8[H, W, 3]"
    return Image.fromarray(np.ascontiguousarray(pixels))


def scale_down(image: Image.Image, max_side: int) -> Image.Image:
    """The image with its longer side at most `max_side`, never enlarged."""
    factor = max_side / max(image.size)
    if factor >= 1:
        return image
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def resize_pixels(image: Image.Image, width: int, height: int) -> Pixels:
    """uint8[height, width, 3], proportions given up."""
    return to_pixels(image.resize((width, height), Image.Resampling.BOX, reducing_gap=2.0))


def encode_png(image: Image.Image) -> bytes:
    """PNG bytes; the same pixels give the same bytes."""
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=6, pnginfo=PngImagePlugin.PngInfo())
    return out.getvalue()


def encode_jpeg(image: Image.Image) -> bytes:
    """JPEG bytes, at a quality where photos show no loss."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90, optimize=True)
    return out.getvalue()


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG, with the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(image))


def encode_thumbnail_data_url(image: Image.Image, side: int) -> str:
    """A ``data:`` URL of the image, at most `side` pixels wide and high, for self-contained HTML pages."""
    small = scale_down(image, side)
    out = io.BytesIO()
    # Photos are ten times smaller as JPEG; drawings have few colours, and JPEG would smear their edges.
    kind = "PNG" if small.getcolors(256) is not None else "JPEG"
    small.save(
        out,
        kind,
        **cast("dict[str, Any]", {"quality": 85} if kind == "JPEG" else {"optimize": True}),
    )
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


# --- looking alike ---------------------------------------------------------------------------------


def _dct_rows(count: int, size: int) -> NDArray[np.float64]:
    """float[count, size]: the first `count` rows of the DCT-II matrix."""
    k, n = np.arange(count)[:, None], np.arange(size)[None, :]
    return cast("NDArray[np.float64]", np.cos(np.pi * k * (2 * n + 1) / (2 * size)))


_DCT = _dct_rows(8, 32)


def compute_perceptual_hash(image: Image.Image) -> int:
    """64 bits of how the image looks in grey: scaled or re-encoded copies differ in a few bits, others in about 32.

    The signs of its 8 x 8 lowest frequencies against their median (pHash). Unlike dHash it keeps its bits balanced on
    drawings before a plain background.
    """
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), dtype=np.float64)
    low = (_DCT @ grey @ _DCT.T).ravel()  # [64]
    low[0] = 0.0  # the mean brightness says nothing of the shape
    bits = low > np.median(low)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def compute_thumbnail_colours(image: Image.Image) -> bytes:
    """192 bytes, the image as 8 x 8 RGB: tells a red hat from the same hat in blue, which `perceptual_hash` does not."""
    return resize_pixels(image, 8, 8).tobytes()


def measure_texture(ref: ImageRef) -> tuple[float, int]:
    """How a cut-out was made: (share of equal horizontal neighbours, number of colours), both of its opaque pixels.

    Raises:
        ImageError: as `load` does.
    """
    load_image(ref)  # all the checks
    pixels = np.asarray(Image.open(io.BytesIO(read_bytes(ref))).convert("RGBA")).astype(
        np.int32
    )  # [H, W, 4]
    opaque = pixels[..., 3] > 250
    pairs = opaque[:, 1:] & opaque[:, :-1]
    equal = (pixels[:, 1:, :3] == pixels[:, :-1, :3]).all(-1) & pairs
    colour = (pixels[..., :3] >> 2)[opaque] @ np.array(
        [1 << 12, 1 << 6, 1]
    )  # 18 bits: nearly equal ones are one
    return float(equal.sum() / max(1, pairs.sum())), len(np.unique(colour))
