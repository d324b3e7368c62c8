"""Values of Arrow files are the same whether they are bytes or byte ranges of the file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.processes import run_process
from helpers.record_files import PNG, read_with_errors
from vlduet.data import images
from vlduet.data.formats import read_records
from vlduet.data.readers import arrow
from vlduet.data.readers.rows import ReadContext, drop_null_fields
from vlduet.data.records import ImageRef
from vlduet.errors import ImageError

SCHEMA = pa.schema(
    {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "images": pa.list_(pa.struct({"bytes": pa.large_binary(), "path": pa.string()})),
        "raw": pa.large_list(pa.binary()),
        "text": pa.string(),
    }
)
binaries = st.none() | st.binary(max_size=9)
pictures = st.none() | st.fixed_dictionaries({"bytes": binaries, "path": st.none() | st.just("a")})
rows = st.fixed_dictionaries(
    {
        "image": pictures,
        "images": st.none() | st.lists(pictures, max_size=3),
        "raw": st.none() | st.lists(binaries, max_size=3),
        "text": st.none() | st.just("x"),
    }
)


def read_references(value: Any) -> Any:
    """Return a value with the bytes that its references refer to."""
    if isinstance(value, ImageRef):
        return images.read_bytes(value)
    if isinstance(value, dict):
        return {key: read_references(item) for key, item in value.items()}
    return [read_references(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=60, deadline=None)
@given(
    st.lists(rows, min_size=1, max_size=8),
    st.integers(1, 3),
    st.sampled_from([None, "lz4", "zstd"]),
)
def test_references_hold_the_values_of_the_table(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[dict[str, Any]],
    chunk_size: int,
    compression: str | None,
) -> None:
    path = tmp_path_factory.getbasetemp() / "x.arrow"
    table = pa.Table.from_pylist(values, schema=SCHEMA)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(path, SCHEMA, options=options) as writer:
        writer.write_table(table, max_chunksize=chunk_size)
    read = [row.value for row in arrow.read_arrow_rows(path, ReadContext(path.parent))]
    assert read_references(read) == drop_null_fields(table.to_pylist())


def write_images(path: Path, *, compression: str | None = None) -> Path:
    """Write 150 rows of different images as Parquet or Arrow."""
    table = pa.Table.from_pylist(
        [
            {"image": {"bytes": PNG + b"%d" % i, "path": f"{i}.png"}, "text": f"row {i}"}
            for i in range(150)
        ]
    )
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    else:
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with pa.ipc.new_stream(path, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=100)
    return path


@pytest.mark.parametrize(
    ("name", "compression", "is_range"),
    [("x.arrow", None, True), ("x.arrow", "zstd", False), ("x.parquet", None, False)],
)
def test_images_of_uncompressed_arrow_files_are_not_in_memory(
    name: str, compression: str | None, is_range: bool, tmp_path: Path
) -> None:
    records = list(read_records(write_images(tmp_path / name, compression=compression)))
    refs = [record.image for record in records if record.image is not None]
    assert [record.short for record in records] == [(f"row {i}",) for i in range(150)]
    assert [images.read_bytes(ref) for ref in refs] == [PNG + b"%d" % i for i in range(150)]
    assert {ref.byte_range is not None for ref in refs} == {is_range}
    assert len({ref.name for ref in refs}) == 150


def test_an_arrow_file_that_changes_is_an_image_error(tmp_path: Path) -> None:
    path = write_images(tmp_path / "x.arrow")
    ref = next(read_records(path)).image
    assert ref is not None and images.read_bytes(ref) == PNG + b"0"
    os.utime(path, ns=(1, 1))
    with pytest.raises(ImageError, match=r"x\.arrow\[\d+:\d+\].*has changed"):
        images.read_bytes(ref)


@pytest.mark.parametrize("name", ["x.arrow", "x.parquet"])
def test_a_truncated_file_is_one_error(name: str, tmp_path: Path) -> None:
    path = write_images(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-500])
    records, errors = read_with_errors(path)
    assert len(errors) == 1 and "truncated or broken" in errors[0].message
    assert len(records) == (100 if name == "x.arrow" else 0)


def test_an_empty_table_has_no_records_and_row_groups_are_joined(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"image": f"{i}.png", "text": "x" * i} for i in range(1, 8)])
    pa.parquet.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    assert list(read_records(tmp_path / "empty.parquet")) == []
    pa.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=3)
    records = list(read_records(tmp_path / "x.parquet"))
    assert [record.id for record in records] == [f"x.parquet:{i}" for i in range(1, 8)]
    assert [len(record.short[0]) for record in records] == list(range(1, 8))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_parquet_file_is_free_after_reading(tmp_path: Path) -> None:
    images_of_rows = [os.urandom(500_000) for _ in range(100)]
    table = pa.table({"image": pa.array(images_of_rows), "text": ["x"] * 100})
    pa.parquet.write_table(table, tmp_path / "x.parquet")
    pa.parquet.write_table(table.slice(0, 1), tmp_path / "warm-up.parquet")
    # A process of its own: the memory of the test's process also holds what other tests left.
    command = [sys.executable, "-c", MEASURE_GROWTH, str(tmp_path)]
    growth_mb = float(run_process(command, check=True).stdout)
    assert growth_mb < 25


MEASURE_GROWTH = """
import sys
from pathlib import Path

from vlduet.data.formats import read_records

def measure_memory_mb():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024

folder = Path(sys.argv[1])
assert sum(1 for _ in read_records(folder / "warm-up.parquet")) == 1
before = measure_memory_mb()
assert sum(1 for _ in read_records(folder / "x.parquet")) == 100
print(measure_memory_mb() - before)
"""
"""Program that prints by how many MB its memory, mapped files aside, grows as it reads a file."""


def test_a_text_of_any_length_is_an_error_of_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrow, "MAX_TEXT_BYTES", 100)
    monkeypatch.setattr(arrow, "MAX_BATCH_ROWS", 1)
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": ["a", "b" * 101, "c" * 100, None]}), path)
    rows = list(arrow.read_parquet_rows(path, ReadContext(tmp_path)))
    assert [row.error is None for row in rows] == [True, False, True, True]
    assert "a.parquet:2" in str(rows[1].error) and rows[2].value == {"text": "c" * 100}


def test_rows_that_unfold_a_thousandfold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"data": [bytes(2**20), b"x"]})
    pa.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    context = ReadContext(tmp_path)
    assert [row.error for row in arrow.read_parquet_rows(path, context)] == [None, None]
    monkeypatch.setattr(arrow, "MAX_UNFOLDED_BYTES", 2**20)
    (row,) = arrow.read_parquet_rows(path, context)
    assert "unfold to" in str(row.error) and str(path) in str(row.error)
