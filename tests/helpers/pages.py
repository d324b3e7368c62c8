"""Properties that every HTML page of ours must have."""

from __future__ import annotations

import re
from html.parser import HTMLParser

SCRIPT = "<script>alert(1)</script>"
HOSTILE = (
    f"</title></style>{SCRIPT}<img src=x onerror=alert(2)> "
    "\"' & \u202e \ud800 {{ 7*7 }} {% raw %}"
)
"""Text that breaks a page which does not escape it: markup, quotes, template code, bad Unicode."""

FORBIDDEN_TAGS = {"script", "iframe", "object", "embed", "link", "base", "form"}
HEADER_TAGS = {"body", "header", "div", "i", "h1", "p", "b", "nav", "a"}
"""Tags that may precede the main column."""
ADDRESS_ATTRIBUTES = {"src", "href", "xlink:href", "srcset", "action", "data"}


class Page(HTMLParser):
    """Parsed page; closing a tag that is not the last open one fails an assertion.

    Attributes:
        tags: (name, attributes) of every element, in order.
        open: names of the elements that are not closed.
        text: text of all elements.
    """

    VOID_TAGS = ("meta", "img", "br", "col")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-5:], self.getpos())
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def parse_checked_page(text: str) -> Page:
    """Parse a page, after checking that it is well-formed, safe and self-contained.

    It has one main column, one footer and one heading, no script, and no address but embedded
    images and anchors of its own.
    """
    page = Page(text)
    assert page.open == []
    names = [tag for tag, _ in page.tags]
    assert not FORBIDDEN_TAGS.intersection(names)
    assert names.count("main") == names.count("footer") == names.count("h1") == 1
    assert set(names[names.index("body") : names.index("main")]) <= HEADER_TAGS
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ADDRESS_ATTRIBUTES and value is not None:
                assert value.startswith(("data:image/", "#")), (tag, name, value[:60])
    without_images = re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)
    assert not re.search(r"(https?:)?//[a-z]|url\(|@import", without_images)
    policies = [
        attributes["content"]
        for _, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    expected = r"default-src 'none'; (img-src data:; )?style-src 'unsafe-inline'"
    assert re.fullmatch(expected, policies[0] or "")
    return page
