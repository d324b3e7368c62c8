"""The web page in headless Chromium, on a server with a tiny model and a tiny index."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny
from helpers.browser import (
    HAS_VISIBLE_FOCUS,
    WatchedPage,
    answer_with,
    ask,
    image_urls,
    open_browser,
    read_ids,
    read_image_width,
    search,
    stream_of,
    wait_for_search,
)
from helpers.serving import RunningServer, becomes_true
from vlduet.data.images import encode_png, from_pixels
from vlduet.model.duet import DuetModel
from vlduet.retrieval.build import build_index
from vlduet.retrieval.index import Index
from vlduet.serve import page as page_package
from vlduet.serve.app import Service
from vlduet.serve.page_files import PAGE_FILES
from vlduet.serve.worker import Worker

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
HOSTILE = '<img src=x onerror="window.hacked=1"><b>bold</b>'
HOSTILE_ID = "\"><script>window.hacked=1</script>/'#?&"
NUM_DOCUMENTS = 30
PHONE = (360, 740)
REQUEST_WITH_AN_OLD_KEY = """
async () => {
  const { sendForJson } = await import("/page/api.js");
  sessionStorage.setItem("vlduet-key", "old");
  window.answers = Promise.all([1, 2, 3].map(() => sendForJson("v1/models")));
  return null;
}
"""
"""Script that sends three requests at once, all of which are refused until there is a new key."""


def paint(colour: tuple[int, int, int]) -> bytes:
    """Return an image of one colour as PNG."""
    return encode_png(from_pixels(np.full((40, 40, 3), colour, np.uint8)))


@pytest.fixture(scope="module")
def duet(tmp_path_factory: pytest.TempPathFactory) -> DuetModel:
    return tiny.build_duet_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, duet: DuetModel) -> Iterator[Index]:
    """An index of coloured images, more than a page shows, and one with hostile texts."""
    root: Path = tmp_path_factory.mktemp("data")
    rows = []
    for i in range(NUM_DOCUMENTS):
        name = list(COLOURS)[i % 3]
        (root / f"{i}.png").write_bytes(paint(tuple(max(c - i, 0) for c in COLOURS[name])))
        metadata = {"colour": name, "year": 1990 + i, "tags": ["a", "b"] if i % 2 else ["a"]}
        row = {"id": f"{name} {i}", "image": f"{i}.png", "short": f"a {name} square"}
        rows.append(row | {"metadata": metadata})
    metadata = {"colour": HOSTILE, HOSTILE: "a", "year": 1980, "tags": [HOSTILE]}
    hostile = {"id": HOSTILE_ID, "image": "0.png", "short": HOSTILE, "metadata": metadata}
    lines = [json.dumps(row) for row in [*rows, hostile]]
    (root / "source.jsonl").write_text("\n".join(lines) + "\n")
    build_index(duet, root / "source.jsonl", to=root / "index", side="image")
    with Index.open(root / "index", duet) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(duet: DuetModel, index: Index) -> Iterator[RunningServer]:
    with RunningServer(Service(Worker(duet), name="tiny", index=index)) as running:
        yield running


@pytest.fixture(scope="module")
def watched() -> Iterator[WatchedPage]:
    with open_browser() as browser:
        yield WatchedPage(browser)


OpenPage = Callable[..., WatchedPage]


@pytest.fixture
def open_page(server: RunningServer, watched: WatchedPage) -> Iterator[OpenPage]:
    """Return a function that opens the page; the fixture fails if the page had any error."""

    def visit(*, port: int | None = None, is_ready: bool = True, **options: Any) -> WatchedPage:
        watched.visit(f"http://127.0.0.1:{port or server.port}/", **options)
        if is_ready:
            watched.page.wait_for_selector("#page-status", state="hidden")
        return watched

    yield visit
    watched.check()


# ------------------------------------------------------------------ search


def test_search_by_a_text_gives_the_hits_of_the_server_and_further_pages(
    open_page: OpenPage, server: RunningServer
) -> None:
    page = open_page().page
    assert page.title() == "tiny · VLDuet"
    assert f"{NUM_DOCUMENTS + 1} documents" in page.locator("#served").inner_text()
    search(page, "a red square")
    body = {"query": "a red square", "k": NUM_DOCUMENTS + 1}
    hits = server.request("/v1/search", body)[1]["data"]
    assert read_ids(page) == [hit["id"] for hit in hits[:24]]
    assert (
        page.locator("#results .card").first.locator(".score").inner_text()
        == f"{hits[0]['score']:.3f}"
    )
    assert becomes_true(lambda: read_image_width(page) > 0)
    assert wait_for_search(page, page.get_by_text("Next page").click)["offset"] == 24
    assert read_ids(page) == [hit["id"] for hit in hits[24:]]
    assert page.get_by_text("Next page").is_disabled()
    assert page.evaluate("document.activeElement.title") == hits[24]["id"], "the focus is kept"


def test_a_dropped_image_and_a_text_are_one_query(open_page: OpenPage) -> None:
    watched = open_page()
    page = watched.page
    file_name = f"{HOSTILE}.png"
    body = wait_for_search(page, lambda: watched.drop(file_name, paint(COLOURS["blue"])))
    assert image_urls(body["query"]) == ["data:image/png;"] and len(body["query"]) == 1
    assert read_ids(page)[0].startswith("blue")
    body = search(page, "at night")
    assert [part["type"] for part in body["query"]] == ["image_url", "text"]
    page.get_by_role("button", name="Remove <img").click()
    assert [part["type"] for part in search(page, "at night")["query"]] == ["text"]


def test_filters_come_from_the_metadata_of_the_index(open_page: OpenPage) -> None:
    page = open_page().page
    search(page, "a square")
    page.get_by_text("Filters", exact=True).click()
    colours = page.get_by_role("group", name="colour", exact=True)
    body = wait_for_search(page, colours.get_by_label("green").check)
    assert body["where"] == ['"colour" in "green"']
    assert page.locator("#results .card").count() == 10
    year = page.get_by_role("group", name="year")
    year.get_by_label("from").fill("2000")
    wait_for_search(page, lambda: year.get_by_label("from").press("Enter"))
    tags = page.get_by_role("group", name="tags")
    body = wait_for_search(page, tags.get_by_label("b", exact=True).check)
    assert body["where"] == ['"colour" in "green"', '"year">=2000', '"tags" contains "b"']
    assert page.locator("#search-status").inner_text() == "3 results"
    remove = page.get_by_role("button", name="Remove the filter colour: green")
    assert len(wait_for_search(page, remove.click)["where"]) == 2
    assert not colours.get_by_label("green").is_checked()
    body = wait_for_search(page, colours.get_by_label(HOSTILE).check)
    assert page.locator("#search-error").is_hidden(), "quotes in values are escaped"


def test_more_like_this_searches_with_the_document(open_page: OpenPage) -> None:
    page = open_page().page
    search(page, "a square")
    wanted = read_ids(page)[3]
    button = page.get_by_role("button", name=f"More like {wanted}", exact=True)
    body = wait_for_search(page, button.click)
    assert body["like"] == wanted and "query" not in body
    ids = read_ids(page)
    assert wanted not in ids and ids[0].split()[0] == wanted.split()[0]
    page.locator(".card-open").first.click()
    assert page.locator("#document-title").inner_text() == ids[0]
    button = page.get_by_role("button", name="Search with this image")
    assert image_urls(wait_for_search(page, button.click)["query"]) == ["data:image/png;"]


def test_errors_of_the_server_are_explained(open_page: OpenPage) -> None:
    page = open_page().page
    page.route("**/v1/search", lambda route: route.abort())
    page.get_by_role("searchbox").fill("a")
    page.get_by_role("searchbox").press("Enter")
    page.get_by_text("The server does not answer. Is it still running?").wait_for()
    page.unroute("**/v1/search")
    page.get_by_role("searchbox").fill("data:image/png;base64,AAAA")
    page.get_by_role("searchbox").press("Enter")
    page.locator("#search-error").get_by_text(re.compile("^An image in the place of")).wait_for()
    assert page.locator("#search-error").get_attribute("role") == "alert"


# ------------------------------------------------------------------ conversation


def test_a_chat_streams_from_the_model_with_images(open_page: OpenPage) -> None:
    watched = open_page(part="chat")
    page = watched.page
    page.get_by_label("Retrieval").select_option("off")
    page.get_by_text("Options").click()
    page.get_by_label("Longest answer, in tokens").fill("8")
    watched.drop("photo.png", paint(COLOURS["red"]))
    page.locator(".attachment img").wait_for()
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "Which colour is it?")
    body = request.value.post_data_json
    assert body["stream"] is True and body["max_tokens"] == 8 and "retrieval" not in body
    assert image_urls(body["messages"][0]["content"]) == ["data:image/png;"]
    assert page.locator(".question img").count() == 1 and page.locator(".attachment").count() == 0
    assert page.locator("#chat-error").is_hidden()
    answer = page.locator(".answer .generated").all_inner_texts()
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "And now?")
    messages = request.value.post_data_json["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"].strip() == "".join(answer).strip()


def test_images_lie_on_pink_and_text_on_blue_and_are_sent_back(open_page: OpenPage) -> None:
    page = open_page(part="chat").page
    hit = {"rank": 1, "score": 0.5, "id": "red 0", "text": HOSTILE, "metadata": {"a": HOSTILE}}
    url = "/v1/images/red%200"
    hit |= {"image": url, "p": 0.00123}
    image = {"type": "image_url", "image_url": {"url": url}, "hit": hit}
    deltas = [{"content": HOSTILE}, {"content": "", "parts": [image]}, {"content": " Then"}]
    bodies = answer_with(page, stream_of(*deltas, {"content": " home.\n"}))
    page.get_by_label("Retrieval").select_option("interleave")
    page.get_by_text("Options").click()
    page.get_by_label("Lowest score of an image").fill("0.2")
    page.get_by_label("Let the model see the images").check()
    ask(page, "Tell a story.")
    retrieval = {"mode": "interleave", "threshold": 0.2, "max_images": 4}
    assert bodies[0]["retrieval"] == retrieval | {"feed_back": True}
    flow = page.locator(".generated, .retrieved")
    assert flow.evaluate_all("all => all.map(e => e.className)") == [
        "generated",
        "retrieved",
        "generated",
    ]
    assert page.locator(".generated").first.inner_text() == HOSTILE
    colours = flow.evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)")
    assert colours == ["rgb(223, 234, 252)", "rgb(253, 224, 234)", "rgb(223, 234, 252)"]
    page.get_by_role("button", name="Open the source red 0").click()
    assert "0.500, p 0.0012" in page.locator("#document-body").inner_text()
    page.keyboard.press("Escape")
    ask(page, "And then?")
    parts = [{"type": "text", "text": HOSTILE}, {"type": "image_url", "image_url": {"url": url}}]
    content = bodies[1]["messages"][1]["content"]
    assert content == [*parts, {"type": "text", "text": "Then home.\n"}]


def test_an_answer_of_the_server_gets_images_of_the_index(open_page: OpenPage) -> None:
    page = open_page(part="chat").page
    page.get_by_label("Retrieval").select_option("interleave")
    page.get_by_text("Options").click()
    page.get_by_label("Template").fill("A red square. {image} Then a blue one. {image}")
    ask(page, "Which squares are there?")
    flow = page.locator(".generated, .retrieved img")
    tags = ["P", "IMG", "P", "IMG"]
    assert flow.evaluate_all("all => all.map((e) => e.tagName)") == tags
    images = page.locator(".retrieved img")
    assert becomes_true(lambda: all(images.evaluate_all("all => all.map(i => i.naturalWidth)")))
    ask(page, "And which others?")
    assert page.locator("#chat-error").is_hidden(), "the server accepts what it sent"
    assert images.count() == 4


def test_sources_of_an_answer_can_be_opened(open_page: OpenPage) -> None:
    page = open_page(part="chat").page
    sources = [{"rank": 1, "score": 0.5, "id": "text 1", "text": "a text", "metadata": {}}]
    bodies = answer_with(page, stream_of({"content": "Yes."}, sources=sources, finish="length"))
    page.get_by_label("Retrieval").select_option("context")
    ask(page, "Is it?")
    assert bodies[0]["retrieval"] == {"mode": "context", "scope": "last", "k": 3}
    assert "longest length" in page.locator(".note").inner_text()
    page.get_by_text("1 document in the prompt").wait_for()
    page.get_by_role("button", name="Open the source text 1").click()
    assert page.locator("#document-title").inner_text() == "text 1"
    assert page.get_by_role("button", name="Search with this image").is_hidden()


def test_an_answer_can_be_stopped_and_a_refused_question_comes_back(
    open_page: OpenPage, duet: DuetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duet.renderer, "eos_token_ids", [])
    page = open_page(part="chat").page
    page.get_by_label("Retrieval").select_option("off")
    page.get_by_text("Options").click()
    page.get_by_label("Longest answer, in tokens").fill("99999")
    message = page.get_by_role("textbox", name="Message")
    message.fill("Too long?")
    message.press("Enter")
    page.locator("#chat-error").get_by_text("99999").wait_for()
    assert message.input_value() == "Too long?" and page.locator(".question").count() == 0
    page.get_by_label("Longest answer, in tokens").fill("400")
    message.press("Enter")
    page.locator(".generated").wait_for()
    message.press("Escape")
    page.locator(".note").get_by_text("Stopped.").wait_for()
    assert page.get_by_role("button", name="Send").is_visible()
    page.get_by_role("button", name="New conversation").click()
    assert page.locator("#transcript > *").count() == 0


# ------------------------------------------------------------------ safety and access


def test_hostile_documents_appear_as_text(open_page: OpenPage) -> None:
    from playwright.sync_api import Error

    watched = open_page()
    page = watched.page
    search(page, "a square")
    page.get_by_text("Filters", exact=True).click()
    wait_for_search(page, page.get_by_label(HOSTILE).first.check)
    card = page.locator("#results .card").filter(has_text=HOSTILE)
    card.locator("img").wait_for()
    card.locator(".card-open").click()
    assert page.locator("#document-title").inner_text() == HOSTILE_ID
    assert HOSTILE in page.locator("#document-body").inner_text()
    wait_for_search(page, page.locator("#more-like-this").click)
    assert page.locator("main b").count() == 0
    assert page.evaluate("window.hacked") is None
    # The browser itself refuses what the page never does.
    with pytest.raises(Error, match="TrustedHTML"):
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<b>bold</b>')")
    assert page.evaluate("window.violations.splice(0)") == ["require-trusted-types-for"]
    watched.errors.clear()


def test_with_keys_the_page_asks_for_one_and_images_are_fetched_with_it(
    open_page: OpenPage, duet: DuetModel, index: Index
) -> None:
    service = Service(Worker(duet), name="tiny", index=index)
    with RunningServer(service, api_keys=["s3cret"]) as server:
        watched = open_page(port=server.port, is_ready=False)
        page = watched.page
        for key in ("wrong", "s3cret"):
            page.get_by_label("Key", exact=True).fill(key)
            page.get_by_label("Key", exact=True).press("Enter")
            if key == "wrong":
                page.get_by_text("The server does not know this key.").wait_for()
        page.wait_for_selector("#page-status", state="hidden")
        search(page, "a square")
        assert becomes_true(lambda: read_image_width(page) > 0)
        source = page.locator("#results .card img").first.get_attribute("src")
        assert source is not None and source.startswith("blob:")
        page.reload()
        page.wait_for_selector("#page-status", state="hidden")
        page.evaluate(REQUEST_WITH_AN_OLD_KEY)
        page.get_by_label("Key", exact=True).fill("s3cret")
        page.get_by_label("Key", exact=True).press("Enter")
        assert page.evaluate("window.answers.then((all) => all.length)") == 3
        with page.expect_navigation():
            page.get_by_role("button", name="Forget the key").click()
        page.get_by_label("Key", exact=True).wait_for()
        assert all("s3cret" not in url for url in watched.requests)
        watched.check()


def test_only_what_the_server_offers_is_visible(open_page: OpenPage) -> None:
    watched = open_page(is_ready=False)
    page = watched.page
    for chat, has_index, parts in (
        (True, False, ["chat"]),
        (False, True, ["search"]),
        (False, False, []),
    ):
        capabilities = {"chat": chat, "search": has_index}
        body = {"data": [{"id": "tiny", "capabilities": capabilities}]}
        page.route("**/v1/models", lambda route, _, body=body: route.fulfill(json=body))
        page.reload()
        page.get_by_text("tiny").first.wait_for()
        for part in ("search", "chat"):
            expected = "visible" if part in parts else "hidden"
            page.wait_for_selector(f"#{part}", state=expected)
        assert page.locator("#tabs").is_hidden()
        if parts == ["chat"]:
            assert page.get_by_label("Retrieval").is_hidden()
        if not parts:
            assert "--index INDEX" in page.locator("#page-status").inner_text()


# ------------------------------------------------------------------ without a mouse, small, dark


def test_everything_is_reached_by_the_keyboard(open_page: OpenPage) -> None:
    page = open_page().page
    focused = "document.activeElement.textContent.trim() || document.activeElement.id"
    order = []
    for _ in range(6):
        page.keyboard.press("Tab")
        order.append(page.evaluate(focused))
        assert page.evaluate(HAS_VISIBLE_FOCUS), order
    expected = ["Skip to the content", "Search", "query-text", "query-file", "Search", "Filters"]
    assert order == expected
    page.get_by_role("searchbox").focus()
    page.keyboard.type("a red square")
    wait_for_search(page, lambda: page.keyboard.press("Enter"))
    page.locator(".card-open").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#document-dialog").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#document-dialog").is_hidden()
    assert "card-open" in page.evaluate("document.activeElement.className")
    page.get_by_role("tab", name="Search").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "chat-tab"
    assert page.locator("#chat").is_visible() and page.url.endswith("#chat")
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, textarea, select')]"
        ".filter((e) => !e.labels?.length && !e.ariaLabel).map((e) => e.id)"
    )
    assert unnamed == []
    assert page.locator("#transcript").get_attribute("aria-live") == "polite"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(
    open_page: OpenPage, scheme: str
) -> None:
    page = open_page(size=PHONE, scheme=scheme).page
    page.get_by_text("Filters", exact=True).click()
    search(page, "a square")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
    assert (brightness < 60) if scheme == "dark" else (brightness > 200)
    answer_with(page, stream_of({"content": "word" * 100}))
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) == PHONE[0]
    page.locator(".card-open").first.click()
    assert page.locator("#document-dialog").evaluate("d => d.scrollWidth <= innerWidth")
    page.keyboard.press("Escape")
    page.get_by_role("tab", name="Chat").click()
    page.get_by_text("Options").click()
    ask(page, "a" * 200)
    assert page.evaluate(width) == PHONE[0]


# ------------------------------------------------------------------ without a browser


def test_files_of_the_page_have_strict_headers(server: RunningServer) -> None:
    folder = files(page_package)
    names = {path.name for path in folder.iterdir() if path.name.endswith((".html", ".css", ".js"))}
    assert names == set(PAGE_FILES.values())
    for path, name in PAGE_FILES.items():
        response = server.send(path)
        assert response.read() == folder.joinpath(name).read_bytes()
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        policy = response.headers["Content-Security-Policy"]
        assert "unsafe" not in policy and "http" not in policy
        for rule in ("default-src 'none'", "base-uri 'none'", "frame-ancestors 'none'"):
            assert rule in policy
    html = server.send("/").read().decode()
    assert "style=" not in html and not re.search(r"<script[^>]*>[^<]|\son\w+=", html)


def test_files_of_the_page_need_no_key_and_nothing_else_is_public(duet: DuetModel) -> None:
    with RunningServer(Service(Worker(duet), name="tiny"), api_keys=["s3cret"]) as server:
        statuses = {path: server.send(path).status for path in PAGE_FILES}
        assert statuses == dict.fromkeys(PAGE_FILES, 200)
        for path in ("/page", "/page/", "/page/none.js", "/page/../docs", "/docs", "/v1/index"):
            assert server.send(path).status == 401


def test_index_is_described_and_after_an_update_anew(
    server: RunningServer, index: Index, duet: DuetModel, tmp_path: Path
) -> None:
    status, body = server.request("/v1/index")
    fields = {field.pop("name"): field for field in body.pop("fields")}
    assert status == 200
    assert body == {"object": "index", "documents": NUM_DOCUMENTS + 1, "side": "image"}
    assert fields["colour"] == {"type": "text", "values": [HOSTILE, "blue", "green", "red"]}
    assert fields["tags"]["type"] == "text list" and len(fields["year"]["values"]) == 31
    (tmp_path / "more.png").write_bytes(paint((0, 0, 0)))
    build_index(duet, tmp_path, to=index.path, side="image")
    assert server.request("/v1/index")[1]["documents"] == NUM_DOCUMENTS + 2


def test_without_an_index_there_is_none_to_describe(duet: DuetModel) -> None:
    with RunningServer(Service(Worker(duet), name="tiny")) as server:
        status, body = server.request("/v1/index")
        assert status == 404 and "--index INDEX" in body["error"]["message"]
        model = server.request("/v1/models/tiny")[1]
        assert model["capabilities"] == {"chat": True, "search": False}
