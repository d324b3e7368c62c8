"""Container readers of Parquet and Arrow files, as Hugging Face `datasets` stores them.

Images inside an Arrow file that is not compressed are byte ranges of it; others are bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlduet.data.images import stat_file_version
from vlduet.data.readers.rows import ReadContext, SourceRow
from vlduet.data.records import ByteRange, ImageRef, Place

ROWS_PER_BATCH = 64
"""Number of rows that are in memory at once; they may hold images."""


def read_parquet_rows(source: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Yield the rows of a ``.parquet`` file; a broken file yields one error at its end."""
    return _read_rows(source, context, _iter_parquet_values(source))


def read_arrow_rows(source: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Yield the rows of an ``.arrow`` or ``.feather`` file, in the stream or the file format.

    A broken file yields one error at its end.
    """
    return _read_rows(source, context, _iter_arrow_values(source))


def _iter_parquet_values(source: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file. Raises as `_iter_arrow_values`."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(source) as file:
        for batch in file.iter_batches(batch_size=ROWS_PER_BATCH):
            yield from batch.to_pylist()


def _iter_arrow_values(source: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow stream or file, with an `ImageRef` for every binary value in it.

    Values of a compressed file are not in it, and remain bytes.

    Raises:
        pyarrow.ArrowException, OSError: the file is missing or broken.
    """
    import pyarrow as pa

    with source.open("rb") as opened, pa.memory_map(str(source)) as data:
        version = stat_file_version(opened)
        mapped = _MappedFile(source, data.read_buffer(1).address, version)
        data.seek(0)
        try:
            reader = pa.ipc.open_stream(data)  # `datasets` writes streams
        except pa.ArrowInvalid:
            data.seek(0)
            file = pa.ipc.open_file(data)
            reader = (file.get_batch(i) for i in range(file.num_record_batches))
        number = 0
        for batch in reader:
            for start in range(0, batch.num_rows, ROWS_PER_BATCH):
                yield from mapped.list_values(batch.slice(start, ROWS_PER_BATCH), number)
                number += min(ROWS_PER_BATCH, batch.num_rows - start)


@dataclass(frozen=True, slots=True)
class _MappedFile:
    """Arrow file that is mapped into memory."""

    path: Path
    address: int
    """Address of its first byte in memory."""
    version: tuple[int, int]
    """Size and time of modification, as `images.stat_file_version` returns them."""

    def list_values(self, batch: Any, number: int) -> list[dict[str, Any]]:
        """Return the rows of a record batch, with references in place of binary values.

        Args:
            number: number of rows of the file before the batch.
        """
        columns: dict[str, list[Any]] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if "binary" not in str(column.type):
                columns[name] = column.to_pylist()
                continue
            places = (f"{self.path}:{number + i}:{name}" for i in range(1, len(column) + 1))
            columns[name] = list(map(self._refer, column, places))
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _refer(self, scalar: Any, place: str) -> Any:
        """Return a pyarrow scalar as Python value, with references in place of binary values."""
        import pyarrow as pa

        if not scalar.is_valid:
            return None
        if isinstance(scalar, pa.StructScalar):
            return {key: self._refer(item, f"{place}.{key}") for key, item in scalar.items()}
        if isinstance(scalar, pa.ListScalar):
            return [self._refer(item, f"{place}[{i}]") for i, item in enumerate(scalar.values)]
        if pa.types.is_binary(scalar.type) or pa.types.is_large_binary(scalar.type):
            buffer = scalar.as_buffer()
            offset = buffer.address - self.address
            if 0 <= offset <= self.version[0] - buffer.size:
                span = ByteRange(self.path, offset, buffer.size, place, self.version)
                return ImageRef(byte_range=span)
        return scalar.as_py()


def _read_rows(
    source: Path, context: ReadContext, values: Iterator[dict[str, Any]]
) -> Iterator[SourceRow]:
    """Yield a row per table row, numbered from 1.

    The default id is ``FILE NAME:NUMBER``. If reading fails, the last row has the error; nothing is
    raised.

    Args:
        values: rows of `source`, consumed one by one.
    """
    import pyarrow as pa

    number = 0
    try:
        for value in values:
            number += 1
            yield SourceRow(Place(str(source), number), context, f"{source.name}:{number}", value)
    except (pa.ArrowException, OSError) as error:
        place = Place(str(source), number + 1)
        cause = str(error).splitlines()[0][:120]
        message = f"truncated or broken {source.suffix[1:]} ({cause})"
        fix = "Copy or download the file again; what follows in it was not read"
        yield SourceRow.broken(place, context, source.name, message=message, fix=fix)
