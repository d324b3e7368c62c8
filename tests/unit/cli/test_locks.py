"""Every command that writes refuses a target that another process is writing."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from helpers import runs, tiny
from vlduet.cli.main import app
from vlduet.errors import LockError

COMMANDS = {
    "train": ["train", "config.yaml", "out=target", "data.validation=null"],
    "compare": ["compare", "compare.yaml"],
    "demo": ["demo", "--to", "target"],
    "analyse": ["analyse", "base", "x.jsonl", "--to", "target"],
    "split": ["data", "split", "x.jsonl", "--to", "target"],
    "convert": ["data", "convert", "x.jsonl", "--to", "target.jsonl"],
    "edit": ["data", "edit", "x.jsonl", "--to", "target.jsonl"],
    "mix": ["data", "mix", "x.jsonl", "--to", "target.jsonl"],
    "encode": ["encode", "base", "x.jsonl", "--out", "target.npz"],
    "merge": ["model", "merge", "base", "target-model"],
    "limit": ["model", "limit", "base", "target-model", "--max-tokens", "99"],
    "nano": ["model", "nano", "target-model"],
    "minilm": ["model", "minilm", "target-model"],
}
LOCK_FILES = ("target/.lock", ".target.jsonl.lock", ".target.npz.lock", ".target-model.lock")
COMPARISON = "{base: config.yaml, out: target, seeds: [0], runs: {a: []}}"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_target_that_another_process_writes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target").mkdir()
    tree = "{out: run, recipe: {name: vladva}, objectives: {language: 1}, model: {path: base}, "
    tree += "data: {train: [{path: x.jsonl}], validation: x.jsonl}, train: {steps: 1}}"
    (tmp_path / "config.yaml").write_text(tree)
    (tmp_path / "compare.yaml").write_text(COMPARISON)
    (tmp_path / "a.png").write_bytes(tiny.random_image().data or b"")
    runs.write_rows(tmp_path / "x.jsonl", [{"id": "a", "image": "a.png", "short": "A cat."}])
    (tmp_path / "target.quarantine.jsonl").write_text("{}\n")
    locks = [FileLock(tmp_path / file) for file in LOCK_FILES]
    for lock in locks:
        lock.acquire()
    files = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, COMMANDS[name])
    assert isinstance(result.exception, LockError), result.exception
    assert result.exception.message == "another process is writing here"
    assert sorted(tmp_path.rglob("*")) == files
    for lock in locks:
        lock.release()
