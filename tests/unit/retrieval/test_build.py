"""Building an index: only new content is embedded, also after interruptions and changes."""

from __future__ import annotations

import base64
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from helpers import fake_embedder
from helpers.fake_embedder import COLOURS, FakeModel, paint, write_pairs, write_records
from helpers.processes import start_process
from vlduet.data.records import ImageRef
from vlduet.errors import ConfigError, DataError, LockError, RetrievalError
from vlduet.retrieval.build import BuildOptions, build_index
from vlduet.retrieval.filter_values import MAX_FILTER_KEYS
from vlduet.retrieval.index import Index
from vlduet.retrieval.search import search


def nonzero_counts(report: Any) -> dict[str, int]:
    names = [name for name in report.__slots__ if name not in ("causes", "unreadable")]
    counts = {name: getattr(report, name) for name in names}
    assert sum(report.causes.values()) == report.quarantined
    return {name: count for name, count in counts.items() if count}


def test_built_index_returns_documents_with_text_metadata_and_image(
    pairs: Path, tmp_path: Path, model: Any
) -> None:
    report = build_index(model, pairs, to=tmp_path / "index")
    assert nonzero_counts(report) == {"added": 4, "embedded": 4, "count": 4}
    with Index.open(tmp_path / "index", model) as index:
        assert index.manifest.complete and index.manifest.count == index.count() == 4
        kinds = {"hue": ["text"], "year": ["number"], "warm": ["flag"], "tags": ["text list"]}
        assert index.manifest.fields == kinds
        hits = search(index, model, "red", k=2)
        assert (hits[0].id, hits[0].rank, hits[0].text) == ("red", 1, "a red square")
        assert hits[0].metadata == {"hue": "red", "year": 2000, "warm": True, "tags": ["a"]}
        assert hits[0].image == ImageRef(path=(pairs.parent / "images" / "red.png").resolve())


def test_only_new_content_is_embedded(
    pairs: Path,
    tmp_path: Path,
    model: Any,
) -> None:
    folder = pairs.parent
    to = tmp_path / "index"
    build_index(model, pairs, to=to)
    model.embedded.clear()

    assert nonzero_counts(build_index(model, pairs, to=to)) == {"kept": 4, "count": 4}

    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows[0]["short"] = "another caption"  # the image is what is embedded
    rows[1]["id"] = "renamed"
    rows.append({"id": "twin", "image": "images/blue.png"})
    write_records(pairs, rows)
    report = build_index(model, pairs, to=to)
    assert nonzero_counts(report) == {"added": 2, "updated": 1, "kept": 2, "absent": 1, "count": 6}
    assert model.embedded == []

    paint(folder / "images" / "red.png", (9, 9, 9))
    report = build_index(model, pairs, to=to, prune=True)
    assert nonzero_counts(report) == {
        "updated": 1,
        "kept": 4,
        "embedded": 1,
        "removed": 1,
        "count": 5,
    }
    assert len(model.embedded) == 1
    with Index.open(to, model) as index:
        hits = {hit.id: hit for hit in search(index, model, "red", k=10)}
        assert set(hits) == {"red", "renamed", "blue", "yellow", "twin"}
        assert hits["red"].text == "another caption"
        assert hits["red"].score < hits["yellow"].score


def test_documents_that_swap_their_content_swap_their_vectors(tmp_path: Path, model: Any) -> None:
    """Rows reuse each other's vectors while both are overwritten, also across chunks."""
    for chunk in (1, 9):
        folder = tmp_path / str(chunk)
        rows = [{"id": name, "parts": [{"text": name}]} for name in ("one", "two", "three")]
        source = write_records(folder / "r.jsonl", rows)
        build_index(model, source, to=folder / "index", side="text", chunk_size=chunk)
        rows = [
            {"id": a, "parts": [{"text": b}]}
            for a, b in (("one", "two"), ("two", "three"), ("three", "one"))
        ]
        write_records(source, rows)
        report = build_index(model, source, to=folder / "index", chunk_size=chunk)
        assert report.updated == 3 and report.embedded <= 1
        with Index.open(folder / "index", model) as index:
            for a, b in (("one", "two"), ("two", "three"), ("three", "one")):
                (hit,) = search(index, model, b, k=1)
                assert (hit.id, hit.score, hit.text) == (a, 1.0, b)


