"""Locks: one writer at a time, none of them left by a killed process."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from helpers.processes import start_process
from vlduet.errors import ConfigError, LockError
from vlduet.locks import lock_folder, lock_output

LOCKS = {"folder": lock_folder, "output": lock_output}

HOLDER = """
import sys, time
from pathlib import Path
from vlduet import locks
with getattr(locks, "lock_" + sys.argv[1])(Path(sys.argv[2])):
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("name", LOCKS)
def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path, name: str) -> None:
    target = tmp_path / "new" / "x"
    command = [sys.executable, "-c", HOLDER, name, str(target)]
    with start_process(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        # A symbolic link leads to the same lock.
        (tmp_path / "link").symlink_to("new")
        for path in (target, tmp_path / "link" / "x"):
            with pytest.raises(LockError) as raised, LOCKS[name](path):
                pass
            message = f"{path}: another process is writing here. Wait for it to end"
            assert str(raised.value).startswith(message)
        process.send_signal(signal.SIGKILL)
    files = [path for path in tmp_path.rglob("*lock") if path.is_file()]
    assert len(files) == 1, "the killed process leaves its lock file"
    with LOCKS[name](target):
        assert files[0].exists()
    assert not files[0].exists()


@pytest.mark.parametrize("name", LOCKS)
def test_a_thread_takes_its_lock_twice_and_another_thread_does_not(
    tmp_path: Path, name: str
) -> None:
    errors: list[LockError] = []

    def take_lock() -> None:
        try:
            with LOCKS[name](tmp_path / "x"):
                pass
        except LockError as error:
            errors.append(error)

    def run_thread() -> int:
        thread = threading.Thread(target=take_lock)
        thread.start()
        thread.join()
        return len(errors)

    with LOCKS[name](tmp_path / "x"):
        with LOCKS[name](tmp_path / "x"):
            assert run_thread() == 1
        assert run_thread() == 2, "the outer block still holds the lock"
    assert run_thread() == 2
    assert not list(tmp_path.rglob("*lock"))


def test_locks_of_other_targets_are_independent(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    with lock_folder(a), lock_folder(b), lock_output(a), lock_output(b), lock_output(a / "b"):
        assert len(list(tmp_path.rglob("*lock"))) == 5


def test_an_error_in_the_block_releases_the_lock(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), lock_output(tmp_path / "x"):
            raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_new_folder_stays_only_with_content(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a" / "b").exists()
    with lock_folder(tmp_path / "a"):
        pass
    assert (tmp_path / "a").is_dir(), "an existing folder stays, also without content"
    with lock_folder(tmp_path / "c"):
        (tmp_path / "c" / "x").touch()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["x"]


def test_a_file_with_content_under_the_name_of_the_lock_stays(tmp_path: Path) -> None:
    (tmp_path / ".x.lock").write_text("notes")
    with lock_output(tmp_path / "x"):
        pass
    assert (tmp_path / ".x.lock").read_text() == "notes"


def test_a_file_is_no_folder_to_lock(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(ConfigError, match="is a file"), lock_folder(tmp_path / "x"):
        pass


def test_drafts_of_killed_writers_are_deleted_by_the_next_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "below").mkdir(parents=True)
    for name in (".a.json.17.draft", ".b.5.draft", "below/.a.json.17.draft", ".a.json.17", "c"):
        (folder / name).touch()
    neighbours = [tmp_path / ".run.17.draft", tmp_path / ".other.17.draft"]
    for neighbour in neighbours:
        neighbour.touch()
    with lock_folder(folder):
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
        assert names == [".a.json.17", ".lock", "below", "below/.a.json.17.draft", "c"]
    assert all(neighbour.exists() for neighbour in neighbours)
    with lock_output(folder):
        assert [neighbour.exists() for neighbour in neighbours] == [False, True]


def test_a_draft_of_another_writer_stays_while_it_holds_the_lock(tmp_path: Path) -> None:
    target = tmp_path / "x"
    with start_process(
        [sys.executable, "-c", HOLDER, "output", str(target)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        draft = tmp_path / f".x.{process.pid}.draft"
        draft.touch()
        with pytest.raises(LockError), lock_output(target):
            pass
        assert draft.exists()
