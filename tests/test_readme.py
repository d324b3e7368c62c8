"""Every command and code block of the README runs, on a tiny checkpoint and a few images."""

from __future__ import annotations

import csv
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import official, tiny
from helpers.documents import CodeBlock, read_code_blocks, split_commands

README = Path(__file__).parents[1] / "README.md"
MAX_BLOCKS_NOT_RUN = 5
BLOCKS = read_code_blocks(README)
NUM_RECORDS = 30


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with the files that the README names, as the working directory."""
    folder = tmp_path_factory.mktemp("readme")
    tiny.FAMILY_BUILDERS["fast_vlm"](folder / "models" / "base")
    (folder / "photos" / "images").mkdir(parents=True)
    lines = ["filename,caption,price\n"]
    for number in range(NUM_RECORDS):
        name = f"{number}.png"
        (folder / "photos" / "images" / name).write_bytes(tiny.random_image(number).data or b"")
        lines.append(f"{name},a photo with the number {number},{number * 1.5}\n")
    (folder / "photos.csv").write_text("".join(lines))
    official.write_official_files(folder / "official")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def run_vlduet(arguments: list[str]) -> int:
    """Run the command line interface in this process and return its exit status."""
    from vlduet.cli.main import main

    argv = sys.argv
    sys.argv = ["vlduet", *arguments]
    try:
        main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    finally:
        sys.argv = argv
    return 0


def run_block(block: CodeBlock) -> None:
    """Run a block in the working directory; fail at the first command that fails."""
    if block.language == "python":
        exec(compile(block.code, str(block), "exec"), {"__name__": "__main__"})
    elif block.language == "csv":
        header, *rows = csv.reader(block.code.splitlines())
        assert header == ["filename", "caption", "price"]
        assert {len(row) for row in rows} == {len(header)}
    else:
        commands = split_commands(block)
        assert commands, f"{block}: no command, or an unknown language '{block.language}'"
        for command in commands:
            assert command.arguments[0] == "vlduet", f"{command}: only vlduet is run"
            status = run_vlduet(list(command.arguments[1:]))
            assert status == 0, (
                f"{block.document}:{command.line} failed: {shlex.join(command.arguments)}"
            )


def test_every_block_of_the_readme_runs(workspace: Path) -> None:
    run_blocks = [block for block in BLOCKS if block.reason_not_run is None]
    assert len(run_blocks) > MAX_BLOCKS_NOT_RUN
    for block in run_blocks:
        run_block(block)
    # The effects of the commands, which a command that does nothing would not have.
    assert (workspace / "runs" / "photos" / "model" / "vlduet.json").is_file()
    assert (workspace / "models" / "photos" / "config.json").is_file()
    assert (workspace / "my-sugar.yaml").is_file()
    assert (workspace / "vectors.npz").is_file()
    assert (workspace / "photos.index").is_dir()


def test_at_most_five_blocks_are_not_run_and_each_says_why() -> None:
    reasons = [block.reason_not_run for block in BLOCKS if block.reason_not_run is not None]
    assert len(reasons) <= MAX_BLOCKS_NOT_RUN
    assert all(len(reason.split()) >= 3 for reason in reasons), reasons


def test_the_readme_has_the_two_commands() -> None:
    commands = []
    for block in BLOCKS:
        commands += [shlex.join(command.arguments) for command in split_commands(block)]
    assert {"make demo", "make test"} <= set(commands)
