"""LanceStore against a brute-force reference in numpy, and its durability."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.stores import (
    AXES,
    DIM,
    ids_of,
    make_row,
    normalize,
    open_for_reading,
    open_for_writing,
)
from vlduet.errors import RetrievalError
from vlduet.retrieval.filter_values import KIND_PLURALS, parse_period
from vlduet.retrieval.filters import MAX_CONDITIONS, MAX_VALUES, OPERATORS, Condition
from vlduet.retrieval.stores import lance
from vlduet.retrieval.stores.base import IndexRow
from vlduet.retrieval.stores.lance import LanceStore
from vlduet.retrieval.stores.sql import condition_to_sql, filter_column, sql_literal


class ReferenceStore:
    """Rows and vectors in a dictionary; `search` is the definition of a search."""

    def __init__(self) -> None:
        self.entries: dict[str, tuple[IndexRow, np.ndarray]] = {}

    def upsert(self, rows: Sequence[IndexRow], vectors: np.ndarray) -> None:
        self.entries |= {row.id: (row, vector) for row, vector in zip(rows, vectors, strict=True)}

    def delete(self, ids: Sequence[str]) -> None:
        for identity in ids:
            self.entries.pop(identity, None)

    def search(
        self, queries: np.ndarray, *, k: int, conditions: Sequence[Condition] = ()
    ) -> list[list[tuple[str, float]]]:
        results = []
        for query in queries.astype(np.float64):
            scored = []
            for identity, (row, vector) in self.entries.items():
                if all(condition.matches(row.filter_values) for condition in conditions):
                    score = round(float(vector.astype(np.float64) @ query), 6) + 0.0
                    scored.append((identity, score))
            results.append(sorted(scored, key=lambda pair: (-pair[1], pair[0]))[:k])
        return results


def test_stored_rows_and_vectors_are_returned_unchanged(tmp_path: Path) -> None:
    rows = [
        make_row("a", name="x", deep={"list": [1, None, "é"]}),
        make_row("b", name=None),
        make_row("ü'\"`"),
    ]
    writer = open_for_writing(tmp_path)
    writer.upsert(rows, AXES[:3])
    for store in (writer, open_for_reading(tmp_path)):
        assert store.count() == 3
        assert store.read_hashes() == {row.id: row.hashes for row in rows}
        np.testing.assert_array_equal(store.read_vectors(["ü'\"`", "a"]), AXES[[2, 0]])
        (matches,) = store.search(AXES[:1], k=3)
        assert matches[0].row == rows[0] and matches[0].score == 1.0
        assert [match.score for match in matches] == [1.0, 0.0, 0.0]


def test_vectors_of_many_ids_are_read_without_sql(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_for_writing(tmp_path)
    store.upsert([make_row("a"), make_row("b"), make_row("c")], AXES[:3])
    monkeypatch.setattr(lance, "MAX_IDS_IN_SQL", 1)
    np.testing.assert_array_equal(store.read_vectors(["c", "a"]), AXES[[2, 0]])
    with pytest.raises(KeyError):
        store.read_vectors(["c", "unknown"])


def test_upsert_replaces_a_row_and_its_metadata(tmp_path: Path) -> None:
    store = open_for_writing(tmp_path)
    store.upsert([make_row("a", old=1), make_row("b", old=1)], AXES[:2])
    store.upsert([make_row("b", version=1, new="x")], AXES[2:3])
    assert store.count() == 2
    (matches,) = store.search(AXES[2:3], k=1)
    assert matches[0].row == make_row("b", version=1, new="x") and matches[0].score == 1.0
    (matches,) = store.search(AXES[:1], k=9, conditions=[Condition("old", "=", 1)])
    assert ids_of(matches) == ["a"]


def test_delete_removes_rows_and_ignores_unknown_ids(tmp_path: Path) -> None:
    store = open_for_writing(tmp_path)
    store.upsert([make_row("a'b"), make_row("b"), make_row("c")], AXES[:3])
    store.delete(["a'b", "c", "not there"])
    store.delete([])
    store.close()
    assert list(open_for_reading(tmp_path).read_hashes()) == ["b"]


def test_empty_store_returns_no_rows(tmp_path: Path) -> None:
    store = open_for_writing(tmp_path)
    for conditions in ([], [Condition("x", "=", 1)], [Condition("x", "!=", 1)]):
        assert store.search(AXES[:2], k=3, conditions=conditions) == [[], []]
    assert store.count() == 0 and store.read_hashes() == {}
    assert store.read_vectors([]).shape == (0, DIM)
    store.upsert([], np.empty((0, DIM), dtype=np.float32))
    store.close()
    assert open_for_reading(tmp_path).count() == 0


def test_ties_are_ordered_by_id_also_at_the_last_place(tmp_path: Path) -> None:
    names = [f"{i:03d}" for i in range(150)]
    order = np.random.default_rng(0).permutation(150)
    direction = normalize(np.random.default_rng(1).normal(size=DIM))
    query = normalize(np.random.default_rng(2).normal(size=(1, DIM)))
    store = open_for_writing(tmp_path)
    store.upsert([make_row(names[i]) for i in order], np.tile(direction, (150, 1)))
    for k in (1, 20, 149, 150, 1000):
        (matches,) = store.search(query, k=k)
        assert ids_of(matches) == names[:k]
        assert len({match.score for match in matches}) == 1


HOSTILE_VALUES = [
    *("'", "''", '"', "`", "\\", "\\'"),
    *("x' OR '1'='1", "'; DROP TABLE rows; --", "%", "_", "\n", "\x00", "é", "A", ""),
]
HOSTILE_KEYS = [
    *("plain", "Upper", "upper", "a.b", "a b", "a_b", "a`b"),
    *("1=1 OR x", "é", "'", "id", "vector", ""),
]


@pytest.mark.parametrize("key", HOSTILE_KEYS)
def test_hostile_keys_and_values_inject_no_sql(tmp_path: Path, key: str) -> None:
    store = open_for_writing(tmp_path)
    rows = [make_row(str(i), **{key: value}) for i, value in enumerate(HOSTILE_VALUES)]
    rows.append(make_row("none"))
    store.upsert(rows, np.tile(AXES[:1], (len(rows), 1)))
    all_ids = {row.id for row in rows}
    for i, value in enumerate(HOSTILE_VALUES):
        (equal,) = store.search(AXES[:1], k=99, conditions=[Condition(key, "=", value)])
        assert ids_of(equal) == [str(i)]
        (unequal,) = store.search(AXES[:1], k=99, conditions=[Condition(key, "!=", value)])
        assert set(ids_of(unequal)) == all_ids - {str(i)}
    five_values = Condition(key, "in", HOSTILE_VALUES[:5])
    assert len(store.search(AXES[:1], k=99, conditions=[five_values])[0]) == 5


def test_filter_columns_are_distinct_and_of_plain_characters() -> None:
    keys = ["a", "A", "a_", "_a", "a_5f_", "5f", "_5f_", "a b", "a.b", "é", "", "text__a"]
    columns = [filter_column(key, kind) for key in keys for kind in KIND_PLURALS]
    assert len(set(columns)) == len(KIND_PLURALS) * len(keys)
    for column in columns:
        assert column.replace("_", "").isalnum() and column.isascii() and column == column.lower()


def test_sql_literal_doubles_quotes() -> None:
    assert sql_literal("a'b") == "'a''b'"


def nesting(predicate: str) -> int:
    depth = deepest = 0
    for character in predicate:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def test_the_largest_filters_are_answered_and_nest_little(tmp_path: Path) -> None:
    store = open_for_writing(tmp_path)
    store.upsert([make_row("a", n=7, day="2024-05-01"), make_row("b", n=-1)], AXES[:2])
    (matches,) = store.search(AXES[:1], k=2, conditions=[Condition("n", ">=", 0)] * MAX_CONDITIONS)
    assert ids_of(matches) == ["a"]
    days = [parse_period(f"2024-{m:02}-{d:02}") for m in range(1, 13) for d in range(1, 28)]
    many: list[list[Any]] = [list(range(MAX_VALUES)), days, [f"x{i}" for i in range(MAX_VALUES)]]
    keys = ("n", "day", "day")
    for key, values, expected in zip(keys, many, (["a"], ["a"], []), strict=True):
        condition = Condition(key, "in", values)
        columns = {filter_column(key, kind) for kind in ("number", "date", "text")}
        assert nesting(condition_to_sql(condition, columns)) < 20
        (matches,) = store.search(AXES[:1], k=2, conditions=[condition])
        assert ids_of(matches) == expected


SCALARS = st.one_of(
    st.sampled_from(["", "a", "b", "é", "a'b", "1", "1.5", "01", "2024-05-01"]),
    st.sampled_from(["2024-05-01T10:00Z", "2024-05-01 23:59:59", "2024-04-30T23:00:00-02:00"]),
    st.sampled_from([0, -0.0, 1, 1.5, -2, 1e300, 2**53 + 1]),
    st.booleans(),
)
LISTS = st.lists(st.one_of(SCALARS, st.none(), st.just([1])), max_size=3)
METADATA = st.dictionaries(st.sampled_from(["x", "y", "X.y"]), st.one_of(SCALARS, LISTS, st.none()))
VECTOR = st.tuples(*[st.integers(-2, 2)] * DIM).filter(any)
ITEM = st.tuples(st.integers(0, 12), METADATA, VECTOR)
PERIODS = st.sampled_from(["2024", "2024-04", "2024-05-01", "2024-05-01T10:00"]).map(parse_period)


@st.composite
def random_condition(draw: Any) -> Condition:
    operator = draw(st.sampled_from(OPERATORS))
    key = draw(st.sampled_from(["x", "y", "X.y", "unknown"]))
    values = SCALARS if operator == "contains" else st.one_of(SCALARS, PERIODS)
    if operator == "in":
        return Condition(key, operator, draw(st.lists(values, min_size=1, max_size=3)))
    if operator in ("<", "<=", ">", ">="):
        values = values.filter(lambda value: not isinstance(value, bool))
    return Condition(key, operator, draw(values))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    writes=st.lists(st.lists(ITEM, max_size=8), max_size=3),
    deleted=st.lists(st.integers(0, 12), max_size=4),
    conditions=st.lists(random_condition(), max_size=2),
    k=st.integers(1, 15),
    max_scanned=st.sampled_from([0, 1000]),
    indexed_write=st.integers(0, 3),
)
def test_search_equals_the_reference(
    writes: Any, deleted: Any, conditions: Any, k: int, max_scanned: int, indexed_write: int
) -> None:
    """Small integer vectors give many exact ties; repeated ids replace rows.

    A search index may be built between two writes; it compares all groups of so few rows.
    """
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lance, "MAX_SCANNED_ROWS", max_scanned)
        patch.setattr(lance, "MIN_ROWS_FOR_APPROXIMATE_SEARCH", 2)
        store = open_for_writing(Path(folder))
        reference = ReferenceStore()
        for version, items in enumerate(writes):
            if version == indexed_write:
                store.update_search_index("auto")
            batch = {}
            for number, metadata, vector in items:
                row = make_row(f"{number:02d}", version, **metadata)
                batch[row.id] = (row, normalize(vector))
            if batch:
                rows = [row for row, _ in batch.values()]
                vectors = np.stack([vector for _, vector in batch.values()])
                store.upsert(rows, vectors)
                reference.upsert(rows, vectors)
        deleted_ids = [f"{number:02d}" for number in deleted]
        store.delete(deleted_ids)
        reference.delete(deleted_ids)
        queries = normalize([[1, 0, 0, 0], [1, 2, -1, 1]])
        results = store.search(queries, k=k, conditions=conditions)
        assert results == store.search(queries, k=k, conditions=conditions, exact=True)
        expected = reference.search(queries, k=k, conditions=conditions)
        for matches, expected_matches in zip(results, expected, strict=True):
            assert [(match.row.id, match.score) for match in matches] == expected_matches
            for match in matches:
                assert match.row == reference.entries[match.row.id][0]
        assert store.count() == len(reference.entries)
        store.close()
        hashes = {identity: row.hashes for identity, (row, _) in reference.entries.items()}
        assert store.read_hashes() == hashes


def test_search_among_many_rows_equals_a_matrix_product(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors, queries = normalize(rng.normal(size=(3000, 32))), normalize(rng.normal(size=(5, 32)))
    store = open_for_writing(tmp_path, dim=32)
    store.upsert([make_row(f"{i:04d}", half=i % 2) for i in range(3000)], vectors)
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    odd = [Condition("half", "=", 1)]
    for conditions, rows in (([], np.arange(3000)), (odd, np.arange(1, 3000, 2))):
        results = store.search(queries, k=25, conditions=conditions)
        for q in range(5):
            best = rows[np.argsort(-scores[q][rows], kind="stable")[:25]]
            assert ids_of(results[q]) == [f"{i:04d}" for i in best]
            result_scores = [match.score for match in results[q]]
            np.testing.assert_allclose(result_scores, scores[q][best], atol=1e-6)


def test_rows_lost_between_the_two_commits_of_a_replacement_are_missing_from_the_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_for_writing(tmp_path)
    store.upsert([make_row("a"), make_row("b")], AXES[:2])

    def fail(rows: Any) -> None:
        raise OSError("killed")

    monkeypatch.setattr(store._table, "add", fail)
    with pytest.raises(RetrievalError, match="killed"):
        store.upsert([make_row("a", 1)], AXES[:1])
    repaired = open_for_writing(tmp_path)
    assert set(repaired.read_hashes()) == {"b"}
    repaired.upsert([make_row("a", 1)], AXES[:1])
    assert repaired.count() == 2


def data_files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*.lance") if path.is_file()}


def test_close_merges_the_files_of_many_writes(tmp_path: Path) -> None:
    store = open_for_writing(tmp_path)
    for i in range(12):
        store.upsert([make_row(str(i))], AXES[i % DIM : i % DIM + 1])
    store.delete(["3"])
    before = data_files(tmp_path)
    store.close()
    assert len(data_files(tmp_path) - before) == 1
    assert open_for_reading(tmp_path).count() == 11


def test_version_cut_short_by_a_power_loss_is_dropped(tmp_path: Path) -> None:
    store = open_for_writing(tmp_path)
    store.upsert([make_row("a")], AXES[:1])
    store.upsert([make_row("b")], AXES[1:2])
    # The names of manifests count down.
    newest = min((tmp_path / "rows.lance" / "_versions").glob("*.manifest"))
    newest.write_bytes(b"")
    with pytest.raises(RetrievalError, match="Run `vlduet index`"):
        open_for_reading(tmp_path)
    repaired = open_for_writing(tmp_path)
    assert list(repaired.read_hashes()) == ["a"]
    repaired.upsert([make_row("b")], AXES[1:2])
    assert open_for_reading(tmp_path).count() == 2


def test_first_version_cut_short_is_replaced(tmp_path: Path) -> None:
    open_for_writing(tmp_path)
    (manifest,) = (tmp_path / "rows.lance" / "_versions").glob("*.manifest")
    manifest.write_bytes(manifest.read_bytes()[:-1])
    store = open_for_writing(tmp_path)
    store.upsert([make_row("a")], AXES[:1])
    assert open_for_reading(tmp_path).count() == 1


def test_every_file_is_synced_before_a_write_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[Path] = set()
    monkeypatch.setattr(lance, "fsync_paths", synced.update)
    store = open_for_writing(tmp_path)
    for i in range(3):
        store.upsert([make_row(str(i), **{f"field{i}": i})], AXES[:1])
        assert {path for path in tmp_path.rglob("*") if path.suffix != ".json"} <= synced
    assert tmp_path / "rows.lance" / "_versions" in synced


def test_a_store_of_another_width_is_refused(tmp_path: Path) -> None:
    open_for_writing(tmp_path).upsert([make_row("a")], AXES[:1])
    for write in (False, True):
        with pytest.raises(RetrievalError, match=f"'dim' is {DIM + 1} .*, the vectors have {DIM}"):
            LanceStore(tmp_path, dim=DIM + 1, write=write)


def test_missing_store_cannot_be_opened_for_reading(tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match="cannot be opened"):
        open_for_reading(tmp_path / "none")


READS = {
    "search": lambda store: store.search(np.eye(1, DIM, dtype=np.float32), k=1),
    "read_hashes": lambda store: store.read_hashes(),
    "read_vectors": lambda store: store.read_vectors(["a"]),
}


@pytest.mark.parametrize("size", [None, 0, 100, 200])
@pytest.mark.parametrize("read", READS)
def test_data_files_that_are_cut_or_lost_are_named_errors(
    tmp_path: Path, read: str, size: int | None
) -> None:
    """`size` is the number of bytes that are left of each file; None: it is deleted."""
    store = open_for_writing(tmp_path)
    store.upsert([make_row("a"), make_row("b")], normalize(np.eye(2, DIM)))
    for path in data_files(tmp_path):
        if size is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RetrievalError, match=r"broken index.*build it again") as caught:
        READS[read](open_for_reading(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
