"""A source reports once what is not read, and a strict one refuses it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlduet.data import sources
from vlduet.data.readers.rows import IgnoredData
from vlduet.data.records import Record
from vlduet.data.sources import RecordSource, as_source
from vlduet.errors import DataError

SOURCE = RecordSource(Path("x.csv"), format="captions", root=Path("r"), columns={"caption": "c"})


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let a source yield two records with unread columns around a broken row; list the settings."""
    received: list[dict[str, Any]] = []

    def read_records(path: Path, **values: Any) -> Iterator[Record]:
        received.append({"path": path, **values})
        ignored: IgnoredData = values["ignored"]
        yield Record("0")
        ignored.add("column", "colour")
        error = DataError("broken row", place=f"{path}:2")
        if values["on_error"] is None:
            raise error
        values["on_error"](error)
        ignored.add("column", "colour")
        ignored.add("column", "size")
        yield Record("1")

    monkeypatch.setattr(sources, "read_records", read_records)
    return received


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]


def test_settings_reach_the_reader_and_errors_the_caller(settings: list[dict[str, Any]]) -> None:
    errors: list[DataError] = []
    assert [record.id for record in SOURCE.read(on_error=errors.append)] == ["0", "1"]
    assert [error.message for error in errors] == ["broken row"]
    (values,) = settings
    assert values["path"] == Path("x.csv") and values["format"] == "captions"
    assert values["root"] == Path("r") and values["columns"] == {"caption": "c"}


def test_each_unread_column_is_one_warning_at_the_end(
    settings: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    records = SOURCE.read(on_error=lambda error: None)
    assert next(records).id == "0" and not warnings_of(caplog)
    assert [record.id for record in records] == ["1"]
    messages = warnings_of(caplog)
    assert len(messages) == 2 and all(message.startswith("x.csv: ") for message in messages)
    assert "`colour`" in messages[0] and "2 rows" in messages[0] and "`size`" in messages[1]


def test_an_iterator_that_is_closed_early_warns_of_what_it_met(
    settings: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    records = SOURCE.read(on_error=lambda error: None)
    next(records)
    next(records)
    records.close()  # type: ignore[attr-defined]
    assert len(warnings_of(caplog)) == 2


def test_a_strict_source_refuses_broken_rows(settings: list[dict[str, Any]]) -> None:
    records = RecordSource(Path("x.csv"), strict=True).read(on_error=lambda error: None)
    assert next(records).id == "0"
    with pytest.raises(DataError, match="broken row"):
        next(records)


def test_a_strict_source_refuses_what_is_not_read_before_the_next_record(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_records(path: Path, **values: Any) -> Iterator[Record]:
        yield Record("0")
        values["ignored"].add("column", "colour")
        yield Record("1")

    monkeypatch.setattr(sources, "read_records", read_records)
    records = RecordSource(Path("x.csv"), strict=True).read()
    assert next(records).id == "0"
    with pytest.raises(DataError, match=r"x\.csv: 1 row .*`colour`.*--columns"):
        next(records)
    assert not warnings_of(caplog), "the error says it already"


def test_reading_without_a_report_has_no_log_messages(
    settings: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    ignored = IgnoredData()
    records = SOURCE.read_silently(ignored, on_error=lambda error: None)
    assert len(list(records)) == 2 and len(ignored.messages()) == 2
    assert not warnings_of(caplog)


def test_a_path_is_a_source_with_default_settings() -> None:
    assert as_source("a.jsonl") == as_source(Path("a.jsonl")) == RecordSource(Path("a.jsonl"))
    assert as_source(SOURCE) is SOURCE


def test_many_unread_files_are_a_few_warnings_and_a_count(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_records(path: Path, **values: Any) -> Iterator[Record]:
        for i in range(1000):
            values["ignored"].add("file", f"{i}.txt")
        yield Record("0")

    monkeypatch.setattr(sources, "read_records", read_records)
    assert len(list(as_source("x").read())) == 1
    messages = warnings_of(caplog)
    assert len(messages) == sources.MAX_WARNINGS + 1
    assert "980 more" in messages[-1] and "980 more" not in messages[-2]
    with pytest.raises(DataError, match="; 980 more"):
        list(RecordSource(Path("x"), strict=True).read())
