"""The page of one record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from helpers import pages, tiny
from vlduet.data.records import ImageRef, Record
from vlduet.inspect.tokens import RecordInspection, TokenRow
from vlduet.reports import record_page

RECORD = Record(
    pages.HOSTILE, parts=("A cat.", tiny.random_image(1)), metadata={pages.HOSTILE: pages.HOSTILE}
)


def test_a_record_and_what_a_model_sees_of_it(tmp_path: Path) -> None:
    tokens = (
        TokenRow(0, 0, "<s>", supervised=False, anchors=(), image=None),
        TokenRow(0, 1, pages.HOSTILE, supervised=True, anchors=(), image=None),
        TokenRow(0, 2, ".", supervised=True, anchors=("text 1", "text 2"), image=None),
    )
    second = tuple(replace(row, sequence=1) for row in tokens[:2])
    record_page.write(tmp_path / "a.html", RecordInspection(RECORD, tokens + second))
    found = pages.parse_checked_page((tmp_path / "a.html").read_text())
    assert found.text.count(pages.SCRIPT) == 6, (
        "title, heading, both of the metadata, and two tokens"
    )
    assert [a["class"] for t, a in found.tags if t == "span"] == [
        "",
        "loss",
        "loss anchor",
        "",
        "loss",
    ]
    assert [a["title"] for t, a in found.tags if t == "span" and a["title"]] == ["text 1, text 2"]
    assert "Sequence 1" in found.text and len([t for t, _ in found.tags if t == "img"]) == 1


def test_without_a_model_there_are_no_sequences(tmp_path: Path) -> None:
    record_page.write(tmp_path / "a.html", RecordInspection(RECORD, ()))
    assert (
        "What the model sees"
        not in pages.parse_checked_page((tmp_path / "a.html").read_text()).text
    )


def test_a_broken_image_is_told_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    record = replace(RECORD, parts=(ImageRef(path=tmp_path / "x.png"),))
    record_page.write(tmp_path / "a.html", RecordInspection(record, ()))
    found = pages.parse_checked_page((tmp_path / "a.html").read_text())
    assert len([a for _, a in found.tags if a.get("class") == "error"]) == 1
    assert "x.png" in found.text and not [t for t, _ in found.tags if t == "img"]
