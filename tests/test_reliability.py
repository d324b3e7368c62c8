"""The table of kills in the documentation, and the processes of `experiments/kills`."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
EXPERIMENT = ROOT / "experiments/kills"

needs_linux = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


def import_script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a module of the experiment, which finds its siblings."""
    monkeypatch.syspath_prepend(str(EXPERIMENT))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__(name)


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> Any:
    return import_script("forks", monkeypatch)


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # which the script changes
    return import_script("kills", monkeypatch)


# --------------------------------------------------------------------- results


@pytest.fixture
def results() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((EXPERIMENT / "kills.json").read_text())
    return content


def test_the_documented_table_is_that_of_the_results(kills: Any, results: dict[str, Any]) -> None:
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    _, _, rest = text.partition(kills.BEGIN)
    table, _, _ = rest.partition(kills.END)
    assert table == kills.format_table(results)


def test_no_command_failed_in_twenty_kills_and_six_errors(results: dict[str, Any]) -> None:
    assert results["failures"] == []
    for name, row in results["commands"].items():
        trials = row["trials"]
        assert trials["time"] + trials["call"] >= 20, name
        assert trials["error"] + trials["size"] >= 6, name
        assert row["failures"] == 0, name


def test_every_command_of_the_experiment_has_results(
    monkeypatch: pytest.MonkeyPatch, results: dict[str, Any]
) -> None:
    commands = import_script("commands", monkeypatch)
    assert {command.name for command in commands.COMMANDS} == set(results["commands"])


def test_the_tests_read_as_many_corrupt_files_as_documented() -> None:
    tree = ast.parse((ROOT / "tests/unit/test_structured_files.py").read_text(encoding="utf-8"))
    sizes = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):
            sizes[ast.unparse(node.target)] = len(node.value.keys)
    num_corruptions = sizes["CONTENTS"] + 2  # a folder, a pipe
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    match = re.search(r"same ten corruptions .* at least (\d+) readers .*: (\d+) files", text, re.S)
    assert match is not None and num_corruptions == 10
    assert int(match[1]) <= sizes["READERS"], "readers may be added"
    assert int(match[2]) == 10 * int(match[1])


# --------------------------------------------------------------------- report


def make_trial(command: str, kind: str, failure: str | None = None) -> dict[str, Any]:
    return {"command": command, "kind": kind, "before": ["old"], "failure": failure}


def test_trials_are_counted_by_command_and_kind(kills: Any) -> None:
    trials = [
        make_trial("encode", "time"),
        make_trial("encode", "time", "wrong"),
        make_trial("encode", "size"),
        make_trial("index", "call"),
    ]
    summary = kills.summarize(trials)
    assert summary["failures"] == [trials[1]]
    lines = kills.format_table(summary).splitlines()
    assert lines[2:] == [
        "| `encode` | 2 | 0 | 0 | 1 | 3 old | 1 |",
        "| `index` | 0 | 1 | 0 | 0 | 1 old | 0 |",
        "| **all** | **2** | **1** | **0** | **1** | | **1** |",
    ]


def test_differences_are_named_and_times_are_none(kills: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"seconds": 1, "a": [{"created": "now", "b": 2}]}')
    content = kills.read_content(path)
    assert content == {"a": [{"b": 2}]}
    assert kills.describe_differences({"a": 1, "b": 2}, {"a": 1, "b": 2}) == ""
    differences = kills.describe_differences({"a": 1, "b": 2, "d": 0}, {"a": 2, "c": 3, "d": 0})
    assert differences == "a differs, b is missing, c is left over"


# --------------------------------------------------------------------- processes


def write_in_parts() -> None:
    """Write two files, the second one through a rename."""
    Path("first").write_bytes(b"1" * 1000)
    Path(".second").write_bytes(b"2" * 3000)
    Path(".second").rename("second")
    print("ready")


@needs_linux
def test_output_status_and_exceptions_are_returned(forks: Any, tmp_path: Path) -> None:
    outcome = forks.run_forked(write_in_parts, folder=tmp_path)
    assert (outcome.status, outcome.output, outcome.find_fault()) == (0, "ready\n", None)

    def fail() -> None:
        raise ValueError("mistake")

    outcome = forks.run_forked(fail, folder=tmp_path)
    assert outcome.status == 70 and "a traceback" in outcome.find_fault()

    def refuse() -> None:
        print("error: no room", file=sys.stderr)
        sys.exit(1)

    assert forks.run_forked(refuse, folder=tmp_path).find_fault() is None
    silent = forks.run_forked(lambda: sys.exit(1), folder=tmp_path)
    assert silent.find_fault() == "exit status 1: nothing on stderr"


@needs_linux
def test_a_process_is_killed_at_its_time_or_when_it_hangs(
    forks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = forks.Interruption(seconds=0.1)
    outcome = forks.run_forked(lambda: time.sleep(60), folder=tmp_path, interruption=moment)
    assert outcome.is_killed and outcome.seconds < 30
    monkeypatch.setattr(forks, "TIMEOUT", 0.1)
    hung = forks.run_forked(lambda: time.sleep(60), folder=tmp_path)
    assert not hung.is_killed and hung.find_fault() == "no end after 0 s"


@needs_linux
def test_a_limit_of_file_sizes_fails_a_write(forks: Any, tmp_path: Path) -> None:
    moment = forks.Interruption(max_file_bytes=2000)
    outcome = forks.run_forked(write_in_parts, folder=tmp_path, interruption=moment)
    assert outcome.status == 70 and "File too large" in outcome.errors
    assert (tmp_path / "first").stat().st_size == 1000 and not (tmp_path / "second").exists()


@needs_linux
@needs_strace
def test_a_process_is_killed_before_a_call_or_the_call_fails(forks: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    folder = tmp_path / "folder"
    folder.mkdir()
    try:
        assert forks.run_forked(write_in_parts, folder=folder, trace=trace).status == 0
    except RuntimeError as error:
        pytest.skip(f"processes may not be traced here: {error}")
    calls = forks.read_trace(trace, folder)
    assert [call.name for call in calls] == ["write", "write", "rename"]
    for path in folder.iterdir():
        path.unlink()
    rename = forks.Interruption(killed_call=calls[2])
    assert forks.run_forked(write_in_parts, folder=folder, interruption=rename).is_killed
    assert sorted(path.name for path in folder.iterdir()) == [".second", "first"]
    write = forks.Interruption(failed_call=calls[1])
    outcome = forks.run_forked(write_in_parts, folder=folder, interruption=write)
    assert outcome.status == 70 and "No space left on device" in outcome.errors


def test_calls_are_chosen_in_turn_of_every_name(forks: Any) -> None:
    calls = [forks.SystemCall("write", number) for number in range(1, 50)]
    calls.append(forks.SystemCall("rename", 1))
    chosen = forks.choose_calls(calls, 10, random.Random(0))
    assert len(set(chosen)) == 10 and calls[-1] in chosen
    few = forks.choose_calls(calls[-1:], 3, random.Random(0))
    assert few == [calls[-1]] * 3
