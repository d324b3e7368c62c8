"""The remedy for missing images names the folder or the file that was probably meant."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vlduet.data.tools import missing_images
from vlduet.data.tools.missing_images import suggest_remedy


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder ``project/tables``, with files around it."""
    for name in (
        "project/tables/old/1.png",
        "project/tables/photos/small/1.png",
        "project/tables/photos/small/2.png",
        "project/shop/IMG_7.JPG",
        "project/shop/sub/9.png",
        "shared/5.png",
        "project/tables/.hidden/8.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "project" / "tables")
    return Path()


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        (["1.png", "2.png", "3.png"], "photos/small"),  # more of them than in old
        (["small/1.png"], "photos"),
        (["tables/old/1.png"], ".."),
        (["sub/9.png"], "../shop"),
        (["5.png"], "../../shared"),
    ],
)
def test_the_folder_with_most_of_the_images_is_suggested(
    project: Path, names: list[str], folder: str
) -> None:
    remedy = suggest_remedy([project / name for name in names], project)
    assert remedy is not None and f"--root {Path(folder)}, " in remedy
    assert (Path(folder) / remedy.split("'")[1]).is_file()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("IMG_7", "../shop/IMG_7.JPG"),  # no ending
        ("img_7.jpg", "../shop/IMG_7.JPG"),  # case
        ("img_7.png", "../shop/IMG_7.JPG"),  # another ending
        ("elsewhere/9.png", "../shop/sub/9.png"),
        (r"C:\Users\me\9.png", "../shop/sub/9.png"),
        ("/absolute/9.png", "../shop/sub/9.png"),
    ],
)
def test_a_file_with_a_similar_name_is_named(project: Path, name: str, file: str) -> None:
    remedy = suggest_remedy([project / name], project)
    assert remedy is not None and f"'{Path(file)}'" in remedy and "--root" not in remedy


def test_nothing_is_suggested_without_a_similar_file(project: Path) -> None:
    assert suggest_remedy([project / "other.png"], project) is None
    assert suggest_remedy([project / "8.png"], project) is None, "hidden folders do not count"
    assert suggest_remedy([project / "1.png"], project / "absent" / "folder" / "deep") is None


def test_the_search_is_bounded(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(30):
        os.mkdir(f"a{i:02}")
    Path("a29/x.png").touch()
    assert "--root a29" in str(suggest_remedy([Path("x.png")], Path()))
    monkeypatch.setattr(missing_images, "MAX_SEARCHED_FOLDERS", 20)
    assert suggest_remedy([Path("x.png")], Path()) is None
