"""Exceptions of libraries become one line that names the file and the remedy."""

from __future__ import annotations

import errno
import io
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from vlduet.cli import main
from vlduet.cli._common import print_text
from vlduet.errors import ConfigError, ModelError
from vlduet.files import replace_folder_atomically, write_atomically
from vlduet.library_errors import (
    READ_ERRORS,
    describe_library_error,
    name_full_disk,
    translate_library_errors,
)
from vlduet.model.pooling import EmbeddingHead

DISK_ERRORS = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EFBIG, "File too large"),
    OSError("1280 requested and 0 written"),  # numpy's tofile
    RuntimeError("basic_ios::clear: iostream error"),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 1 vs 2"),
    SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
]
LANCE_PLACE = "/root/.cargo/registry/src/index.crates.io-19/lance-13.0.0/src/io.rs:2:9"
MEMORY_ERRORS = [
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
    RuntimeError("CUDA out of memory. Tried to allocate 20 MiB"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", DISK_ERRORS, ids=repr)
def test_a_full_disk_names_the_output(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(OSError) as caught, name_full_disk(tmp_path / "out"):
        raise error
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "out")


def test_other_exceptions_of_writing_propagate(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), name_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(RuntimeError, match="shape"), name_full_disk(tmp_path):
        raise RuntimeError("shape")


def test_a_full_disk_leaves_file_and_folder_as_they_were(tmp_path: Path) -> None:
    def write(file: object) -> None:
        raise RuntimeError("iostream error")

    with pytest.raises(OSError, match=r"x\.bin"):
        write_atomically(tmp_path / "x.bin", write)
    with (
        pytest.raises(OSError, match="folder"),
        replace_folder_atomically(tmp_path / "folder", marker="m"),
    ):
        raise SafetensorError("No space left on device (os error 28)")
    assert not (tmp_path / "x.bin").exists() and not (tmp_path / "folder").exists()


@pytest.mark.parametrize("error_class", READ_ERRORS)
def test_every_read_error_names_its_place(error_class: type[Exception]) -> None:
    with (
        pytest.raises(ModelError, match=r"^there: broken file") as caught,
        translate_library_errors("there"),
    ):
        raise error_class("cut\nsecond line") if error_class is not MemoryError else OSError("cut")
    assert "second" not in str(caught.value) and "again" in str(caught.value)


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=repr)
def test_a_lack_of_memory_is_no_broken_file(error: Exception) -> None:
    with pytest.raises(ModelError, match="too little memory"), translate_library_errors("there"):
        raise error


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (f"lance error: IO: No space left on device (os error 28), {LANCE_PLACE}", "no space left"),
        ("database or disk is full", "no space left on the disk (disk is full)"),
        (
            f"lance error: Invalid user input: cut, {LANCE_PLACE}",
            "a broken index (lance error: Invalid user input: cut)",
        ),
    ],
)
def test_the_place_in_the_source_of_a_library_is_left_out(message: str, words: str) -> None:
    described = describe_library_error(RuntimeError(message))
    assert described is not None and described[0].startswith(words)
    assert "/root" not in described[0] and "os error" not in described[0]


def test_a_message_of_any_length_is_shortened_at_once() -> None:
    message, _ = describe_library_error(zipfile.BadZipFile("a" * 500_000)) or ("", "")
    assert message.startswith("a broken or truncated file (aaa") and len(message) < 250


def test_an_error_of_ours_passes_unchanged() -> None:
    with pytest.raises(ConfigError, match=r"^x: y$"), translate_library_errors("there"):
        raise ConfigError("y", place="x")


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("x"), ValueError("x"), OSError(errno.ENOENT, "x", "y")]
)
def test_mistakes_of_the_program_are_not_described(error: Exception) -> None:
    assert describe_library_error(error) is None


@pytest.mark.parametrize(
    "error", [EOFError(), zipfile.BadZipFile("cut"), RecursionError(), *MEMORY_ERRORS]
)
def test_the_command_line_prints_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("vlduet.config.list_presets", fail)
    monkeypatch.setattr("sys.argv", ["vlduet", "config", "list"])
    with pytest.raises(SystemExit) as caught:
        main.main()
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 1 and len(lines) == 1 and lines[0].startswith("error: ")


def test_too_large_a_head_names_the_option() -> None:
    with pytest.raises(ConfigError, match=r"^model\.dim: too little memory"):
        EmbeddingHead("linear", 8, 10**12)


def test_a_state_that_torch_cannot_write_is_a_full_disk(tmp_path: Path) -> None:
    class FullFile(io.RawIOBase):
        """File of a disk that is full after 100 bytes."""

        size = 0

        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as caught, name_full_disk(tmp_path):
        torch.save({"x": torch.zeros(1000)}, FullFile())
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path)


def test_printed_text_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    print_text("a\x1b]0;title\x07b\u202ec\u2066d\u2028e\x9bf\tg\nh", end="")
    assert capsys.readouterr().out == "a ]0;title b c d e f\tg\nh"


def test_commands_print_by_one_function() -> None:
    folder = Path(main.__file__).parent
    lines = [
        line.strip()
        for path in folder.glob("*.py")
        for line in path.read_text().splitlines()
        if line.strip().startswith("print(")
    ]
    assert sorted(lines) == [
        'print(f"vlduet {__version__}")',
        "print(inspection.to_text(colour=sys.stdout.isatty()))",
        'print(strip_control_characters(str(value), keep="\\n\\t"), end=end, flush=not end)',
    ]
