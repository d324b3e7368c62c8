"""A record as the model sees it, for ``vlduet data show``; the model's weights are not loaded.

1. lay out    the record becomes the sequences that training makes of it
2. list       a `TokenRow` per token, one per image: text, loss, and where embeddings are read
3. format     as text for a terminal; `reports` makes a page of the same `RecordInspection`
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from vlduet.config import parse_options
from vlduet.data import images
from vlduet.data.record_json import record_to_json
from vlduet.data.records import Record, iter_labelled_parts
from vlduet.data.sequences import IGNORE_INDEX, Anchor, Sequence
from vlduet.data.stream import Sample
from vlduet.errors import ImageError
from vlduet.files import recover_folder
from vlduet.hub import resolve_model
from vlduet.logs import strip_control_characters
from vlduet.model import checkpoint
from vlduet.model.limits import Limits
from vlduet.model.processing import Tokenizer, load_processor
from vlduet.model.prompts import Prompts, Renderer
from vlduet.model.saving import find_published_model
from vlduet.model.soft_prompts import ROWS_TENSOR_NAME, add_soft_prompt_tokens
from vlduet.recipes.registry import find_recipe

TERMINAL_IMAGE_WIDTH = 48
"""Largest width of an image in a terminal, in cells."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One token of a sequence, or one image with all its tokens."""

    sequence: int
    """Number of the sequence, from 0: a record may become several."""
    position: int
    """Position of the first token in its sequence, from 0."""
    text: str
    """Decoded token, or ``[image, N tokens]``."""
    supervised: bool
    """True if the token is a label of the next-token loss."""
    anchors: tuple[str, ...]
    """Roles of the embeddings read here; ``ROLE from here`` and ``ROLE to here`` where the
    pooled span is longer than this row."""
    image: str | None
    """Name of the image; None for a token."""


@dataclass(frozen=True, slots=True)
class RecordInspection:
    """A record and the tokens that it becomes."""

    record: Record
    tokens: tuple[TokenRow, ...]
    """Rows of all sequences in order; empty if no model was given."""

    @property
    def sequences(self) -> list[list[TokenRow]]:
        """Rows of each sequence."""
        return [list(rows) for _, rows in groupby(self.tokens, key=lambda row: row.sequence)]

    def to_json(self) -> dict[str, Any]:
        """Return the record, its kind and its tokens as JSON types; paths are relative to here."""
        return {
            "record": record_to_json(self.record, root=Path()),
            "kind": self.record.kind,
            "tokens": [asdict(row) for row in self.tokens],
        }

    def to_text(self, *, colour: bool) -> str:
        """Return the record and its sequences for a terminal; images are drawn only in colour."""
        lines = [format_record(self.record, colour=colour)]
        for number, rows in enumerate(self.sequences):
            lines += [f"sequence {number}:", format_tokens(rows, colour=colour)]
        return "\n".join(lines)


def inspect_record(record: Record, model_folder: Path | None) -> RecordInspection:
    """Return a record with the tokens that a model sees of it; without a model, with no tokens.

    Raises:
        DataError, ModelError, ConfigError: as `list_record_tokens`.
    """
    rows = [] if model_folder is None else list_record_tokens(record, model_folder)
    return RecordInspection(record, tuple(rows))


def list_record_tokens(record: Record, folder: Path) -> list[TokenRow]:
    """Lay a record out as training does, and return the rows of all its sequences in order.

    Weights are not loaded. A model folder that a crash left under its backup name is restored.

    Args:
        record: a record of any kind.
        folder: a model folder, whose recipe, prompts and limits are used, or a plain
            checkpoint, which gets the defaults of the recipe `vladva`.

    Raises:
        DataError: the record cannot be laid out, for example because an image is broken.
        ModelError: the folder holds no model, or a file of it is broken.
        ConfigError: this version does not know the model's recipe or one of its options.
    """
    folder = resolve_model(recover_folder(folder))
    published = find_published_model(folder)
    saved = checkpoint.read_checkpoint(folder if published is None else published.folder)
    run_config: dict[str, Any] = saved.manifest.get("provenance", {}).get("config", {})
    recipe_config = dict(run_config.get("recipe", {"name": "vladva"}))
    recipe = find_recipe(recipe_config.pop("name"))
    # A model of an earlier version says only in its config what it was trained with.
    is_earlier = "limits" not in saved.manifest
    max_tokens = run_config.get("data", {}).get("max_tokens") if is_earlier else None
    limits = Limits.from_manifest(saved.manifest, max_tokens=max_tokens)
    processor = load_processor(
        saved.base_folder,
        image_settings=saved.manifest.get("image_processor"),
        max_image_tokens=limits.max_image_tokens,
        chat_template=saved.chat_template,
        ignores_code=bool(saved.manifest) or (published is not None and published.ignores_code),
    )
    if ROWS_TENSOR_NAME in saved.tensors:
        add_soft_prompt_tokens(processor.tokenizer, len(saved.tensors[ROWS_TENSOR_NAME]))
    prompts = Prompts()
    if published is not None:
        prompts = published.complete_prompts(processor.tokenizer.chat_template)
    if saved.manifest:
        prompts = Prompts.from_manifest(saved.manifest["prompts"])
    renderer = Renderer(
        processor,
        prompts=prompts,
        max_tokens=limits.max_tokens,
    )
    options = parse_options(recipe.options, recipe_config, place="recipe")
    sequences = recipe.layout(Sample(record, position=0, seed=0), renderer, options)
    names = {processor.prepare_image(ref).cache_key: ref.name for ref in record.images()}
    rows = []
    for number, sequence in enumerate(sequences):
        rows += _list_sequence_tokens(number, sequence, processor.tokenizer, names)
    return rows


