"""A fake model for retrieval, without weights, and small sources to index."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlduet.data import images
from vlduet.data.records import Conversation, ImageRef, Message, Part, Parts, as_parts
from vlduet.model.limits import TruncationCallback, too_long_error
from vlduet.model.score_statistics import ScoreStatistics

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}


class FakeModel:
    """Model that embeds a text as a bag of hashed words and an image as its mean colour.

    The name of a colour has the embedding of an image of that colour. A text has at most
    `max_words` words. `embedded` lists the documents that were embedded, `queries` the queries,
    `conversations` the messages that were answered, and `before_document` is called with the parts
    of each document before it is embedded.
    """

    dim = 64
    image_backend = "pil"
    max_words = 1000
    score_statistics: ScoreStatistics | None = None

    @property
    def max_text_tokens(self) -> int:
        return self.max_words

    def __init__(self, fingerprint: str = "fake"):
        self.fingerprint = fingerprint
        self.embedded: list[Parts] = []
        self.queries: list[Part | Parts | Conversation] = []
        self.conversations: list[tuple[Message, ...]] = []
        self.before_document: Callable[[Parts], object] = lambda parts: None

    def encode_query(
        self, items: Sequence[Part | Parts], *, on_truncate: TruncationCallback | None = None
    ) -> np.ndarray:
        self.queries += items
        rows = self._check_lengths(items, on_truncate)
        return np.stack([self._vector(parts) for parts in rows])

    def encode_document(
        self, items: Sequence[Part | Parts], *, on_truncate: TruncationCallback | None = None
    ) -> np.ndarray:
        rows = self._check_lengths(items, on_truncate)
        for parts in rows:
            self.before_document(parts)
        vectors = np.stack([self._vector(parts) for parts in rows])
        self.embedded += rows
        return vectors

    def generate(
        self, messages: Sequence[Message], *, max_new_tokens: int = 128, stream: bool = False
    ) -> str | Iterator[str]:
        self.conversations.append(tuple(messages))
        texts = ["An ", "answer."]
        return iter(texts) if stream else "".join(texts)

    def _check_lengths(
        self, items: Sequence[Part | Parts], on_truncate: TruncationCallback | None
    ) -> list[Parts]:
        """Return the parts of items, with texts of more than `max_words` words cut or refused."""
        rows = []
        for position, item in enumerate(items):
            parts = self._parts(item)
            words = " ".join(part for part in parts if isinstance(part, str)).split()
            if len(words) > self.max_words:
                if on_truncate is None:
                    raise too_long_error(len(words), self.max_words)
                on_truncate(position, len(words))
                images = tuple(part for part in parts if not isinstance(part, str))
                parts = (*images, " ".join(words[: self.max_words]))
            rows.append(parts)
        return rows

    @staticmethod
    def _parts(item: Part | Parts | Conversation) -> Parts:
        """Return the parts of an item; those of a conversation are joined."""
        parts: list[Part] = []
        for part in as_parts(item):
            parts += part.parts if isinstance(part, Message) else (part,)
        return tuple(parts)

    def _vector(self, parts: Parts) -> np.ndarray:
        total = np.zeros(self.dim)
        total[-1] = 0.1  # no embedding has zero length
        for part in parts:
            if isinstance(part, ImageRef):
                total[:3] += images.to_pixels(images.load_image(part)).mean((0, 1)) / 255
                continue
            for word in part.lower().split():
                if word in COLOURS:
                    total[:3] += np.array(COLOURS[word]) / 255
                else:
                    total[3 + zlib.crc32(word.encode("utf-8")) % (self.dim - 4)] += 1
        return (total / np.linalg.norm(total)).astype(np.float32)


def paint(path: Path, colour: tuple[int, int, int]) -> Path:
    """Write a small image of one colour and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((4, 4, 3), colour, dtype=np.uint8)
    path.write_bytes(images.encode_png(images.from_pixels(pixels)))
    return path


def write_records(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write a file of records and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pairs(folder: Path, colours: dict[str, tuple[int, int, int]] = COLOURS) -> Path:
    """Write a captioned image per colour, with metadata of every kind; `year` counts from 2000."""
    rows: list[dict[str, Any]] = []
    for i, (name, colour) in enumerate(colours.items()):
        paint(folder / "images" / f"{name}.png", colour)
        metadata = {"hue": name, "year": 2000 + i, "warm": name in ("red", "yellow"), "tags": ["a"]}
        row = {
            "id": name,
            "image": f"images/{name}.png",
            "short": f"a {name} square",
            "metadata": metadata,
        }
        rows.append(row)
    return write_records(folder / "records.jsonl", rows)
