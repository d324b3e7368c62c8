"""Start programs that cannot outlive a test or make it wait for ever."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MAX_SECONDS = 240
"""Longest time that a program may take; well below `faulthandler_timeout` in pyproject.toml."""


@contextmanager
def start_process(command: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a program in a session of its own; kill it and its descendants after the block.

    `options` are those of `subprocess.Popen`.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=MAX_SECONDS)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def run_process(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = False,
    timeout: float = MAX_SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, and return its status and output as text.

    Raises:
        TimeoutExpired: it takes longer than `timeout` seconds; it and its descendants are killed.
        CalledProcessError: `check` is set and its status is not 0; its errors are printed.
    """
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with start_process(command, env=env, cwd=cwd, **pipes) as process:
        stdout, stderr = process.communicate(timeout=timeout)
    result = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    if check and process.returncode != 0:
        print(stderr)
        result.check_returncode()
    return result
