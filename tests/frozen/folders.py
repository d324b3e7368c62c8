"""Open a model folder and a search index that an earlier version wrote."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from frozen import calls, fixed
from frozen.measures import INPUTS, ITEMS, TOKENS, TURNS, plain

STORED = fixed.DATA / "folders"
NAMES = ("base", "model", "index")
"""A checkpoint, a model folder that names it, and an index that names the model, relatively."""
QUERIES: dict[str, tuple[tuple[calls.Item, ...], int, str | None]] = {
    "a text": (("a red flower",), 3, None),
    "an image": ((INPUTS / "1.png",), 6, None),
    "a mixture": ((INPUTS / "2.png", "at night"), 2, None),
    "filtered": (("a cat",), 5, "year >= 1990"),
}


def write() -> None:
    """Write the folders and store them; a neutral place, as an index also holds absolute paths."""
    place = Path(tempfile.gettempdir()) / "vlduet-frozen"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    shutil.copytree(INPUTS, place / "inputs")
    fixed.checkpoint("fast_vlm", place / "base")
    calls.write_model(place / "base", place / "model")
    calls.write_index(place / "model", place / "inputs" / "pairs.jsonl", place / "index")
    shutil.rmtree(STORED, ignore_errors=True)
    for name in NAMES:
        shutil.copytree(place / name, STORED / name, ignore=shutil.ignore_patterns(".lock"))
    shutil.rmtree(place)


def placed(folder: Path) -> Path:
    """Copy the stored folders and their images into another folder, and return it."""
    for name in NAMES:
        shutil.copytree(STORED / name, folder / name)
    shutil.copytree(INPUTS, folder / "inputs")
    return folder


def opened(folder: Path) -> dict[str, Any]:
    """Open the model and the index that stand in a folder, and use them."""
    model = calls.open_model(folder / "model")
    answers = [calls.answer(model, turn, tokens=TOKENS) for turn in TURNS]
    pairs = zip(TURNS, answers, strict=True)
    ids, vectors = calls.stored_vectors(folder / "index")
    values = {
        "fingerprint": calls.fingerprint(model),
        "embeddings": calls.encode(model, ITEMS, query=False),
        "answers": answers,
        "margins": [
            calls.smallest_margin(model, turn, ids=answer["ids"]) for turn, answer in pairs
        ],
        "index": {"ids": ids, "vectors": vectors},
        "hits": {
            name: calls.hits(folder / "index", query, k=k, where=where)
            for name, (query, k, where) in QUERIES.items()
        },
    }
    return plain(values)
