"""Write files and distinct images below a root."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlduet.data import images


def random_png(seed: int) -> bytes:
    """Return an encoded image of 8 x 8 random pixels; equal seeds give equal bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return images.encode_png(images.from_pixels(pixels))


class OfficialWriter:
    """Writer of files below a root, whose images all differ."""

    def __init__(self, root: Path):
        self.root = root
        self.num_images = 0

    def write_file(self, name: str, data: bytes | str) -> None:
        """Write a file, with its parent folders."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        self.write_file(name, json.dumps(value))

    def write_json_lines(self, name: str, rows: Sequence[Any]) -> None:
        """Write a JSON lines file."""
        self.write_file(name, "".join(json.dumps(row) + "\n" for row in rows))

    def write_image(self, name: str) -> None:
        """Write an image that differs from all others."""
        self.num_images += 1
        self.write_file(name, random_png(self.num_images))
