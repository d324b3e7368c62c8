"""Container reader of tables as text: CSV and TSV. A broken row is yielded with its error."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from vlduet.data.readers.rows import UTF8_FIX, ReadContext, SourceRow
from vlduet.data.records import Place, is_utf8_encodable
from vlduet.errors import DataError


def read_table_rows(source: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Yield the rows of a ``.csv`` or ``.tsv`` file with a header line, without empty cells.

    A CSV may be separated by commas, semicolons or tabs: the most frequent one in the header. A
    value maps column names to texts. Blank lines are skipped. Broken quotes, more cells than
    columns, and cells that are not UTF-8 give a row with an error. An empty file yields nothing.

    Raises:
        DataError: before the first row, if the header is broken or names a column twice.
    """
    with source.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        header = lines.readline()
        lines.seek(0)
        delimiters = "\t,;" if source.suffix.lower() == ".csv" else "\t"
        reader = csv.reader(lines, delimiter=max(delimiters, key=header.count), strict=True)
        place = Place(str(source), 1)
        try:
            columns = [name.strip() for name in next(reader, [])]
        except csv.Error as error:
            message = f"broken header ({error})"
            raise DataError(message, place=place, fix="Correct the quotes") from None
        if len(set(columns)) != len(columns):
            message = f"a column twice: {', '.join(columns)}"
            raise DataError(message, place=place, fix="Rename one")
        while True:
            place = Place(str(source), reader.line_num + 1)
            name = f"{source.name}:{place.line}"
            try:
                cells = next(reader)
                if cells:
                    yield SourceRow(place, context, name, _label_cells(columns, cells, place))
            except StopIteration:
                return
            except csv.Error as error:
                fix = "Double the quotes inside a quoted cell, and close it"
                yield SourceRow.broken(
                    place, context, name, message=f"broken row ({error})", fix=fix
                )
            except DataError as error:
                yield SourceRow(place, context, name, error=error)


def _label_cells(columns: list[str], cells: list[str], place: Place) -> dict[str, str]:
    """Return the cells of a row that are not blank, unstripped, by column.

    Columns without a cell are left out.

    Raises:
        DataError: there are more cells than columns, or a cell is not UTF-8.
    """
    if len(cells) > len(columns):
        message = f"{len(cells)} cells for {len(columns)} columns"
        first_extra = place.with_field(cells[len(columns)][:20])
        raise DataError(message, place=first_extra, fix="Quote cells that hold the separator")
    values = dict(zip(columns, cells, strict=False))
    for column, cell in values.items():
        if not is_utf8_encodable(cell):
            raise DataError("not UTF-8", place=place.with_field(column), fix=UTF8_FIX)
    return {column: cell for column, cell in values.items() if cell.strip()}
