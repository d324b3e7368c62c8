"""Images of the server's own index, which requests name by their URL on this server.

    /v1/images/ID                      the path that a search or an answer returns
    http://HOST:PORT/v1/images/ID      the same with the address to which the request was sent

No request is sent for them: the document is looked up in the index.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import quote, unquote, urlsplit

from vlduet.data.records import ImageRef
from vlduet.errors import DataError, quote_value
from vlduet.retrieval.index import Index
from vlduet.serve.content import UrlLoader

IMAGES_PATH = "/v1/images/"
SIZE_QUERY = re.compile(r"(size=\d+)?")
"""Query of an image's URL: it scales what a browser is sent, and has no effect on the model."""


def format_image_url(document_id: str) -> str | None:
    """Return the path of a document's image on this server; None for an id without a path.

    These are ``.`` and ``..``, which are steps in a path, and ids with a line end.
    """
    if document_id in (".", "..") or "\n" in document_id:
        return None
    return IMAGES_PATH + quote(document_id, safe="")


class UrlImages:
    """Images at URLs in one request: of the server's index, or of other servers.

    Args:
        host: value of the request's Host header, the server's own address.
        read_index: function that returns a function's result for the index; DataError without one.
        load_url: function for http(s) URLs of other servers; None refuses them.
    """

    def __init__(
        self,
        host: str,
        read_index: Callable[[Callable[[Index], ImageRef]], ImageRef],
        load_url: UrlLoader | None,
    ):
        self.host = host.lower()
        self._read_index, self._load_url = read_index, load_url

    def find_document_id(self, url: str) -> str | None:
        """Return the id of the document whose image a URL names on this server, or None."""
        try:
            parts = urlsplit(url)
            is_own = not parts.scheme and not parts.netloc and url.startswith(IMAGES_PATH)
            if parts.netloc and parts.scheme in ("http", "https"):
                is_own = parts.netloc.lower() == self.host
            is_image = parts.path.startswith(IMAGES_PATH) and not parts.fragment
            if not (is_own and is_image and SIZE_QUERY.fullmatch(parts.query)):
                return None
            return unquote(parts.path[len(IMAGES_PATH) :], errors="strict") or None
        except ValueError:  # a broken address, or bytes that are no UTF-8
            return None

    def load(self, url: str, place: str) -> ImageRef:
        """Return the image at a URL, undecoded; it may block for the index or the network.

        Raises:
            DataError: neither of this server nor of one that may be read, a document or an index
                that does not exist, or a document without an image.
            HTTPException: 503 if the index was rebuilt by another model.
        """
        document_id = self.find_document_id(url)
        if document_id is not None:
            return self._load_own(document_id, place)
        if self._load_url is not None and re.match("https?://", url, re.IGNORECASE):
            return self._load_url(url, place)
        fix = f"Send data:image/png;base64,..., or {IMAGES_PATH}ID for an image of the index"
        raise DataError("an image that is not a data: URL", place=place, fix=fix)

    def _load_own(self, document_id: str, place: str) -> ImageRef:
        """Return the image of a document of the index; raises as `load`."""

        def find_image(index: Index) -> ImageRef:
            row = index.get_row(document_id)
            image = None if row is None else index.row_image(row)
            if image is None:
                reason = "the index has no document" if row is None else "no image in document"
                message = f"{reason} {quote_value(document_id)}"
                raise DataError(message, place=place, fix="Send the image of a hit")
            return image

        try:
            return self._read_index(find_image)
        except DataError as error:
            raise DataError(error.message, place=error.place or place, fix=error.fix) from None
