"""The process of the command line: memory, errors, streams, and imports."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from pathlib import Path

import pytest

from helpers import tiny
from helpers.processes import run_process
from vlduet.cli import main as main_module

COUNT_PAGE_FAULTS = """
import resource, sys
from vlduet.cli.main import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytearray(b"x") * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_page_faults(mode: str) -> int:
    command = [sys.executable, "-c", COUNT_PAGE_FAULTS, mode]
    return int(run_process(command, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of glibc")
def test_freed_memory_is_reused_without_page_faults() -> None:
    pages = 10 * (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert count_page_faults("default") > pages // 2
    assert count_page_faults("keep") < pages // 5


def run_main(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run `vlduet WORDS` as the entry point does and return the exit status."""
    monkeypatch.setattr(sys, "argv", ["vlduet", *map(str, words)])
    with pytest.raises(SystemExit) as exit_info:
        main_module.main()
    return int(exit_info.value.code or 0)


@pytest.mark.parametrize("command", [[], ["train"], ["index"], ["serve"], ["data", "show"]])
def test_help_imports_no_heavy_dependency(command: list[str]) -> None:
    script = f"""
import sys
import threading
from vlduet.cli.main import main
sys.argv = ["vlduet", *{command}, "--help"]
try:
    main()
except SystemExit as exit:
    assert exit.code in (0, None)
heavy = ("torch", "transformers", "numpy", "lancedb", "PIL", "starlette")
print("imported:", *(name for name in heavy if name in sys.modules))
"""
    command_line = [sys.executable, "-c", script]
    process = run_process(command_line)
    assert process.returncode == 0, process.stderr
    assert "Usage:" in process.stdout
    assert process.stdout.splitlines()[-1] == "imported:"


def test_unwritable_path_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    records = tmp_path / "r.jsonl"
    records.write_text('{"id": "a", "parts": [{"text": "hello"}]}\n')
    path = tmp_path / "file" / "new"
    assert run_main(monkeypatch, "analyse", "nowhere", records, "--to", path) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {path}: Not a directory. Check")
    assert (tmp_path / "file").read_text() == "mine"


def test_control_characters_of_an_error_do_not_reach_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "config", "show", "bell\x07and\x9bcolour") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "bell and colour" in error


def test_commands_that_write_a_model_never_replace_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.build_duet_model(tmp_path / "base").save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("precious")
    for command in (["merge", tmp_path / "model"], ["nano"], ["minilm"]):
        for target in (tmp_path / "photos", tmp_path / "photos" / "notes.txt", tmp_path / "model"):
            assert run_main(monkeypatch, "model", *command, target) == 1
            assert f"{target}: the output folder is not empty" in capsys.readouterr().err
    assert (tmp_path / "photos" / "notes.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert run_main(monkeypatch, "model", "merge", tmp_path / "model", tmp_path / "empty") == 0
    assert (tmp_path / "empty" / "vlduet.json").is_file()


def test_control_characters_of_a_record_do_not_reach_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"id": "a\x1b]0;mine\x07", "parts": [{"text": "a \x1b[2J b"}]}
    row["metadata"] = {"k": "\x1b[31m"}
    file = tmp_path / "x.jsonl"
    file.write_text(2 * (json.dumps(row) + "\n"))
    run_main(monkeypatch, "data", "show", file, "--index", "0")
    run_main(monkeypatch, "data", "check", file)
    output = capsys.readouterr()
    assert "mine" in output.out
    assert "\x1b" not in output.out + output.err and "\x07" not in output.out + output.err


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on device"),
        (RuntimeError("file write failed: os error 28"), "file write failed: os error 28"),
        (KeyError("mistake"), None),
    ],
)
def test_a_full_disk_in_a_thread_is_logged_in_one_line(
    error: Exception,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(threading, "excepthook", main_module.log_thread_error)
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join(60)
    is_traced = "Traceback" in capsys.readouterr().err
    if reason is None:
        assert is_traced and not caplog.messages
    else:
        message = f"warning: a thread has ended: no space left on the disk ({reason})"
        assert not is_traced and caplog.messages == [message]
