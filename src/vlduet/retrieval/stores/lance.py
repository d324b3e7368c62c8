"""The store in a local LanceDB folder, where rows stay on disk. The one door to lancedb.

Exact: no vector index is ever built. Metadata is kept twice, as JSON to give back and as typed columns to
filter by. LanceDB's threads do not survive a fork: start processes that search with spawn.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa

from vlduet.errors import RetrievalError
from vlduet.files import fsync_paths
from vlduet.retrieval.filters import ORDER_OPERATORS, Condition, Scalar, scalar_kind
from vlduet.retrieval.stores.base import (
    SCORE_TOLERANCE,
    IndexRow,
    RowHashes,
    ScoredRow,
    rank_candidates,
)

TABLE_NAME = "rows"
ROW_COLUMNS = ["id", "key", "digest", "text", "image", "image_relative", "metadata", "vector"]
MANIFEST_MAGIC = b"LANC"
VERSION_RETENTION = timedelta(minutes=10)
"""Older versions stay this long, for searches that are reading them; every new search reads the newest."""
COMMITS_PER_COMPACTION = 64
"""Commits; each leaves a small file that all later ones have to look at."""

ARROW_TYPES = {"text": pa.string(), "number": pa.float64(), "flag": pa.bool_()}


class LanceStore:
    """See `Store`.

    Args:
        folder: made where it is missing and `write` is set.
        dim: D, the width of the vectors.
        write: whether this process holds the index's lock.

    Raises:
        RetrievalError: the folder holds no readable table.
    """

    def __init__(self, folder: Path, *, dim: int, write: bool):
        self.folder, self.dim, self.write = folder, dim, write
        self._synced: set[Path] = set()
        self._commits = 0
        if write:
            self._drop_torn_versions()
        try:
            self._table: Any = self._open(
                lancedb.connect(folder, read_consistency_interval=timedelta(0))
            )
        except (ValueError, RuntimeError, OSError) as error:
            fix = "Run `vlduet index` on it again: what is there is kept"
            raise RetrievalError(
                f"the store cannot be opened ({_first_line(error)})", place=folder, fix=fix
            ) from error
        if write:
            self._sync()

    def _open(self, database: Any) -> Any:
        try:
            return database.open_table(TABLE_NAME)
        except ValueError:
            if not self.write:
                raise
            return database.create_table(TABLE_NAME, schema=self._schema())

    def _schema(self) -> pa.Schema:
        texts = [pa.field(name, pa.string()) for name in ROW_COLUMNS[:-1]]
        return pa.schema([*texts, pa.field("vector", pa.list_(pa.float32(), self.dim))])

    def read_hashes(self) -> dict[str, RowHashes]:
        """What is there, by id."""
        columns = self._table.search().select(["id", "key", "digest"]).to_arrow().to_pydict()
        found = zip(columns["id"], columns["key"], columns["digest"], strict=True)
        return {identity: RowHashes(key, digest) for identity, key, digest in found}

    def read_vectors(self, ids: Sequence[str]) -> np.ndarray:
        """float32[N, D] of stored ids."""
        if not ids:
            return np.empty((0, self.dim), dtype=np.float32)
        table = self._table.search().where(_one_of("id", ids)).select(["id", "vector"]).to_arrow()
        at = {identity: i for i, identity in enumerate(table["id"].to_pylist())}
        return self._matrix(table)[[at[identity] for identity in ids]]

    def _matrix(self, table: pa.Table) -> np.ndarray:
        flat = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        matrix: np.ndarray = flat.reshape(-1, self.dim).astype(np.float32, copy=False)
        return matrix

    def upsert(self, rows: Sequence[IndexRow], vectors: np.ndarray) -> None:
        """Write rows and their vectors in one commit."""
        assert vectors.shape == (len(rows), self.dim) and self.write
        if not rows:
            return
        wanted = {
            filter_column(name, scalar_kind(value)): scalar_kind(value)
            for row in rows
            for name, value in row.filter_values.items()
        }
        missing = sorted(wanted.keys() - set(self._table.schema.names))
        if missing:
            self._table.add_columns(
                pa.schema([pa.field(name, ARROW_TYPES[wanted[name]]) for name in missing])
            )
        # Without use_index(False) a scalar index on the key makes it update nothing (lancedb #3515).
        merge = (
            self._table.merge_insert("id")
            .when_matched_update_all()
            .when_not_matched_insert_all()
            .use_index(False)
        )
        merge.execute(self._arrow(rows, vectors))
        self._commits += 1
        if self._commits % COMMITS_PER_COMPACTION == 0:
            self._compact()
        self._sync()

    def _arrow(self, rows: Sequence[IndexRow], vectors: np.ndarray) -> pa.Table:
        """All columns of the table: one that is left out would keep its old value in updated rows."""
        filters = [
            {
                filter_column(key, scalar_kind(value)): value
                for key, value in row.filter_values.items()
            }
            for row in rows
        ]
        given: dict[str, list[Any]] = {
            "id": [row.id for row in rows],
            "key": [row.hashes.content_hash for row in rows],
            "digest": [row.hashes.details_hash for row in rows],
            "text": [row.text for row in rows],
            "image": [row.image_path for row in rows],
            "image_relative": [row.relative_image_path for row in rows],
            "metadata": [json.dumps(dict(row.metadata)) for row in rows],
        }
        schema: pa.Schema = self._table.schema
        arrays = []
        for part in schema:
            if part.name == "vector":
                values = pa.array(vectors.astype(np.float32).reshape(-1))
                arrays.append(pa.FixedSizeListArray.from_arrays(values, self.dim))
            else:
                arrays.append(
                    pa.array(
                        given.get(part.name) or [f.get(part.name) for f in filters], type=part.type
                    )
                )
        return pa.table(arrays, names=schema.names)

    def delete(self, ids: Sequence[str]) -> None:
        """Remove rows."""
        assert self.write
        if ids:
            self._table.delete(_one_of("id", ids))
            self._sync()

    def search(
        self, queries: np.ndarray, *, k: int, conditions: Sequence[Condition] = ()
    ) -> list[list[ScoredRow]]:
        """The k best rows for each query."""
        columns = set(self._table.schema.names)
        predicate = " AND ".join(
            f"({condition_to_sql(condition, columns)})" for condition in conditions
        )
        return [self._search_one(query, k, predicate) for query in queries.astype(np.float32)]

    def _search_one(self, query: np.ndarray, k: int, predicate: str) -> list[ScoredRow]:
        limit = k + 16
        while True:
            asked = (
                self._table.search(query, vector_column_name="vector")
                .distance_type("dot")
                .bypass_vector_index()
            )
            if predicate:
                asked = asked.where(predicate, prefilter=True)
            table = asked.select([*ROW_COLUMNS, "_distance"]).limit(limit).to_arrow()
            far = table["_distance"].to_numpy()
            # Ties at the k-th place are settled by id, so all that tie with it must be here.
            if len(far) < limit or far[-1] > far[k - 1] + SCORE_TOLERANCE:
                break
            limit *= 4
        ranked = rank_candidates(query, k, ids=table["id"].to_pylist(), vectors=self._matrix(table))
        rows = (
            table.select(ROW_COLUMNS[:-1]).take([i for i, _ in ranked]).to_pylist()
            if ranked
            else []
        )
        return [ScoredRow(_row(row), score) for row, (_, score) in zip(rows, ranked, strict=True)]

    def count(self) -> int:
        """Rows."""
        return int(self._table.count_rows())

    def close(self) -> None:
        """Join the small files that many commits left."""
        if self.write:
            self._compact()
            self._sync()

    def _compact(self) -> None:
        self._table.optimize(cleanup_older_than=VERSION_RETENTION)

    def _sync(self) -> None:
        """LanceDB writes without fsync: bring every file it made since the last call to the disk."""
        now = {
            path for path in self.folder.rglob("*") if path.suffix != ".json"
        }  # a mere hint, written over
        new = now - self._synced
        fsync_paths(new | {path.parent for path in new})
        self._synced = now

    def _drop_torn_versions(self) -> None:
        """A version that a power loss cut short hides the whole table; the one before it is complete."""
        for manifest in self.folder.glob(f"{TABLE_NAME}.lance/_versions/*.manifest"):
            with manifest.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - len(MANIFEST_MAGIC)))
                if file.read() != MANIFEST_MAGIC:
                    logging.getLogger(__name__).warning(
                        "dropped a half-written version: %s", manifest
                    )
                    manifest.unlink()


def _row(raw: dict[str, Any]) -> IndexRow:
    stamp = RowHashes(raw["key"], raw["digest"])
    return IndexRow(
        raw["id"],
        stamp,
        raw["text"],
        raw["image"],
        raw["image_relative"],
        json.loads(raw["metadata"]),
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def filter_column(key: str, form: str) -> str:
    """The column of a metadata key: distinct keys have distinct names, made of a-z, 0-9 and _ only."""
    return f"{form}__" + re.sub(r"[^a-z0-9]", lambda match: f"_{ord(match[0]):x}_", key)


def condition_to_sql(condition: Condition, columns: set[str]) -> str:
    """A condition as a predicate over the table's columns; keys and values can spell no SQL of their own."""

    def tests(value: Scalar) -> str:
        name = filter_column(condition.key, scalar_kind(value))
        if name not in columns:
            return "false"
        sign = condition.operator if condition.operator in ORDER_OPERATORS else "="
        return f"({name} IS NOT NULL AND {name} {sign} {sql_literal(value)})"

    found = " OR ".join(map(tests, condition.values)) or "false"
    return f"NOT ({found})" if condition.operator == "!=" else found


def sql_literal(value: Scalar) -> str:
    """A value as an SQL literal. Only the quote is special inside one, and is doubled."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"CAST('{value!r}' AS DOUBLE)"
    return "'" + value.replace("'", "''") + "'"


def _one_of(name: str, values: Sequence[str]) -> str:
    return f"{name} IN ({', '.join(map(sql_literal, values))})"
