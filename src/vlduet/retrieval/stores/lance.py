"""Vector store in a local LanceDB folder. The only file that imports lancedb.

Search is exact: no approximate vector index is ever built. Metadata is stored twice, as JSON to
return and as typed columns to filter by. LanceDB's threads do not survive a fork, so processes that
search must be started with the spawn method.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlduet.errors import RetrievalError
from vlduet.files import fsync_paths
from vlduet.library_errors import translate_library_errors
from vlduet.retrieval.filters import ORDER_OPERATORS, Condition, Scalar, scalar_kind
from vlduet.retrieval.stores.base import (
    SCORE_TOLERANCE,
    IndexRow,
    RowHashes,
    ScoredRow,
    rank_candidates,
)
from vlduet.retrieval.stores.lancedb_import import import_lancedb
from vlduet.structured_files import parse_json

logger = logging.getLogger("vlduet")

TABLE_NAME = "rows"
ROW_COLUMNS = ["id", "key", "digest", "text", "image", "image_relative", "metadata"]
"""Columns that every row has besides `vector` and the filter columns; part of the file format."""
MANIFEST_MAGIC = b"LANC"
"""Last bytes of a complete version manifest of Lance."""
VERSION_RETENTION = timedelta(minutes=10)
"""Time that older versions are kept for searches that still read them."""
COMMITS_PER_COMPACTION = 64
"""Number of commits after which files are merged; each commit adds a file that reads open."""
MAX_IDS_IN_SQL = 1000
"""Number of ids that are selected by SQL; for more the whole table is read."""
ARROW_TYPES = {"text": pa.string(), "number": pa.float64(), "flag": pa.bool_()}
"""Arrow type of a filter column by kind of value."""


class LanceStore:
    """Vector store that keeps its rows on disk in LanceDB; implements `VectorStore`.

    Args:
        folder: folder of the database; LanceDB creates it if it is missing.
        dim: D, the width of the vectors.
        write: whether this process holds the lock of the index and may write.

    Raises:
        RetrievalError: the folder holds no readable table.
    """

    def __init__(self, folder: Path, *, dim: int, write: bool):
        """Open the database, and with `write` repair it, or create its table if it is missing.

        The repair deletes incomplete versions, and all files are then flushed to the disk. Without
        `write` nothing is changed but that LanceDB creates a missing folder. Raises RetrievalError
        if the table cannot be read, or is missing without `write`.
        """
        self.folder, self.dim, self.write = folder, dim, write
        self._synced_paths: set[Path] = set()
        self._num_commits = 0
        if write:
            self._remove_incomplete_versions()
        try:
            database = import_lancedb().connect(folder, read_consistency_interval=timedelta(0))
            self._table: Any = self._open_table(database)
        except (ValueError, RuntimeError, OSError) as error:
            reason = str(error).partition("\n")[0][:200]
            fix = "Run `vlduet index` on it again: stored rows are kept"
            message = f"the store cannot be opened ({reason})"
            raise RetrievalError(message, place=folder, fix=fix) from error
        width = getattr(self._table.schema.field("vector").type, "list_size", None)
        if width != dim:
            message = f"'dim' is {dim} in the manifest, the vectors have {width}"
            fix = "Copy the index again, or delete it and build it again"
            raise RetrievalError(message, place=folder, fix=fix)
        if write:
            self._sync_files()

    def _open_table(self, database: Any) -> Any:
        """Return the table of rows; create it if it is missing and the store is for writing.

        Raises ValueError for a missing table if the store only reads.
        """
        try:
            return database.open_table(TABLE_NAME)
        except ValueError:
            if not self.write:
                raise
            fields = [pa.field(name, pa.string()) for name in ROW_COLUMNS]
            vector = pa.field("vector", pa.list_(pa.float32(), self.dim))
            return database.create_table(TABLE_NAME, schema=pa.schema([*fields, vector]))

    def read_hashes(self) -> dict[str, RowHashes]:
        """Return the hashes of every stored row by id."""
        with self._translate_errors():
            columns = self._table.search().select(["id", "key", "digest"]).to_arrow().to_pydict()
        hashes = map(RowHashes, columns["key"], columns["digest"])
        return dict(zip(columns["id"], hashes, strict=True))

    def read_vectors(self, ids: Sequence[str]) -> np.ndarray:
        """Return the vectors of stored ids in the given order, float32[N, D]; N may be 0.

        Raises KeyError for an unknown id.
        """
        if not ids:
            return np.empty((0, self.dim), dtype=np.float32)
        request = self._table.search()
        if len(ids) <= MAX_IDS_IN_SQL:
            request = request.where(_id_predicate(ids))
        with self._translate_errors():
            table = request.select(["id", "vector"]).to_arrow()
        positions = {identity: i for i, identity in enumerate(table["id"].to_pylist())}
        return self._vector_matrix(table)[[positions[identity] for identity in ids]]

    def _vector_matrix(self, table: pa.Table) -> np.ndarray:
        """Return the vector column of an Arrow table as float32[N, D]."""
        values = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        matrix: np.ndarray = values.reshape(-1, self.dim).astype(np.float32, copy=False)
        return matrix

    def upsert(self, rows: Sequence[IndexRow], vectors: np.ndarray) -> None:
        """Insert rows of distinct ids and their unit vectors float32[N, D], or replace them.

        All rows are one durable commit; nothing is done without rows. Filter columns that the table
        lacks are added first. Every `COMMITS_PER_COMPACTION`-th commit merges the files. Raises
        AssertionError for another shape, and if the store is not open for writing.
        """
        assert vectors.shape == (len(rows), self.dim) and self.write
        if not rows:
            return
        columns = {}
        for row in rows:
            for key, value in row.filter_values.items():
                columns[filter_column(key, scalar_kind(value))] = ARROW_TYPES[scalar_kind(value)]
        new_columns = sorted(columns.keys() - set(self._table.schema.names))
        if new_columns:
            schema = pa.schema([pa.field(name, columns[name]) for name in new_columns])
            with self._translate_errors():
                self._table.add_columns(schema)
        merge = self._table.merge_insert("id").when_matched_update_all()
        # Without use_index(False) a scalar index on the id makes it update nothing (lancedb #3515).
        merge = merge.when_not_matched_insert_all().use_index(False)
        new_rows = self._to_arrow(rows, vectors)
        with self._translate_errors():
            merge.execute(new_rows)
        self._num_commits += 1
        if self._num_commits % COMMITS_PER_COMPACTION == 0:
            self._compact()
        self._sync_files()

    def _to_arrow(self, rows: Sequence[IndexRow], vectors: np.ndarray) -> pa.Table:
        """Return rows and vectors as an Arrow table with every column of the stored table.

        Values that a row lacks are null: a column that is left out would keep its old value in
        replaced rows. Raises KeyError if the stored table lacks the column of a filter value.
        """
        columns: dict[str, list[Any]] = {
            "id": [row.id for row in rows],
            "key": [row.hashes.content_hash for row in rows],
            "digest": [row.hashes.details_hash for row in rows],
            "text": [row.text for row in rows],
            "image": [row.image_path for row in rows],
            "image_relative": [row.relative_image_path for row in rows],
            "metadata": [json.dumps(dict(row.metadata)) for row in rows],
        }
        schema: pa.Schema = self._table.schema
        for name in schema.names:
            columns.setdefault(name, [None] * len(rows))
        for i, row in enumerate(rows):
            for key, value in row.filter_values.items():
                columns[filter_column(key, scalar_kind(value))][i] = value
        arrays = []
        for field in schema:
            if field.name == "vector":
                values = pa.array(vectors.astype(np.float32).reshape(-1))
                arrays.append(pa.FixedSizeListArray.from_arrays(values, self.dim))
            else:
                arrays.append(pa.array(columns[field.name], type=field.type))
        return pa.table(arrays, names=schema.names)

    def delete(self, ids: Sequence[str]) -> None:
        """Remove rows; ignore unknown ids; durable on return.

        Raises AssertionError if the store is not open for writing.
        """
        assert self.write
        if ids:
            with self._translate_errors():
                self._table.delete(_id_predicate(ids))
            self._sync_files()

    def read_row(self, row_id: str) -> IndexRow | None:
        """Return the row of an id, or None if there is none."""
        request = self._table.search().where(_id_predicate([row_id]))
        with self._translate_errors():
            rows = request.select(ROW_COLUMNS).limit(1).to_arrow().to_pylist()
        return _parse_row(rows[0]) if rows else None

    def search(
        self,
        queries: np.ndarray,
        *,
        k: int,
        conditions: Sequence[Condition] = (),
        exact: bool = False,
    ) -> list[list[ScoredRow]]:
        """Return for each query of float32[Q, D] the `k` nearest rows that satisfy all conditions.

        Rows come best first, ties in the order of ids; fewer than `k` if fewer rows match.
        """
        columns = set(self._table.schema.names)
        predicate = " AND ".join(f"({condition_to_sql(c, columns)})" for c in conditions)
        return [self._search_query(query, k, predicate) for query in queries.astype(np.float32)]

    def _search_query(self, query: np.ndarray, k: int, predicate: str) -> list[ScoredRow]:
        """Return the `k` >= 1 nearest rows of a query float32[D] that satisfy an SQL predicate.

        Rows come best first, ties in the order of ids; fewer than `k` if fewer rows match. An empty
        predicate holds for all rows.
        """
        limit = k + 16
        while True:
            request = self._table.search(query, vector_column_name="vector")
            request = request.distance_type("dot").bypass_vector_index()
            if predicate:
                request = request.where(predicate, prefilter=True)
            columns = [*ROW_COLUMNS, "vector", "_distance"]
            with self._translate_errors():
                table = request.select(columns).limit(limit).to_arrow()
            distances = table["_distance"].to_numpy()
            # Ties at the k-th place are resolved by id, so every row that ties with it is needed.
            if len(distances) < limit or distances[-1] > distances[k - 1] + SCORE_TOLERANCE:
                break
            limit *= 4
        ids = table["id"].to_pylist()
        ranking = rank_candidates(query, k, ids=ids, vectors=self._vector_matrix(table))
        if not ranking:
            return []
        stored_rows = table.select(ROW_COLUMNS).take([position for position, _ in ranking])
        scores = [score for _, score in ranking]
        return list(map(ScoredRow, map(_parse_row, stored_rows.to_pylist()), scores))

    def count(self) -> int:
        """Return the number of stored rows."""
        with self._translate_errors():
            return int(self._table.count_rows())

    def close(self) -> None:
        """Merge the files that many writes left; do nothing in a store that only reads."""
        if self.write:
            self._compact()
            self._sync_files()

    def _compact(self) -> None:
        with self._translate_errors():
            self._table.optimize(cleanup_older_than=VERSION_RETENTION)

    def _translate_errors(self) -> AbstractContextManager[None]:
        """Turn what LanceDB raises in a block into a RetrievalError at the folder."""
        fix = "Copy the index again, or delete it and build it again"
        return translate_library_errors(
            self.folder, error_class=RetrievalError, subject="index", fix=fix
        )

    def _sync_files(self) -> None:
        """Flush files created since the last call, and their folders, to disk.

        LanceDB itself writes without fsync. Files ``.json`` are not flushed. Updates
        `_synced_paths`.
        """
        # A .json file is only a hint about the newest version and is overwritten in place.
        paths = {path for path in self.folder.rglob("*") if path.suffix != ".json"}
        new_paths = paths - self._synced_paths
        fsync_paths(new_paths | {path.parent for path in new_paths})
        self._synced_paths = paths

    def _remove_incomplete_versions(self) -> None:
        """Delete version manifests that a power loss cut short, and log a warning for each.

        They hide the whole table. An older version is the newest one then.
        """
        for manifest in self.folder.glob(f"{TABLE_NAME}.lance/_versions/*.manifest"):
            with manifest.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - len(MANIFEST_MAGIC)))
                if file.read() != MANIFEST_MAGIC:
                    logger.warning("removed an incomplete version of the index: %s", manifest)
                    manifest.unlink()


def _parse_row(columns: dict[str, Any]) -> IndexRow:
    """Return the row that the values of `ROW_COLUMNS` describe."""
    return IndexRow(
        id=columns["id"],
        hashes=RowHashes(columns["key"], columns["digest"]),
        text=columns["text"],
        image_path=columns["image"],
        relative_image_path=columns["image_relative"],
        metadata=parse_json(
            columns["metadata"],
            place=f"index row {columns['id']}",
            error_class=RetrievalError,
            fix="Delete the index and build it again",
        ),
    )


def filter_column(key: str, kind: str) -> str:
    """Return the column of a metadata key and a kind; distinct for distinct keys, of [a-z0-9_]."""
    return f"{kind}__" + re.sub(r"[^a-z0-9]", lambda match: f"_{ord(match[0]):x}_", key)


def condition_to_sql(condition: Condition, columns: set[str]) -> str:
    """Return a condition as an SQL predicate on the filter columns among `columns`.

    A value whose column is not in `columns` equals no row; without any column the predicate is
    ``false``, and ``NOT (false)`` for ``!=``. A row without the key satisfies only ``!=``. Keys and
    values are encoded, so that no SQL can be injected through them.
    """
    operator = condition.operator if condition.operator in ORDER_OPERATORS else "="
    comparisons = []
    for value in condition.values:
        column = filter_column(condition.key, scalar_kind(value))
        if column in columns:
            comparison = f"{column} {operator} {sql_literal(value)}"
            comparisons.append(f"({column} IS NOT NULL AND {comparison})")
    predicate = " OR ".join(comparisons) or "false"
    return f"NOT ({predicate})" if condition.operator == "!=" else predicate


def sql_literal(value: Scalar) -> str:
    """Return a value as an SQL literal: ``true``, ``CAST('1.5' AS DOUBLE)`` or a quoted text.

    A quote in a text, the only special character, is doubled.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"CAST('{value!r}' AS DOUBLE)"
    return "'" + value.replace("'", "''") + "'"


def _id_predicate(ids: Sequence[str]) -> str:
    return f"id IN ({', '.join(map(sql_literal, ids))})"
