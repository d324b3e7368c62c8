"""`vlduet interleave`: the page, the text on the terminal, and what happens to an older page."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.testing import CliRunner, Result

from helpers import pages, tiny
from helpers.command_line import invoke
from helpers.documents import read_code_blocks, split_commands
from helpers.fake_embedder import FakeModel, paint, write_pairs
from vlduet.cli.main import app
from vlduet.data.records import ImageRef, Message
from vlduet.errors import ConfigError, LockError, ModelError, RetrievalError
from vlduet.model.duet import DuetModel
from vlduet.model.generation.interleave import ImageOptions, RetrievedImage, TextDelta
from vlduet.retrieval.build import build_index
from vlduet.retrieval.index import Index
from vlduet.retrieval.search import search

DOCUMENT = Path(__file__).parents[3] / "docs" / "interleave.md"


class FakeWriter(FakeModel):
    """Model that writes `texts`, with the image of the colour for each name of a colour.

    `calls` lists the messages and options of each answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = ["At dawn ", "it rose.", "red", " Then", "\nnight.", "blue"]
        self.calls: list[dict[str, Any]] = []

    def interleave(
        self, messages: Sequence[Message], index: Index, **options: Any
    ) -> Iterator[TextDelta | RetrievedImage]:
        self.calls.append({"messages": tuple(messages), **options})
        for number, text in enumerate(self.texts):
            if text == "fail":
                raise ModelError("the logits are not finite")
            if text in ("red", "blue"):
                (hit,) = search(index, self, text, k=1)
                yield RetrievedImage(hit, number, hit.score, is_fed_back=text == "blue")
            else:
                yield TextDelta(text)


