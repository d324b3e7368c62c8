"""Images that benchmarks make: one grey image for all, and two images side by side."""

from __future__ import annotations

from functools import cache

import numpy as np

from vlduet.data.images import encode_png, from_pixels, load_image, scale_down, to_pixels
from vlduet.data.records import ImageRef

SIDE = 192
"""Pixels of the height, and of half the width, of two images side by side."""
GREY = 128
WHITE = 255


@cache
def make_grey_image() -> ImageRef:
    """Return the image of one grey that replaces images in text-only controls."""
    pixels = np.full((SIDE, SIDE, 3), GREY, dtype=np.uint8)
    return ImageRef(data=encode_png(from_pixels(pixels)))


def join_side_by_side(left: ImageRef, right: ImageRef) -> ImageRef:
    """Return one PNG image, `SIDE` pixels high and twice as wide, with both images on white.

    Each is scaled down to fit into its half, never up, and stands in the middle of it.

    Raises:
        ImageError: an image cannot be read.
    """
    canvas = np.full((SIDE, 2 * SIDE, 3), WHITE, dtype=np.uint8)
    for position, ref in enumerate((left, right)):
        pixels = to_pixels(scale_down(load_image(ref), SIDE))
        height, width, _ = pixels.shape
        top = (SIDE - height) // 2
        begin = position * SIDE + (SIDE - width) // 2
        canvas[top : top + height, begin : begin + width] = pixels
    return ImageRef(data=encode_png(from_pixels(canvas)))
