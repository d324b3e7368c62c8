"""GET /v1/index: what the served index holds, and the metadata that it can be filtered by."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, Field

from vlduet.errors import DataError
from vlduet.retrieval.documents import Side
from vlduet.retrieval.fields import describe_fields
from vlduet.retrieval.index import Index, IndexManifest
from vlduet.serve.resources import Resources


class IndexField(BaseModel):
    """Metadata key that `where` can test."""

    name: str
    type: Literal[
        "text",
        "date",
        "number",
        "flag",
        "mixed",
        "text list",
        "number list",
        "flag list",
        "mixed list",
    ] = Field(description="Kind of its values. Conditions on lists use `contains`.")
    values: list[str | float | bool] | None = Field(
        None, description="All values, if they are few and of one kind."
    )


class IndexObject(BaseModel):
    """Response of GET /v1/index."""

    object: Literal["index"]
    documents: int = Field(description="Number of documents.")
    side: Side = Field(description="What of a record is a document.")
    fields: list[IndexField]


def make_router(resources: Resources) -> APIRouter:
    """Return the route of this file."""
    router = APIRouter()
    # The description of the last version: to read all values takes long in a large index.
    cached: list[tuple[IndexManifest, dict[str, Any]]] = []

    def describe_index(index: Index) -> dict[str, Any]:
        """Return the response for the version of the index that is open now."""
        manifest = index.manifest
        if not cached or cached[0][0] is not manifest:
            cached[:] = [(manifest, _describe(index))]
        return cached[0][1]

    @router.get(
        "/v1/index",
        response_model=IndexObject,
        response_model_exclude_none=True,
        tags=["Search"],
    )
    async def get_index() -> dict[str, Any]:
        """Return the size of the index, and the fields of its metadata with their values."""
        try:
            resources.require_index()
        except DataError as error:
            raise HTTPException(404, str(error)) from None
        return await resources.query_index(describe_index)

    return router


def _describe(index: Index) -> dict[str, Any]:
    """Return an index as the fields of `IndexObject`."""
    fields = [
        {"name": field.name, "type": field.type, "values": field.values}
        for field in describe_fields(index)
    ]
    common = {"object": "index", "documents": index.count(), "side": index.manifest.side}
    return common | {"fields": fields}
