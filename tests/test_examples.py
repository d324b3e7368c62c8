"""The program of examples/ runs against a local server, and the tutorial quotes it as it is."""

from __future__ import annotations

import importlib.util
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import pytest

from helpers import tiny
from helpers.documents import read_code_blocks
from helpers.fake_embedder import paint, write_records
from helpers.pages import SCRIPT, Page
from helpers.serving import RunningServer
from vlduet.retrieval.build import build_index
from vlduet.retrieval.index import Index
from vlduet.serve.app import Service
from vlduet.serve.worker import Worker

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "examples" / "story.py"
TUTORIAL = ROOT / "docs" / "tutorial-story.md"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Run a server of a tiny model with an index of one image, whose text is hostile."""
    folder = tmp_path_factory.mktemp("story")
    model = tiny.build_duet_model(folder / "base")
    paint(folder / "a.png", (200, 0, 0))
    row = {"id": "a/1 ?", "image": "a.png", "short": SCRIPT}
    build_index(model, write_records(folder / "records.jsonl", [row]), to=folder / "index")
    index = Index.open(folder / "index", model)
    with RunningServer(Service(Worker(model), name="tiny", index=index)) as running:
        yield running


@pytest.fixture
def program(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module of the application, set to the server."""
    specification = importlib.util.spec_from_file_location("story", PROGRAM)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "SERVER", f"http://127.0.0.1:{server.port}")
    return module


@pytest.fixture
def address(program: ModuleType) -> Iterator[str]:
    """Run the application and return its address."""
    program.StoryHandler.log_message = lambda *_: None
    application = ThreadingHTTPServer(("127.0.0.1", 0), program.StoryHandler)
    thread = threading.Thread(target=application.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{application.server_port}"
    application.shutdown()
    application.server_close()
    thread.join(30)


def fetch(url: str) -> tuple[str, str]:
    """Return the content of a page of the application and its content security policy."""
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read().decode(), response.headers["Content-Security-Policy"]


def test_a_story_has_texts_and_images_in_order(program: ModuleType, address: str) -> None:
    program.RETRIEVAL["template"] = "A day: {image} Then, <night>."
    page, policy = fetch(f"{address}/?about=" + quote("a day & a night"))
    assert policy == program.POLICY and SCRIPT not in page
    parsed = Page(page.replace("required>", "required></input>"))
    text = " ".join(parsed.text.split())
    assert text.endswith(f"A day:{SCRIPT} Then, <night>.")
    (url,) = [attributes["src"] for tag, attributes in parsed.tags if tag == "img"]
    assert url == "/v1/images/a%2F1%20%3F"
    with urllib.request.urlopen(f"{address}{url}", timeout=60) as response:
        assert response.headers["Content-Type"] == "image/png"
        assert response.read().startswith(b"\x89PNG")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{address}/v1/images/b", timeout=60)


def test_a_generated_story_is_streamed(program: ModuleType) -> None:
    deltas: list[dict[str, Any]] = list(program.request_story("a day"))
    assert deltas[0]["role"] == "assistant"
    assert all(isinstance(delta.get("content", ""), str) for delta in deltas)


def test_a_form_comes_without_a_story_and_errors_are_part_of_the_page(
    program: ModuleType, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetch(f"{address}/")[0].endswith("<article><p>")
    program.RETRIEVAL["threshold"] = 7
    assert "threshold" in fetch(f"{address}/?about=x")[0]
    monkeypatch.setattr(program, "SERVER", "http://127.0.0.1:9")
    assert "refused" in fetch(f"{address}/?about=x")[0]


def test_the_tutorial_quotes_the_program() -> None:
    program = PROGRAM.read_text(encoding="utf-8")
    quoted = [block.code for block in read_code_blocks(TUTORIAL) if block.language == "python"]
    assert len(quoted) == 3
    for code in quoted:
        assert code in program, code


def test_the_program_has_about_fifty_lines_without_imports_and_html() -> None:
    program = re.sub(r'""".*?"""', "", PROGRAM.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for line in program.splitlines() if line.strip()]
    assert 40 < sum(not line.startswith(("import ", "from ")) for line in lines) <= 55
