"""A judge behind an OpenAI-compatible address: the only thing in evaluation that uses a network, and only when named."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlduet.errors import ConfigError

RETRY_DELAYS = (0.0, 2.0, 10.0, 30.0)
"""Seconds before each attempt; a busy judge (429, 5xx) is asked again."""


def open_grader(
    url: str, *, model: str | None = None, key_file: Path | None = None, timeout: float = 120.0
) -> Callable[[Mapping[str, Any], str, float], str]:
    """A function (the benchmark's judge, prompt, temperature) -> text.

    Args:
        url: up to and without ``/chat/completions``, as ``http://localhost:8000/v1``.
        model: default is the benchmark's official judge.
        key_file: holds the key, if the address wants one; it is never stored.
        timeout: seconds of one request.

    Raises:
        ConfigError: of the function: the address does not answer as it should.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"'{url}'", place="judge.url", fix="Write http://... or https://...")
    headers = {"Content-Type": "application/json"}
    if key_file is not None:
        try:
            headers["Authorization"] = f"Bearer {key_file.read_text(encoding='utf-8').strip()}"
        except OSError as error:
            what = f"cannot be read ({error.strerror})"
            raise ConfigError(
                what, place="judge.key_file", fix="Name a file that holds the key"
            ) from None

    def ask(official: Mapping[str, Any], prompt: str, temperature: float) -> str:
        told = [{"role": "system", "content": official["system"]}] if official.get("system") else []
        body = {
            "model": model or official["model"],
            "messages": [*told, {"role": "user", "content": prompt}],
            "max_tokens": official["max_tokens"],
            "temperature": temperature,
        }
        address = f"{url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        return _answered(request, timeout=timeout)

    return ask


def _answered(request: urllib.request.Request, *, timeout: float) -> str:
    said = ""
    for wait in RETRY_DELAYS:
        time.sleep(wait)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return str(json.loads(response.read())["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            said = f"{error.code} {error.reason}"
            if error.code != 429 and error.code < 500:
                break
        except (OSError, ValueError, KeyError, IndexError) as error:
            said = str(error) or type(error).__name__
    fix = "Check judge.url, judge.model and judge.key_file; what was judged so far is kept"
    raise ConfigError(f"the judge does not answer ({said})", place=request.full_url, fix=fix)
