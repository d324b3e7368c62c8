"""Files of the web page, their paths on the server, and the headers that they are sent with."""

from __future__ import annotations

from importlib.resources import files

from vlduet.serve import page

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
PAGE_FILES = {
    "/": "index.html",
    "/page/style.css": "style.css",
    "/page/app.js": "app.js",
    "/page/api.js": "api.js",
    "/page/chat.js": "chat.js",
    "/page/details.js": "details.js",
    "/page/dom.js": "dom.js",
    "/page/filters.js": "filters.js",
    "/page/images.js": "images.js",
    "/page/search.js": "search.js",
    "/page/transcript.js": "transcript.js",
}
"""Files of the page by their paths on the server. They hold nothing of a model or an index, and
need no API key."""
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""The browser runs only scripts of these files, connects only to this server, shows the page in no
other page, and refuses scripts that write HTML."""
PAGE_HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def read_page_file(name: str) -> tuple[bytes, str]:
    """Return the content and the media type of a file of `PAGE_FILES`."""
    suffix = name[name.rindex(".") :]
    return files(page).joinpath(name).read_bytes(), MEDIA_TYPES[suffix]
