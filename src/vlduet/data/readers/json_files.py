"""Container readers of JSON: lines, lists and single objects. A broken row is yielded as an error.

[{...}, {...}]          a list, decoded item by item
{...}\n{...}\n          lines of objects
{ ... }                 one object: a record, or a list of rows under a key   (json_objects.py)
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vlduet.data.readers.json_objects import iter_object_rows
from vlduet.data.readers.rows import UTF8_FIX, ReadContext, SourceRow
from vlduet.data.readers.text_encoding import detect_encoding
from vlduet.data.records import Place
from vlduet.errors import DataError

NUM_BROKEN_LINES = 20
"""Number of first lines that must all be broken for a file to be no JSON lines at all."""
MAX_LINE_BYTES = 1 << 28
"""Size of the longest line that is read."""
_BLANKS = " \t\r\n"


def read_jsonl_rows(source: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Yield the rows of a ``.jsonl`` file, one JSON value per line; blank lines are skipped.

    A file that starts with a list, or with an object over several lines, is read as ``.json``.

    Raises:
        DataError: before the first row, if the first `NUM_BROKEN_LINES` lines, or all, are broken
            and more than one; or as `read_json_rows`.
    """
    encoding = detect_encoding(source)
    with _open_lines(source, encoding) as lines:
        filled_lines = (line for line in _iter_lines(lines, source) if line.strip())
        head = list(itertools.islice(filled_lines, 2))
    text = b"".join(head).decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if text.startswith("[") or _spans_lines(text):
        yield from read_json_rows(source, context)
    else:
        yield from _read_lines(source, context, encoding)


def _open_lines(source: Path, encoding: str) -> IO[bytes]:
    """Open a text file as bytes in UTF-8; of another encoding, it is read at once.

    Raises:
        DataError: the bytes are not of `encoding`, if it is not ``utf-8-sig``.
    """
    if encoding == "utf-8-sig":
        return source.open("rb")
    return io.BytesIO(_read_text(source).encode("utf-8", "surrogatepass"))


def _iter_lines(lines: IO[bytes], source: Path) -> Iterator[bytes]:
    """Yield the lines of a file; raise DataError for one of more than `MAX_LINE_BYTES`."""
    while line := lines.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            message = f"a line of more than {MAX_LINE_BYTES // 2**20} MiB"
            raise DataError(message, place=source, fix="Write one JSON object per line")
        yield line


def _spans_lines(text: str) -> bool:
    """Return whether the JSON value at the beginning of `text` continues on its second line.

    It does if the first line breaks off at its end, and the second is no object of its own.
    """
    first, _, second = text.strip().partition("\n")
    try:
        json.loads(first)
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(first.rstrip())
        return is_cut and second.strip() != "" and not second.strip().startswith("{")
    except (ValueError, RecursionError):
        pass
    return False


def _read_lines(source: Path, context: ReadContext, encoding: str) -> Iterator[SourceRow]:
    """Yield a row per line that is not blank, as `read_jsonl_rows` does.

    Raises:
        DataError: the first lines are all broken, and there are several.
    """
    with _open_lines(source, encoding) as lines:
        rows = (
            _parse_json_line(line, Place(str(source), number), context)
            for number, line in enumerate(_iter_lines(lines, source), 1)
            if line.strip()
        )
        head: list[SourceRow] = []
        for row in itertools.islice(rows, NUM_BROKEN_LINES):
            head.append(row)
            if row.error is None:
                break
        errors = [row.error for row in head if row.error is not None]
        if len(errors) > 1 and len(errors) == len(head):
            message = f"no JSON lines: none of the first {len(errors)} can be read, the first: "
            first = errors[0]
            fix = first.fix if first.fix == UTF8_FIX else "Write one JSON object per line"
            raise DataError(message + first.message, place=head[0].place, fix=fix)
        yield from itertools.chain(head, rows)


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
        return f"not {error.encoding.upper()} at byte {error.start}"
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON at column {error.colno} ({error.msg})"
    return f"JSON that cannot be held ({error})"  # thousands of digits, or of nested lists


