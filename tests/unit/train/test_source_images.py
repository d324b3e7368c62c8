"""Images inside archives and tables are read when their step comes, and give the same losses."""

from __future__ import annotations

import base64
import gc
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from helpers import runs
from vlduet import config
from vlduet.data import images
from vlduet.data.formats import read_jsonl
from vlduet.data.records import Record
from vlduet.train.loader import iterate_batches
from vlduet.train.setup import prepare_run
from vlduet.train.step import forward_backward

NAMES = ("x.tar", "x.tar.gz", "x.parquet", "x.arrow", "x.jsonl")


def write_source(path: Path, records: list[Record]) -> None:
    """Write pairs with a long caption, and the content of their images, to one file."""
    rows = [
        {
            "image": images.read_bytes(record.images()[0]),
            "short": record.short[0],
            "long": (record.long or "").strip(),
        }
        for record in records
    ]
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path, row_group_size=5)
    elif path.suffix == ".arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    elif path.suffix == ".jsonl":
        for i, row in enumerate(rows):
            row |= {
                "id": str(i),
                "image": "data:;base64," + base64.b64encode(row["image"]).decode(),
            }
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            for i, row in enumerate(rows):
                texts = {"txt": row["short"].encode(), "long.txt": row["long"].encode()}
                for ending, data in {"png": row["image"], **texts}.items():
                    member = tarfile.TarInfo(f"{i:04d}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


def test_sources_of_all_kinds_give_equal_losses_and_hold_no_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="vlduet")
    path = runs.write_run_config(tmp_path, steps=1)
    records = list(read_jsonl(tmp_path / "train.jsonl"))
    losses = {}
    for name in NAMES:
        write_source(tmp_path / name, records)
        overrides = [f"data.train.0.path={tmp_path / name}", f"data.cache={tmp_path / 'cache'}"]
        caplog.clear()
        run = prepare_run(config.load_run_config(path, overrides))
        refs = [image for record in run.mixture.sources[0] for image in record.images()]
        assert len(refs) == len(records) and all(ref.data is None for ref in refs)
        is_stored = name in ("x.tar.gz", "x.parquet", "x.jsonl")
        assert is_stored == any("MB of images" in message for message in caplog.messages)
        assert is_stored == (refs[0].path is not None and "cache" in refs[0].path.parts)
        _, batches = next(iterate_batches(run, 0))
        losses[name] = forward_backward(run, batches)
    assert losses == dict.fromkeys(NAMES, losses["x.jsonl"])
    stored = list((tmp_path / "cache" / "images").iterdir())
    assert len(stored) == len({images.image_key(record.images()[0]) for record in records})


def test_a_dry_run_leaves_no_image_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    caplog.set_level("INFO", logger="vlduet")
    path = runs.write_run_config(tmp_path, steps=1)
    write_source(tmp_path / "x.tar.gz", list(read_jsonl(tmp_path / "train.jsonl")))
    overrides = [f"data.train.0.path={tmp_path / 'x.tar.gz'}"]
    run = prepare_run(config.load_run_config(path, overrides), write_files=False)
    (folder,) = (tmp_path / "temporary").iterdir()
    assert any(str(folder) in message for message in caplog.messages)
    run.mixture[0]
    del run
    gc.collect()
    assert not folder.exists() and not (tmp_path / "run").exists()
