"""GET /health and /v1/models: the state of the server, and the one model that it serves."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from vlduet.errors import DataError
from vlduet.serve.resources import Resources


class Health(BaseModel):
    """Response of GET /health."""

    status: Literal["ok"]


class ModelCapabilities(BaseModel):
    """Endpoints that work with the model and the index of this server."""

    chat: bool = Field(description="Whether the model generates: POST /v1/chat/completions.")
    search: bool = Field(description="Whether an index is served: POST /v1/search.")


class ModelObject(BaseModel):
    """Model in OpenAI's format."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    capabilities: ModelCapabilities


class ModelList(BaseModel):
    """Response of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelObject]


def make_router(resources: Resources) -> APIRouter:
    """Return the routes of this file."""
    router = APIRouter(tags=["Models"])
    capabilities = {"chat": resources.worker.can_generate, "search": _has_index(resources)}
    model = {"id": resources.name, "object": "model", "created": resources.created}
    model |= {"owned_by": "vlduet", "capabilities": capabilities}

    @router.get("/health", response_model=Health)
    async def get_health() -> dict[str, Any]:
        """Answer that the server is running and has loaded its model."""
        return {"status": "ok"}

    @router.get("/v1/models", response_model=ModelList)
    async def list_models() -> dict[str, Any]:
        """Return the list of models, which is the one model of this server."""
        return {"object": "list", "data": [model]}

    @router.get("/v1/models/{name:path}", response_model=ModelObject)
    async def get_model(name: str) -> dict[str, Any]:
        """Return the model of the name in the path, or status 404."""
        resources.check_model_name(name)
        return model

    return router


def _has_index(resources: Resources) -> bool:
    """Return whether the server has an index."""
    try:
        resources.require_index()
    except DataError:
        return False
    return True
