"""Options and output helpers that several commands share."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlduet.logs import logger, strip_control_characters

if TYPE_CHECKING:
    from vlduet.data.quarantine import Quarantine
    from vlduet.data.records import Record
    from vlduet.data.sources import RecordSource
    from vlduet.errors import DataError

FORMAT = "Format, by default detected from the first rows; see 'vlduet data formats'."
ROOT = "Folder that relative image paths start from, by default the file's own."
COLUMNS = "Column that has a role, such as caption=text_en; repeatable."
MODEL = "A model folder or a supported checkpoint, or its name on a hub: ORG/NAME[@REVISION]."
STRICT = "Refuse broken rows, and whatever is not read."

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Format = Annotated[str | None, typer.Option("--format", metavar="NAME", help=FORMAT)]
Root = Annotated[Path | None, typer.Option("--root", metavar="DIR", help=ROOT)]
Columns = Annotated[
    list[str] | None, typer.Option("--columns", metavar="ROLE=COLUMN", help=COLUMNS)
]
Strict = Annotated[bool, typer.Option("--strict", help=STRICT)]
ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help=MODEL)]
Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="A file of records, or a folder of images.")
]
QueryFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="Pairs with short captions, or retrieval records.")
]


def print_text(value: object, *, end: str = "\n") -> None:
    """Print ``str(value)`` without control characters, but for newlines and tabs; `end` follows it.

    All commands print by this function, because texts of records may hold escape sequences. Without
    a newline as `end`, what was printed is shown at once.
    """
    print(strip_control_characters(str(value), keep="\n\t"), end=end, flush=not end)


def print_json(value: Any) -> None:
    """Print a value as one line of JSON, in ASCII so that no text can control the terminal."""
    print_text(json.dumps(value, default=str))


def drop_counts(dropped: Quarantine) -> dict[str, Any]:
    """Return the JSON fields that tell how many records were left out, and why."""
    return {"dropped": dropped.count, "causes": dropped.count_by_cause()}


def print_output_summary(
    to: Path,
    count: int,
    dropped: Quarantine,
    *,
    as_json: bool,
    details: str = "",
    fields: dict[str, Any] | None = None,
) -> None:
    """Print how many records were written to a file, and how many were left out.

    Raises typer.Exit with status 1, after printing, if none were written.

    Args:
        to: file that was written.
        count: number of its records.
        dropped: records that were left out.
        as_json: print one JSON object instead of a line of text.
        details: text behind the number; not part of the JSON object.
        fields: further fields of the JSON object; not part of the text.
    """
    if as_json:
        counts = {"file": str(to), "records": count}
        print_json({**counts, **(fields or {}), **drop_counts(dropped)})
    else:
        print_text(f"{to}: {count} records{details}; {dropped}")
    if not count:
        raise typer.Exit(1)


def format_left_out(causes: Mapping[str, int], source: Path, *, listing: Path) -> str:
    """Return the number of records that were left out, in all and by cause, and where they are.

    A second line tells what helps against missing images, if there are any.

    Args:
        causes: number of records by cause, as of `Quarantine.count_by_cause`.
        source: source as it was given.
        listing: file that lists the records.
    """
    from vlduet.data.images import MISSING_IMAGE
    from vlduet.model.limits import TOO_LONG

    counts = ", ".join(f"{count} x {cause}" for cause, count in causes.items())
    text = f"{sum(causes.values())} left out ({counts}): see {listing}"
    if MISSING_IMAGE in causes:
        text += f"\nvlduet data check {shlex.quote(str(source))} looks for the missing images"
    if TOO_LONG in causes:
        text += "\n--truncate cuts texts that are too long; 'vlduet model limit' changes the limit"
    return text


def quarantine_rows(dropped: Quarantine) -> Callable[[DataError], None]:
    """Return a function for `on_error` of a reader: it adds each error to `dropped`."""

    def on_error(error: DataError) -> None:
        dropped.add(error.place, error)

    return on_error


def make_source(
    path: Path,
    *,
    format: str | None = None,
    root: Path | None = None,
    columns: list[str] | None = None,
    strict: bool = False,
) -> RecordSource:
    """Return the source that the path and the options of a command describe.

    Raises ConfigError for a text of `columns` that is not ``ROLE=COLUMN``, and for a role that has
    two columns. Nothing is opened, and names of roles and formats are not checked.
    """
    from vlduet.data.sources import RecordSource
    from vlduet.errors import ConfigError

    column_by_role: dict[str, str] = {}
    for text in columns or ():
        role, equals, column = (word.strip() for word in text.partition("="))
        if not (role and equals and column):
            fix = "Write ROLE=COLUMN, such as caption=text_en"
            raise ConfigError(f"'{text}'", place="--columns", fix=fix)
        if column_by_role.setdefault(role, column) != column:
            message = f"two columns for '{role}': {column_by_role[role]} and {column}"
            raise ConfigError(message, place="--columns", fix="Name one")
    return RecordSource(path, format=format, root=root, columns=column_by_role, strict=strict)


def read_record_at(source: RecordSource, index: int) -> Record:
    """Return the readable record number `index` of a source, counted from 0.

    Broken records before it, and what is not read up to it, are logged as warnings; the former are
    not counted. Raises DataError if the source cannot be read or has too few readable records, or
    as `RecordSource.read` if it is strict.
    """
    from vlduet.errors import DataError

    count = 0
    records = source.read(on_error=lambda error: logger.warning(f"left out: {error}"))
    for record in records:
        if count == index:
            return record
        count += 1
    fix = f"Use 0 to {count - 1}" if count else "Run 'vlduet data check' on it"
    message = f"no record {index}, the file holds {count}"
    raise DataError(message, place=source.path, fix=fix)
