"""The file of API keys."""

from __future__ import annotations

import pytest

from vlduet.errors import ConfigError
from vlduet.serve.auth import read_api_keys


def test_keys_are_read_without_comments_and_blank_lines(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\n\n  one \ntwo-2\n")
    assert read_api_keys(path) == ["one", "two-2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no keys"),
        ("# none\n", "no keys"),
        ("one\nt wo\n", "keys:2: not a key"),
        ("é", "keys:1: not a key"),
    ],
)
def test_file_without_usable_keys_is_refused(tmp_path, text, message):
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_api_keys(path)


def test_missing_file_of_keys_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_api_keys(tmp_path / "missing")
