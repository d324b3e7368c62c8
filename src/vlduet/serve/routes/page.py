"""GET / and the files of the web page."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from vlduet.serve.page_files import PAGE_FILES, PAGE_HEADERS, read_page_file
from vlduet.serve.resources import Resources


def make_router(_: Resources) -> APIRouter:
    """Return the routes of this file, which are not part of the API and its documentation."""
    router = APIRouter(include_in_schema=False)
    # Read once: they are small, and do not change while the server runs.
    contents = {path: read_page_file(name) for path, name in PAGE_FILES.items()}

    async def get_file(request: Request) -> Response:
        """Return a file of the page."""
        data, media_type = contents[request.url.path]
        return Response(data, media_type=media_type, headers=PAGE_HEADERS)

    for path in PAGE_FILES:
        router.add_api_route(path, get_file, methods=["GET"])
    return router
