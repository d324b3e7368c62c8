"""Contents of the images of records: a key and a fingerprint of each, decoded in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vlduet.data import images
from vlduet.data.records import ImageRef, Record
from vlduet.data.tools.duplicates import ImageFingerprint, fingerprint_image
from vlduet.errors import DataError

NUM_THREADS = 4


@dataclass(frozen=True, slots=True)
class ImageContent:
    """Key and appearance of a readable image."""

    key: str
    """Key of its bytes, see `images.image_key`."""
    fingerprint: ImageFingerprint
    """Appearance, by which near-duplicates are found."""


ImageResult = ImageContent | DataError
"""Content of an image, or the error of one that cannot be decoded."""


def read_image_contents(
    records: Iterable[Record],
) -> Iterator[tuple[Record, tuple[ImageResult, ...]]]:
    """Yield every record with the results of `Record.images`, in order.

    Images are decoded in `NUM_THREADS` threads, a few dozen records ahead. A file that occurs again
    is not read again and gives the same object, which identifies repeated errors. Errors of
    `records` propagate.
    """
    results_by_path: dict[Path, Future[ImageResult] | ImageResult] = {}
    pending: deque[tuple[Record, list[Future[ImageResult] | ImageResult]]] = deque()
    with ThreadPoolExecutor(NUM_THREADS) as executor:

        def submit(ref: ImageRef) -> Future[ImageResult] | ImageResult:
            """Return the result of an image, or its future."""
            if ref.path is None:
                return executor.submit(_read_image_content, ref)
            if ref.path not in results_by_path:
                results_by_path[ref.path] = executor.submit(_read_image_content, ref)
            return results_by_path[ref.path]

        def take_oldest() -> tuple[Record, tuple[ImageResult, ...]]:
            """Wait for the images of the oldest pending record; return it with their results."""
            record, submitted = pending.popleft()
            results = tuple(r.result() if isinstance(r, Future) else r for r in submitted)
            for ref, result in zip(record.images(), results, strict=True):
                if ref.path is not None:
                    results_by_path[ref.path] = result  # smaller than the future
            return record, results

        for record in records:
            pending.append((record, [submit(ref) for ref in record.images()]))
            if len(pending) > 8 * NUM_THREADS:
                yield take_oldest()
        while pending:
            yield take_oldest()


def _read_image_content(ref: ImageRef) -> ImageResult:
    """Return the content of an image; return, not raise, the DataError of a broken one."""
    try:
        data = ImageRef(data=images.read_bytes(ref))  # read once, for both
        return ImageContent(images.image_key(data), fingerprint_image(data))
    except DataError as error:
        return error
