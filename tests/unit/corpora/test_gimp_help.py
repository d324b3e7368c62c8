"""Corpus gimp-help, from a small manual made here."""

from __future__ import annotations

from pathlib import Path

from helpers.small_corpora import build_samples, write_noise_png, write_text
from vlduet.corpora import gimp_help

PAGE = (
    "<html><head><title>t</title></head><body>"
    '<div class="navheader"><p>Prev</p></div>{}</body></html>'
)
BODY = (
    '<h3>One &amp; two</h3><p>Text <b>runs</b>\n on.</p><img src="images/{}.png"/>'
    '<div class="note"><p>No.</p></div>'
    '<p>Then<img src="images/icon.png"/> more.<br/>Last</p>'
    '<img src="images/{}.png"><img src="images/film.mng">'
)


def test_pages_keep_their_order_without_icons_and_are_split_by_shared_images(
    tmp_path: Path,
) -> None:
    root = tmp_path / "usr/share/gimp/2.0/help/en"
    for i in range(6):
        write_noise_png(root / f"images/i{i}.png", 500 + i)
    write_noise_png(root / "images/icon.png", 600, size=16)
    write_text(root / "images/film.mng", "not decodable")
    pairs = {"a": ("i0", "i1"), "b": ("i1", "i2"), "c": ("i2", "i3"), "d": ("i4", "i5")}
    for name, pair in pairs.items():
        write_text(root / f"{name}.html", PAGE.format(BODY.format(*pair)))
    single_image = '<p>One image only</p><img src="images/i5.png"/>'
    write_text(root / "e.html", PAGE.format(single_image))
    samples = build_samples("gimp-help", {gimp_help.PACKAGE_NAME: tmp_path})
    assert list(samples) == ["a", "b", "c", "d"]
    # a and c share no image, but b shares one with each of them.
    assert samples["a"].split == samples["b"].split == samples["c"].split
    record = samples["a"].record
    parts = [part.get("text") or part["image"].name for part in record["parts"]]
    assert parts == [
        "One & two",
        "Text runs on.",
        "images/i0.png",
        "Then",
        "more.",
        "Last",
        "images/i1.png",
    ]
    assert record["metadata"] == {"images": 2}
