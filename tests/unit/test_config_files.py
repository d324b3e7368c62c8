"""Config files of strangers: aliases, depth and values that the YAML parser gives up on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vlduet import config, config_files
from vlduet.errors import ConfigError


def write_bomb(path: Path, *, levels: int, key: str = "seed") -> Path:
    """Write a config whose value of `key` unfolds to about 10^(levels + 1) values."""
    lists = ["  - &a0 [" + ", ".join("x" * 10) + "]"]
    for level in range(1, levels + 1):
        lists.append(f"  - &a{level} [" + ", ".join([f"*a{level - 1}"] * 10) + "]")
    path.write_text(f"{key}:\n" + "\n".join(lists) + "\n")
    return path


@pytest.mark.parametrize("levels", [5, 8, 30])
def test_aliases_that_unfold_to_many_values_are_refused_by_key(tmp_path: Path, levels: int) -> None:
    path = write_bomb(tmp_path / "c.yaml", levels=levels)
    with pytest.raises(ConfigError, match="unfolds to more than") as caught:
        config.load_run_config(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 300 + len(str(path))


def test_a_list_where_a_number_should_stand_is_shortened(tmp_path: Path) -> None:
    path = write_bomb(tmp_path / "c.yaml", levels=2)
    path.write_text(path.read_text() + "out: x\n")
    with pytest.raises(ConfigError, match="seed = ") as caught:
        config.load_run_config(path)
    assert len(str(caught.value)) < 300 + len(str(path))


def test_merged_keys_are_bounded(tmp_path: Path) -> None:
    lines = ["a0: &a0 {" + ", ".join(f"k{i}: 1" for i in range(10)) + "}"]
    for level in range(1, 9):
        lines.append(f"a{level}: &a{level} {{<<: [" + ", ".join([f"*a{level - 1}"] * 10) + "]}")
    path = tmp_path / "c.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="keys are merged"):
        config_files.read_yaml_mapping(path)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "a: 2026-02-30",
        "a: 2026-01-01T25:00:00",
        "a: " + "9" * 5000,
        "a: " + "[" * 400,
    ],
)
def test_values_that_a_parser_gives_up_on_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        config_files.read_yaml_mapping(path)
    with pytest.raises(ConfigError, match="out"):
        config_files.parse_overrides([text.replace("a: ", "out=")], place="out")
