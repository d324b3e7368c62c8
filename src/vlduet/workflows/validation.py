"""Validation during training: retrieval and captions, on records that are never trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vlduet.data.formats import read_records
from vlduet.data.images import load_image
from vlduet.data.records import Record
from vlduet.encoders.dual import DualEncoder
from vlduet.errors import DataError
from vlduet.eval import protocols
from vlduet.eval.examples import evenly_spaced
from vlduet.logs import logger
from vlduet.model.duet import DuetModel
from vlduet.model.generation import continuous

MAX_VALIDATION_RECORDS = 256
"""Number of records that are used: the first of the file, so that validations are comparable."""
NUM_CAPTIONED_IMAGES = 16
"""Number of these images, evenly spaced, that the model captions."""
MAX_CAPTION_TOKENS = 256
"""Length limit of such a caption, however long the captions of the file are."""


def make_validator(
    path: Path, *, seed: int
) -> Callable[[DuetModel | DualEncoder], dict[str, float]]:
    """Read a file, and return a function that computes the metrics of a model on its pairs.

    The function calls `compute_validation_metrics`.

    Args:
        path: file of records, which is read to its end. The first `MAX_VALIDATION_RECORDS` pairs
            with a short caption and a readable image are used; broken records are logged and left
            out.
        seed: seed of the choice of the wrong image for each caption.

    Raises:
        DataError: the file has no usable pair, or cannot be read.
    """
    records: list[Record] = []
    for record in read_records(path, on_error=_log_dropped):
        if len(records) < MAX_VALIDATION_RECORDS and is_usable_pair(record):
            records.append(record)
    if not records:
        message = "no pair with an image and a short caption"
        raise DataError(message, place=path, fix="Name pair records in data.validation")
    return lambda model: compute_validation_metrics(model, records, seed=seed)


def _log_dropped(error: DataError) -> None:
    """Log that validation goes without a record, at level INFO."""
    logger.info(f"validation: dropped {error}")


def is_usable_pair(record: Record) -> bool:
    """Return whether a record has a short caption and an image that can be decoded.

    A broken or missing image is logged, not raised.
    """
    if record.image is None or not record.short:
        return False
    try:
        load_image(record.image)
    except DataError as error:
        _log_dropped(error)
        return False
    return True


def compute_validation_metrics(
    model: DuetModel | DualEncoder, records: Sequence[Record], *, seed: int
) -> dict[str, float]:
    """Return the metrics of a model on pairs, by name. The model's mode is restored.

    Args:
        records: pairs with an image and a short caption.
        seed: seed of the choice of the wrong image for each caption.

    Returns:
        ``text_to_image/hit@1`` (5, 10) and ``image_to_text/hit@1`` (5, 10) on short captions. For a
        `DuetModel` also ``caption_cross_entropy`` and ``caption_cross_entropy_wrong_image``, in
        nats per token of the long caption, else the first short one, and ``captions_ended``, see
        `compute_caption_end_rate`. Hit rates are fractions.

    Raises:
        DataError: there are no records, one lacks image or short caption, an image cannot be read,
            or (for a `DuetModel`) a record shares a caption with all others.
    """
    retrieval = protocols.measure_retrieval(
        model.encode_document, model.encode_query, records=records
    )
    text_to_image = retrieval.text_to_image.hit_rates()
    image_to_text = retrieval.image_to_text.hit_rates()
    values = {f"text_to_image/{name}": rate for name, rate in text_to_image.items()}
    values |= {f"image_to_text/{name}": rate for name, rate in image_to_text.items()}
    if isinstance(model, DualEncoder):  # it cannot generate
        return values
    captions = [replace(record, short=(record.long or record.short[0],)) for record in records]
    entropy = protocols.measure_caption_cross_entropy(
        model.compute_caption_nll, captions, seed=seed
    )
    values["caption_cross_entropy"] = entropy.nats_right_image().mean
    values["caption_cross_entropy_wrong_image"] = entropy.nats_wrong_image().mean
    values["captions_ended"] = compute_caption_end_rate(
        model, captions, max_caption_tokens=int(max(entropy.num_tokens))
    )
    return values


def compute_caption_end_rate(
    model: DuetModel, records: Sequence[Record], *, max_caption_tokens: int
) -> float:
    """Return the share of greedy captions that the model ends by itself, from 0 to 1.

    The cross entropy does not show this: a model that knows its training captions by heart may not
    know where a new caption ends.

    Args:
        records: pairs, at least one; `NUM_CAPTIONED_IMAGES` of them, evenly spaced, are captioned.
        max_caption_tokens: length of the longest true caption. A caption may become twice as long,
            but not longer than `MAX_CAPTION_TOKENS`.
    """
    prompts = [
        model.renderer.render_caption_request(record.image, "")
        for record in evenly_spaced(records, NUM_CAPTIONED_IMAGES)
        if record.image is not None
    ]
    limit = min(2 * max_caption_tokens, MAX_CAPTION_TOKENS)
    generated = continuous.generate_with_finish_reason(
        model.backbone, model.prefill_inputs(prompts), limit
    )
    return sum(finish_reason == "stop" for _, finish_reason in generated) / len(generated)