def test_equal_content_is_embedded_once(tmp_path: Path, model: Any) -> None:
    rows = [{"id": str(i), "parts": [{"text": f"text {i % 3}"}]} for i in range(10)]
    source = write_records(tmp_path / "r.jsonl", rows)
    report = build_index(model, source, to=tmp_path / "index", side="text", chunk_size=4)
    assert (report.added, report.embedded, len(model.embedded)) == (10, 3, 3)


def write_text_records(tmp_path: Path, count: int = 20) -> Path:
    rows = [{"id": f"{i:02d}", "parts": [{"text": f"word{i} word{i + 1}"}]} for i in range(count)]
    path: Path = write_records(tmp_path / "many.jsonl", rows)
    return path


class Interruption(BaseException):
    pass


def test_interrupted_build_resumes_where_it_stopped(tmp_path: Path, model: Any) -> None:
    source, to = write_text_records(tmp_path), tmp_path / "index"

    def stop(parts: Any) -> None:
        if len(model.embedded) == 12:
            raise Interruption

    model.before_document = stop
    with pytest.raises(Interruption):
        build_index(model, source, to=to, side="text", chunk_size=4)
    with Index.open(to, model) as index:
        assert not index.manifest.complete
        assert index.count() == 12
        assert search(index, model, "word3", k=1)

    model.before_document = lambda parts: None
    report = build_index(model, source, to=to, chunk_size=4)
    assert nonzero_counts(report) == {"added": 8, "kept": 12, "embedded": 8, "count": 20}
    assert len(model.embedded) == 20
    other = FakeModel()
    build_index(other, source, to=tmp_path / "whole", side="text")
    with Index.open(to, model) as resumed, Index.open(tmp_path / "whole", other) as at_once:
        assert resumed.manifest.complete
        for query in ("word3", "word17 word2"):
            assert search(resumed, model, query, k=20) == search(at_once, other, query, k=20)


SLOW_BUILD = """
    import importlib.util, pathlib, sys, time
    spec = importlib.util.spec_from_file_location("fakes", sys.argv[1])
    fakes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fakes)
    from vlduet.retrieval.build import BuildOptions, build_index
    model = fakes.FakeModel()
    def slow(parts):
        if len(model.embedded) >= 8:
            print("ready", flush=True)
            time.sleep(600)
    model.before_document = slow
    build_index(model, sys.argv[2], to=sys.argv[3], side="text", chunk_size=4)
"""


