"""Headless Chromium for tests of the web page, and a page that notes what must not happen."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
NOTE_VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation",
                          (event) => window.violations.push(event.violatedDirective));
"""
DROP = """
({ name, type, data }) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type }));
  const event = (kind) => new DragEvent(
    kind, { bubbles: true, cancelable: true, dataTransfer: transfer });
  document.body.dispatchEvent(event("dragover"));
  document.body.dispatchEvent(event("drop"));
}
"""
CARD = "#results .card"
DESKTOP = (1000, 760)
HAS_VISIBLE_FOCUS = """
(() => {
  const focused = document.activeElement;
  const outlined = [focused, focused.nextElementSibling, focused.closest(".field")];
  return outlined.some((e) => e && getComputedStyle(e).outlineStyle !== "none");
})()
"""


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start headless Chromium; skip the test where Playwright or the browser is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    paths = [path for name in CHROMIUM_NAMES if (path := shutil.which(name))]
    if not paths:
        pytest.skip("needs Chromium; on Debian: apt-get install chromium")
    with playwright.sync_playwright() as manager:
        # Without a sandbox, which root cannot have: the pages are our own.
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--in-process-gpu"]
        browser = manager.chromium.launch(executable_path=paths[0], args=arguments)
        yield browser
        browser.close()


class WatchedPage:
    """A page whose requests, errors and violations of its content policy are noted.

    One page serves many tests: to open another costs most of a second of CPU time.
    """

    def __init__(self, browser: Browser):
        self.page: Page = browser.new_page()
        self.page.set_default_timeout(20_000)
        self.page.add_init_script(NOTE_VIOLATIONS)
        self.url = ""
        self.num_visits = 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note_message)
        self.page.on("request", lambda request: self.requests.append(request.url))

    def _note_message(self, message: Any) -> None:
        """Note an error of the console, but not the status of a response, which tests cause."""
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def visit(
        self, url: str, *, part: str = "", size: tuple[int, int] = DESKTOP, scheme: Any = "light"
    ) -> None:
        """Load the page of a server anew, with nothing left of earlier visits.

        Args:
            url: address of the server, ending with a slash.
            part: "search" or "chat"; "" leaves the choice to the page.
            size: width and height of the window in pixels.
            scheme: colours of the system, "light" or "dark".
        """
        self.page.unroute_all()
        self.page.set_viewport_size({"width": size[0], "height": size[1]})
        self.page.emulate_media(color_scheme=scheme)
        self.url = url
        self.num_visits += 1
        self.page.goto(f"{url}?{self.num_visits}#{part}")

    def check(self) -> None:
        """Fail if there was an error, a violation, or a request to elsewhere; forget all notes."""
        violations = self.page.evaluate("window.violations")
        own = (self.url, "blob:", "data:")
        elsewhere = [url for url in self.requests if not url.startswith(own)]
        notes = (self.errors.copy(), violations, elsewhere)
        self.errors.clear()
        self.requests.clear()
        assert notes == ([], [], [])

    def drop(self, name: str, data: bytes, media_type: str = "image/png") -> None:
        """Drop a file on the page."""
        values = {"name": name, "type": media_type, "data": base64.b64encode(data).decode()}
        self.page.evaluate(DROP, values)


def search(page: Page, text: str) -> dict[str, Any]:
    """Search for a text with the keyboard; return the body of the request."""
    page.get_by_role("searchbox").fill(text)
    return wait_for_search(page, lambda: page.get_by_role("searchbox").press("Enter"))


def wait_for_search(page: Page, action: Callable[[], object]) -> dict[str, Any]:
    """Return the body of the search that an action causes, when its results are shown."""
    with page.expect_response("**/v1/search") as response:
        action()
    body = response.value.request.post_data_json
    page.wait_for_selector("#results:not([aria-busy])", state="attached")
    assert isinstance(body, dict)
    return body


def read_ids(page: Page) -> list[str]:
    """Return the ids of the documents that are shown, in order."""
    ids: list[str] = page.locator(".card-open").evaluate_all("cards => cards.map(c => c.title)")
    return ids


def read_image_width(page: Page) -> int:
    """Return the width of the first result's image in pixels; 0 until it is loaded."""
    return int(page.locator(f"{CARD} img").first.evaluate("image => image.naturalWidth"))


def image_urls(parts: list[dict[str, Any]]) -> list[str]:
    """Return the beginnings of the URLs of the images among the parts of a content."""
    return [part["image_url"]["url"][:15] for part in parts if part["type"] == "image_url"]


def stream_of(*deltas: dict[str, Any], finish: str = "stop", **fields: Any) -> str:
    """Return the events of a streamed answer; `fields` are those of its first event."""
    chunks = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks = [{"choices": [{"delta": {"role": "assistant", "content": ""}}], **fields}, *chunks]
    chunks.append({"choices": [{"delta": {}, "finish_reason": finish}]})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def answer_with(page: Page, stream: str) -> list[dict[str, Any]]:
    """Answer chats of a page with a stream; return a list that receives their bodies."""
    bodies: list[dict[str, Any]] = []

    def answer(route: Any) -> None:
        bodies.append(route.request.post_data_json)
        route.fulfill(body=stream, content_type="text/event-stream")

    page.route("**/v1/chat/completions", answer)
    return bodies


def ask(page: Page, text: str) -> None:
    """Send a message with the keyboard and wait for the end of its answer."""
    num_answers = page.locator(".answer").count()
    page.get_by_role("textbox", name="Message").fill(text)
    page.get_by_role("textbox", name="Message").press("Enter")
    page.locator(".answer:not([aria-busy])").nth(num_answers).wait_for()
