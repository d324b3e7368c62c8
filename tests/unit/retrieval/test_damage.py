"""Indexes whose files were damaged: search and build refuse them, and name the file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.fake_embedder import FakeModel, paint, write_records
from helpers.restored_folders import restore_folder
from vlduet.errors import RetrievalError
from vlduet.retrieval.build import build_index
from vlduet.retrieval.index import Index, IndexManifest, find_index_damage
from vlduet.retrieval.search import search
from vlduet.retrieval.stores import lance


def write_texts(folder: Path, number: int = 20) -> Path:
    """Write `number` texts as records to a file in the folder, and return its path."""
    rows = [{"id": f"{i:02d}", "parts": [{"text": f"word{i} word{i + 1}"}]} for i in range(number)]
    return write_records(folder / "records.jsonl", rows)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of two builds; tests restore what they change."""
    folder = tmp_path_factory.mktemp("damage")
    model = FakeModel()
    for number in (12, 20):
        source = write_texts(folder, number)
        build_index(model, source, to=folder / "index", side="text", chunk_size=4)
    return folder / "index"


@pytest.fixture
def index(built: Path) -> Iterator[Path]:
    """The same index, which is restored at the end."""
    with restore_folder(built):
        yield built


def list_names(index: Path) -> list[str]:
    return sorted(json.loads((index / "manifest.json").read_text())["files"])


def test_every_file_of_the_store_but_hints_is_listed(built: Path) -> None:
    paths = [path for path in (built / "store").rglob("*") if path.is_file()]
    names = {path.relative_to(built).as_posix() for path in paths if path.suffix != ".json"}
    assert set(list_names(built)) == names
    assert {name.split("/")[2] for name in names} >= {"data", "_versions"}
    lines, num_files = find_index_damage(built)
    assert lines == [] and num_files == len(names)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_changed_byte_or_size_of_any_file_is_named(built: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list_names(built)))
    path = built / name
    original = path.read_bytes()
    content = bytearray(original)
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= data.draw(st.integers(1, 255))
    else:
        del content[position:]
    path.write_bytes(content)
    try:
        for read in (Index.open, build_again):
            with pytest.raises(RetrievalError) as error_info:
                read(built)
            assert str(path) in str(error_info.value) and "again" in str(error_info.value)
        lines, _ = find_index_damage(built)
        assert len(lines) == 1 and lines[0].startswith(f"{path}: has ")
    finally:
        path.write_bytes(original)
    Index.open(built).close()


def build_again(index: Path) -> object:
    return build_index(FakeModel(), index.parent / "records.jsonl", to=index)


def test_a_missing_version_does_not_give_an_earlier_one(index: Path) -> None:
    """LanceDB would open the version before, with fewer rows."""
    newest = min((index / "store" / "rows.lance" / "_versions").glob("*.manifest"))
    newest.unlink()
    with pytest.raises(RetrievalError, match=rf"{newest.name}: is missing"):
        Index.open(index)


@pytest.mark.parametrize(
    ("key", "value"), [("count", 3), ("side", "image"), ("source", "x"), ("created", "now")]
)
def test_a_changed_manifest_is_refused(index: Path, key: str, value: Any) -> None:
    path = index / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(RetrievalError, match=r"manifest\.json: has another content"):
        Index.open(index)


def test_an_index_of_an_earlier_version_opens_and_gets_a_list(index: Path) -> None:
    path = index / "manifest.json"
    manifest = json.loads(path.read_text())
    files = manifest.pop("files")
    del manifest["manifest_sha256"]
    path.write_text(json.dumps(manifest))
    Index.open(index).close()
    build_again(index)
    assert json.loads(path.read_text())["files"].keys() & files.keys()


class StoppedBuild(BaseException):
    """What stops a build as a kill does: the manifest stays as it was at the last commit."""


def interrupt_build(folder: Path, num_embedded: int) -> Path:
    """Start to build an index of twenty texts in chunks of four, and stop; return its folder."""
    model = FakeModel()

    def stop(parts: Any) -> None:
        if len(model.embedded) >= num_embedded:
            raise StoppedBuild

    model.before_document = stop
    with pytest.raises(StoppedBuild):
        source = write_texts(folder)
        build_index(model, source, to=folder / "index", side="text", chunk_size=4)
    return folder / "index"


def test_what_an_interrupted_build_committed_is_listed(tmp_path: Path) -> None:
    index = interrupt_build(tmp_path, 12)
    assert not IndexManifest.read(index).complete
    Index.open(index).close()
    (name,) = [name for name in list_names(index) if "/data/" in name][:1]
    content = (index / name).read_bytes()
    (index / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(RetrievalError, match="has another content"):
        Index.open(index)
    with pytest.raises(RetrievalError, match="has another content"):
        build_again(index)


def test_a_build_that_was_killed_after_it_merged_files_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files that were merged are listed and gone, and the new one is not listed."""
    monkeypatch.setattr(lance, "VERSION_RETENTION", lance.timedelta(microseconds=1))
    index = interrupt_build(tmp_path, 12)
    with Index(index, IndexManifest.read(index), write=True) as opened:
        opened.store.close()
    assert not all((index / name).exists() for name in list_names(index))
    with Index.open(index) as opened:
        assert opened.count() == 12
    assert build_again(index)
    with Index.open(index) as opened:
        assert opened.count() == 20 and opened.manifest.complete


def test_a_build_that_starts_while_an_index_is_opened_is_no_damage(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lance, "VERSION_RETENTION", lance.timedelta(microseconds=1))
    read = IndexManifest.read
    manifests = [read(index)]  # of before the build
    source = write_texts(index.parent, 40)
    build_index(FakeModel(), source, to=index, chunk_size=4)
    assert manifests[0].find_damage(index), "the build must have merged files"

    def read_old_manifest_first(path: Path) -> IndexManifest:
        return manifests.pop() if manifests else read(path)

    monkeypatch.setattr(IndexManifest, "read", read_old_manifest_first)
    with Index.open(index) as opened:
        assert opened.count() == 40


def test_a_damaged_image_is_named_by_check_and_replaced_by_a_build(tmp_path: Path) -> None:
    data = paint(tmp_path / "a.png", (255, 0, 0)).read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    source = write_records(tmp_path / "r.jsonl", [{"id": "a", "image": url}])
    build_index(FakeModel(), source, to=tmp_path / "index")
    (image,) = (tmp_path / "index" / "images").iterdir()
    image.write_bytes(data[:-20])
    lines, _ = find_index_damage(tmp_path / "index")
    assert len(lines) == 1 and image.name in lines[0]
    write_records(source, [{"id": "b", "image": url}])
    build_index(FakeModel(), source, to=tmp_path / "index")
    assert image.read_bytes() == data and find_index_damage(tmp_path / "index")[0] == []
    with Index.open(tmp_path / "index") as opened:
        assert len(search(opened, FakeModel(), "red", k=2)) == 2
