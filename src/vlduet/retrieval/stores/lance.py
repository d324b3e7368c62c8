"""Vector store in a local LanceDB folder. The only file that imports lancedb.

Without a search index every row is compared. With one, IVF_FLAT, the vectors are grouped by k-means
and a search compares the groups that are nearest to the query, and all rows that were written since
the search index; scores are exact in both cases. Metadata is stored twice, as JSON to return and as
typed columns to filter by. LanceDB's threads do not survive a fork, so processes that search must
be started with the spawn method.
"""

from __future__ import annotations

import json
import logging
import math
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
from vlduet.retrieval.filter_values import Scalar, column_values
from vlduet.retrieval.filters import Condition
from vlduet.retrieval.stores.base import (
    MIN_ROWS_FOR_APPROXIMATE_SEARCH,
    SCORE_TOLERANCE,
    ApproximateMode,
    IndexRow,
    RowHashes,
    ScoredRow,
    rank_candidates,
)
from vlduet.retrieval.stores.lancedb_import import import_lancedb
from vlduet.retrieval.stores.sql import conditions_to_sql, filter_column, ids_to_sql
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
"""Number of commits after which files are merged, if they hold a quarter of the rows."""
MAX_COMMITS_PER_COMPACTION = 256
"""Number of commits after which files are merged in any case: reads open the file of each."""
MAX_FILES_LEFT = 32
"""Number of files that are left unmerged by an update of less than a quarter of the rows."""
MAX_SCANNED_ROWS = 5000
"""Number of rows that match a filter up to which only these are read and compared."""
NUM_PROBES = 40
"""Number of groups that an approximate search compares at least."""
MAX_K_OF_FEW_PROBES = 100
"""Number of hits above which an approximate search compares as many groups as LanceDB finds
useful."""
MAX_UNINDEXED_SHARE = 0.05
"""Share of rows that the search index may lack before it is brought up to date."""
MAX_GROWTH = 2.0
"""Growth of the number of rows after which the groups of the search index are computed anew."""
MAX_IDS_IN_SQL = 1000
"""Number of ids that are selected by SQL; for more the whole table is read."""
ARROW_TYPES = {
    "text": pa.string(),
    "number": pa.float64(),
    "flag": pa.bool_(),
    "date": pa.float64(),
    "text list": pa.list_(pa.string()),
    "number list": pa.list_(pa.float64()),
    "flag list": pa.list_(pa.bool_()),
}
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
        self._num_commits = self._num_written = 0
        self._ids: set[str] | None = None
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

    def read_ids(self) -> set[str]:
        """Return the ids of all stored rows.

        A store that is open for writing reads them once and keeps this set up to date.
        """
        if self._ids is not None:
            return self._ids
        with self._translate_errors():
            ids = set(self._table.search().select(["id"]).to_arrow()["id"].to_pylist())
        if self.write:
            self._ids = ids
        return ids

    def read_vectors(self, ids: Sequence[str]) -> np.ndarray:
        """Return the vectors of stored ids in the given order, float32[N, D]; N may be 0.

        Raises KeyError for an unknown id.
        """
        if not ids:
            return np.empty((0, self.dim), dtype=np.float32)
        request = self._table.search()
        if len(ids) <= MAX_IDS_IN_SQL:
            request = request.where(ids_to_sql(ids))
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

        Replaced rows are deleted in a commit of their own before all rows are added in another; an
        interruption between both loses rows, which `read_hashes` shows. Both are durable on return,
        and their time does not depend on the number of stored rows. Filter columns that the table
        lacks are added first. After many commits files are merged. Nothing is done without rows.
        Raises AssertionError for another shape, and if the store is not open for writing.
        """
        assert vectors.shape == (len(rows), self.dim) and self.write
        if not rows:
            return
        columns = {}
        for row in rows:
            for key, value in row.filter_values.items():
                for kind in column_values(value):
                    columns[filter_column(key, kind)] = ARROW_TYPES[kind]
        new_columns = sorted(columns.keys() - set(self._table.schema.names))
        if new_columns:
            schema = pa.schema([pa.field(name, columns[name]) for name in new_columns])
            with self._translate_errors():
                self._table.add_columns(schema)
        # LanceDB's merge_insert compares the ids of all stored rows.
        stored_ids = self.read_ids()
        replaced = [row.id for row in rows if row.id in stored_ids]
        new_rows = self._to_arrow(rows, vectors)
        with self._translate_errors():
            if replaced:
                self._table.delete(ids_to_sql(replaced))
            self._table.add(new_rows)
        stored_ids.update(row.id for row in rows)
        self._num_commits += 1
        self._num_written += len(rows)
        is_large_part = 4 * self._num_written >= len(stored_ids)
        if self._num_commits >= (
            COMMITS_PER_COMPACTION if is_large_part else MAX_COMMITS_PER_COMPACTION
        ):
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
                for kind, form in column_values(value).items():
                    columns[filter_column(key, kind)][i] = form
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
                self._table.delete(ids_to_sql(ids))
            self.read_ids().difference_update(ids)
            self._num_written += len(ids)
            self._sync_files()

    def read_rows(self, ids: Sequence[str]) -> list[IndexRow]:
        """Return the rows of ids, in any order, without those of unknown ids."""
        if not ids:
            return []
        request = self._table.search().where(ids_to_sql(ids)).select(ROW_COLUMNS)
        with self._translate_errors():
            columns = request.to_arrow().to_pylist()
        return list(map(_parse_row, columns))

    def read_distinct_values(self, key: str, kind: str, *, limit: int) -> list[Scalar] | None:
        """Return the sorted values of one kind of a metadata key; None for more than `limit`.

        Those of the kind of a list are its items. [] for a key or a kind that no row has.
        """
        column = filter_column(key, kind)
        if column not in self._table.schema.names:
            return []
        values: set[Scalar] = set()
        with self._translate_errors():
            request = self._table.search().where(f"{column} IS NOT NULL").select([column])
            for batch in request.to_batches():
                array = batch.column(0)
                items = array.flatten() if isinstance(array, pa.ListArray) else array
                values.update(items.unique().to_pylist())
                if len(values) > limit:
                    return None
        return sorted(values)

    def search(
        self,
        queries: np.ndarray,
        *,
        k: int,
        conditions: Sequence[Condition] = (),
        exact: bool = False,
    ) -> list[list[ScoredRow]]:
        """Return for each query of float32[Q, D] the `k` nearest rows that satisfy all conditions.

        Rows come best first, ties in the order of ids; fewer than `k` if fewer rows match. With a
        search index, some of the nearest rows may be missing, unless `exact` is set or few rows
        satisfy the conditions.
        """
        predicate = conditions_to_sql(conditions, set(self._table.schema.names))
        is_exact = exact or self._search_index() is None
        return [
            self._search_query(query, k, predicate, is_exact)
            for query in queries.astype(np.float32)
        ]

    def _search_query(
        self, query: np.ndarray, k: int, predicate: str, is_exact: bool
    ) -> list[ScoredRow]:
        """Return the `k` >= 1 nearest rows of a query float32[D] that satisfy an SQL predicate.

        Rows come best first, ties in the order of ids; fewer than `k` if fewer rows match. An empty
        predicate holds for all rows. Without `is_exact` the search index is used.
        """
        limit = k + 16
        table = self._read_matching_rows(predicate)
        while table is None:
            candidates = self._find_candidates(query, limit, predicate, is_exact)
            distances = candidates["_distance"].to_numpy()
            # Ties at the k-th place are resolved by id, so every row that ties with it is needed.
            if len(distances) < limit or distances[-1] > distances[k - 1] + SCORE_TOLERANCE:
                table = candidates
            limit *= 4
        ids = table["id"].to_pylist()
        ranking = rank_candidates(query, k, ids=ids, vectors=self._vector_matrix(table))
        if not ranking:
            return []
        stored_rows = table.select(ROW_COLUMNS).take([position for position, _ in ranking])
        scores = [score for _, score in ranking]
        return list(map(ScoredRow, map(_parse_row, stored_rows.to_pylist()), scores))

    def _read_matching_rows(self, predicate: str) -> pa.Table | None:
        """Return the rows that satisfy an SQL predicate if they are few, else None.

        To read these rows is faster than to search all rows and more accurate than a search index,
        whose nearest groups may hold none of them. None for an empty predicate.
        """
        if not predicate:
            return None
        with self._translate_errors():
            if self._table.count_rows(predicate) > MAX_SCANNED_ROWS:
                return None
            request = self._table.search().where(predicate)
            return request.select([*ROW_COLUMNS, "vector"]).to_arrow()

    def _find_candidates(
        self, query: np.ndarray, limit: int, predicate: str, is_exact: bool
    ) -> pa.Table:
        """Return the `limit` nearest rows that satisfy an SQL predicate, nearest first.

        The table has the columns `ROW_COLUMNS`, ``vector`` and ``_distance``. Arguments are those
        of `_search_query`.
        """
        request = self._table.search(query, vector_column_name="vector").distance_type("dot")
        if is_exact:
            request = request.bypass_vector_index()
        else:
            request = request.minimum_nprobes(NUM_PROBES)
            is_simple = limit <= MAX_K_OF_FEW_PROBES and not predicate
            request = request.maximum_nprobes(NUM_PROBES if is_simple else 0)  # 0: no limit
        if predicate:
            request = request.where(predicate, prefilter=True)
        with self._translate_errors():
            return request.select([*ROW_COLUMNS, "vector", "_distance"]).limit(limit).to_arrow()

    def has_search_index(self) -> bool:
        """Return whether searches are approximate unless they ask for exactness."""
        return self._search_index() is not None

    def _search_index(self) -> Any:
        """Return LanceDB's description of the search index; None without one."""
        with self._translate_errors():
            indices = self._table.list_indices()
        return next((index for index in indices if index.columns == ["vector"]), None)

    def update_search_index(self, mode: ApproximateMode) -> None:
        """Build the index for approximate search, bring it up to date, or remove it.

        Raises AssertionError if the store is not open for writing.

        Args:
            mode: "auto" builds one for more than `MIN_ROWS_FOR_APPROXIMATE_SEARCH` rows and keeps
                an existing one up to date; "on" does so for any number of rows; "off" removes it.
        """
        assert self.write
        from lancedb.index import BTree

        index, num_rows = self._search_index(), self.count()
        is_large = num_rows > MIN_ROWS_FOR_APPROXIMATE_SEARCH
        with self._translate_errors():
            if is_large and not any(i.columns == ["id"] for i in self._table.list_indices()):
                # Without it, the time to replace rows grows with their number.
                self._table.create_index("id", config=BTree())
            if mode == "off" or num_rows == 0:
                if index is not None:
                    self._table.drop_index(index.name)
            elif index is not None or is_large or mode == "on":
                self._refresh_search_index(index, num_rows)
        self._sync_files()

    def _refresh_search_index(self, index: Any, num_rows: int) -> None:
        """Add rows to a search index, or compute it anew if there is none or it is outgrown.

        `index` is LanceDB's description of it, or None, and `num_rows` > 0 the number of rows.
        """
        from lancedb.index import IvfFlat

        # The name tells how many groups there are, and thereby how many rows there were.
        num_groups = 0 if index is None else int(index.name.rpartition("_")[2])
        if index is not None and num_rows <= MAX_GROWTH * (num_groups + 1) ** 2:
            if index.num_unindexed_rows > MAX_UNINDEXED_SHARE * num_rows:
                self._compact()
            return
        self._compact()
        num_groups = math.isqrt(num_rows)
        config = IvfFlat(distance_type="dot", num_partitions=num_groups)
        self._table.create_index("vector", config=config, name=f"vector_{num_groups}")
        if index is not None:
            self._table.drop_index(index.name)

    def count(self) -> int:
        """Return the number of stored rows."""
        with self._translate_errors():
            return int(self._table.count_rows())

    def close(self) -> None:
        """Merge the files that many writes left; do nothing in a store that only reads.

        Files stay as they are after an update of a small part of the rows, unless there are many.
        """
        if self.write:
            with self._translate_errors():
                num_files = self._table.stats()["fragment_stats"]["num_fragments"]
            is_large_part = self._num_written > 0 and 4 * self._num_written >= self.count()
            if is_large_part or num_files > MAX_FILES_LEFT:
                self._compact()
                self._sync_files()

    def _compact(self) -> None:
        """Merge files, delete old versions, and add new rows to the search index."""
        with self._translate_errors():
            self._table.optimize(cleanup_older_than=VERSION_RETENTION)
        self._num_commits = self._num_written = 0

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
