"""`vlduet config`, and presets by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlduet.cli.main import app
from vlduet.config import find_config, list_presets, load_run_config
from vlduet.errors import ConfigError

RUNNER = CliRunner()


def test_list_names_every_preset_with_a_summary() -> None:
    lines = RUNNER.invoke(app, ["config", "list"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list_presets()
    summaries = json.loads(RUNNER.invoke(app, ["config", "list", "--json"]).stdout)
    assert list(summaries) == list_presets() and all(summaries.values())


def test_show_prints_the_text_of_the_preset() -> None:
    text = find_config("vladva").read_text(encoding="utf-8")
    assert RUNNER.invoke(app, ["config", "show", "vladva"]).stdout == text


@pytest.mark.parametrize("name", ["vladva", "ablations/sugar-without-gak"])
def test_copied_preset_loads_as_the_preset(name: str, tmp_path: Path) -> None:
    target = tmp_path / "new" / "mine.yaml"
    result = RUNNER.invoke(app, ["config", "copy", name, str(target)])
    assert result.exit_code == 0, result.output
    copied_config = load_run_config(target)
    # A copy is the user's own: it names no preset but the one that it extends.
    assert copied_config.preset in (None, "sugar-nano")
    assert copied_config.model_copy(update={"preset": name}) == load_run_config(name)


def test_copy_into_a_folder_keeps_the_file_name_and_replaces_nothing(tmp_path: Path) -> None:
    command = ["config", "copy", "vladva", str(tmp_path)]
    assert RUNNER.invoke(app, command).exit_code == 0
    (tmp_path / "vladva.yaml").write_text("mine")
    result = RUNNER.invoke(app, command)
    assert isinstance(result.exception, ConfigError) and "exists already" in str(result.exception)
    assert (tmp_path / "vladva.yaml").read_text() == "mine"


@pytest.mark.parametrize("command", [["config", "show"], ["train"], ["compare"]])
def test_unknown_preset_is_refused_with_the_known_ones(command: list[str]) -> None:
    result = RUNNER.invoke(app, [*command, "vlavda"])
    assert isinstance(result.exception, ConfigError)
    assert "vladva-nano" in str(result.exception)
