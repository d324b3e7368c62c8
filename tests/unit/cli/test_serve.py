"""`vlduet serve` as a process."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys

from helpers import tiny
from helpers.processes import run_process, start_process


def test_command_serves_with_keys_and_ends_on_interrupt(tmp_path):
    tiny.build_duet_model(tmp_path / "base").save_pretrained(tmp_path / "small")
    (tmp_path / "keys").write_text("mine\n")
    command = [sys.executable, "-W", "ignore", "-m", "vlduet.cli.main", "serve", tmp_path / "small"]
    command += ["--keys", tmp_path / "keys", "--port", "0"]
    with start_process(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if "answers and embeds at" in line)
            port = int(line.partition("127.0.0.1:")[2].partition("/")[0])
            second_command = [*command[:-1], str(port)]
            second = run_process(second_command)
            assert second.returncode == 1
            assert "Address already in use. Choose another --port" in second.stderr
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            for key, status in (("theirs", 401), ("mine", 200)):
                connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
                response = connection.getresponse()
                body = json.loads(response.read())
                assert response.status == status
            assert body["data"][0]["id"] == "small"
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)
        assert "Traceback" not in process.stderr.read()


def test_missing_extra_is_named_with_the_command_that_installs_it():
    code = "import sys; sys.modules['starlette'] = None; sys.argv = ['vlduet', 'serve', 'x']; "
    code += "from vlduet.cli.main import main; main()"
    command = [sys.executable, "-c", code]
    process = run_process(command)
    assert process.returncode == 1 and "pip install 'vlduet[serve]'" in process.stderr
