"""Requests that schemathesis derives from the OpenAPI document find no mistake of the server.

One check is left out, `positive_data_acceptance`: that every request which fits the document is
accepted. A document cannot express that a text has few enough tokens, that an image decodes, that
the last message is the user's, or which keys a filter may use: these requests get status 400.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from helpers.processes import run_process
from slow.conftest import API_KEY, LiveServer

MAX_EXAMPLES = 60
"""Requests of each phase of each endpoint."""


def test_schemathesis_has_no_findings(server: LiveServer, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).parent / "schemathesis"),
        "run",
        f"{server.url}/openapi.json",
        f"--header=Authorization: Bearer {API_KEY}",
        f"--max-examples={MAX_EXAMPLES}",
        "--checks=all",
        "--exclude-checks=positive_data_acceptance",
        "--seed=27",
        "--request-timeout=60",
        "--continue-on-failure",
        "--no-color",
    ]
    process = run_process(command, cwd=tmp_path, timeout=1500)
    report = process.stdout[-20000:]
    assert process.returncode == 0, report
    assert re.search(r"(\d+) generated, \1 passed", report), report
