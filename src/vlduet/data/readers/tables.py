"""Container reader of tables as text: CSV and the like. A broken row is yielded with its error.

1. dialect   encoding, separator and columns, by the first lines
2. types     a pass over the file: columns of numbers and of true or false
3. rows      a second pass, one row at a time
"""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vlduet.data.readers.rows import UTF8_FIX, ReadContext, SourceRow
from vlduet.data.readers.text_encoding import detect_encoding
from vlduet.data.records import Place, is_utf8_encodable
from vlduet.errors import DataError

SEPARATORS = "\t,;|"
"""Separators that are recognised; of equally good ones the first."""
NUM_SAMPLE_LINES = 200
"""Number of lines that decide the separator."""

_INTEGER = re.compile(r"-?(0|[1-9]\d{0,14})")
_FLOAT = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d{1,20})?([eE][+-]\d{1,3})?")
_PRICE = re.compile(r"-?(0|[1-9]\d{0,14})(,\d{2})?")
_BOOLEANS = {"true": True, "false": False}


def _parse_boolean(text: str) -> bool:
    return _BOOLEANS[text.strip().lower()]


def _parse_price(text: str) -> float:
    return float(text.replace(",", "."))


_TYPES: tuple[tuple[Callable[[str], bool], Callable[[str], Any]], ...] = (
    (lambda text: _INTEGER.fullmatch(text) is not None, int),
    (lambda text: _FLOAT.fullmatch(text) is not None and math.isfinite(float(text)), float),
    (lambda text: text.lower() in _BOOLEANS, _parse_boolean),
)
"""Test of a stripped cell and conversion for each type of a column that is no text. Numbers with
leading zeros, thousands separators, decimal commas, unsigned exponents or more than 15 digits may
be codes, so they are texts."""

_SEMICOLON_TYPES = (*_TYPES, (lambda text: _PRICE.fullmatch(text) is not None, _parse_price))
"""The types in a table separated by semicolons. Spreadsheets write it where the comma is decimal:
there, numbers with two digits after a comma are prices."""


@dataclass(frozen=True, slots=True)
class _Dialect:
    """Encoding and separators of a table."""

    encoding: str
    separator: str
    skips_blanks: bool
    """Whether blanks after a separator do not belong to the cell."""
    num_skipped_lines: int
    """Number of lines before the header: blank ones, and Excel's ``sep=;``."""


