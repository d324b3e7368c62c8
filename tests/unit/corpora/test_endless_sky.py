"""Corpus endless-sky, from a small data file made here."""

from __future__ import annotations

from pathlib import Path

from helpers.small_corpora import build_samples, write_noise_png, write_text
from vlduet.corpora import endless_sky

DATA = """# a comment
planet Aba
\tattributes "core" farming
\tlandscape land/sea
\tdescription `A "wet" world.`
\tdescription `\tSecond.`
planet Bab
\tlandscape land/sea
\tdescription `Dry.`
ship "Kite"
\tsprite "ship/kite"
\tattributes
\t\tcategory "Fighter"
\t\tcost 80
\tdescription "Fast."
ship "Kite" "Kite (Red)"
\tdescription "No."
ship "Marauder Kite"
\tsprite ship/mkite
\tdescription "Faster."
outfit "Empty"
\tthumbnail outfit/empty
"""


def test_entries_that_share_a_picture_or_a_model_are_in_one_split(tmp_path: Path) -> None:
    root = tmp_path / "usr/share/games/endless-sky"
    write_text(root / "data/all.txt", DATA)
    names = ("land/sea.png", "ship/kite+0.png", "ship/mkite.png", "outfit/empty.png")
    for i, name in enumerate(names):
        write_noise_png(root / "images" / name, 400 + i)
    samples = build_samples("endless-sky", {endless_sky.PACKAGE_NAME: tmp_path})
    assert list(samples) == ["planet/Aba", "planet/Bab", "ship/Kite", "ship/Marauder Kite"]
    assert samples["planet/Aba"].split == samples["planet/Bab"].split
    assert samples["ship/Kite"].split == samples["ship/Marauder Kite"].split
    planet = samples["planet/Aba"].record
    assert planet["long"] == 'A "wet" world.\n\nSecond.'
    assert planet["metadata"] == {"kind": "planet", "attributes": ["core", "farming"]}
    ship = samples["ship/Kite"].record
    assert ship["metadata"] == {"kind": "ship", "category": "Fighter", "cost": 80}
    assert ship["image"].name == "images/ship__kite-0.png"
