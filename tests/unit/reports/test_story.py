"""The page of a story shows texts, images and sources, escapes them, and contains its images."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers import pages, tiny
from vlduet.data.records import ImageRef
from vlduet.reports import story as story_module
from vlduet.reports.story import Story, StoryImage, write_story

IMAGE = StoryImage(
    "a/1",
    0.25,
    tiny.random_image(1),
    "A boat.",
    {"year": 1990, "tags": ["sail", "red"], "Licence": "CC0", "author": "Ada"},
)
STORY = Story(
    ("Tell a story.",), ("One. ", IMAGE, " ", "Two."), True, {"model": "m"}, "vlduet interleave"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "story.html"


def read_page(path: Path, story: Story) -> pages.Page:
    """Write a story and return its page, after the checks that hold for every page."""
    write_story(path, story)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no staging file is left"
    return pages.parse_checked_page(path.read_text(encoding="utf-8"))


def list_values(page: pages.Page, tag: str, attribute: str) -> list[str | None]:
    """Return an attribute of all elements of a kind, in order."""
    return [attributes.get(attribute) for name, attributes in page.tags if name == tag]


def test_page_shows_texts_images_and_sources_in_order(path: Path) -> None:
    second = StoryImage("b/2", -0.5, tiny.random_image(2))
    page = read_page(path, Story(STORY.prompt, (*STORY.content, second), True, {}, "command"))
    text = " ".join(page.text.split())
    assert "One. [1] A boat. Two. [2] Sources" in text
    assert "[1] a/1 score 0.250" in text and "[2] b/2 score -0.500 How" in text
    # Who made the image comes before everything else.
    assert re.search(r"author ?Ada ?Licence ?CC0 ?year ?1990 ?tags ?sail, red", text)
    assert list_values(page, "img", "alt") == ["A boat.", "b/2"]
    assert list_values(page, "figure", "id") == ["image-1", "image-2"]
    links = ["#source-1", "#source-2", "#image-1", "#image-2"]
    assert list_values(page, "a", "href") == links
    assert "One model wrote the" in text


def test_everything_is_escaped(path: Path) -> None:
    hostile = pages.HOSTILE
    image = StoryImage(hostile, 1.0, tiny.random_image(1), hostile, {hostile: hostile})
    page = read_page(path, Story((hostile,), (hostile, image), True, {hostile: hostile}, hostile))
    # Title, heading, text, caption, id, metadata (2), command and facts (2).
    assert page.text.count(pages.SCRIPT) == 10


def test_images_are_scaled_down_and_a_missing_one_is_replaced_by_its_error(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story_module, "IMAGE_SIDE", 8)
    sides: list[int] = []
    encode = story_module.encode_thumbnail_data_url

    def record_side(image: object, side: int) -> str:
        sides.append(side)
        return encode(image, side)  # type: ignore[arg-type]

    monkeypatch.setattr(story_module, "encode_thumbnail_data_url", record_side)
    gone = StoryImage("gone", 0.1, ImageRef(path=tmp_path / "gone.png"))
    prompt = (tiny.random_image(3), "Look.")
    page = read_page(path, Story(prompt, ("One.", IMAGE, gone), False, {}, ""))
    assert sides == [8, 8]
    assert list_values(page, "img", "alt") == ["image of the prompt", "A boat."]
    assert "gone.png: no such image" in page.text and "was given" in page.text


def test_a_story_without_images_has_no_sources_and_a_long_prompt_is_cut(path: Path) -> None:
    page = read_page(path, Story(("word " * 100,), ("One.",), True, {}, "vlduet"))
    assert "Sources" not in page.text and not list_values(page, "img", "alt")
    heading = re.search(r"<h1[^>]*>(.*?)</h1>", path.read_text(encoding="utf-8"))
    assert heading is not None and heading[1].endswith("word…") and len(heading[1]) <= 140