def read_table_rows(source: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Yield the rows of a table as text with a header line; a blank cell is None.

    The separator, one of `SEPARATORS`, is the one with which most of the first lines have as many
    cells as the header. A value maps stripped names of columns to unstripped texts; a column
    without a name is called ``column 3`` by its number. Blank lines are skipped. Broken quotes,
    more cells than columns, and cells that are not UTF-8 give a row with an error. An empty file
    yields nothing.

    A column whose cells are all numbers, or all true or false, has this type in metadata. The file
    is read twice for this.

    Raises:
        DataError: before the first row, if the header is broken or names a column twice, or the
            file is no text.
    """
    dialect = _detect_dialect(source)
    with _open_text(source, dialect.encoding) as lines:
        reader = _make_reader(lines, dialect)
        columns = _read_header(reader, Place(str(source), dialect.num_skipped_lines + 1))
        if not columns:
            return
        types = _detect_types(source, dialect, columns)
        for place, cells in _iter_rows(reader, source, dialect):
            name = f"{source.name}:{place.line}"
            if isinstance(cells, csv.Error):
                fix = "Double the quotes inside a quoted cell, and close it"
                message = f"broken row ({cells})"
                if "unexpected end" in str(cells):
                    message = "a quote that is not closed, so that the rest of the file is not read"
                yield SourceRow.broken(place, context, name, message=message, fix=fix)
                continue
            try:
                value = _label_cells(columns, cells, place)
            except DataError as error:
                yield SourceRow(place, context, name, error=error)
            else:
                yield SourceRow(place, context, name, value, metadata_types=types)


def _open_text(source: Path, encoding: str) -> IO[str]:
    """Open a table for reading; bytes of UTF-8 that are broken become lone surrogates."""
    errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
    return source.open(encoding=encoding, errors=errors, newline="")


def _make_reader(lines: IO[str], dialect: _Dialect) -> Any:
    """Return a strict `csv.reader` behind the lines that the dialect skips."""
    for _ in range(dialect.num_skipped_lines):
        lines.readline()
    return csv.reader(
        lines, delimiter=dialect.separator, skipinitialspace=dialect.skips_blanks, strict=True
    )


def _read_header(reader: Any, place: Place) -> list[str]:
    """Return the names of the columns; [] for an empty file.

    Raises:
        DataError: broken quotes, or a name twice.
    """
    try:
        names = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        message = f"broken header ({error})"
        raise DataError(message, place=place, fix="Correct the quotes") from None
    columns = [name or f"column {number}" for number, name in enumerate(names, 1)]
    if not is_utf8_encodable("".join(columns)):
        raise DataError("a header that is not UTF-8", place=place, fix=UTF8_FIX)
    if len(set(columns)) != len(columns):
        raise DataError(f"a column twice: {', '.join(columns)}", place=place, fix="Rename one")
    return columns


def _iter_rows(
    reader: Any, source: Path, dialect: _Dialect
) -> Iterator[tuple[Place, list[str] | csv.Error]]:
    """Yield (place, cells or the error of reading them) of each row that is not blank."""
    while True:
        place = Place(str(source), reader.line_num + dialect.num_skipped_lines + 1)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield place, error
            continue
        if any(cell.strip() for cell in cells):
            yield place, cells


def _label_cells(columns: list[str], cells: list[str], place: Place) -> dict[str, str | None]:
    """Return the cells of a row by column, unstripped; None for blank and for missing ones.

    Raises:
        DataError: there are more cells than columns, or a cell is not UTF-8.
    """
    if _has_extra_cells(cells, columns):
        message = f"{len(cells)} cells for {len(columns)} columns"
        first_extra = place.with_field(cells[len(columns)][:20])
        raise DataError(message, place=first_extra, fix="Quote cells that hold the separator")
    values: dict[str, str | None] = dict.fromkeys(columns)
    for column, cell in zip(columns, cells, strict=False):
        if not is_utf8_encodable(cell):
            raise DataError("not UTF-8", place=place.with_field(column), fix=UTF8_FIX)
        if cell.strip():
            values[column] = cell
    return values


def _has_extra_cells(cells: list[str], columns: list[str]) -> bool:
    """Return whether a row has a cell behind the last column that is not blank."""
    return any(cell.strip() for cell in cells[len(columns) :])


# --- dialect and types


def _detect_dialect(source: Path) -> _Dialect:
    """Return how a table is written, by its first `NUM_SAMPLE_LINES` lines.

    Raises:
        DataError: the file is no text.
        OSError: it cannot be read.
    """
    encoding = detect_encoding(source)
    with _open_text(source, encoding) as file:
        lines = list(itertools.islice(file, NUM_SAMPLE_LINES))
    num_skipped = 0
    separator = None
    for line in lines:
        if match := re.fullmatch(r"sep=(.)\s*", line):
            separator = match[1]
        elif line.strip(SEPARATORS + " \r\n"):
            break
        num_skipped += 1
    lines = lines[num_skipped:]
    if separator is None:
        default = "\t" if source.suffix.lower() == ".tsv" else ","
        header = lines[0] if lines else ""
        candidates = [item for item in SEPARATORS if item in header] or [default]
        separator = max(candidates, key=lambda item: _rate_separator(item, lines))
    return _Dialect(encoding, separator, _has_blanks(lines[:1], separator), num_skipped)


def _has_blanks(header: list[str], separator: str) -> bool:
    """Return whether a blank follows every separator of a header line."""
    cells = header[0].split(separator)[1:] if header else []
    return bool(cells) and all(cell.startswith(" ") for cell in cells)


def _rate_separator(separator: str, lines: list[str]) -> tuple[float, bool, int]:
    """Return (share of rows with as many cells as the header, no blanks, number of columns).

    A single column rates worst, and blanks behind every separator of the header, as behind the
    commas of a text, rate worse than none. The last row may be cut, and does not count if there
    are others.
    """
    has_no_blanks = not _has_blanks(lines[:1], separator)
    try:
        rows = [row for row in csv.reader(lines, delimiter=separator, strict=False) if row]
    except csv.Error:  # an overlong cell
        rows = []
    num_columns = len(rows[0]) if rows else 0
    if num_columns < 2:
        return -1.0, has_no_blanks, num_columns
    body = rows[1:-1] or rows[1:]
    num_equal = sum(len(row) == num_columns for row in body)
    return num_equal / len(body) if body else 1.0, has_no_blanks, num_columns


def _detect_types(
    source: Path, dialect: _Dialect, columns: list[str]
) -> dict[str, Callable[[str], Any]]:
    """Return the conversion of each column all of whose cells are of one type of `_TYPES`.

    With semicolons as separators, the types are `_SEMICOLON_TYPES`. Columns of texts and columns
    without cells are left out. Broken rows do not count.
    """
    all_types = _SEMICOLON_TYPES if dialect.separator == ";" else _TYPES
    candidates = {column: list(all_types) for column in columns}
    filled: set[str] = set()
    with _open_text(source, dialect.encoding) as lines:
        reader = _make_reader(lines, dialect)
        next(reader, None)
        for _, cells in _iter_rows(reader, source, dialect):
            if not candidates:
                break
            if isinstance(cells, csv.Error) or _has_extra_cells(cells, columns):
                continue
            for column, cell in zip(columns, cells, strict=False):
                text = cell.strip()
                if not text or column not in candidates:
                    continue
                filled.add(column)
                types = [item for item in candidates[column] if item[0](text)]
                candidates[column] = types
                if not types:
                    del candidates[column]
    return {column: types[0][1] for column, types in candidates.items() if column in filled}
