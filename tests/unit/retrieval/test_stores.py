"""LanceStore gives what FlatStore gives, and FlatStore what a loop in plain Python gives."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlduet.errors import RetrievalError
from vlduet.retrieval.filters import OPERATORS, Condition, to_scalar
from vlduet.retrieval.stores.base import FlatStore, IndexRow, RowHashes, VectorStore
from vlduet.retrieval.stores.lance import LanceStore, filter_column, sql_literal

DIM = 4
Opener = Callable[..., VectorStore]


@pytest.fixture
def open_store(store: str) -> Opener:
    """A constructor of the store under test."""
    return FlatStore if store == "flat" else LanceStore


def row(identity: str, version: int = 0, **metadata: Any) -> IndexRow:
    filters = {key: value for key, raw in metadata.items() if (value := to_scalar(raw)) is not None}
    stamp = RowHashes(f"key {identity} {version}", f"digest {version}")
    return IndexRow(
        identity,
        stamp,
        f"text {identity}",
        f"/images/{identity}",
        f"../{identity}",
        metadata,
        filters,
    )


def unit(vectors: Any) -> np.ndarray:
    found = np.asarray(vectors, dtype=np.float64)
    scaled: np.ndarray = (found / np.linalg.norm(found, axis=-1, keepdims=True)).astype(np.float32)
    return scaled


def ids(found: Sequence[Any]) -> list[str]:
    return [match.row.id for match in found]


AXES = unit(np.eye(DIM))


def test_rows_come_back_as_they_were(tmp_path: Path, open_store: Opener) -> None:
    rows = [row("a", name="x", deep={"list": [1, None, "é"]}), row("b", name=None), row("ü'\"`")]
    one = open_store(tmp_path, dim=DIM, write=True)
    one.upsert(rows, AXES[:3])
    for opened in (one, open_store(tmp_path, dim=DIM, write=False)):
        assert opened.count() == 3
        assert opened.read_hashes() == {r.id: r.hashes for r in rows}
        np.testing.assert_array_equal(opened.read_vectors(["ü'\"`", "a"]), AXES[[2, 0]])
        (found,) = opened.search(AXES[:1], k=3)
        assert found[0].row == rows[0] and found[0].score == 1.0
        assert [m.score for m in found] == [1.0, 0.0, 0.0]


def test_upsert_replaces_and_forgets_old_metadata(tmp_path: Path, open_store: Opener) -> None:
    opened = open_store(tmp_path, dim=DIM, write=True)
    opened.upsert([row("a", old=1), row("b", old=1)], AXES[:2])
    opened.upsert([row("b", version=1, new="x")], AXES[2:3])
    assert opened.count() == 2
    (found,) = opened.search(AXES[2:3], k=1)
    assert found[0].row == row("b", version=1, new="x") and found[0].score == 1.0
    assert ids(opened.search(AXES[:1], k=9, conditions=[Condition("old", "=", 1)])[0]) == ["a"]


def test_delete(tmp_path: Path, open_store: Opener) -> None:
    opened = open_store(tmp_path, dim=DIM, write=True)
    opened.upsert([row("a'b"), row("b"), row("c")], AXES[:3])
    opened.delete(["a'b", "c", "not there"])
    opened.delete([])
    opened.close()
    assert list(open_store(tmp_path, dim=DIM, write=False).read_hashes()) == ["b"]


def test_empty_store(tmp_path: Path, open_store: Opener) -> None:
    opened = open_store(tmp_path, dim=DIM, write=True)
    for where in ([], [Condition("x", "=", 1)], [Condition("x", "!=", 1)]):
        assert opened.search(AXES[:2], k=3, conditions=where) == [[], []]
    assert opened.count() == 0 and opened.read_hashes() == {}
    assert opened.read_vectors([]).shape == (0, DIM)
    opened.upsert([], np.empty((0, DIM), dtype=np.float32))
    opened.close()
    assert open_store(tmp_path, dim=DIM, write=False).count() == 0


def test_ties_are_settled_by_id_at_the_edge_too(tmp_path: Path, open_store: Opener) -> None:
    names = [f"{i:03d}" for i in range(150)]
    order = np.random.default_rng(0).permutation(150)
    direction = unit(np.random.default_rng(1).normal(size=DIM))
    opened = open_store(tmp_path, dim=DIM, write=True)
    opened.upsert([row(names[i]) for i in order], np.tile(direction, (150, 1)))
    for k in (1, 20, 149, 150, 1000):
        (found,) = opened.search(unit(np.random.default_rng(2).normal(size=(1, DIM))), k=k)
        assert ids(found) == names[:k]
        assert len({m.score for m in found}) == 1


HOSTILE = [
    "'",
    "''",
    '"',
    "`",
    "\\",
    "\\'",
    "x' OR '1'='1",
    "'; DROP TABLE rows; --",
    "%",
    "_",
    "\n",
    "\x00",
    "é",
    "A",
    "",
]


@pytest.mark.parametrize(
    "key",
    [
        "plain",
        "Upper",
        "upper",
        "a.b",
        "a b",
        "a_b",
        "a`b",
        "1=1 OR x",
        "é",
        "'",
        "id",
        "vector",
        "",
    ],
)
def test_hostile_keys_and_values_are_only_keys_and_values(
    tmp_path: Path, open_store: Opener, key: str
) -> None:
    opened = open_store(tmp_path, dim=DIM, write=True)
    rows = [row(str(i), 0, **{key: value}) for i, value in enumerate(HOSTILE)]
    opened.upsert([*rows, row("none")], np.tile(AXES[:1], (len(rows) + 1, 1)))
    for i, value in enumerate(HOSTILE):
        assert ids(opened.search(AXES[:1], k=99, conditions=[Condition(key, "=", value)])[0]) == [
            str(i)
        ]
        unlike = ids(opened.search(AXES[:1], k=99, conditions=[Condition(key, "!=", value)])[0])
        assert set(unlike) == {*(r.id for r in rows), "none"} - {str(i)}
    assert (
        len(opened.search(AXES[:1], k=99, conditions=[Condition(key, "in", HOSTILE[:5])])[0]) == 5
    )


def test_columns_are_distinct_and_plain() -> None:
    keys = ["a", "A", "a_", "_a", "a_5f_", "5f", "_5f_", "a b", "a.b", "é", "", "text__a"]
    names = {filter_column(key, kind) for key in keys for kind in ("text", "number")}
    assert len(names) == 2 * len(keys)
    assert all(
        name.replace("_", "").isalnum() and name.isascii() and name == name.lower()
        for name in names
    )
    assert sql_literal("a'b") == "'a''b'"


SCALARS = st.one_of(
    st.sampled_from(["", "a", "b", "é", "a'b", "1"]),
    st.sampled_from([0, -0.0, 1, 1.5, -2, 1e300, 2**53 + 1]),
    st.booleans(),
    st.none(),
    st.just([1]),
)
METADATA = st.dictionaries(st.sampled_from(["x", "y", "X.y"]), SCALARS)
ITEM = st.tuples(st.integers(0, 12), METADATA, st.tuples(*[st.integers(-2, 2)] * DIM).filter(any))
COMPARABLE = SCALARS.filter(lambda v: v is not None and v != [1])


@st.composite
def condition(draw: Any) -> Condition:
    sign = draw(st.sampled_from(OPERATORS))
    key = draw(st.sampled_from(["x", "y", "X.y", "unknown"]))
    if sign == "in":
        return Condition(key, sign, draw(st.lists(COMPARABLE, max_size=3)))
    value = (
        COMPARABLE if sign in ("=", "!=") else COMPARABLE.filter(lambda v: not isinstance(v, bool))
    )
    return Condition(key, sign, draw(value))


def plain(
    held: dict[str, tuple[IndexRow, np.ndarray]], query: np.ndarray, k: int, where: list[Condition]
) -> list[Any]:
    """The definition of a search, as a loop."""
    scored = [
        (
            -round(float(np.dot(vector.astype(np.float64), query.astype(np.float64))), 6) + 0.0,
            identity,
        )
        for identity, (held_row, vector) in held.items()
        if all(c.matches(held_row.filter_values) for c in where)
    ]
    return [(identity, -score + 0.0) for score, identity in sorted(scored)[:k]]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    writes=st.lists(st.lists(ITEM, max_size=8), max_size=3),
    deleted=st.lists(st.integers(0, 12), max_size=4),
    where=st.lists(condition(), max_size=2),
    k=st.integers(1, 15),
)
def test_both_stores_equal_the_definition(writes: Any, deleted: Any, where: Any, k: int) -> None:
    """Small integer vectors make many exact ties; the same ids come again to be replaced."""
    with tempfile.TemporaryDirectory() as folder:
        stores: list[VectorStore] = [
            kind(Path(folder, kind.__name__), dim=DIM, write=True)
            for kind in (FlatStore, LanceStore)
        ]
        held: dict[str, tuple[IndexRow, np.ndarray]] = {}
        for version, items in enumerate(writes):
            batch = {
                f"{i:02d}": (row(f"{i:02d}", version, **metadata), unit(v))
                for i, metadata, v in items
            }
            held |= batch
            if batch:
                for opened in stores:
                    opened.upsert(
                        [r for r, _ in batch.values()], np.stack([v for _, v in batch.values()])
                    )
        for opened in stores:
            opened.delete([f"{i:02d}" for i in deleted])
        held = {identity: pair for identity, pair in held.items() if int(identity) not in deleted}
        queries = unit([[1, 0, 0, 0], [1, 2, -1, 1]])
        wanted = [plain(held, query, k, where) for query in queries]
        for opened in stores:
            found = opened.search(queries, k=k, conditions=where)
            assert [[(m.row.id, m.score) for m in matches] for matches in found] == wanted, type(
                opened
            )
            assert all(m.row == held[m.row.id][0] for matches in found for m in matches)
            assert opened.count() == len(held)
            opened.close()
            assert opened.read_hashes() == {identity: r.hashes for identity, (r, _) in held.items()}


def test_many_rows_against_a_matrix_product(tmp_path: Path, open_store: Opener) -> None:
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng.normal(size=(3000, 32))), unit(rng.normal(size=(5, 32)))
    opened = open_store(tmp_path, dim=32, write=True)
    opened.upsert([row(f"{i:04d}", half=i % 2) for i in range(3000)], vectors)
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    for where, kept in (([], slice(None)), ([Condition("half", "=", 1)], slice(1, None, 2))):
        found = opened.search(queries, k=25, conditions=where)
        names = np.arange(3000)[kept]
        for q in range(5):
            best = names[np.argsort(-scores[q][kept], kind="stable")[:25]]
            assert ids(found[q]) == [f"{i:04d}" for i in best]
            np.testing.assert_allclose([m.score for m in found[q]], scores[q][best], atol=1e-6)


def test_close_joins_what_many_writes_left(tmp_path: Path, open_store: Opener) -> None:
    opened = open_store(tmp_path, dim=DIM, write=True)
    for i in range(12):
        opened.upsert([row(str(i))], AXES[i % DIM : i % DIM + 1])
    opened.delete(["3"])
    before = {p for p in tmp_path.rglob("*") if p.suffix in (".npz", ".lance") and p.is_file()}
    opened.close()
    after = {
        p for p in tmp_path.rglob("*") if p.suffix in (".npz", ".lance") and p.is_file()
    } - before
    assert len(after) == 1
    assert open_store(tmp_path, dim=DIM, write=False).count() == 11


def test_a_version_cut_short_by_power_loss_is_dropped(tmp_path: Path) -> None:
    opened = LanceStore(tmp_path, dim=DIM, write=True)
    opened.upsert([row("a")], AXES[:1])
    opened.upsert([row("b")], AXES[1:2])
    newest = min((tmp_path / "rows.lance" / "_versions").glob("*.manifest"))  # names count down
    newest.write_bytes(b"")
    with pytest.raises(RetrievalError, match="Run `vlduet index`"):
        LanceStore(tmp_path, dim=DIM, write=False)
    mended = LanceStore(tmp_path, dim=DIM, write=True)
    assert list(mended.read_hashes()) == ["a"]
    mended.upsert([row("b")], AXES[1:2])
    assert LanceStore(tmp_path, dim=DIM, write=False).count() == 2


def test_a_first_version_cut_short_is_made_again(tmp_path: Path) -> None:
    LanceStore(tmp_path, dim=DIM, write=True)
    (manifest,) = (tmp_path / "rows.lance" / "_versions").glob("*.manifest")
    manifest.write_bytes(manifest.read_bytes()[:-1])
    opened = LanceStore(tmp_path, dim=DIM, write=True)
    opened.upsert([row("a")], AXES[:1])
    assert LanceStore(tmp_path, dim=DIM, write=False).count() == 1


def test_everything_is_synced_before_a_write_returns(tmp_path: Path, monkeypatch: Any) -> None:
    synced: set[Path] = set()
    monkeypatch.setattr("vlduet.retrieval.stores.lance.sync", synced.update)
    opened = LanceStore(tmp_path, dim=DIM, write=True)
    for i in range(3):
        opened.upsert([row(str(i), **{f"field{i}": i})], AXES[:1])
        assert {p for p in tmp_path.rglob("*") if p.suffix != ".json"} <= synced
    assert tmp_path / "rows.lance" / "_versions" in synced


def test_a_broken_segment_is_named(tmp_path: Path) -> None:
    opened = FlatStore(tmp_path, dim=DIM, write=True)
    opened.upsert([row("a")], AXES[:1])
    (segment,) = tmp_path.glob("*.npz")
    segment.write_bytes(segment.read_bytes()[:100])
    with pytest.raises(RetrievalError, match=r"segment-.*Delete the index"):
        FlatStore(tmp_path, dim=DIM, write=False)


def test_a_reader_of_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(RetrievalError, match="cannot be opened"):
        LanceStore(tmp_path / "none", dim=DIM, write=False)
