"""Container readers of Parquet and Arrow files, as Hugging Face `datasets` stores them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlduet.data.readers.rows import ReadContext, SourceRow
from vlduet.data.records import Place

ROWS_PER_BATCH = 64
"""Number of rows that are in memory at once; they may hold images."""


def read_parquet_rows(source: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Yield the rows of a ``.parquet`` file; a broken file yields one error at its end."""
    return _read_rows(source, context, _iter_parquet_batches(source))


def read_arrow_rows(source: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Yield the rows of an ``.arrow`` or ``.feather`` file, in the stream or the file format.

    A broken file yields one error at its end.
    """
    return _read_rows(source, context, _iter_arrow_batches(source))


def _iter_parquet_batches(source: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(source) as file:
        yield from file.iter_batches(batch_size=ROWS_PER_BATCH)


def _iter_arrow_batches(source: Path) -> Iterator[Any]:
    """Yield record batches of at most `ROWS_PER_BATCH` rows from an Arrow stream or file.

    Raises:
        pyarrow.ArrowException, OSError: the file is missing or broken.
    """
    import pyarrow as pa

    with pa.memory_map(str(source)) as data:
        try:
            reader = pa.ipc.open_stream(data)  # `datasets` writes streams
        except pa.ArrowInvalid:
            data.seek(0)
            file = pa.ipc.open_file(data)
            reader = (file.get_batch(i) for i in range(file.num_record_batches))
        for batch in reader:
            for start in range(0, batch.num_rows, ROWS_PER_BATCH):
                yield batch.slice(start, ROWS_PER_BATCH)


def _read_rows(source: Path, context: ReadContext, batches: Iterator[Any]) -> Iterator[SourceRow]:
    """Yield a row per table row, numbered from 1.

    The default id is ``FILE NAME:NUMBER``. If reading fails, the last row has the error; nothing is
    raised.

    Args:
        batches: pyarrow record batches of `source`, consumed one by one.
    """
    import pyarrow as pa

    number = 0
    try:
        for batch in batches:
            for value in batch.to_pylist():
                number += 1
                place = Place(str(source), number)
                name = f"{source.name}:{number}"
                yield SourceRow(place, context, name, value)
    except (pa.ArrowException, OSError) as error:
        place = Place(str(source), number + 1)
        cause = str(error).splitlines()[0][:120]
        message = f"truncated or broken {source.suffix[1:]} ({cause})"
        fix = "Copy or download the file again; what follows in it was not read"
        yield SourceRow.broken(place, context, source.name, message=message, fix=fix)
