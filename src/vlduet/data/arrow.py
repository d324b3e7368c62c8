"""Parquet and Arrow files, as Hugging Face `datasets` keeps them on disk -> rows, a few at a time, by pyarrow alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlduet.data.readers.rows import SourceRow, drop_null_fields
from vlduet.data.records import Place
from vlduet.errors import DataError

ROWS_PER_BATCH = 64
"""Rows that are in memory at once: they may hold images."""


def read_parquet_rows(source: Path, root: Path) -> Iterator[SourceRow]:
    """``.parquet``."""
    return _rows(source, root, _parquet_batches(source))


def read_arrow_rows(source: Path, root: Path) -> Iterator[SourceRow]:
    """``.arrow`` and ``.feather``: a stream (what `datasets` writes) or a file."""
    return _rows(source, root, _arrow_batches(source))


def _parquet_batches(source: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(source) as file:
        yield from file.iter_batches(batch_size=ROWS_PER_BATCH)


def _arrow_batches(source: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(source)) as data:
        try:
            reader = pa.ipc.open_stream(data)
        except pa.ArrowInvalid:
            data.seek(0)
            file = pa.ipc.open_file(data)
            reader = (file.get_batch(i) for i in range(file.num_record_batches))
        for batch in reader:
            for start in range(0, batch.num_rows, ROWS_PER_BATCH):
                yield batch.slice(start, ROWS_PER_BATCH)


def _rows(source: Path, root: Path, batches: Iterator[Any]) -> Iterator[SourceRow]:
    import pyarrow as pa

    number = 0
    try:
        for batch in batches:
            for value in batch.to_pylist():
                number += 1
                yield SourceRow(
                    Place(str(source), number),
                    root,
                    f"{source.name}:{number}",
                    drop_null_fields(value),
                )
    except (pa.ArrowException, OSError) as error:
        place = Place(str(source), number + 1)
        what = f"truncated or broken {source.suffix[1:]} ({str(error).splitlines()[0][:120]})"
        fix = "Copy or download the file again; what follows in it was not read"
        yield SourceRow(place, root, source.name, error=DataError(what, place=place, fix=fix))
