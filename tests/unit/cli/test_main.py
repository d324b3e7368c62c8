"""What the command does for its own process, before any verb and where one fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import tiny
from vlduet.cli import main as cli

FAULTS = """
import resource, sys
from vlduet.cli.main import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytearray(b"x") * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of glibc")
def test_freed_memory_is_used_again_without_asking_the_kernel() -> None:
    faults = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, how], capture_output=True, check=True
            ).stdout
        )
        for how in ("keep", "let go")
    }
    pages = 10 * (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert faults["let go"] > pages // 2
    assert faults["keep"] < pages // 5


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit status of `vlduet WORDS`, run as the entry point does."""
    monkeypatch.setattr(sys, "argv", ["vlduet", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_a_path_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    records = tmp_path / "r.jsonl"
    records.write_text('{"id": "a", "parts": [{"text": "hello"}]}\n')
    assert command(monkeypatch, "analyse", "nowhere", records, "--to", tmp_path / "file") == 1
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: {tmp_path / 'file' / 'quarantine.jsonl'}: Not a directory. Check"
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_no_verb_makes_a_model_where_something_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.build_duet_model(tmp_path / "base").save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("precious")
    for words in (["merge", tmp_path / "model"], ["nano"], ["minilm"]):
        for target in (tmp_path / "photos", tmp_path / "photos" / "notes.txt", tmp_path / "model"):
            assert command(monkeypatch, "model", *words, target) == 1
            assert f"{target}: the output folder is not empty" in capsys.readouterr().err
    assert (tmp_path / "photos" / "notes.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert command(monkeypatch, "model", "merge", tmp_path / "model", tmp_path / "empty") == 0
    assert (tmp_path / "empty" / "vlduet.json").is_file()


def test_a_record_does_not_steer_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {
        "id": "a\x1b]0;mine\x07",
        "parts": [{"text": "a \x1b[2J b"}],
        "metadata": {"k": "\x1b[31m"},
    }
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    command(monkeypatch, "data", "show", tmp_path / "x.jsonl", "--index", "0")
    command(monkeypatch, "data", "check", tmp_path / "x.jsonl")
    told = capsys.readouterr()
    assert (
        "mine" in told.out
        and "\x1b" not in told.out + told.err
        and "\x07" not in told.out + told.err
    )
