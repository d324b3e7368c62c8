"""`vlduet serve` as a process."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import tiny
from helpers.processes import run_process, start_process
from helpers.serving import becomes_true
from vlduet.cli.serve import serve
from vlduet.errors import ConfigError, VLDuetError


def request(port, path, **headers):
    """Return the status and the JSON body of the response to a GET request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_command_serves_with_keys_and_ends_on_interrupt(tmp_path):
    tiny.build_duet_model(tmp_path / "base").save_pretrained(tmp_path / "small")
    (tmp_path / "keys").write_text("mine\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "vlduet.cli.main", "serve", tmp_path / "small"]
    command += ["--keys", tmp_path / "keys", "--allow-host", "photos.example.org"]
    command += ["--port", str(port), "--open"]
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    environment = os.environ | {"BROWSER": f"{browser} %s"}
    with start_process(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            while not is_listening(port):
                assert process.poll() is None
            # Importing torch alone takes longer than the way from the socket to this request.
            status, body = request(port, "/readyz")
            assert status == 503 and "loads its model" in body["error"]["message"]
            assert request(port, "/livez")[0] == 200
            assert process.stderr is not None
            next(line for line in process.stderr if "answers and embeds at" in line)
            assert request(port, "/readyz")[0] == 200
            page = f"http://127.0.0.1:{port}/\n"
            assert becomes_true(lambda: opened.exists() and opened.read_text() == page)
            second = run_process(command)
            assert second.returncode == 1
            assert "Address already in use. Choose another --port" in second.stderr
            for key, status in (("theirs", 401), ("mine", 200)):
                for host in ("localhost", "photos.example.org"):
                    headers = {"Authorization": f"Bearer {key}", "Host": host}
                    assert request(port, "/v1/models", **headers)[0] == status
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()


def is_listening(port):
    """Return whether a connection to a local port is accepted."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionRefusedError:
        time.sleep(0.05)
        return False
    return True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allow_host": ["https://a.b"]}, "--allow-host: 'https://a.b' is not the name of a host"),
        ({"cors_origin": ["a.b"]}, "--cors-origin: 'a.b' is not the origin of a web page"),
        ({"allow_image_host": ["a/b"]}, "--allow-image-host: 'a/b' is not the name of a host"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_read(options, message):
    with pytest.raises(ConfigError, match=message):
        serve(Path("no-such-model"), port=0, **options)


@pytest.mark.parametrize(("host", "is_warned"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_server_that_anyone_can_reach_without_a_key_gives_a_warning(caplog, host, is_warned):
    """A list of names keeps web pages away, but not other machines."""
    with pytest.raises(VLDuetError):
        serve(Path("no-such-model"), host=host, port=0, allow_host=["photos.example.org"])
    assert any("everyone who reaches" in text for text in caplog.messages) == is_warned


def test_missing_extra_is_named_with_the_command_that_installs_it():
    code = "import sys; sys.modules['starlette'] = None; sys.argv = ['vlduet', 'serve', 'x']; "
    code += "from vlduet.cli.main import main; main()"
    command = [sys.executable, "-c", code]
    process = run_process(command)
    assert process.returncode == 1 and "pip install 'vlduet[serve]'" in process.stderr
