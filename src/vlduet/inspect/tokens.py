"""`vlduet data show`: a record as the model sees it, without loading the model's weights."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from vlduet import config
from vlduet.data.records import Record
from vlduet.data.sequences import IGNORE_INDEX, Anchor, Sequence
from vlduet.data.stream import Sample
from vlduet.files import recover_folder
from vlduet.model import checkpoint
from vlduet.model.processing import Tokenizer, load_processor
from vlduet.model.prompts import Prompts, Renderer
from vlduet.model.soft_prompts import ROWS_TENSOR_NAME, add_soft_prompt_tokens
from vlduet.train.setup import RECIPES


@dataclass(frozen=True, slots=True)
class TokenRow:
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


def list_record_tokens(record: Record, folder: Path) -> list[TokenRow]:
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
    kept = checkpoint.read_checkpoint(recover_folder(folder))
    made_by: dict[str, Any] = kept.manifest.get("provenance", {}).get("config", {})
    values = dict(made_by.get("recipe", {"name": "vladva"}))
    recipe = RECIPES[values.pop("name")]
    processing = load_processor(kept.base_folder)
    if ROWS_TENSOR_NAME in kept.tensors:
        add_soft_prompt_tokens(processing.tokenizer, len(kept.tensors[ROWS_TENSOR_NAME]))
    renderer = Renderer(
        processing,
        prompts=Prompts(**kept.manifest.get("prompts", {})),
        max_tokens=made_by.get("data", {}).get("max_tokens", 2048),
    )
    sample = Sample(record, position=0, seed=0)
    sequences = recipe.layout(
        sample, renderer, config.parse_options(recipe.Options, values, place="recipe")
    )
    names = {processing.prepare_image(ref).cache_key: ref.name for ref in record.images()}
    words = processing.tokenizer
    return [
        row
        for number, sequence in enumerate(sequences)
        for row in _list_sequence_tokens(number, sequence, words, names)
    ]


def _list_sequence_tokens(
    number: int, sequence: Sequence, tokenizer: Tokenizer, names: dict[str, str]
) -> list[TokenRow]:
    inside = {at + i: (at, image) for at, image in sequence.images for i in range(image.num_tokens)}
    rows = []
    for first, group in groupby(
        range(len(sequence)), key=lambda t: inside[t][0] if t in inside else t
    ):
        last = max(group)
        image = inside[first][1] if first in inside else None
        text = (
            tokenizer.decode([sequence.token_ids[first]])
            if image is None
            else f"[image, {image.num_tokens} tokens]"
        )
        rows.append(
            TokenRow(
                sequence=number,
                position=first,
                text=text,
                supervised=sequence.labels[first] != IGNORE_INDEX,
                anchors=tuple(role for a in sequence.anchors for role in _roles(a, first, last)),
                image=names.get(image.cache_key) if image else None,
            )
        )
    return rows


def _roles(anchor: Anchor, first: int, last: int) -> list[str]:
    """What an anchor is called at the row of the tokens [first, last]."""
    starts, ends = first <= anchor.start <= last, first < anchor.end <= last + 1
    if starts and ends:
        return [anchor.role]
    return [f"{anchor.role} from here"] if starts else [f"{anchor.role} to here"] if ends else []
