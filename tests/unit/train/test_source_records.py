"""Records that no loss can use are left out before the order is made, and some are held out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import runs, tiny
from vlduet import config
from vlduet.config import RunConfig
from vlduet.data.holdout import is_in_holdout
from vlduet.data.image_store import ImageStore
from vlduet.data.quarantine import Quarantine
from vlduet.data.records import ImageRef, Record
from vlduet.errors import DataError
from vlduet.recipes.registry import load_recipe
from vlduet.train.setup import load_mixture
from vlduet.train.source_records import SourceRecords, draw_records
from vlduet.workflows import validation

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
PAIR = {"image": "x.png", "short": "a cat"}


def make_config(folder: Path, rows: list[dict[str, Any]], *overrides: str) -> RunConfig:
    """Write rows with numbers as ids to a file, and return a config that trains on it."""
    path = folder / "train.jsonl"
    runs.write_rows(path, [{"id": str(i), **row} for i, row in enumerate(rows)])
    tree = {
        "out": str(folder / "run"),
        "recipe": {"name": "vladva"},
        "objectives": {"contrastive": 1, "language": 1},
        "model": {"path": "base"},
        "data": {"train": [{"path": str(path)}]},
        "train": {"epochs": 2, "batch_size": 4},
    }
    file = folder / "config.yaml"
    file.write_text(json.dumps(tree))
    return config.load_run_config(file, overrides)


def load(run_config: RunConfig) -> tuple[list[SourceRecords], list[str]]:
    """Return the sources of a config, and the ids of the first thirty samples of its order."""
    sources, mixture = load_mixture(
        run_config, load_recipe(run_config), quarantine=Quarantine(), store=ImageStore(None)
    )
    return sources, [mixture[position].record.id for position in range(30)]


@pytest.mark.parametrize("max_records", [1, 7, 20, 21])
def test_max_records_are_a_subset_in_order_that_no_seed_changes(
    tmp_path: Path, max_records: int
) -> None:
    rows = [PAIR for _ in range(20)]
    override = f"data.train.0.max_records={max_records}"
    (source,), _ = load(make_config(tmp_path, rows, override))
    (other_source,), _ = load(make_config(tmp_path, rows, override, "seed=5"))
    ids = [int(record.id) for record in source.records]
    assert ids == sorted(set(ids)) and len(ids) == min(max_records, 20)
    assert ids == [int(record.id) for record in other_source.records]
    assert source.num_not_drawn == 20 - len(ids) and source.num_rows == 20


def test_max_records_counts_usable_records(tmp_path: Path) -> None:
    rows = [PAIR if i % 3 else {"image": "x.png"} for i in range(9)]
    (source,), _ = load(make_config(tmp_path, rows, "data.train.0.max_records=4"))
    assert len(source.records) == 4 and all(int(record.id) % 3 for record in source.records)
    assert source.left_out.total() == 3 and source.num_not_drawn == 2 and source.num_rows == 9


def test_a_source_without_anything_for_the_losses_is_drawn_from_too(tmp_path: Path) -> None:
    run_config = make_config(
        tmp_path, [{"messages": TURNS}] * 5, "data.train.0.max_records=2", "objectives.language=0"
    )
    with pytest.raises(DataError, match="none of its 2 records has anything"):
        load(run_config)


def test_all_parts_of_a_source_are_drawn_from_equally() -> None:
    records = [Record(str(i), parts=("a", "b")) for i in range(3000)]
    drawn, num_others = draw_records(iter(records), 1000, store=ImageStore(None))
    assert num_others == 2000
    thirds = Counter(int(record.id) // 1000 for record in drawn)
    assert all(abs(count - 333) < 60 for count in thirds.values()) and len(thirds) == 3


def test_the_order_is_that_of_a_file_without_the_unusable_records(tmp_path: Path) -> None:
    rows = [PAIR if i % 3 else {"image": "x.png"} for i in range(9)]
    (source,), order = load(make_config(tmp_path, rows))
    assert source.left_out == {"an image without a caption": 3} and source.num_rows == 9
    assert [record.id for record in source.records] == ["1", "2", "4", "5", "7", "8"]
    (_,), order_without = load(make_config(tmp_path, [PAIR] * 6))
    ids = [record.id for record in source.records]
    assert order == [ids[int(index)] for index in order_without]


@pytest.mark.parametrize(
    ("row", "objectives", "cause"),
    [
        ({"image": "x.png", "long": "a cat."}, "{contrastive: 1}", "a long caption alone has"),
        ({"image": "x.png", "short": "a cat."}, "{language: 1}", "a short caption alone has"),
        ({"messages": TURNS}, "{contrastive: 1}", "a chat has nothing for contrastive"),
        ({"parts": [{"text": "x"}]}, "{contrastive: 1, language: 0}", "a document has nothing"),
        (
            {"query": [{"text": "q"}], "positive": [[{"text": "a"}]]},
            "{language: 1}",
            "a retrieval record has nothing for language",
        ),
    ],
)
def test_the_cause_says_what_a_record_lacks(
    tmp_path: Path, row: dict[str, Any], objectives: str, cause: str
) -> None:
    both = {"image": "x.png", "short": "a cat", "long": "a grey cat."}
    run_config = make_config(tmp_path, [both, row, both], f"objectives={objectives}")
    (source,), order = load(run_config)
    assert set(order) == {"0", "2"}
    ((message, count),) = source.left_out.items()
    assert count == 1 and cause in message


def test_a_source_without_any_use_keeps_its_share_of_the_steps(tmp_path: Path) -> None:
    """A control run leaves out a loss, and all other records keep their share of the steps."""
    other = runs.write_rows(tmp_path / "chats.jsonl", [{"id": "chat", "messages": TURNS}])
    overrides = ["objectives={contrastive: 1}", f"data.train.1.path={other}"]
    sources, order = load(make_config(tmp_path, [PAIR, PAIR], *overrides))
    assert not sources[0].unusable_reason
    assert "a chat has nothing for contrastive" in sources[1].unusable_reason
    assert 5 < order.count("chat") < 25


def test_a_config_without_any_usable_record_is_refused(tmp_path: Path) -> None:
    run_config = make_config(tmp_path, [{"image": "x.png"}] * 3)
    with pytest.raises(DataError, match=r"none of its 3 .* an image without a caption"):
        load(run_config)


# --------------------------------------------------------------------- validation


def write_pairs(folder: Path, count: int, *, captions: int = 1) -> list[dict[str, Any]]:
    """Write images, and return `captions` rows of each of them."""
    for i in range(count):
        runs.write_image(folder / f"{i}.png", i)
    names = [i for i in range(count) for _ in range(captions)]
    return [{"image": f"{i}.png", "short": f"thing {n}"} for n, i in enumerate(names)]


def test_validation_records_are_never_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_pairs(tmp_path, 40, captions=2)
    run_config = make_config(tmp_path, rows, "data.validation=0.25")
    (source,), _ = load(run_config)
    measured: list[Record] = []

    def compute(model: object, records: list[Record], *, seed: int) -> dict[str, float]:
        measured.extend(records)
        return {}

    monkeypatch.setattr(validation, "compute_validation_metrics", compute)
    validation.make_config_validator(run_config, seed=0)(None)  # type: ignore[arg-type]
    trained_ids = {record.id for record in source.records}
    holdout_ids = {record.id for record in measured}
    assert not trained_ids & holdout_ids and len(trained_ids | holdout_ids) == 80
    assert source.num_holdout == len(holdout_ids) and 8 <= len(holdout_ids) <= 32
    # Both captions of an image are on the same side.
    assert {str(int(record_id) ^ 1) for record_id in holdout_ids} == holdout_ids


def test_the_holdout_does_not_depend_on_order_names_or_other_records(
    tmp_path: Path,
) -> None:
    rows = write_pairs(tmp_path, 30)
    (source,), _ = load(make_config(tmp_path, rows, "data.validation=0.3"))
    trained = {record.short for record in source.records}
    folder = tmp_path / "again"
    folder.mkdir()
    for i in range(30):
        (folder / f"new-{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes())
    again = [{**row, "image": f"new-{row['image']}"} for row in reversed(rows[:20])]
    (source,), _ = load(make_config(folder, again, "data.validation=0.3"))
    captions = {(row["short"],) for row in rows[:20]}
    assert {record.short for record in source.records} == trained & captions


@settings(max_examples=25, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=30, unique=True))
def test_a_larger_share_holds_out_what_a_smaller_one_does(contents: list[bytes]) -> None:
    records = [Record(str(i), image=ImageRef(data=data)) for i, data in enumerate(contents)]

    def count(share: float) -> set[str]:
        return {record.id for record in records if is_in_holdout(record, share)}

    assert count(0.0) == set() and count(1.0) == {record.id for record in records}
    assert count(0.1) <= count(0.4) <= count(0.9)


@pytest.mark.parametrize(
    "make_record",
    [
        lambda i: Record(str(i), image=tiny.random_image(i)),
        lambda i: Record(str(i), parts=(f"text {i}",)),
        lambda i: Record(str(i), query=(f"q{i}",), positive=(("a",),)),
        lambda i: Record(str(i), image=ImageRef(path=Path(f"missing/{i}.png"))),
    ],
    ids=["images", "texts", "queries", "missing images"],
)
def test_the_share_is_about_the_one_that_is_asked_for(
    make_record: Callable[[int], Record],
) -> None:
    count = sum(is_in_holdout(make_record(i), 0.3) for i in range(300))
    assert 60 < count < 120
