"""A server of a real model and an index, in a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.fake_embedder import write_pairs
from helpers.processes import run_process, start_process

MAX_START_SECONDS = 300
API_KEY = "slow-key"


@dataclass(frozen=True)
class LiveServer:
    """Address and contents of the server; requests need API_KEY."""

    url: str
    """Address without a path, such as ``http://127.0.0.1:8000``."""
    model: str
    """Name of the model."""
    image_url: str
    """A red image as a data: URL."""
    log: Path


def run_vlduet(*arguments: object) -> None:
    """Run a command of vlduet to its end."""
    run_process([sys.executable, "-m", "vlduet", *map(str, arguments)], check=True)


@pytest.fixture(scope="session")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """Start `vlduet serve` with the model of --slow-model and an index of four images."""
    import base64

    model = request.config.getoption("--slow-model").resolve()
    folder = tmp_path_factory.mktemp("live")
    pairs = write_pairs(folder / "source")
    run_vlduet("index", model, pairs, "--to", folder / "index")
    (folder / "keys").write_text(API_KEY + "\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vlduet", "serve", str(model), "--index", folder / "index"]
    command += ["--port", str(port), "--keys", str(folder / "keys")]
    log = folder / "serve.log"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    image = base64.b64encode((folder / "source/images/red.png").read_bytes()).decode()
    url = f"http://127.0.0.1:{port}"
    with (
        log.open("wb") as file,
        start_process(command, stdout=file, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        _wait_until_ready(url, process, log)
        yield LiveServer(url, model.name, f"data:image/png;base64,{image}", log)
        process.terminate()
        assert process.wait(30) == 0
    assert "Traceback" not in log.read_text()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Poll /readyz; fail if the process ends or MAX_START_SECONDS pass."""
    deadline = time.monotonic() + MAX_START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5) as response:
                assert json.load(response) == {"status": "ok"}
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"not ready after {MAX_START_SECONDS} s")
