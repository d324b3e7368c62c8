"""`vlduet data show`: a record as the model sees it, without loading the model's weights."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from vlduet import config
from vlduet.data.records import Record
from vlduet.data.sequences import IGNORE, Anchor, Sequence
from vlduet.data.stream import Sample
from vlduet.files import recovered
from vlduet.model import checkpoint
from vlduet.model.processing import Tokenizer, load_processing
from vlduet.model.prompts import Prompts, Renderer
from vlduet.model.soft import ROWS, add_tokens
from vlduet.train.setup import RECIPES


@dataclass(frozen=True, slots=True)
class Row:
    """One token, or one image with all its tokens."""

    sequence: int
    """A record becomes one sequence or several, from 0."""
    position: int
    """Of the first token in its sequence."""
    text: str
    supervised: bool
    """Carries next-token loss."""
    anchors: tuple[str, ...]
    """Roles of the embeddings that are read here; `ROLE from here` and `ROLE to here` where a reading is longer."""
    image: str | None
    """The image's name."""


def render(record: Record, folder: Path) -> list[Row]:
    """Lay a record out as training does.

    Args:
        record: any kind.
        folder: a model folder, which is shown with the recipe that it was trained with, or a plain checkpoint, with the
            defaults of vladva.

    Returns:
        The rows of all sequences, in order.

    Raises:
        DataError: a record that cannot be laid out, such as one with a broken image; ModelError: no model there.
    """
    kept = checkpoint.read(recovered(folder))
    made_by: dict[str, Any] = kept.manifest.get("provenance", {}).get("config", {})
    values = dict(made_by.get("recipe", {"name": "vladva"}))
    recipe = RECIPES[values.pop("name")]
    processing = load_processing(kept.base)
    if ROWS in kept.tensors:
        add_tokens(processing.tokenizer, len(kept.tensors[ROWS]))
    renderer = Renderer(
        processing,
        prompts=Prompts(**kept.manifest.get("prompts", {})),
        max_tokens=made_by.get("data", {}).get("max_tokens", 2048),
    )
    sample = Sample(record, position=0, seed=0)
    sequences = recipe.layout(sample, renderer, config.options(recipe.Options, values, place="recipe"))
    names = {processing.prepare(ref).key: ref.name for ref in record.images()}
    words = processing.tokenizer
    return [row for number, sequence in enumerate(sequences) for row in _rows(number, sequence, words, names)]


def _rows(number: int, sequence: Sequence, tokenizer: Tokenizer, names: dict[str, str]) -> list[Row]:
    inside = {at + i: (at, image) for at, image in sequence.images for i in range(image.num_tokens)}
    rows = []
    for first, group in groupby(range(len(sequence)), key=lambda t: inside[t][0] if t in inside else t):
        last = max(group)
        image = inside[first][1] if first in inside else None
        text = tokenizer.decode([sequence.ids[first]]) if image is None else f"[image, {image.num_tokens} tokens]"
        rows.append(
            Row(
                sequence=number,
                position=first,
                text=text,
                supervised=sequence.labels[first] != IGNORE,
                anchors=tuple(role for a in sequence.anchors for role in _roles(a, first, last)),
                image=names.get(image.key) if image else None,
            )
        )
    return rows


def _roles(anchor: Anchor, first: int, last: int) -> list[str]:
    """What an anchor is called at the row of the tokens [first, last]."""
    starts, ends = first <= anchor.start <= last, first < anchor.end <= last + 1
    if starts and ends:
        return [anchor.role]
    return [f"{anchor.role} from here"] if starts else [f"{anchor.role} to here"] if ends else []
