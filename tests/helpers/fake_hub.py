"""A model hub on this machine: an HTTP server with the routes that huggingface_hub asks for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

INFO_ROUTE = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/revision/([^?]+)")
TREE_ROUTE = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^?/]+)")
FILE_ROUTE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)")


@dataclass
class Repository:
    """Repository of the hub with one commit."""

    files: dict[str, bytes]
    """Content by path."""
    is_gated: bool = False
    """Whether nobody has access to its files."""

    @property
    def commit(self) -> str:
        """Forty hexadecimal digits that depend on the files."""
        content = repr(sorted(self.files.items())).encode()
        return hashlib.sha1(content).hexdigest()


@dataclass
class FakeHub:
    """State of the server, which tests read and modify."""

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    """Repository by kind (`models` or `datasets`) and name."""
    requests: list[str] = field(default_factory=list)
    """Method and path of every request, in their order."""
    authorizations: set[str] = field(default_factory=set)
    """Values of the header Authorization."""
    cut_file: str = ""
    """Name of a file of which only the first half is sent."""
    url: str = ""
    """Address of the server."""

    def add(self, name: str, folder: Path, *, kind: str = "models") -> Repository:
        """Add a repository with the files of a folder and its subfolders, and return it."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        self.repositories[kind, name] = Repository(files)
        return self.repositories[kind, name]

    def fetched_files(self) -> set[str]:
        """Return the paths within their repositories of the files whose content was asked for."""
        matches = [FILE_ROUTE.match(line.removeprefix("GET ")) for line in self.requests]
        return {match[4] for match in matches if match}


class HubHandler(BaseHTTPRequestHandler):
    """Handler of the requests; `hub` is set on a subclass."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer with JSON about a repository, or with the content of a file."""
        self.answer()

    def do_HEAD(self) -> None:
        """Answer with the headers alone."""
        self.answer()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def answer(self) -> None:
        """Answer a request of any route, or with status 404."""
        self.hub.requests.append(f"{self.command} {self.path}")
        self.hub.authorizations.add(self.headers.get("Authorization", ""))
        if match := INFO_ROUTE.match(self.path):
            self.answer_about(match[1], match[2], match[3])
        elif match := TREE_ROUTE.match(self.path):
            self.answer_tree(match[1], match[2])
        elif match := FILE_ROUTE.match(self.path):
            self.answer_file("datasets" if match[1] else "models", match[2], match[4])
        else:
            self.send(404, b"")

    def find_repository(self, kind: str, name: str) -> Repository | None:
        """Return a repository, or answer as the hub does for a missing one and return None."""
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            # The hub does not say whether a private repository exists.
            self.send(401, b"", {"X-Error-Code": "RepoNotFound"})
        return repository

    def answer_about(self, kind: str, name: str, revision: str) -> None:
        """Answer with the commit of a revision."""
        repository = self.find_repository(kind, name)
        if repository is None:
            return
        if revision not in ("main", "v1", repository.commit):
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": path} for path in repository.files]
        facts = {"id": name, "sha": repository.commit, "siblings": siblings, "tags": []}
        self.send(200, json.dumps(facts).encode())

    def answer_tree(self, kind: str, name: str) -> None:
        """Answer with the files of a repository."""
        repository = self.find_repository(kind, name)
        if repository is None:
            return
        rows = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in repository.files.items()
        ]
        self.send(200, json.dumps(rows).encode())

    def answer_file(self, kind: str, name: str, path: str) -> None:
        """Answer with the content of a file, or with a half of it and a closed connection."""
        repository = self.find_repository(kind, name)
        if repository is None:
            return
        if repository.is_gated:
            self.send(403, b"", {"X-Error-Code": "GatedRepo"})
            return
        data = repository.files[path]
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": repository.commit,
        }
        begin = 0
        if match := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            begin = int(match[1])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        is_cut = path == self.hub.cut_file and self.command == "GET"
        self.send(206 if begin else 200, data[begin:], headers, is_cut=is_cut)

    def send(
        self,
        status: int,
        data: bytes,
        headers: dict[str, str] | None = None,
        *,
        is_cut: bool = False,
    ) -> None:
        """Send an answer; one that is cut ends after half of its data."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if is_cut else data)
        self.close_connection = self.close_connection or is_cut


@contextmanager
def run_fake_hub(cache: Path) -> Iterator[FakeHub]:
    """Serve an empty hub, and let huggingface_hub use it with a cache of its own, in the block."""
    hub = FakeHub()
    handler = type("Handler", (HubHandler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", hub.url)
            template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            patch.setattr(constants, "HF_HUB_CACHE", str(cache))
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            huggingface_hub.close_session()
            yield hub
    finally:
        huggingface_hub.close_session()
        server.shutdown()
        server.server_close()
        thread.join()
