"""Images of records that are looked at before training, without decoding all of them.

How many tokens an image takes depends on its size alone, which the header tells. So the image
processor runs for the first image of a size only. As many images as MAX_DECODED_PIXELS allow are
decoded, which shows broken ones; of the others, the end of the file shows truncated ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from vlduet.data import images
from vlduet.data.records import ImageRef, Record, map_images
from vlduet.data.sequences import PreparedImage

MAX_DECODED_PIXELS = 50_000_000
"""Number of pixels that are decoded, at most: four photos of a phone or 700 small images, a few
seconds. It is no time limit, so that all runs decode the same."""


class ImageProbe:
    """Stand-in for the image processor: it knows the number of tokens, and has no pixels."""

    def __init__(self, prepare_image: Callable[[ImageRef], PreparedImage] | None):
        """Store the image processor; None, for a model without one, prepares no image."""
        self.num_images = 0
        """Number of images that were looked at."""
        self.num_decoded = 0
        """Number of these images that were decoded."""
        self._prepare_image = prepare_image
        self._prepared_by_size: dict[tuple[int, int], PreparedImage] = {}
        self._pixels_left = MAX_DECODED_PIXELS

    def replace_images(self, record: Record) -> Record:
        """Return a record with a placeholder for every image, which `prepare_image` accepts.

        Raises:
            ImageError: an image is missing, refused, or (as far as it is decoded) broken.
        """
        return map_images(record, self._check_image)

    def prepare_image(self, placeholder: ImageRef) -> PreparedImage:
        """Return the prepared image of a placeholder: number and grid of its tokens, no inputs.

        Of a size that the image processor has not seen, it is that of the size most like it.
        """
        assert placeholder.data is not None, "only placeholders are laid out"
        width, height = map(int, placeholder.data.split())

        def measure_difference(size: tuple[int, int]) -> float:
            """Return how much a width and a height differ, as the sum of their log ratios."""
            return abs(math.log(size[0] / width)) + abs(math.log(size[1] / height))

        return self._prepared_by_size[min(self._prepared_by_size, key=measure_difference)]

    def _check_image(self, ref: ImageRef) -> ImageRef:
        """Look at an image, and return a placeholder that holds its size; raise ImageError."""
        header = images.read_image_header(ref)
        width, height = header.size
        # A file without its end may be truncated or not: more of those are decoded.
        bound = 0 if header.has_end else -MAX_DECODED_PIXELS
        is_decoded = self._pixels_left - width * height >= bound
        is_new_size = header.size not in self._prepared_by_size
        self.num_images += 1
        if is_decoded or not self._prepared_by_size:
            self.num_decoded += 1
            self._pixels_left -= width * height
            if self._prepare_image is not None and is_new_size:
                prepared = self._prepare_image(ref)  # decodes it, too
                self._prepared_by_size[header.size] = replace(prepared, inputs={})
            else:
                images.load_image(ref)
        return ImageRef(data=f"{width} {height}".encode())
