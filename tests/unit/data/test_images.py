"""Untrusted images are refused with the reason, or come out upright, RGB, 8 bits, on white."""

from __future__ import annotations

import base64
import io
import os
import pickle
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import tiny
from vlduet.data import image_formats, images
from vlduet.data.records import ByteRange, ImageRef
from vlduet.errors import ImageError


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> ImageRef:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return ImageRef(data=buffer.getvalue())


def load_error(ref: ImageRef) -> ImageError:
    """Return the error of loading an image, after checking its place and remedy."""
    with pytest.raises(ImageError) as caught:
        images.load_image(ref)
    assert caught.value.place == ref.name and caught.value.fix
    return caught.value


def corner_pixel(ref: ImageRef) -> list[int]:
    return images.to_pixels(images.load_image(ref))[0, 0].tolist()


# --- what is refused


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_complete_images_load_and_truncated_ones_are_errors(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    data = images.read_bytes(encode(Image.fromarray(noise), kind))
    assert image_formats.detect_image_format(data) == kind
    assert images.to_pixels(images.load_image(ImageRef(data=data))).shape == (40, 50, 3)
    truncated = ImageRef(data=data[: len(data) // 2])
    assert "truncated or broken" in load_error(truncated).message


@pytest.mark.parametrize("size", range(0, 200, 7))
def test_any_prefix_of_a_png_is_an_image_error(size: int) -> None:
    data = images.read_bytes(tiny.random_image(side=8))
    assert load_error(ImageRef(data=data[:size])).message


def encode_png_chunk(kind: bytes, content: bytes) -> bytes:
    chunk = kind + content
    return struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))


def make_png(*, width: int, height: int) -> ImageRef:
    """Return a PNG whose header states a size that its pixels do not have."""
    header = encode_png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = encode_png_chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return ImageRef(data=b"\x89PNG\r\n\x1a\n" + header + pixels)


@pytest.mark.parametrize("side", [20_000, 9_000])
def test_a_decompression_bomb_is_refused_by_its_header(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    assert "too large" in load_error(make_png(width=side, height=side)).message


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
    assert name in load_error(ImageRef(data=data)).message


def test_the_bytes_of_a_file_decide_and_not_its_name(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("<svg/>")
    assert "SVG" in load_error(ImageRef(path=tmp_path / "x.png")).message


def test_a_missing_file_is_an_error() -> None:
    assert "no such image" in load_error(ImageRef(path=Path("gone.png"))).message


def place_in_file(path: Path, data: bytes) -> ImageRef:
    """Write `data` between other bytes to a file, and return its range."""
    path.write_bytes(b"before" + data + b"after")
    with path.open("rb") as file:
        version = images.stat_file_version(file)
    return ImageRef(byte_range=ByteRange(path, 6, len(data), f"{path}:a.png", version))


def test_an_image_inside_a_file_is_read_under_the_same_limits(tmp_path: Path) -> None:
    data = images.read_bytes(encode(Image.new("RGB", (3, 2), (1, 2, 3))))
    ref = place_in_file(tmp_path / "x.tar", data)
    assert corner_pixel(ref) == [1, 2, 3] and images.read_image_header(ref).size == (3, 2)
    assert images.image_key(ref) == images.image_key(ImageRef(data=data))
    assert (
        pickle.loads(pickle.dumps(ref)) == ref and len({ref, pickle.loads(pickle.dumps(ref))}) == 1
    )
    bomb = images.read_bytes(make_png(width=65_000, height=65_000))
    for content, message in ((bomb, "too large"), (b"<svg/>", "SVG"), (b"", "0 bytes")):
        error = load_error(place_in_file(tmp_path / "x.tar", content))
        assert message in error.message and error.place == f"{tmp_path / 'x.tar'}:a.png"
    truncated = place_in_file(tmp_path / "x.tar", data[: len(data) // 2])
    assert "truncated or broken PNG" in load_error(truncated).message


@pytest.mark.parametrize("offset", [0, 10, 10**9])
def test_a_range_beyond_the_end_of_its_file_is_an_error(tmp_path: Path, offset: int) -> None:
    span = place_in_file(tmp_path / "x.tar", b"data").byte_range
    assert span is not None
    ref = ImageRef(byte_range=replace(span, offset=offset, size=100))
    assert "has changed" in load_error(ref).message


def test_an_image_without_pixels_is_refused_and_one_pixel_is_enough() -> None:
    assert corner_pixel(encode(Image.new("RGB", (1, 1), (1, 2, 3)))) == [1, 2, 3]
    assert "broken PNG" in load_error(make_png(width=0, height=5)).message


# --- what is decoded


def test_transparent_pixels_become_white() -> None:
    assert corner_pixel(encode(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))) == [255, 255, 255]
    assert corner_pixel(encode(Image.new("RGBA", (2, 2), (255, 0, 0, 255)))) == [255, 0, 0]
    assert corner_pixel(encode(Image.new("LA", (2, 2), (0, 0)))) == [255, 255, 255]
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 8, 7] + [0] * 765)
    assert corner_pixel(encode(palette)) == [9, 8, 7]
    assert corner_pixel(encode(palette, transparency=0)) == [255, 255, 255]


def test_grey_sixteen_bits_and_cmyk_become_rgb() -> None:
    grey = np.array([[0, 32768, 65535]], dtype=np.uint16)
    pixels = images.to_pixels(images.load_image(encode(Image.fromarray(grey))))
    assert pixels[0, :, 0].tolist() == [0, 128, 255]
    assert corner_pixel(encode(Image.new("L", (2, 2), 77))) == [77, 77, 77]
    cmyk = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    red, green, blue = corner_pixel(cmyk)
    assert red > 230 and green < 40 and blue < 40


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_come_out_upright_and_without_exif(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = images.load_image(encode(Image.new("RGB", (20, 10)), "JPEG", exif=exif))
    assert image.size == ((10, 20) if orientation >= 5 else (20, 10))
    assert not image.getexif()


def test_only_the_first_frame_of_an_animation_is_decoded() -> None:
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    animation = encode(red, "GIF", save_all=True, append_images=[blue])
    assert corner_pixel(animation) == [255, 0, 0]


# --- pixels and encoded bytes


def test_png_keeps_pixels_and_equal_pixels_have_equal_bytes() -> None:
    image = images.load_image(tiny.random_image(3))
    pixels = images.to_pixels(image)
    copy = images.from_pixels(pixels)
    assert images.encode_png(copy) == images.encode_png(image)
    loaded = images.load_image(ImageRef(data=images.encode_png(copy)))
    np.testing.assert_array_equal(images.to_pixels(loaded), pixels)


def test_scaling_down_keeps_proportions_and_never_enlarges() -> None:
    image = Image.new("RGB", (200, 50))
    assert images.scale_down(image, 100).size == (100, 25)
    assert images.scale_down(image, 200) is image
    assert images.resize_pixels(image, 4, 8).shape == (8, 4, 3)


@pytest.mark.parametrize(("kind", "is_photo"), [("png", False), ("jpeg", True)])
def test_thumbnails_are_png_for_drawings_and_jpeg_for_photos(kind: str, is_photo: bool) -> None:
    pixels = np.zeros((100, 300, 3), dtype=np.uint8)
    if is_photo:
        pixels[:] = np.random.default_rng(0).integers(0, 256, pixels.shape)
    url = images.encode_thumbnail_data_url(images.from_pixels(pixels), 90)
    header, _, data = url.partition(",")
    assert header == f"data:image/{kind};base64"
    thumbnail = images.load_image(ImageRef(data=base64.b64decode(data)))
    assert thumbnail.size == (90, 30)


def test_texture_tells_flat_drawings_from_noise() -> None:
    flat = encode(Image.new("RGBA", (8, 8), (255, 0, 0, 255)))
    assert images.measure_texture(flat) == (1.0, 1)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    equal_share, num_colours = images.measure_texture(encode(Image.fromarray(noise)))
    assert equal_share < 0.01 and num_colours > 1000
    transparent = encode(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))
    assert images.measure_texture(transparent) == (0.0, 0)


# --------------------------------------------------------------------- headers


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "bmp", "tiff"])
def test_a_header_tells_the_size_and_a_cut_file_has_no_end(suffix: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(pixels).save(path)
    header = images.read_image_header(ImageRef(path=path))
    assert header.size == (50, 30)
    assert header.has_end == (suffix not in ("bmp", "tiff"))  # unknown until they are decoded
    data = path.read_bytes()
    assert images.read_image_header(ImageRef(data=data)) == header
    path.write_bytes(data[: len(data) * 3 // 4])
    if suffix == "webp":  # its decoder looks at the length at once
        with pytest.raises(ImageError, match="truncated or broken WEBP"):
            images.read_image_header(ImageRef(path=path))
    elif header.has_end:
        assert not images.read_image_header(ImageRef(path=path)).has_end


def test_the_size_in_a_header_is_that_of_the_upright_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[images.EXIF_ORIENTATION] = 6
    path = tmp_path / "x.jpg"
    Image.new("RGB", (40, 20)).save(path, exif=exif)
    ref = ImageRef(path=path)
    assert images.read_image_header(ref).size == images.load_image(ref).size == (20, 40)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such image"),
        (b"", "0 bytes"),
        (b"<svg></svg>", "SVG, which is refused"),
        (b"\x89PNG\r\n\x1a\n broken", "truncated or broken PNG"),
    ],
)
def test_a_header_that_cannot_be_read_is_an_error_as_in_decoding(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    for read in (images.read_image_header, images.load_image):
        with pytest.raises(ImageError, match=message):
            read(ImageRef(path=path))


@pytest.mark.parametrize("read", [images.load_image, images.read_image_header, images.image_key])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "sparse"])
def test_only_regular_files_of_bounded_size_are_read(
    tmp_path: Path, kind: str, read: Callable[[ImageRef], object]
) -> None:
    path = tmp_path / "a.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(50 << 30)
    with pytest.raises(ImageError, match=r"a\.png.*(regular file|MiB)"):
        read(ImageRef(path=path))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("offset", [0, -70_000])
def test_strips_of_pixels_are_scaled_as_one(dtype: type, offset: int) -> None:
    rows = np.arange(3 * images.STRIP_ROWS + 5)[:, None] * 300 + np.arange(7)
    values = np.clip(rows + offset, 0 if dtype is np.uint16 else None, 65535).astype(dtype)
    pixels = images.to_pixels(images.load_image(encode(Image.fromarray(values), "TIFF")))[..., 0]
    numbers = values.astype(np.float64)
    if dtype is np.float32 or numbers.min() < 0:
        numbers = (numbers - numbers.min()) / (numbers.max() - numbers.min()) * 65535
    assert np.abs(pixels - numbers / 257).max() <= 0.51


def test_sixteen_bits_take_little_more_memory_than_eight() -> None:
    side = 1500
    deep = Image.fromarray(np.full((side, side), 40_000, np.uint16))
    sizes = {}
    for name, ref in (("deep", encode(deep)), ("rgb", encode(Image.new("RGB", (side, side))))):
        tracemalloc.start()
        images.load_image(ref)
        sizes[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert sizes["deep"] < 1.5 * sizes["rgb"]  # numpy's arrays are traced, Pillow's are not
