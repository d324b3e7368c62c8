"""Metadata fields of an index as a user chooses filters from them: names, types and values."""

from __future__ import annotations

from dataclasses import dataclass

from vlduet.retrieval.filter_values import LIST_SUFFIX, Scalar
from vlduet.retrieval.index import Index

MAX_LISTED_VALUES = 100
"""Number of different values up to which all values of a field are listed."""
MAX_VALUE_CHARS = 100
"""Length of a text beyond which a field holds prose, whose values are not listed."""
MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class MetadataField:
    """One metadata key that an index can be filtered by."""

    name: str
    type: str
    """Kind of its values ("text", "date", "number", "flag"), "mixed" for several kinds, or one of
    these with " list" if documents have lists."""
    values: tuple[Scalar, ...] | None
    """All values in order; None if there are more than `MAX_LISTED_VALUES`, one is longer than
    `MAX_VALUE_CHARS`, or the kinds are mixed. Those of lists are their items, those of dates their
    texts."""


def describe_fields(index: Index) -> list[MetadataField]:
    """Return the fields that an index can be filtered by, in the order of their first documents.

    Each column is read until it has too many values to list. Raises RetrievalError if the store
    cannot be read.
    """
    return [
        MetadataField(name, _join_kinds(kinds), _list_values(index, name, kinds))
        for name, kinds in index.manifest.fields.items()
    ]


def _join_kinds(kinds: list[str]) -> str:
    """Return the type of a field whose values have these kinds."""
    if len(kinds) == 1:
        return kinds[0]
    has_lists = any(kind.endswith(LIST_SUFFIX) for kind in kinds)
    return MIXED + (LIST_SUFFIX if has_lists else "")


def _list_values(index: Index, name: str, kinds: list[str]) -> tuple[Scalar, ...] | None:
    """Return the values of a field as `MetadataField.values`."""
    if len(kinds) != 1:
        return None
    # The column of dates holds seconds; their texts are in another.
    kind = "text" if kinds[0] == "date" else kinds[0]
    values = index.store.read_distinct_values(name, kind, limit=MAX_LISTED_VALUES)
    if values is None or any(isinstance(v, str) and len(v) > MAX_VALUE_CHARS for v in values):
        return None
    return tuple(values)
