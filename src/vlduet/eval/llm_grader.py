"""LLM grader behind an OpenAI-compatible address.

Nothing else in evaluation uses a network, and this only where the user names an address.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlduet.errors import ConfigError
from vlduet.eval.predictions import GradeFunction

RETRY_DELAYS = (0.0, 2.0, 10.0, 30.0)
"""Seconds before each attempt; a busy server (HTTP 429 or 5xx) is asked again."""


def open_grader(
    url: str, *, model: str | None = None, key_file: Path | None = None, timeout: float = 120.0
) -> GradeFunction:
    """Return a function that sends a prompt to the grader and returns its text.

    No request is sent before the function is called. The function raises ConfigError where the
    server refuses or does not answer as it should, after all attempts.

    Args:
        url: address without ``/chat/completions``, such as ``http://localhost:8000/v1``.
        model: name of the grader; None is the benchmark's official one.
        key_file: file with the API key, if the server needs one; the key is never stored.
        timeout: seconds of one request.

    Raises:
        ConfigError: the address has no ``http://`` or ``https://``, or the key file cannot be read.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"'{url}'", place="judge.url", fix="Write http://... or https://...")
    headers = {"Content-Type": "application/json"}
    if key_file is not None:
        try:
            key = key_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(
                f"cannot be read ({error.strerror})",
                place="judge.key_file",
                fix="Name a file that holds the key",
            ) from None
        headers["Authorization"] = f"Bearer {key}"

    def grade(official: Mapping[str, Any], prompt: str, temperature: float) -> str:
        """Send one prompt, after the official system message if any, and return the answer.

        Args:
            official: the benchmark's ``max_tokens``, ``model`` (used unless `open_grader` got one)
                and, optionally, ``system``.

        Raises:
            ConfigError: the server refuses, or all attempts fail.
        """
        messages = [{"role": "user", "content": prompt}]
        if official.get("system"):
            messages = [{"role": "system", "content": official["system"]}, *messages]
        body = {
            "model": model or official["model"],
            "messages": messages,
            "max_tokens": official["max_tokens"],
            "temperature": temperature,
        }
        address = f"{url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        return _send_request(request, timeout=timeout)

    return grade


def _send_request(request: urllib.request.Request, *, timeout: float) -> str:
    """Send a chat completion request and return the text of the first choice of the answer.

    A failed attempt (no connection, HTTP 429 or 5xx, an answer of another form) is repeated after
    the next of `RETRY_DELAYS`, for which the function sleeps.

    Raises:
        ConfigError: all attempts failed, or one failed with another HTTP error.
    """
    problem = ""
    for delay in RETRY_DELAYS:
        time.sleep(delay)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return str(json.loads(response.read())["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {error.reason}"
            if error.code != 429 and error.code < 500:
                break
        except (OSError, ValueError, KeyError, IndexError) as error:
            problem = str(error) or type(error).__name__
    raise ConfigError(
        f"the judge does not answer ({problem})",
        place=request.full_url,
        fix="Check judge.url, judge.model and judge.key_file; the reviews so far are stored",
    )
