"""Options and output helpers that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlduet.logs import logger

if TYPE_CHECKING:
    from vlduet.data.quarantine import Quarantine
    from vlduet.data.records import Record
    from vlduet.errors import DataError

FORMAT = "Format, by default detected from the first row; see 'vlduet data formats'."
ROOT = "Folder that relative image paths start from, by default the file's own."

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Format = Annotated[str | None, typer.Option("--format", metavar="NAME", help=FORMAT)]
Root = Annotated[Path | None, typer.Option("--root", metavar="DIR", help=ROOT)]
ModelFolder = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A model folder or a supported checkpoint.")
]
Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="A file of records, or a folder of images.")
]
QueryFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="Pairs with short captions, or retrieval records.")
]


def print_json(value: Any) -> None:
    """Print a value as one line of JSON, in ASCII so that no text can control the terminal."""
    print(json.dumps(value, default=str))


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
        print(f"{to}: {count} records{details}; {dropped}")
    if not count:
        raise typer.Exit(1)


def quarantine_rows(dropped: Quarantine) -> Callable[[DataError], None]:
    """Return a function for `on_error` of a reader: it adds each error to `dropped`."""

    def on_error(error: DataError) -> None:
        dropped.add(error.place, error)

    return on_error


def read_record_at(
    file: Path, index: int, *, format: str | None = None, root: Path | None = None
) -> Record:
    """Return the readable record number `index` of a file or folder, counted from 0.

    Broken records before it are logged as warnings and not counted. Raises DataError if the file
    cannot be read or has too few readable records.
    """
    from vlduet.data.formats import read_records
    from vlduet.errors import DataError

    count = 0
    for record in read_records(
        file,
        format=format,
        root=root,
        on_error=lambda error: logger.warning(f"left out: {error}"),
    ):
        if count == index:
            return record
        count += 1
    fix = f"Use 0 to {count - 1}" if count else "Run 'vlduet data check' on it"
    message = f"no record {index}, the file holds {count}"
    raise DataError(message, place=file, fix=fix)
