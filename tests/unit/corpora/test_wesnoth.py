"""Corpora wesnoth and campaigns, and the reader of their markup language."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.small_corpora import build_samples, write_noise_png, write_text
from vlduet.corpora import wesnoth, wml

UNIT = """[unit_type]
 id={0}
 name= _ "{0}"
 race=elf
 level=1
 profile="portraits/{1}.png~CROP(1,2)"
 description= _ "About {0}."
 advances_to={2}
[/unit_type]
"""
SCENARIO = """[scenario]
 name= _ "Start"
 [story]
  [part]
   background=story/dawn.png
   story= _ "It was dawn."
  [/part]
 [/story]
 [side]
  id=Elo
  type=Archer
  name= _ "Elo"
 [/side]
 [event]
  [message]
   speaker=Elo
   message= _ "Halt!"
  [/message]
  [message]
   speaker=Elo
   message= _ "Who $name?"
  [/message]
  [message]
   speaker=narrator
   message= _ "Silence."
  [/message]
 [/event]
[/scenario]
"""


def test_wml_texts_attributes_and_blocks_are_read() -> None:
    text = """#textdomain x
[unit_type]
    name= _ "female^Elvish " + _ "Archer" # why
    description= _ "He said ""no"".
<i>Twice</i>, at [12]."+
        _ " End."
    cost=17
    die_sound={SOUND_LIST:ELF}
#ifdef HARD
    [attack]
        name=bow
    [/attack]
#endif
    {MACRO ( _ "text [x] = y") "a ] b"}
[/unit_type]"""
    (unit,) = wml.parse_wml(text).find_blocks("unit_type")
    assert unit.get_text("name") == "Elvish Archer"
    assert unit.get_text("description") == 'He said "no". Twice, at [12]. End.'
    assert unit.get_text("cost") == "17"
    assert unit.get_text("missing") == ""
    assert [block.name for block in unit.children] == ["attack"]
    assert unit.children[0].get_text("name") == "bow"


def test_wml_without_balanced_tags_does_not_raise() -> None:
    root = wml.parse_wml("[/a][b]\nkey=1\n[c]\nother=2\n")
    (block,) = root.find_blocks("b")
    assert block.attributes == {"key": "1"}
    assert block.children[0].attributes == {"other": "2"}


@pytest.fixture
def wesnoth_packages(tmp_path: Path) -> dict[str, Path]:
    """Four units with three portraits, and 12 campaigns of one scenario each."""
    core = tmp_path / "w" / wesnoth.DATA_FOLDER / "core"
    units = [
        ("Archer", "archer", "Ranger"),
        ("Ranger", "ranger", "null"),
        ("Twin", "archer", ""),
        ("Orc", "orc", ""),
    ]
    write_text(core / "units/elves.cfg", "".join(UNIT.format(*unit) for unit in units))
    for i, name in enumerate(("archer", "ranger", "orc")):
        write_noise_png(core / f"images/portraits/{name}.png", 200 + i)
    folders = {wesnoth.PACKAGE_NAME: tmp_path / "w"}
    for i in range(12):
        campaign = tmp_path / f"c{i}" / wesnoth.DATA_FOLDER / f"campaigns/Tale_{i}"
        write_text(campaign / "_main.cfg", "")
        write_noise_png(campaign / "images/story/dawn.png", 300 + i)
        write_text(campaign / "scenarios/01_Start.cfg", SCENARIO)
        folders[f"wesnoth-1.16-t{i}"] = tmp_path / f"c{i}"
    return folders


def test_units_that_share_a_portrait_or_advance_are_in_one_split(
    wesnoth_packages: dict[str, Path],
) -> None:
    samples = build_samples("wesnoth", wesnoth_packages)
    assert list(samples) == ["Archer", "Ranger", "Twin", "Orc"]
    assert samples["Archer"].split == samples["Ranger"].split == samples["Twin"].split
    assert samples["Archer"].record["metadata"] == {"race": "elf", "level": 1}
    assert samples["Orc"].record["long"] == "About Orc."


def test_campaigns_show_a_portrait_only_in_its_split_of_wesnoth(
    wesnoth_packages: dict[str, Path],
) -> None:
    portrait_split = build_samples("wesnoth", wesnoth_packages)["Archer"].split
    samples = build_samples("campaigns", wesnoth_packages)
    assert len(samples) == 12
    assert len({sample.split for sample in samples.values()}) > 1
    for sample in samples.values():
        parts = sample.record["parts"]
        texts = [part["text"] for part in parts if "text" in part]
        assert texts == ["Start", "It was dawn.", "Elo: Halt!", "Silence."]
        names = [part["image"].name for part in parts if "image" in part]
        has_portrait = "images/core/portraits__archer.png" in names
        assert has_portrait == (sample.split == portrait_split)
        assert sample.record["metadata"]["images"] == len(names)
