"""Fetching a corpus: a complete folder with the same bytes every time, or an error."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import pytest

from helpers.small_corpora import write_stamp_package, write_text
from vlduet.corpora import build, catalog, packages, stamps
from vlduet.data import images
from vlduet.data.formats import read_jsonl
from vlduet.errors import DataError, PackageError


@pytest.fixture
def stamp_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of stamps, the only one that can be fetched."""
    folder = write_stamp_package(tmp_path / "stamps-package")

    def fetch(package: packages.Package) -> Path:
        if package.name != stamps.PACKAGE_NAME:
            raise PackageError(f"{package} needs apt-get, which is not on this system")
        return folder

    monkeypatch.setattr(catalog, "fetch_package", fetch)
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files in a folder by their relative paths."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_the_same_packages_give_the_same_bytes(
    stamp_package: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="vlduet")
    first = catalog.fetch_corpus("stamps", tmp_path / "first")
    assert caplog.messages == ["building stamps"]
    second = catalog.fetch_corpus("stamps", tmp_path / "second")
    assert not first.reused
    assert sum(first.counts.values()) == first.num_images == 42
    assert read_files(first.folder) == read_files(second.folder)
    assert list((tmp_path / "first").iterdir()) == [first.folder], "no staging folder is left"


def test_a_corpus_folder_holds_records_images_notices_and_their_hashes(
    stamp_package: Path, tmp_path: Path
) -> None:
    write_text(stamp_package / f"usr/share/doc/{stamps.PACKAGE_NAME}/copyright", "GPL-2")
    summary = catalog.fetch_corpus("stamps", tmp_path)
    files = read_files(summary.folder)
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest["files"] == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    pin = packages.get_package(stamps.PACKAGE_NAME)
    assert manifest["packages"] == [
        {"kind": pin.kind, "name": pin.name, "version": pin.version, "sha256": pin.sha256}
    ]
    assert files[f"COPYRIGHT-{stamps.PACKAGE_NAME}.txt"] == b"GPL-2"
    readme = files["README.md"].decode()
    assert all(text in readme for text in ("GPL-2", "Bill Kendrick", "| test |", pin.sha256))
    for split, count in summary.counts.items():
        records = list(read_jsonl(summary.folder / f"{split}.jsonl"))
        assert len(records) == count
        for record in records:
            assert max(images.load_image(record.images()[0]).size) <= build.MAX_IMAGE_SIDE


def test_a_complete_folder_is_reused_and_an_incomplete_one_rewritten(
    stamp_package: Path, tmp_path: Path
) -> None:
    summary = catalog.fetch_corpus("stamps", tmp_path)
    assert catalog.fetch_corpus("stamps", tmp_path).reused
    (summary.folder / "val.jsonl").unlink()
    assert not catalog.fetch_corpus("stamps", tmp_path).reused
    assert (summary.folder / "val.jsonl").exists()


def test_a_folder_with_something_else_is_not_touched(stamp_package: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "stamps/precious.txt", "mine")
    with pytest.raises(DataError, match="something else") as caught:
        catalog.fetch_corpus("stamps", tmp_path)
    assert "--to" in str(caught.value)
    assert read_files(tmp_path / "stamps") == {"precious.txt": b"mine"}


def test_an_unknown_corpus_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Did you mean 'stamps'"):
        catalog.fetch_corpus("stamp", tmp_path)


def test_a_missing_required_package_leaves_no_folder(stamp_package: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="apt-get"):
        catalog.fetch_corpus("gimp-help", tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("name", sorted(catalog.CORPORA))
def test_every_corpus_states_its_licence_and_pins_its_packages(name: str) -> None:
    corpus = catalog.get_corpus(name)
    assert corpus.name == name
    assert corpus.packages
    for package in (*corpus.packages, *corpus.optional):
        assert packages.get_package(package.name) is package
    for text in (corpus.title, corpus.licence, corpus.attribution, corpus.split_by):
        assert len(text) > 4
