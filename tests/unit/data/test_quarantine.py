"""Dropped records are listed once, with their cause."""

from __future__ import annotations

import json
from pathlib import Path

from vlduet.data.quarantine import Quarantine, bisect_failures, generalize_cause, quarantine_path
from vlduet.data.records import ImageRef, Place, Record
from vlduet.errors import DataError, ImageError

PLACE = Place("x.jsonl", 3)
NO_IMAGE = ImageError("no such image", place="a.png", fix="Correct the path")


def make_record(name: str) -> Record:
    return Record(name, image=ImageRef(path=Path(f"{name}.png")), place=PLACE)


def test_each_drop_is_a_line_with_place_cause_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "out" / "quarantine.jsonl"
    quarantine = Quarantine(path)
    assert not path.parent.exists(), "nothing is created before the first drop"
    assert quarantine.add(make_record("a"), NO_IMAGE)
    no_id = DataError("id is nothing", fix="Write one")
    assert quarantine.add(PLACE.with_field("id"), no_id)
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert first == {
        "id": "a",
        "place": "x.jsonl:3",
        "cause": "no such image",
        "message": "a.png: no such image",
        "fix": "Correct the path",
    }
    assert (second["id"], second["place"]) == (None, "x.jsonl:3:id")


def test_an_equal_drop_is_listed_once_even_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path)
    assert quarantine.add(make_record("a"), NO_IMAGE)
    assert not quarantine.add(make_record("a"), NO_IMAGE)
    restarted = Quarantine(path)
    assert not restarted.add(make_record("a"), NO_IMAGE) and restarted.count == 1
    assert restarted.add(make_record("b"), NO_IMAGE)
    assert len(path.read_text().splitlines()) == 2


def test_create_deletes_the_list_of_an_earlier_run(tmp_path: Path) -> None:
    path = quarantine_path(tmp_path / "out.jsonl")
    assert path == tmp_path / "out.quarantine.jsonl"
    Quarantine(path).add(make_record("a"), NO_IMAGE)
    assert Quarantine.create(path).count == 0 and not path.exists()


def test_the_drop_of_an_incomplete_line_is_listed_again(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path).add(make_record("a"), NO_IMAGE)
    path.write_text(path.read_text() + '{"id": "b", "pl')
    restarted = Quarantine(path)
    assert restarted.count == 1 and restarted.add(make_record("b"), NO_IMAGE)


def test_causes_leave_out_names_and_numbers() -> None:
    quarantine = Quarantine()
    for i in range(3):
        error = ImageError(f"the image is too small: {i} x 7 pixels")
        quarantine.add(make_record(f"r{i}"), error)
    quarantine.add(make_record("other"), DataError("unknown key 'shrt'"))
    assert quarantine.count_by_cause() == {"the image is too small: x pixels": 3, "unknown key": 1}
    assert quarantine.count == 4
    text = str(quarantine)
    assert text == "4 dropped (3 x the image is too small: x pixels, 1 x unknown key)"
    assert str(Quarantine()) == "nothing dropped"


def test_an_exception_without_message_is_named_by_its_type() -> None:
    quarantine = Quarantine()
    quarantine.add("x.jsonl:1", ValueError())
    assert quarantine.count_by_cause() == {"ValueError": 1}


def test_bisection_isolates_broken_items() -> None:
    batches: list[list[int]] = []

    def square(numbers: list[int]) -> list[int]:
        batches.append(numbers)
        if any(number % 5 == 3 for number in numbers):
            raise DataError("no squares of these")
        return [number * number for number in numbers]

    errors: list[int] = []
    results = bisect_failures(
        square, list(range(10)), on_error=lambda number, _: errors.append(number)
    )
    assert results == [0, 1, 4, None, 16, 25, 36, 49, None, 81] and errors == [3, 8]
    assert batches[0] == list(range(10)), "all at once first"
    assert bisect_failures(square, [], on_error=lambda number, _: None) == []


def test_the_general_cause_lacks_names_and_numbers_but_not_those_of_a_name() -> None:
    assert generalize_cause("'a.png' has 24 x 24.5 pixels (line 7)") == "has x pixels"
    assert generalize_cause("not UTF-8") == "not UTF-8"
    assert generalize_cause("'x'") == ""
