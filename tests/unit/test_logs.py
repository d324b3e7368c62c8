"""Messages on standard error, progress without a terminal, and the file of metrics."""

from __future__ import annotations

import errno
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlduet import files, logs
from vlduet.logs import MetricsLog, logger, read_metrics


@pytest.fixture
def clean_logger() -> Iterator[None]:
    """Remove the handlers and the level that a test gives to the package's logger."""
    handlers = list(logger.handlers)
    level = logger.level
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.mark.usefixtures("clean_logger")
def test_without_a_handler_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    logger.info("building")
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("clean_logger")
def test_the_handler_writes_plain_messages_to_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.install_log_handler()
    logs.install_log_handler()
    long_path = "runs/" + "x" * 200
    logger.info(f"[1/9] {long_path} \x1b[31mred\x1b[0m")
    logger.debug("a detail")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"[1/9] {long_path}  [31mred [0m\n"


@pytest.mark.usefixtures("clean_logger")
def test_messages_on_a_terminal_are_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    logs.install_log_handler()
    message = "a [b]message[/b] :smile: " + "word " * 60 + "end"
    logger.info(message)
    assert terminal.getvalue() == f"{message}\n"


@pytest.mark.usefixtures("clean_logger")
def test_a_closed_pipe_does_not_stop_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    class ClosedPipe(io.StringIO):
        num_writes = 0

        def write(self, text: str) -> int:
            self.num_writes += 1
            raise BrokenPipeError

    pipe = ClosedPipe()
    monkeypatch.setattr(sys, "stderr", pipe)
    logs.install_log_handler()
    logger.info("building")
    assert pipe.num_writes > 0


def test_control_characters_become_blanks() -> None:
    assert logs.strip_control_characters("a\x1b[2Jb\tc\n") == "a [2Jb c "
    assert logs.strip_control_characters("a\tb\nc\x07", keep="\n\t") == "a\tb\nc "
    assert logs.strip_control_characters("a\u202eb\u2066c\u2028d\u200de") == "a b c d\u200de"


def test_progress_without_a_terminal_is_logged_from_time_to_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="vlduet")
    clock = iter(range(0, 600, 6))
    monkeypatch.setattr(logs.time, "monotonic", lambda: float(next(clock)))
    with logs.ProgressBar(total=3, label="train") as bar:
        for number in range(3):
            bar.advance(note=f"loss {number}")
    lines = caplog.messages
    assert lines[0] == "train: 2/3 after 24 s loss 1"
    assert lines[-1].startswith("train: 3/3 after")


def test_short_loops_log_nothing_and_pass_their_items(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="vlduet")
    assert list(logs.track_progress(iter("abc"), label="letters")) == ["a", "b", "c"]
    assert caplog.messages == []


def test_a_resumed_run_rewrites_the_metrics_from_its_first_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in range(4):
        log.write(step, {"loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # what a killed process leaves
    log = MetricsLog(tmp_path, resume_at=2)
    log.write(2, {"loss": 9.0})
    log.close()
    steps = [(row["step"], row["loss"]) for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [(0, 0.0), (1, 1.0), (2, 9.0)]


def test_an_error_while_metrics_are_rewritten_loses_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricsLog(tmp_path)
    for step in range(4):
        log.write(step, {"loss": float(step)})
    log.close()
    content = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(files.os, "fsync", fail)
        MetricsLog(tmp_path, resume_at=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content
    MetricsLog(tmp_path, resume_at=2).close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]
    assert not list(tmp_path.glob(".metrics*"))


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (999.6, "1 KB"),
        (2_359_296, "2.36 MB"),
        (64e9, "64 GB"),
        (19.11e12, "19.1 TB"),
        (7.1234e15, "7,123 TB"),
    ],
)
def test_sizes_have_three_digits_and_a_unit(num_bytes: float, text: str) -> None:
    assert logs.format_bytes(num_bytes) == text
