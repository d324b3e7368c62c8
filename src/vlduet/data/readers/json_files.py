"""Container readers of JSON: lines of JSON, and one list. A broken row is yielded as an error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from vlduet.data.readers.rows import UTF8_FIX, ReadContext, SourceRow
from vlduet.data.records import Place
from vlduet.errors import DataError


def read_jsonl_rows(source: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Yield the rows of a ``.jsonl`` file, one JSON value per line; blank lines are skipped."""
    with source.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parse_json_line(line, Place(str(source), number), context)


def _parse_json_line(data: bytes, place: Place, context: ReadContext) -> SourceRow:
    """Return the row of one line of JSON (any value), with ``FILE NAME:LINE`` as default id.

    A line that is not UTF-8 or not JSON gives a row with a DataError; nothing is raised.
    """
    name = f"{Path(place.file).name}:{place.line}"
    try:
        return SourceRow(place, context, name, json.loads(data.decode("utf-8-sig")))
    except (ValueError, RecursionError) as error:
        fix = UTF8_FIX if isinstance(error, UnicodeDecodeError) else "Correct the line"
        return SourceRow.broken(place, context, name, message=_describe_json_error(error), fix=fix)


def _describe_json_error(error: Exception) -> str:
    """Return a message, without place, for an exception of decoding bytes or text as JSON."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON at column {error.colno} ({error.msg})"
    return f"JSON that cannot be held ({error})"  # thousands of digits, or of nested lists


def read_json_rows(source: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Yield the rows of a ``.json`` file: the items of one list, decoded one by one.

    An item has the line where it starts, and ``FILE NAME:LINE`` as default id. A file that starts
    with ``{`` is read as JSON lines. A syntax error gives a last row with the error; what follows
    it is not read. An empty file or list yields nothing.

    Raises:
        DataError: before the first row, if the file is not UTF-8, or is neither a list nor lines
            of objects.
    """
    blanks = " \t\r\n"
    try:
        text = source.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(_describe_json_error(error), place=source, fix=UTF8_FIX) from None
    position = _skip(text, 0, blanks)
    if text[position : position + 1] == "{":
        yield from read_jsonl_rows(source, context)
        return
    if text[position : position + 1] != "[":
        if text.strip():
            fix = "Write [{...}, {...}]"
            raise DataError("neither a list nor lines of objects", place=source, fix=fix)
        return
    decoder = json.JSONDecoder()
    line = 1  # of `position`
    counted = 0  # characters whose line ends are in `line`
    position = _skip(text, position + 1, blanks)
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted = position
        place = Place(str(source), line)
        name = f"{source.name}:{line}"
        try:
            value, position = decoder.raw_decode(text, position)
            position = _skip(text, position, blanks)
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("expected , or ]", text, position)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                place = Place(str(source), error.lineno)
            fix = "Correct the line; what follows it in the list was not read"
            yield SourceRow.broken(
                place, context, name, message=_describe_json_error(error), fix=fix
            )
            return
        yield SourceRow(place, context, name, value)
        position = _skip(text, position, "," + blanks)


def _skip(text: str, position: int, characters: str) -> int:
    """Return the first position from `position` on that holds none of `characters`."""
    while position < len(text) and text[position] in characters:
        position += 1
    return position
