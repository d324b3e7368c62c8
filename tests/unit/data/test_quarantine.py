"""Dropped records are counted, named by cause, written once."""

from __future__ import annotations

import json
from pathlib import Path

from vlduet.data.quarantine import Quarantine
from vlduet.data.records import ImageRef, Place, Record
from vlduet.errors import DataError, ImageError

PLACE = Place("x.jsonl", 3)


def record(name: str) -> Record:
    return Record(name, image=ImageRef(path=Path(f"{name}.png")), place=PLACE)


def test_each_drop_is_a_line_with_its_place_cause_and_fix(tmp_path: Path) -> None:
    bad = Quarantine(tmp_path / "out" / "quarantine.jsonl")
    assert not (tmp_path / "out").exists(), "nothing is made before the first drop"
    assert bad.add(record("a"), ImageError("no such image", place="a.png", fix="Mend the path"))
    assert bad.add(PLACE.with_field("id"), DataError("id is nothing", fix="Write one"))
    assert bad.path is not None
    rows = [json.loads(line) for line in bad.path.read_text().splitlines()]
    assert rows[0] == {
        "id": "a",
        "place": "x.jsonl:3",
        "cause": "no such image",
        "message": "a.png: no such image",
        "fix": "Mend the path",
    }
    assert (rows[1]["id"], rows[1]["place"]) == (None, "x.jsonl:3:id")


def test_the_same_drop_is_counted_once_also_after_a_restart(tmp_path: Path) -> None:
    path, error = tmp_path / "quarantine.jsonl", ImageError("no such image", place="a.png")
    first = Quarantine(path)
    assert first.add(record("a"), error) and not first.add(record("a"), error)
    again = Quarantine(path)
    assert not again.add(record("a"), error) and again.count == 1
    assert again.add(record("b"), error) and len(path.read_text().splitlines()) == 2


def test_a_line_cut_short_is_written_again(tmp_path: Path) -> None:
    path, error = tmp_path / "quarantine.jsonl", DataError("broken")
    Quarantine(path).add(record("a"), error)
    path.write_text(path.read_text() + '{"id": "b", "pl')
    again = Quarantine(path)
    assert again.count == 1 and again.add(record("b"), error)


def test_causes_leave_out_names_and_numbers() -> None:
    bad = Quarantine()
    for i in range(3):
        bad.add(record(f"r{i}"), ImageError(f"the image is too small: {i} x 7 pixels"))
    bad.add(record("other"), DataError("unknown key 'shrt'"))
    counts = list(bad.count_by_cause().values())
    assert counts == [3, 1] and bad.count == 4
    assert str(bad).startswith("4 dropped (3 x ") and "shrt" not in str(bad)
    assert str(Quarantine()) == "nothing dropped"


def test_any_exception_can_be_the_cause() -> None:
    bad = Quarantine()
    bad.add("x.jsonl:1", ValueError())
    assert bad.count_by_cause() == {"ValueError": 1}
