"""Sources without anything to learn are named before training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from helpers import runs
from vlduet import config
from vlduet.data.sequences import Sequence
from vlduet.errors import DataError
from vlduet.recipes import vladva
from vlduet.train import source_check
from vlduet.train.loop import train
from vlduet.train.plan import plan_run
from vlduet.train.setup import prepare_run


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        # A misspelt caption, as in a table from elsewhere whose columns have other names.
        (
            [{"id": str(i), "image": f"{i}.png", "captoin": "x"} for i in range(3)],
            r"none of its 3 .* an image without a caption",
        ),
        ([{"id": "0", "image": "gone/0.png", "short": "x"}], r"none of its 1 .* no such im"),
    ],
    ids=["no caption", "no image"],
)
def test_a_useless_source_is_refused_alone_and_a_warning_with_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: list[dict[str, Any]], message: str
) -> None:
    path = runs.write_run_config(tmp_path)
    source = write_lines(tmp_path / "useless.jsonl", rows)
    alone = config.load_run_config(path, [f"data.train=[{{path: {source}}}]"])
    with pytest.raises(DataError, match=message) as error:
        plan_run(alone)
    assert str(error.value).startswith(str(source))
    with pytest.raises(DataError, match=message):
        train(alone)
    # A control run may have sources for a loss that it leaves out.
    with_another = config.load_run_config(path, [f"data.train.1.path={source}"])
    with caplog.at_level(logging.WARNING, logger="vlduet"):
        prepare_run(with_another, write_files=False)
    assert f"warning: {source}: none of its" in caplog.text


def test_records_without_the_only_loss_are_refused(tmp_path: Path) -> None:
    overrides = ["objectives={language: 1}", "recipe.split=length", "recipe.short_below=1000"]
    run_config = config.load_run_config(runs.write_run_config(tmp_path), overrides)
    with pytest.raises(DataError, match="has anything for language of vladva"):
        prepare_run(run_config, write_files=False)


def test_a_few_records_of_a_large_source_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_check, "MAX_PROBED_RECORDS", 3)
    path = runs.write_run_config(tmp_path)
    rows = [
        {"id": str(i), "query": [{"text": "q"}], "positive": [[{"text": "a"}]]} for i in range(40)
    ]
    source = write_lines(tmp_path / "queries.jsonl", rows)
    layout_retrieval_record = vladva.layout_retrieval_record
    calls: list[int] = []

    def record(*args: Any, **kwargs: Any) -> list[Sequence]:
        calls.append(1)
        return layout_retrieval_record(*args, **kwargs)

    monkeypatch.setattr(vladva, "layout_retrieval_record", record)
    overrides = ["objectives={language: 1}", f"data.train.1.path={source}"]
    prepare_run(config.load_run_config(path, overrides), write_files=False)
    assert len(calls) == 3
