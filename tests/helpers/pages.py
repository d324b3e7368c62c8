"""What holds of every page that we write."""

from __future__ import annotations

import re
from html.parser import HTMLParser

SCRIPT = "<script>alert(1)</script>"
HOSTILE = f"</title></style>{SCRIPT}<img src=x onerror=alert(2)> \"' & \u202e \ud800 {{{{ 7*7 }}}} {{% raw %}}"


class Page(HTMLParser):
    """Tags, attributes and unclosed elements of a page."""

    VOID = ("meta", "img", "br", "col")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-5:], self.getpos())
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def parse_checked_page(text: str) -> Page:
    """The page: well-formed, all of it in the column that the style knows, without script, and it reaches out to nothing."""
    found = Page(text)
    assert found.open == []
    names = [tag for tag, _ in found.tags]
    assert not {*names} & {"script", "iframe", "object", "embed", "link", "base", "form"}
    assert names.count("main") == names.count("footer") == names.count("h1") == 1
    outside = names[names.index("body") : names.index("main")]
    assert {*outside} <= {"body", "header", "div", "i", "h1", "p", "b", "nav", "a"}
    for tag, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert value is None or value.startswith(("data:image/", "#")), (
                    tag,
                    name,
                    value[:60],
                )
    plain = re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)
    assert not re.search(r"(https?:)?//[a-z]|url\(|@import", plain)
    policy = next(
        a["content"] for t, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert re.fullmatch(
        r"default-src 'none'; (img-src data:; )?style-src 'unsafe-inline'", policy or ""
    )
    return found
