"""HTTP application: requests become work for the one worker, and its results become responses.

Each endpoint is a file in `routes`. /openapi.json describes all of them, and /docs shows them. The
web page at / is in `page`.
`server` adds what a network needs: limits of bodies and connections, keys, host names, metrics.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException

from vlduet import __version__
from vlduet.errors import ModelError, VLDuetError
from vlduet.retrieval.index import Index
from vlduet.serve.asgi import error_content
from vlduet.serve.content import UrlLoader
from vlduet.serve.openapi import ERROR_RESPONSES, PAGE_HEADERS, TITLE, make_document, render_page
from vlduet.serve.resources import Resources
from vlduet.serve.routes import (
    chat,
    classify,
    embeddings,
    images,
    index,
    models,
    page,
    rerank,
    search,
)
from vlduet.serve.validation import describe_mistake
from vlduet.serve.worker import ServerBusyError, Worker

ROUTES = (models, embeddings, chat, search, rerank, classify, index, images, page)
"""Files of the endpoints, in the order of the documentation."""
ROUTER_ERRORS = {
    (404, "Not Found"): "There is no such path. /docs shows those that exist",
    (405, "Method Not Allowed"): "This path needs another method. /docs shows which",
}
"""Our text of the errors that the framework raises by itself."""
BODIES = (
    embeddings.EmbeddingsBody,
    chat.ChatBody,
    search.SearchBody,
    rerank.RerankBody,
    classify.ClassifyBody,
)
"""Bodies that the endpoints read by themselves."""


class Service:
    """A model, and optionally an index that it built, behind the endpoints of `routes`.

    Args:
        worker: worker that owns the model.
        name: name under which clients know the model.
        index: index to search; must be built by the same model.
        strict: whether fields of requests that this server does not know are always refused.
        load_url: function for images at http(s) URLs (see `content.UrlLoader`); None refuses them.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        name: str,
        index: Index | None = None,
        strict: bool = False,
        load_url: UrlLoader | None = None,
    ):
        self.worker = worker
        self.resources = Resources(worker, name=name, index=index, strict=strict, load_url=load_url)

    def build_app(self) -> FastAPI:
        """Return the ASGI application with all endpoints.

        Errors of an endpoint become JSON responses in OpenAI's format (see `_handle_error`).
        """
        errors = [VLDuetError, HTTPException, RequestValidationError, ServerBusyError]
        handlers: dict[Any, Any] = dict.fromkeys([*errors, Exception], _handle_error)
        app = FastAPI(
            title=TITLE,
            version=__version__,
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            redirect_slashes=False,
            exception_handlers=handlers,
            responses=ERROR_RESPONSES,
        )
        for module in ROUTES:
            app.include_router(module.make_router(self.resources))
        document = make_document(app, BODIES)
        page = render_page(document)

        @app.get("/openapi.json", include_in_schema=False)
        async def get_document() -> dict[str, Any]:
            """Return the OpenAPI document."""
            return document

        @app.get("/docs", include_in_schema=False)
        async def get_page() -> HTMLResponse:
            """Return the page that shows the OpenAPI document."""
            return HTMLResponse(page, headers=PAGE_HEADERS)

        return app


async def _handle_error(_: Request, error: Exception) -> Response:
    """Return the response for an error, with its status, in OpenAI's format.

    The status is 400 for invalid requests (VLDuetError, RequestValidationError), 500 for
    ModelError, 503 with Retry-After for ServerBusyError, and an HTTPException's own. Any other
    error is our own or a lack of memory: status 500 without details. The web server, not this
    function, logs its traceback.
    """
    error_type, place, headers = "invalid_request_error", None, None
    if isinstance(error, RequestValidationError):  # of the path or the query of a URL
        mistake = dict(error.errors()[0])
        name = str(mistake["loc"][-1])
        mistake["loc"] = (name,)
        error = describe_mistake(mistake, {name: None})
    if isinstance(error, HTTPException):
        status, headers = error.status_code, error.headers
        text = ROUTER_ERRORS.get((status, error.detail), error.detail)
        error_type = error_type if status < 500 else "server_error"
    elif isinstance(error, VLDuetError):
        status, text = 400, str(error)
        # The place of an error in a filter continues with the condition.
        place = error.place and error.place.partition(": ")[0]
        if isinstance(error, ModelError):
            status, error_type = 500, "server_error"
    elif isinstance(error, ServerBusyError):
        status, text = 503, "too many requests are waiting. Try again later"
        error_type, headers = "server_error", {"Retry-After": "5"}
    else:
        status, text = 500, "an error inside the server; see its log"
        error_type = "server_error"
    content = error_content(text, error_type=error_type, place=place)
    return Response(content, status, headers=headers, media_type="application/json")