def test_killed_build_loses_one_chunk_and_releases_the_lock(
    tmp_path: Path,
    model: Any,
) -> None:
    source, to = write_text_records(tmp_path), tmp_path / "index"
    script = textwrap.dedent(SLOW_BUILD)
    command = [sys.executable, "-c", script, fake_embedder.__file__, str(source), str(to)]
    with start_process(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(LockError, match="another process is writing"):
            build_index(model, source, to=to)
        process.send_signal(signal.SIGKILL)
    report = build_index(model, source, to=to, chunk_size=4)
    assert nonzero_counts(report) == {"added": 12, "kept": 8, "embedded": 12, "count": 20}
    with Index.open(to, model) as index:
        assert search(index, model, "word5", k=1)[0].score > 0.5


def test_second_writer_is_refused(pairs: Path, tmp_path: Path, model: Any) -> None:
    to = tmp_path / "index"
    build_index(model, pairs, to=to)
    with FileLock(to / ".lock"), pytest.raises(LockError, match="another process is writing"):
        build_index(model, pairs, to=to)


def test_open_index_reads_the_rows_of_a_later_build(
    tmp_path: Path,
    model: Any,
) -> None:
    source = write_text_records(tmp_path)
    build_index(model, source, to=tmp_path / "index", side="text")
    with Index.open(tmp_path / "index", model) as reader:
        write_records(source, [{"id": "new", "parts": [{"text": "word3"}]}])
        options = BuildOptions(force=True)
        build_index(model, source, to=tmp_path / "index", prune=True, options=options)
        (hit,) = search(reader, model, "word3", k=1)
        assert hit.id == "new"


def test_index_of_another_model_is_refused(
    pairs: Path,
    tmp_path: Path,
    model: Any,
    other_model: Any,
) -> None:
    to = tmp_path / "index"
    build_index(model, pairs, to=to, model_path=tmp_path / "the-model")
    message = r"built by model fake \(.*the-model\), this is model another.*--model"
    with pytest.raises(RetrievalError, match=message):
        Index.open(to, other_model)
    with pytest.raises(RetrievalError, match=message):
        build_index(other_model, pairs, to=to)
    with Index.open(to) as index, pytest.raises(RetrievalError, match=message):
        search(index, other_model, "red")
    assert other_model.embedded == []


def test_side_of_an_existing_index_is_the_default_and_cannot_change(
    pairs: Path, tmp_path: Path, model: Any
) -> None:
    to = tmp_path / "index"
    build_index(model, pairs, to=to, side="text")
    assert nonzero_counts(build_index(model, pairs, to=to)) == {"kept": 4, "count": 4}
    with pytest.raises(RetrievalError, match="built with --side text, not image"):
        build_index(model, pairs, to=to, side="image")
    with pytest.raises(RetrievalError, match="--side: 'pictures'"):
        build_index(model, pairs, to=tmp_path / "new", side="pictures")  # type: ignore[arg-type]


def test_broken_images_are_quarantined_and_indexed_once_repaired(
    pairs: Path,
    tmp_path: Path,
    model: Any,
) -> None:
    images = pairs.parent / "images"
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    data = (images / "red.png").read_bytes()
    (images / "cut.png").write_bytes(data[: len(data) // 2])
    rows.insert(1, {"id": "cut", "image": "images/cut.png"})
    rows.insert(3, {"id": "cut again", "image": "images/cut.png"})
    rows.append({"id": "missing", "image": "images/missing.png"})
    write_records(pairs, rows)
    report = build_index(model, pairs, to=tmp_path / "index")
    assert nonzero_counts(report) == {"added": 4, "embedded": 4, "quarantined": 3, "count": 4}
    lines = [
        json.loads(line)
        for line in (tmp_path / "index" / "quarantine.jsonl").read_text().splitlines()
    ]
    assert sorted(line["id"] for line in lines) == ["cut", "cut again", "missing"]

    shutil.copy(images / "red.png", images / "cut.png")
    report = build_index(model, pairs, to=tmp_path / "index")
    assert nonzero_counts(report) == {"added": 2, "kept": 4, "quarantined": 1, "count": 6}, (
        "the vector of red.png is reused"
    )


def test_image_that_broke_after_indexing_stays_as_it_was(
    pairs: Path,
    tmp_path: Path,
    model: Any,
) -> None:
    build_index(model, pairs, to=tmp_path / "index")
    (pairs.parent / "images" / "red.png").write_bytes(b"not an image")
    report = build_index(model, pairs, to=tmp_path / "index")
    assert nonzero_counts(report) == {"kept": 3, "outdated": 1, "quarantined": 1, "count": 4}
    with pytest.raises(RetrievalError, match=r"1 files or records cannot be read.*nothing is"):
        build_index(model, pairs, to=tmp_path / "index", prune=True)
    with Index.open(tmp_path / "index", model) as index:
        assert index.manifest.complete and search(index, model, "red", k=1)[0].id == "red"


def test_prune_is_refused_if_rows_of_the_source_cannot_be_read(tmp_path: Path, model: Any) -> None:
    rows = [{"id": str(i), "parts": [{"text": f"word{i}"}]} for i in range(6)]
    source, to = tmp_path / "r.json", tmp_path / "index"
    source.write_text(json.dumps(rows))
    build_index(model, source, to=to, side="text")
    source.write_text(json.dumps(rows[:2])[:-1] + ', {"id": "2", broken]')
    with pytest.raises(
        RetrievalError, match=r"1 files or records cannot be read, so nothing is pruned"
    ):
        build_index(model, source, to=to, prune=True)
    assert build_index(model, source, to=to).count == 6


def test_prune_is_refused_if_nothing_can_be_indexed(
    pairs: Path, tmp_path: Path, model: Any
) -> None:
    build_index(model, pairs, to=tmp_path / "index")
    shutil.rmtree(pairs.parent / "images")
    with pytest.raises(RetrievalError, match="nothing is pruned"):
        build_index(model, pairs, to=tmp_path / "index", prune=True)
    assert Index.open(tmp_path / "index").count() == 4


def test_folder_of_images_can_be_indexed(tmp_path: Path, model: Any) -> None:
    for name, colour in COLOURS.items():
        paint(tmp_path / "photos" / name / "0.png", colour)
    report = build_index(model, tmp_path / "photos", to=tmp_path / "index")
    assert nonzero_counts(report) == {"added": 4, "embedded": 4, "count": 4}
    with Index.open(tmp_path / "index", model) as index:
        (hit,) = search(index, model, "yellow", k=1)
        assert "yellow" in hit.id and hit.image is not None


def test_images_given_as_bytes_are_stored_in_the_index(
    tmp_path: Path,
    model: Any,
) -> None:
    data = paint(tmp_path / "a.png", (255, 0, 0)).read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    source = write_records(tmp_path / "r.jsonl", [{"id": str(i), "image": url} for i in range(2)])
    build_index(model, source, to=tmp_path / "index")
    (tmp_path / "index").rename(tmp_path / "moved")
    with Index.open(tmp_path / "moved", model) as index:
        hit = search(index, model, "red", k=1)[0]
        assert hit.image is not None and hit.image.path is not None
        assert hit.image.path.read_bytes() == data
    assert len(list((tmp_path / "moved" / "images").iterdir())) == 1


def test_images_of_an_archive_are_stored_in_the_index(tmp_path: Path, model: Any) -> None:
    source = tmp_path / "x.tar"
    with tarfile.open(source, "w") as archive:
        for name, colour in COLOURS.items():
            archive.add(paint(tmp_path / f"{name}.png", colour), f"{name}.png")
    build_index(model, source, to=tmp_path / "index")
    source.unlink()
    with Index.open(tmp_path / "index", model) as index:
        hit = search(index, model, "red", k=1)[0]
    assert hit.id == "x/red" and hit.image is not None and hit.image.path is not None
    assert hit.image.path.read_bytes() == (tmp_path / "red.png").read_bytes()


def test_project_at_a_new_path_finds_its_images_and_model(tmp_path: Path, model: Any) -> None:
    source = write_pairs(tmp_path / "old" / "source")
    (tmp_path / "old" / "model").mkdir()
    build_index(model, source, to=tmp_path / "old" / "index", model_path=tmp_path / "old" / "model")
    assert (
        Index.open(tmp_path / "old" / "index").model_path == (tmp_path / "old" / "model").resolve()
    )
    (tmp_path / "old").rename(tmp_path / "new")
    with Index.open(tmp_path / "new" / "index", model) as index:
        assert index.model_path.samefile(tmp_path / "new" / "model")
        hit = search(index, model, "red", k=1)[0]
        assert hit.image is not None and hit.image.path is not None and hit.image.path.is_file()
    source = tmp_path / "new" / "source" / "records.jsonl"
    report = build_index(model, source, to=tmp_path / "new" / "index")
    assert nonzero_counts(report) == {"updated": 4, "count": 4}


def test_build_continues_in_a_folder_where_another_was_killed_at_its_start(
    pairs: Path, tmp_path: Path, model: Any
) -> None:
    to = tmp_path / "index"
    to.mkdir()
    leftovers = (".lock", ".manifest.json.4711.draft", ".manifest.json.4712.draft")
    for name in (*leftovers, ".manifest.json.bak"):
        (to / name).touch()
    with pytest.raises(RetrievalError, match="is not an index"):
        build_index(model, pairs, to=to)
    (to / ".manifest.json.bak").unlink()  # this file is none of a build
    assert build_index(model, pairs, to=to).count
    assert not {path.name for path in to.iterdir()} & {*leftovers}


def test_missing_model_is_named_in_the_error(pairs: Path, tmp_path: Path, model: Any) -> None:
    build_index(model, pairs, to=tmp_path / "index", model_path=tmp_path / "model")
    with pytest.raises(RetrievalError, match=r"model .* is not there.*--model DIR"):
        _ = Index.open(tmp_path / "index").model_path


def test_path_that_is_not_an_index_is_refused_and_left_unchanged(
    pairs: Path, tmp_path: Path, model: Any
) -> None:
    with pytest.raises(RetrievalError, match=r"no index here.*vlduet index"):
        Index.open(tmp_path / "nothing")
    with pytest.raises(RetrievalError, match="is not an index"):
        build_index(model, pairs, to=pairs.parent)
    assert not (pairs.parent / "manifest.json").exists()
    with pytest.raises(ConfigError, match="is a file"):
        build_index(model, pairs, to=pairs)
    with pytest.raises(DataError, match="no such file or folder"):
        build_index(model, tmp_path / "no source", to=tmp_path / "index")
    assert not (tmp_path / "index").exists(), "a misspelt source must not create the index folder"


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "broken JSON"),
        ("[]", "an object is needed"),
        ('{"format": 9}', "this version reads 1"),
        ('{"format": 1}', "broken"),
    ],
)
def test_broken_manifest_is_refused(tmp_path: Path, manifest: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(RetrievalError, match=message):
        Index.open(tmp_path)


def test_index_in_the_flat_store_of_earlier_versions_asks_to_rebuild(
    pairs: Path, tmp_path: Path, model: Any
) -> None:
    to = tmp_path / "index"
    build_index(model, pairs, to=to)
    manifest = json.loads((to / "manifest.json").read_text())
    (to / "manifest.json").write_text(json.dumps(manifest | {"store": "flat"}))
    message = "store 'flat' is no longer supported.*Delete the index and build it again"
    with pytest.raises(RetrievalError, match=message):
        Index.open(to)
    with pytest.raises(RetrievalError, match=message):
        build_index(model, pairs, to=to)


def test_metadata_of_any_kind_is_returned_and_the_first_keys_can_be_filtered(
    tmp_path: Path, model: Any
) -> None:
    rows = [
        {
            "id": "a",
            "parts": [{"text": "x"}],
            "metadata": {f"key{i}": i for i in range(MAX_FILTER_KEYS + 5)},
        },
        {
            "id": "b",
            "parts": [{"text": "x"}],
            "metadata": {"key0": "text", "key1": {"deep": None}, "'": "\ud800"},
        },
    ]
    source = write_records(tmp_path / "r.jsonl", rows)
    build_index(model, source, to=tmp_path / "index", side="text")
    with Index.open(tmp_path / "index", model) as index:
        assert index.manifest.fields["key0"] == ["number", "text"]
        assert len(index.manifest.fields) == MAX_FILTER_KEYS
        assert [h.id for h in search(index, model, "x", where={"key0": "text"})] == ["b"]
        assert [h.id for h in search(index, model, "x", where={"key0": 0})] == ["a"]
        hits = search(index, model, "x")
        assert hits[0].metadata == rows[0]["metadata"], (
            "metadata is returned whether it can be filtered by or not"
        )


def test_vector_with_nan_is_refused(tmp_path: Path, model: Any) -> None:
    model.encode_document = lambda items, on_truncate: model.encode_query(items) * float("nan")
    with pytest.raises(RetrievalError, match="not finite for '00'"):
        build_index(model, write_text_records(tmp_path), to=tmp_path / "index", side="text")


def test_unchanged_documents_are_not_embedded_again(
    tmp_path: Path,
    model: Any,
) -> None:
    source = write_text_records(tmp_path, count=10_000)
    build_index(model, source, to=tmp_path / "index", side="text", chunk_size=5000)
    embedded = len(model.embedded)
    started = time.monotonic()
    report = build_index(model, source, to=tmp_path / "index")
    assert nonzero_counts(report) == {"kept": 10_000, "count": 10_000}
    assert len(model.embedded) == embedded == 10_000
    assert time.monotonic() - started < 20, "unchanged documents must be read quickly"
