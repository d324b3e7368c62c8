"""Untrusted images: refused or broken ones say why, all others come out upright, RGB, 8 bits, on white."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.tiny import random_image
from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.errors import ImageError


def encoded(image: Image.Image, kind: str = "PNG", exif: Any = None) -> ImageRef:
    out = io.BytesIO()
    if exif is None:
        image.save(out, kind)
    else:
        image.save(out, kind, exif=exif)
    return ImageRef(data=out.getvalue())


def error_of(ref: ImageRef, **limits: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        images.load_image(ref, limits=images.ImageLimits(**limits))
    assert caught.value.place == ref.name and caught.value.fix
    return caught.value


def corner(ref: ImageRef) -> list[int]:
    return images.to_pixels(images.load_image(ref))[0, 0].tolist()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_all_formats_load_and_break_with_a_message(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    ref = encoded(Image.fromarray(noise), kind)
    assert ref.data is not None and images.detect_image_format(ref.data) == kind
    assert images.to_pixels(images.load_image(ref)).shape == (40, 50, 3)
    assert "truncated or broken" in error_of(ImageRef(data=ref.data[: len(ref.data) // 2])).message


@pytest.mark.parametrize("size", range(0, 200, 7))
def test_any_prefix_of_a_png_is_an_image_error(size: int) -> None:
    data = random_image(side=8).data
    assert data is not None
    error_of(ImageRef(data=data[:size]))


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize("size", [(20_000, 20_000), (9_000, 9_000)])
def test_a_bomb_is_refused_on_its_header(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", never)
    body = b"IDAT" + zlib.compress(b"\0" * 100)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    assert "too large" in error_of(ImageRef(data=png_header(*size) + chunk)).message


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<?xml version='1.0'?>\n<!-- x --><svg/>", "SVG"),
        (b"8BPS\0\1" + bytes(40), "PSD"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "EPS"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"hello", "unknown"),
        (b"", "empty"),
    ],
)
def test_other_formats_are_refused_by_name(data: bytes, name: str) -> None:
    assert name in error_of(ImageRef(data=data)).message


def test_a_file_is_known_by_its_bytes_not_its_name(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("<svg/>")
    assert "SVG" in error_of(ImageRef(path=tmp_path / "x.png")).message


def test_missing_files_and_small_images() -> None:
    assert "no such image" in error_of(ImageRef(path=Path("gone.png"))).message
    one = encoded(Image.new("RGB", (1, 1), (1, 2, 3)))
    assert corner(one) == [1, 2, 3]
    assert "too small: 1 x 1" in error_of(one, min_side=2).message


def test_transparency_is_put_on_white() -> None:
    assert corner(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))) == [255, 255, 255]
    assert corner(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 255)))) == [255, 0, 0]
    assert corner(encoded(Image.new("LA", (2, 2), (0, 0)))) == [255, 255, 255]
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 8, 7] + [0] * 765)
    assert corner(encoded(palette)) == [9, 8, 7]
    out = io.BytesIO()
    palette.save(out, "PNG", transparency=0)
    assert corner(ImageRef(data=out.getvalue())) == [255, 255, 255]


def test_grey_sixteen_bits_and_cmyk() -> None:
    grey = np.array([[0, 32768, 65535]], dtype=np.uint16)
    assert images.to_pixels(images.load_image(encoded(Image.fromarray(grey))))[
        0, :, 0
    ].tolist() == [0, 128, 255]
    assert corner(encoded(Image.new("L", (2, 2), 77))) == [77, 77, 77]
    red, green, blue = corner(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert red > 230 and green < 40 and blue < 40


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_come_out_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    wide = encoded(Image.new("RGB", (20, 10)), "JPEG", exif)
    assert images.load_image(wide).size == ((10, 20) if orientation >= 5 else (20, 10))
    assert not images.load_image(wide).getexif()


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    assert corner(ImageRef(data=out.getvalue())) == [255, 0, 0]
