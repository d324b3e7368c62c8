"""A small web application for illustrated stories, on the HTTP API of `vlduet serve`.

    vlduet serve MODEL --index INDEX
    python examples/story.py

Then open http://127.0.0.1:8080 in a browser. docs/tutorial-story.md explains it part by part.
"""

import html
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SERVER = "http://127.0.0.1:8000"
RETRIEVAL = {"mode": "interleave", "max_images": 6}
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Illustrated stories</title>
<meta name="viewport" content="width=device-width"><style>
body { max-width: 40em; margin: 2em auto; padding: 0 1em; font: 18px/1.6 sans-serif }
p, figure { margin: 1em 0; padding: .6em 1em; border-radius: 10px; background: #e2ecfd }
p { white-space: pre-line } p:empty { display: none } figure { background: #fde3ec }
img { display: block; max-width: 100%; margin: auto } figcaption { text-align: center }
input, button { font: inherit; padding: .3em .6em } input { width: 70% }
</style><form><input name="about" placeholder="a day at the beach" required> <button>Write</button>
</form>"""
POLICY = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; form-action 'self'"


def request_story(about: str) -> Iterator[dict[str, Any]]:
    """Yield the deltas of a story while the model writes it and retrieves images for it."""
    body = {
        "messages": [{"role": "user", "content": f"Tell a story about {about}."}],
        "retrieval": RETRIEVAL,
        "max_tokens": 200,
        "stream": True,
    }
    url, headers = f"{SERVER}/v1/chat/completions", {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise OSError(event["error"]["message"])
                yield from (choice["delta"] for choice in event["choices"])


def format_delta(delta: dict[str, Any]) -> str:
    """Return a delta as HTML: text as it is, an image as a figure between two paragraphs."""
    page = html.escape(delta.get("content", ""))
    for part in delta.get("parts", ()):
        url, caption = html.escape(part["image_url"]["url"]), html.escape(part["hit"]["text"])
        figure = f'<figure><img src="{url}" alt=""><figcaption>{caption}</figcaption></figure>'
        page += f"</p>{figure}<p>"
    return page


class StoryHandler(BaseHTTPRequestHandler):
    """Serves the form and the story at /, and images of the index at /v1/images/."""

    def do_GET(self) -> None:
        """Answer a request of the browser."""
        if self.path.startswith("/v1/images/"):
            return self.send_image()
        self.send_headers("text/html")
        self.wfile.write(f"{PAGE}<article><p>".encode())
        about = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query).get("about")
        try:
            for delta in request_story(about[0]) if about else ():
                self.wfile.write(format_delta(delta).encode())
        except urllib.error.HTTPError as error:
            self.wfile.write(html.escape(json.load(error)["error"]["message"]).encode())
        except OSError as error:
            self.wfile.write(html.escape(str(error)).encode())

    def send_image(self) -> None:
        """Send an image of the model's server, or the status with which that refuses it."""
        try:
            with urllib.request.urlopen(SERVER + self.path) as image:
                self.send_headers(image.headers["Content-Type"])
                self.wfile.write(image.read())
        except urllib.error.HTTPError as error:
            self.send_error(error.code)

    def send_headers(self, media_type: str) -> None:
        """Send the status and the headers of a response."""
        self.send_response(200)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", 8080), StoryHandler).serve_forever()
