"""Container readers of Parquet and Arrow files, as Hugging Face `datasets` stores them.

Images inside an Arrow file that is not compressed are byte ranges of it; others are bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlduet.data.images import stat_file_version
from vlduet.data.readers.rows import ReadContext, SourceRow
from vlduet.data.records import ByteRange, ImageRef, Place
from vlduet.errors import DataError

BATCH_BYTES = 4 * 2**20
"""Size of the rows of a Parquet file that are in memory at once, unless one row is larger."""
MAX_TEXT_BYTES = 16 * 2**20
"""Size of the longest text of a row of a Parquet file."""
MAX_UNFOLDED_BYTES = 256 * 2**20
"""Size of a group of rows from which on its compression is checked."""
MAX_COMPRESSION = 1000
"""Largest factor by which a group of more than `MAX_UNFOLDED_BYTES` is compressed."""
MAX_BATCH_ROWS = 64
"""Largest number of rows that are in memory at once."""


def read_parquet_rows(source: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Yield the rows of a ``.parquet`` file; a broken file yields one error at its end."""
    return _read_rows(source, context, _iter_parquet_values(source))


def read_arrow_rows(source: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Yield the rows of an ``.arrow`` or ``.feather`` file, in the stream or the file format.

    A broken file yields one error at its end.
    """
    return _read_rows(source, context, _iter_arrow_values(source))


def _iter_parquet_values(source: Path) -> Iterator[dict[str, Any] | DataError]:
    """Yield the rows of a Parquet file, and an error for rows with a longer text than allowed.

    Raises as `_iter_arrow_values`, and DataError for a group of rows that `_check_compression`
    refuses.
    """
    import pyarrow.parquet

    # A mapped file takes half of the memory: pyarrow decodes at least a page at once.
    with pyarrow.parquet.ParquetFile(source, memory_map=True) as file:
        for i in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(i)
            _check_compression(group, Place(str(source)))
            num_rows = BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)
            num_rows = min(max(num_rows, 1), MAX_BATCH_ROWS)
            for batch in file.iter_batches(num_rows, row_groups=[i]):
                yield from [_too_long_error(source)] if _has_long_text(batch) else batch.to_pylist()
            batch = None
            pyarrow.default_memory_pool().release_unused()  # it would keep the largest page


def _check_compression(group: Any, place: Place) -> None:
    """Raise DataError for a group of rows that is large and compressed like no real data."""
    columns = [group.column(i) for i in range(group.num_columns)]
    stored = max(1, sum(column.total_compressed_size for column in columns))
    unfolded = sum(column.total_uncompressed_size for column in columns)
    if unfolded > MAX_UNFOLDED_BYTES and unfolded > MAX_COMPRESSION * stored:
        message = f"{stored / 2**10:.0f} KiB of rows unfold to {unfolded / 2**20:.0f} MiB"
        raise DataError(message, place=place, fix="Write it again; what follows was not read")


def _has_long_text(batch: Any) -> bool:
    """Return whether a column of texts has one of more than `MAX_TEXT_BYTES`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for column in batch.columns:
        is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        if is_text and (pc.max(pc.binary_length(column)).as_py() or 0) > MAX_TEXT_BYTES:
            return True
    return False


def _too_long_error(source: Path) -> DataError:
    message = f"a text of more than {MAX_TEXT_BYTES // 2**20} MiB"
    return DataError(message, place=source, fix="Shorten it, or leave its column out")


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
        for batch in reader:
            for start in range(0, batch.num_rows, MAX_BATCH_ROWS):
                part = batch.slice(start, MAX_BATCH_ROWS)
                columns = [mapped.list_values(column) for column in part.columns]
                for values in zip(*columns, strict=True):
                    yield dict(zip(batch.schema.names, values, strict=True))


@dataclass(frozen=True, slots=True)
class _MappedFile:
    """Arrow file that is mapped into memory."""

    path: Path
    address: int
    """Address of its first byte in memory."""
    version: tuple[int, int]
    """Size and time of modification, as `images.stat_file_version` returns them."""

    def list_values(self, array: Any) -> list[Any]:
        """Return the values of a pyarrow array, with references in place of binary ones.

        Binary values that are not in the file remain bytes.
        """
        import pyarrow as pa

        if not len(array):
            return []
        if pa.types.is_struct(array.type) and array.type.num_fields:
            names = [field.name for field in array.type]
            fields = [self.list_values(array.field(i)) for i in range(len(names))]
            rows = zip(*fields, strict=True)
            values: list[Any] = [dict(zip(names, row, strict=True)) for row in rows]
        elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
            offsets = array.offsets.to_pylist()
            items = self.list_values(array.values.slice(offsets[0], offsets[-1] - offsets[0]))
            values = [
                items[begin - offsets[0] : end - offsets[0]]
                for begin, end in itertools.pairwise(offsets)
            ]
        elif pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
            values = self._refer_to_values(array)
        else:
            return list(array.to_pylist())
        is_valid = array.is_valid().to_pylist()
        return [value if valid else None for value, valid in zip(values, is_valid, strict=True)]

    def _refer_to_values(self, array: Any) -> list[Any]:
        """Return references to the values of a binary array, or its bytes if it is not in the file.

        What stands for a null value is undefined.
        """
        import pyarrow as pa

        _, offsets_buffer, data = array.buffers()
        begin = -1 if data is None else data.address - self.address
        if begin < 0 or begin + data.size > self.version[0]:
            return list(array.to_pylist())
        dtype = np.int64 if pa.types.is_large_binary(array.type) else np.int32
        offsets = np.frombuffer(offsets_buffer, dtype)[array.offset :][: len(array) + 1]
        values = []
        for start, stop in itertools.pairwise((offsets.astype(np.int64) + begin).tolist()):
            name = f"{self.path}[{start}:{stop}]"
            span = ByteRange(self.path, start, stop - start, name, self.version)
            values.append(ImageRef(byte_range=span))
        return values


def _read_rows(
    source: Path, context: ReadContext, values: Iterator[dict[str, Any] | DataError]
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
            place, name = Place(str(source), number), f"{source.name}:{number}"
            if isinstance(value, DataError):
                error = DataError(value.message, place=place, fix=value.fix)
                yield SourceRow(place, context, name, error=error)
            else:
                yield SourceRow(place, context, name, value)
    except DataError as error:
        yield SourceRow(Place(str(source), number + 1), context, source.name, error=error)
    except (pa.ArrowException, OSError) as error:
        place = Place(str(source), number + 1)
        cause = str(error).splitlines()[0][:120]
        message = f"truncated or broken {source.suffix[1:]} ({cause})"
        fix = "Copy or download the file again; what follows in it was not read"
        yield SourceRow.broken(place, context, source.name, message=message, fix=fix)