def _read_text(source: Path) -> str:
    """Return the content of a text file. Raise DataError if it is not of its encoding."""
    try:
        return source.read_bytes().decode(detect_encoding(source))
    except UnicodeDecodeError as error:
        raise DataError(_describe_json_error(error), place=source, fix=UTF8_FIX) from None


def read_json_rows(source: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Yield the rows of a ``.json`` file: of a list, of lines of objects, or of one object.

    Items of a list are decoded one by one. An item has the line where it starts as its place, and
    ``FILE NAME:POSITION`` as default id, counted from 1. A syntax error gives a last row with the
    error; what follows it is not read. Objects one after the other are JSON lines if the first is
    on one line, else they are items as well. One object gives the rows of `iter_object_rows`. An
    empty file or list yields nothing.

    Raises:
        DataError: before the first row, if the file is not UTF-8, is broken at its beginning, or
            is neither a list nor objects.
    """
    text = _read_text(source)
    position = _skip(text, 0, _BLANKS)
    start = text[position : position + 1]
    if start == "[":
        yield from _iter_items(text, position + 1, source, context)
    elif start == "{":
        lines = text[position : position + 10_000].split("\n")
        end = _find_value_end(
            text, position, source, is_line=not _spans_lines("\n".join(lines[:2]))
        )
        if end is not None and not text[end:].strip():
            yield from iter_object_rows(json.loads(text[position:end]), source, context)
        elif end is None or "\n" not in text[position:end]:
            yield from _read_lines(source, context, detect_encoding(source))
        else:
            yield from _iter_items(text, position, source, context, is_list=False)
    elif start:
        fix = "Write [{...}, {...}]"
        raise DataError("neither a list nor lines of objects", place=source, fix=fix)


def _find_value_end(text: str, position: int, source: Path, *, is_line: bool) -> int | None:
    """Return where the JSON value at a position ends; None if it is a broken line.

    Args:
        is_line: whether the value ends with its line, so that what is broken is this line.

    Raises:
        DataError: the value is broken, and spans lines.
    """
    try:
        return json.JSONDecoder().raw_decode(text, position)[1]
    except (ValueError, RecursionError) as error:
        if is_line:
            return None
        place = Place(
            str(source), error.lineno if isinstance(error, json.JSONDecodeError) else None
        )
        message = f"one object over several lines: {_describe_json_error(error)}"
        raise DataError(message, place=place, fix="Correct it, or write a list") from None


def _iter_items(
    text: str, position: int, source: Path, context: ReadContext, *, is_list: bool = True
) -> Iterator[SourceRow]:
    """Yield a row per item of a list, or of values one after the other.

    The text behind the end of a list, and a syntax error, are a last row with an error.

    Args:
        position: of the first character behind the bracket of the list, or of the first value.
    """
    decoder = json.JSONDecoder()
    separators = "," + _BLANKS if is_list else _BLANKS
    end_mark = "]" if is_list else ""
    line = 1  # of `position`
    counted = 0  # characters whose line ends are in `line`
    position = _skip(text, position, _BLANKS)
    for number in itertools.count(1):
        if text[position : position + 1] == end_mark:
            break
        line += text.count("\n", counted, position)
        counted = position
        place = Place(str(source), line)
        name = f"{source.name}:{number}"
        try:
            value, position = decoder.raw_decode(text, position)
            position = _skip(text, position, _BLANKS)
            if is_list and text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("expected , or ]", text, position)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                place = Place(str(source), error.lineno)
            fix = "Correct the line; what follows it in the file was not read"
            message = _describe_json_error(error)
            yield SourceRow.broken(place, context, name, message=message, fix=fix)
            return
        yield SourceRow(place, context, name, value)
        position = _skip(text, position, separators)
    if is_list and text[position + 1 :].strip():
        place = Place(str(source), text.count("\n", 0, position) + 1)
        message = "text behind the end of the list, which was not read"
        fix = "Write one list"
        yield SourceRow.broken(place, context, source.name, message=message, fix=fix)


def _skip(text: str, position: int, characters: str) -> int:
    """Return the first position from `position` on that holds none of `characters`."""
    while position < len(text) and text[position] in characters:
        position += 1
    return position
