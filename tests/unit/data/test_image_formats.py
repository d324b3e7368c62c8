"""The bytes of a file decide whether it is an image; HEIC needs an extra."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from vlduet.data import image_formats, images
from vlduet.data.image_formats import detect_image_format, is_image_file
from vlduet.data.records import ImageRef
from vlduet.errors import ImageError


def encode(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def encode_heic() -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    return encode("HEIF")


@pytest.mark.parametrize(
    ("name", "content", "is_image"),
    [
        ("a.jpg", b"", True),  # its reading says that it is empty
        ("a.JPE", b"", True),
        ("a.jfif", b"", True),
        ("a.heic", b"\xff\xd8\xff\xe0", True),
        ("IMG_1", b"\xff\xd8\xff\xe0", True),
        ("a.bin", b"\x89PNG\r\n\x1a\n", True),
        ("a.jpg~", b"GIF89a", True),
        ("a.txt", b"\xff\xd8\xff\xe0", False),
        ("a.thm", b"\xff\xd8\xff\xe0", False),
        ("a.nef", b"II*\0", False),
        ("a.svs", b"II*\0", False),
        ("scan", b"II*\0", True),
        ("a.log", b"BMW drives", False),
        ("a.log", b"BM" + bytes(12) + b"\x28\0\0\0", True),
        ("a.mov", b"\0\0\0\x14ftypqt  ", False),
        ("a", b"", False),
        ("a.exe", b"MZ", False),
    ],
)
def test_content_decides_where_the_name_does_not(
    tmp_path: Path, name: str, content: bytes, is_image: bool
) -> None:
    (tmp_path / name).write_bytes(content)
    assert is_image_file(tmp_path / name) == is_image


def test_what_cannot_be_opened_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("folder", "gone", "a\0b"):
        assert not is_image_file(tmp_path / name)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "AVIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isomavc1", "MP4"),
        (b"\0\0\0\x10ftypisom\0\0\0\0avif", "MP4"),  # behind the end of the box
        (b"\xff\xff\xff\xffftyp", "MP4"),
    ],
)
def test_the_brands_of_a_container_tell_its_format(head: bytes, kind: str) -> None:
    assert detect_image_format(head) == kind


def test_avif_is_decoded_under_any_name(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encode("AVIF"))
    ref = ImageRef(path=tmp_path / "a.jpg")
    assert images.load_image(ref).size == (64, 48) == images.read_image_header(ref).size
    (tmp_path / "a.jpg").write_bytes(encode("AVIF")[:-40])
    with pytest.raises(ImageError, match="truncated or broken AVIF"):
        images.load_image(ref)


def test_heic_is_decoded_with_the_extra_and_names_it_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ref = ImageRef(data=encode_heic())
    assert images.load_image(ref).size == (64, 48) == images.read_image_header(ref).size
    with pytest.raises(ImageError, match="truncated or broken HEIC"):
        images.load_image(ImageRef(data=images.read_bytes(ref)[:-40]))
    monkeypatch.setattr(images, "can_decode_heic", lambda: False)
    with pytest.raises(ImageError, match=r"HEIC image.*pip install \"vlduet\[heic\]\""):
        images.load_image(ref)


def test_only_a_real_heic_needs_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_formats, "can_decode_heic", lambda: False)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "b.heic").write_bytes(encode("JPEG"))
    assert image_formats.needs_heic_extra(tmp_path / "a.heic")
    assert not image_formats.needs_heic_extra(tmp_path / "b.heic")