@pytest.fixture
def model() -> FakeWriter:
    return FakeWriter()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of the records of the index."""
    return write_pairs(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """Return the folder of an index of four images."""
    to = tmp_path_factory.mktemp("built") / "index"
    build_index(FakeWriter(), source, to=to)
    return to


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, model: FakeWriter, folder: Path, tmp_path: Path) -> Run:
    """Run the command with the page tmp_path/to/story.html; raise its errors."""
    monkeypatch.setattr(DuetModel, "from_pretrained", lambda path: model)

    def run_interleave(*options: object, prompt: str = "Tell a story.") -> Result:
        to = () if "--to" in options else ("--to", tmp_path / "to" / "story.html")
        return invoke("interleave", tmp_path / "model", folder, prompt, *to, *options)

    return run_interleave


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "to" / "story.html"


def test_text_and_a_line_for_each_image_are_printed_and_the_page_has_both(
    run: Run, page: Path, source: Path
) -> None:
    lines = run().stdout.splitlines()
    images = source.parent / "images"
    assert [line.split("  ")[0] for line in lines] == [
        "At dawn it rose.",
        "[1] red (1.000)",
        "Then",
        "night.",
        "[2] blue (1.000)",
        f"{page}: 2 images",
    ]
    assert lines[1].endswith(f"  a red square  {images / 'red.png'}")
    parsed = pages.parse_checked_page(page.read_text(encoding="utf-8"))
    text = " ".join(parsed.text.split())
    assert "At dawn it rose. [1] a red square Then night. [2] a blue square Sources" in text
    assert "[1] red score 1.000" in text and "[2] blue score 1.000" in text
    assert "fingerprint fake" in text and "index, 4 documents" in text
    assert str(images) not in parsed.text
    assert list(page.parent.iterdir()) == [page], "no lock and no draft is left"


def test_json_has_the_parts_of_the_answer(run: Run, page: Path) -> None:
    report = json.loads(run("--json").stdout)
    assert report["page"] == str(page) and page.is_file()
    first, red, second, blue = report["parts"]
    assert first == {"type": "text", "text": "At dawn it rose."}
    assert second == {"type": "text", "text": " Then\nnight."}
    assert (red["type"], red["slice"], red["is_fed_back"]) == ("image", 2, False)
    assert (blue["hit"]["id"], blue["hit"]["rank"], blue["is_fed_back"]) == ("blue", 2, True)


def test_options_reach_the_model(run: Run, model: FakeWriter, page: Path, tmp_path: Path) -> None:
    photos = [paint(tmp_path / name, (9, 9, 9)) for name in ("a.png", "b.png")]
    run()
    assert model.calls[0] == {
        "messages": (Message("user", ("Tell a story.",)),),
        "template": "",
        "feed_back": False,
        "images": ImageOptions(),
        "max_new_tokens": 128,
        "temperature": 0.0,
    }
    options = ["--threshold", 0.5, "--max-images", 2, "--where", "year>2000", "--feed-back"]
    options += ["--max-new-tokens", 7, "--temperature", 0.5]
    run(*options, "--image", photos[0], "--image", photos[1])
    assert model.calls[1] == {
        "messages": (Message("user", (*[ImageRef(path=p) for p in photos], "Tell a story.")),),
        "template": "",
        "feed_back": True,
        "images": ImageOptions(threshold=0.5, where=["year>2000"], max_images=2),
        "max_new_tokens": 7,
        "temperature": 0.5,
    }
    assert "One model wrote" in page.read_text(encoding="utf-8")
    for count, max_images in ((2, 8), (9, 9)):
        run("--template", "A {image}" * count)
        assert model.calls[-1]["template"] == "A {image}" * count
        assert model.calls[-1]["images"] == ImageOptions(max_images=max_images)
    assert "was given" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("texts", [["One.", "red", "fail"], [" ", "\n"], []])
def test_an_older_page_stays_if_there_is_no_complete_answer(
    run: Run, model: FakeWriter, page: Path, texts: list[str]
) -> None:
    run()
    older = page.read_bytes()
    model.texts = texts
    message = "not finite" if "fail" in texts else "wrote nothing, and no image"
    with pytest.raises(ModelError, match=message):
        run()
    assert page.read_bytes() == older and list(page.parent.iterdir()) == [page]


def test_an_impossible_page_is_an_error_before_the_model_is_loaded(
    run: Run, model: FakeWriter, page: Path, source: Path
) -> None:
    with pytest.raises(ConfigError, match="a folder, not a regular file"):
        run("--to", source.parent)
    with pytest.raises(OSError):
        run("--to", source / "story.html")
    held = FileLock(page.with_name(".story.html.lock"), is_singleton=False)
    page.parent.mkdir()
    with held, pytest.raises(LockError):
        run()
    for options in ({"prompt": " "}, {"prompt": "A story."}):
        with pytest.raises(ConfigError, match="an empty text"):
            run(*(["--template", ""] if options["prompt"].strip() else []), **options)
    with pytest.raises(RetrievalError, match="no document has metadata 'size'"):
        run("--where", "size=3")
    with pytest.raises(ConfigError, match="a threshold for a template"):
        run("--template", "A {image}", "--threshold", 0)
    assert not model.calls


def test_an_answer_without_images_is_logged(
    run: Run, model: FakeWriter, page: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model.texts = ["One."]
    with caplog.at_level(logging.WARNING, logger="vlduet"):
        assert run().stdout == f"One.\n{page}: 0 images\n"
    assert "no image was retrieved" in caplog.text and page.is_file()


def test_a_model_illustrates_its_answer_and_a_template(tmp_path: Path) -> None:
    model = tiny.build_duet_model(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    folder = tmp_path / "index"
    build_index(DuetModel.from_pretrained(tmp_path / "model"), write_pairs(tmp_path), to=folder)

    def read_report(*options: str) -> dict[str, Any]:
        command = ["interleave", str(tmp_path / "model"), str(folder), "A story.", "--json"]
        command += ["--to", str(tmp_path / "story.html"), *options]
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        report: dict[str, Any] = json.loads(result.stdout)
        return report

    parts = read_report("--max-new-tokens", "8", "--feed-back")["parts"]
    assert any(part["type"] == "text" for part in parts)
    parts = read_report("--template", "A day: {image} Then, {image} a boat.")["parts"]
    assert [part.get("text") for part in parts] == ["A day:", None, " Then,", None, " a boat."]
    assert parts[1]["hit"]["id"] != parts[3]["hit"]["id"]
    text = (tmp_path / "story.html").read_text(encoding="utf-8")
    assert text.count("<figure") == 2


def test_examples_of_the_documentation_run(
    run: Run,
    model: FakeWriter,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "index").symlink_to(folder)
    for block in read_code_blocks(DOCUMENT):
        for command in split_commands(block):
            result = CliRunner().invoke(app, list(command.arguments[1:]), catch_exceptions=False)
            assert result.exit_code == 0, command
        if block.language == "python":
            exec(compile(block.code, str(block), "exec"), {})
    assert (tmp_path / "story.html").is_file() and (tmp_path / "day.html").is_file()
    assert model.calls[1]["template"].count("{image}") == 3
    assert model.calls[-1]["images"] == ImageOptions(threshold=0.2, max_images=3)
    assert re.search(r"\[red 1.000, after slice \d\]", capsys.readouterr().out)
