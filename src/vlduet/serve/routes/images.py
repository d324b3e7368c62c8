"""GET /v1/images/{id}: the image of a document of the index, scaled down and without metadata."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request, Response

from vlduet.data.images import encode_preview
from vlduet.data.records import ImageRef
from vlduet.errors import ImageError, quote_value
from vlduet.retrieval.index import Index
from vlduet.serve.resources import Resources, await_while_connected, logger

DEFAULT_SIZE = 512
MIN_SIZE, MAX_SIZE = 16, 2048
"""Longer side of an image in pixels."""
CACHE_CONTROL = "private, max-age=3600"
"""Browsers may keep an image for an hour; caches that several users share may not."""
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'",
}


def make_router(resources: Resources) -> APIRouter:
    """Return the route of this file."""
    router = APIRouter()
    # Decoding takes up to seconds: a thread of its own keeps it from delaying other requests.
    decoder = ThreadPoolExecutor(1, thread_name_prefix="image")

    @router.get(
        "/v1/images/{document_id:path}",
        response_class=Response,
        responses={
            200: {"content": {"image/png": {}, "image/jpeg": {}}, "description": "The image."},
            304: {"description": "The client has the current image already."},
        },
        tags=["Search"],
    )
    async def get_image(
        request: Request,
        document_id: str,
        size: Annotated[
            int, Query(ge=MIN_SIZE, le=MAX_SIZE, description="Longer side in pixels, at most.")
        ] = DEFAULT_SIZE,
    ) -> Response:
        """Return the image of a document as PNG or JPEG, not larger than `size` pixels."""
        image, version = await resources.query_index(lambda index: _find_image(index, document_id))
        etag = f'"{version}-{size}"'
        headers = {"ETag": etag, "Cache-Control": CACHE_CONTROL, **SECURITY_HEADERS}
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        try:
            loop = asyncio.get_running_loop()
            encoding = loop.run_in_executor(decoder, encode_preview, image, size)
            data, media_type = await await_while_connected(request, encoding)
        except ImageError as error:
            # The message may contain a path of the server.
            logger.warning("the image of document %a cannot be shown: %s", document_id, error)
            text = f"The image of document {quote_value(document_id)} is missing or broken"
            raise HTTPException(404, text) from None
        return Response(data, media_type=media_type, headers=headers)

    return router


def _find_image(index: Index, document_id: str) -> tuple[ImageRef, str]:
    """Return the image of a document, and a text that changes when the image does.

    Raises:
        HTTPException: 404 if the index lacks the document, or the document an image.
    """
    row = index.get_row(document_id)
    image = None if row is None else index.row_image(row)
    if row is None or image is None:
        reason = "The index has no document" if row is None else "There is no image in document"
        raise HTTPException(404, f"{reason} {quote_value(document_id)}")
    version = row.hashes.content_hash
    try:
        status = image.path.stat() if image.path is not None else None
    except OSError:
        status = None  # `encode_preview` reports it
    if status is not None:
        version += f"-{status.st_size:x}-{status.st_mtime_ns:x}"
    return image, version
