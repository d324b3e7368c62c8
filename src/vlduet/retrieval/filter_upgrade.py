"""Filter columns of an index that an earlier version of vlduet built."""

from __future__ import annotations

from dataclasses import replace

from vlduet.logs import logger, track_progress
from vlduet.retrieval.encode import batched
from vlduet.retrieval.filter_values import extract_filter_values
from vlduet.retrieval.stores.base import VectorStore

ROWS_PER_WRITE = 1000


def upgrade_filter_columns(store: VectorStore, fields: dict[str, list[str]]) -> None:
    """Store the dates, lists and numbers of all rows in the columns of this version.

    They are taken from the metadata that every row has; nothing is embedded. An interrupted upgrade
    can be repeated.

    Args:
        store: store that is open for writing.
        fields: kinds of the values of each key; computed anew, in place.
    """
    ids = sorted(store.read_ids())
    fields.clear()
    if ids:
        logger.info("the index is from an earlier version: its filters are being renewed")
    for chunk in batched(track_progress(ids, label="renew"), ROWS_PER_WRITE):
        rows = store.read_rows(chunk)
        vectors = store.read_vectors([row.id for row in rows])
        renewed = [
            replace(row, filter_values=extract_filter_values(row.metadata, fields)) for row in rows
        ]
        store.upsert(renewed, vectors)