def _list_sequence_tokens(
    number: int, sequence: Sequence, tokenizer: Tokenizer, image_names: dict[str, str]
) -> list[TokenRow]:
    """Return one row per token and one per image (all of its tokens), in order.

    Args:
        number: number of the sequence, for the rows.
        sequence: a sequence that a recipe laid out.
        tokenizer: decodes the tokens, each alone.
        image_names: cache key of an image -> its name; None is the name of an unknown image.
    """
    image_starts = dict(sequence.images)  # position of the first token -> image
    rows = []
    first = 0
    while first < len(sequence):
        image = image_starts.get(first)
        length = 1 if image is None else image.num_tokens
        last = first + length - 1
        text = f"[image, {length} tokens]"
        if image is None:
            text = tokenizer.decode([sequence.token_ids[first]])
        rows.append(
            TokenRow(
                sequence=number,
                position=first,
                text=text,
                supervised=sequence.labels[first] != IGNORE_INDEX,
                anchors=_label_anchors(sequence.anchors, first, last),
                image=None if image is None else image_names.get(image.cache_key),
            )
        )
        first = last + 1
    return rows


def _label_anchors(anchors: Iterable[Anchor], first: int, last: int) -> tuple[str, ...]:
    """Return labels of the anchors whose span starts or ends in the tokens `first` to `last`.

    ``ROLE`` does both, ``ROLE from here`` starts and ``ROLE to here`` ends in them. An anchor that
    only passes through them has no label.
    """
    labels = []
    for anchor in anchors:
        starts = first <= anchor.start <= last
        ends = first < anchor.end <= last + 1  # anchor.end is exclusive
        if starts and ends:
            labels.append(anchor.role)
        elif starts:
            labels.append(f"{anchor.role} from here")
        elif ends:
            labels.append(f"{anchor.role} to here")
    return tuple(labels)


# --- text for a terminal


def format_record(record: Record, *, colour: bool) -> str:
    """Return a record for a terminal: a line per part with its label, then the metadata.

    Images are named with their size or their error, and drawn only with `colour`; a broken image
    raises nothing. Control characters are removed, except line ends in texts of the record.
    """
    details = f"{record.kind}, {record.place}" if record.place else record.kind
    lines = [strip_control_characters(f"{record.id}  ({details})")]
    for label, part in iter_labelled_parts(record):
        if isinstance(part, str):
            lines.append(f"{label:>12}  " + strip_control_characters(part, keep="\n"))
            continue
        line = f"{label:>12}  {strip_control_characters(part.name)}"
        try:
            image = images.load_image(part)
        except ImageError as error:
            lines += [line, f"{'':>12}  {strip_control_characters(str(error))}"]
            continue
        lines.append(f"{line}  {image.width} x {image.height}")
        if colour:
            lines += render_half_blocks(image, TERMINAL_IMAGE_WIDTH)
    for key, value in record.metadata.items():
        lines.append(strip_control_characters(f"{key:>12}: {value}"))
    return "\n".join(lines)


def render_half_blocks(image: images.DecodedImage, width: int) -> list[str]:
    """Return an image as lines of terminal cells in 24-bit colour, at most `width` per line.

    Every cell shows two pixels, one above the other. The image is scaled down to `width` pixels,
    never up, in its proportions; one higher than 2 * width + 64 pixels is compressed to that.
    """
    width = max(1, min(width, image.width))
    height = max(2, round(image.height * width / image.width))
    height = min(height + height % 2, 2 * width + 64)
    pixels = images.resize_pixels(image, width, height - height % 2)  # [H, W, 3]
    lines = []
    for upper_row, lower_row in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        line = ""
        for upper, lower in zip(upper_row, lower_row, strict=True):
            foreground = ";".join(map(str, upper))
            background = ";".join(map(str, lower))
            line += f"\x1b[38;2;{foreground};48;2;{background}m▀"
        lines.append(line + "\x1b[0m")
    return lines


def format_tokens(rows: Iterable[TokenRow], *, colour: bool) -> str:
    """Return the rows of one sequence, one per line, numbered from 0.

    ``*`` (and with `colour` green, by ANSI codes) marks a token with loss; the labels of its
    anchors follow. Texts are quoted as by `repr`, so that control characters are visible. No rows
    give "".
    """
    lines = []
    for number, row in enumerate(rows):
        mark = "*" if row.supervised else " "
        line = f"{number:>5} {mark} {row.text!r}"
        if row.anchors:
            line += f"  <- {', '.join(row.anchors)}"
        lines.append(f"\x1b[32m{line}\x1b[0m" if colour and row.supervised else line)
    return "\n".join(lines)
