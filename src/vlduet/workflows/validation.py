"""Both sides of the bargain, measured on records that are never trained on: what training asks for now and then."""

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
from vlduet.logs import logger
from vlduet.model.duet import DuetModel
from vlduet.model.generation import continuous
from vlduet.eval.examples import evenly_spaced

MAX_VALIDATION_RECORDS = 256
"""Records that are measured; the first ones of the file, so that numbers of one run compare."""

NUM_CAPTIONED_IMAGES = 16
"""Of them, evenly spaced, whose images the model captions."""

MAX_CAPTION_TOKENS = 256
"""Tokens of such a caption, however long the file's own are."""


def make_validator(
    path: Path, *, seed: int, limit: int = MAX_VALIDATION_RECORDS
) -> Callable[[DuetModel | DualEncoder], dict[str, float]]:
    """A function that measures a model on the pairs of `path`.

    It returns hit@1/5/10 of both directions on short captions, the cross entropy of captions (long where there are any) in
    nats a token, with the right and with a wrong image, and the share of the model's own captions that end. Broken records
    are named and left out.

    Raises:
        DataError: no usable pair in the file.
    """
    records: list[Record] = []
    for record in read_records(path, on_error=lambda error: logger.info(f"validation: dropped {error}")):
        if len(records) < limit and is_usable_pair(record):
            records.append(record)
    if not records:
        raise DataError(
            "no pair with an image and a short caption",
            place=path,
            fix="Name pair records in data.validation",
        )
    return lambda model: compute_validation_metrics(model, records, seed=seed)


def is_usable_pair(record: Record) -> bool:
    """A pair with a short caption whose image can be read; what is not is said once."""
    if record.image is None or not record.short:
        return False
    try:
        load_image(record.image)
    except DataError as error:
        logger.info(f"validation: dropped {error}")
        return False
    return True


def compute_validation_metrics(
    model: DuetModel | DualEncoder, records: Sequence[Record], *, seed: int
) -> dict[str, float]:
    """The numbers of one measurement, by name."""
    found = protocols.measure_retrieval(model.encode_document, model.encode_query, records=records)
    values = {
        f"text_to_image/{name}": value for name, value in found.text_to_image.hit_rates().items()
    }
    values |= {
        f"image_to_text/{name}": value for name, value in found.image_to_text.hit_rates().items()
    }
    if isinstance(model, DualEncoder):  # it has nothing to say
        return values
    told = [replace(record, short=(record.long or record.short[0],)) for record in records]
    entropy = protocols.measure_caption_cross_entropy(model.compute_caption_nll, told, seed=seed)
    values["caption_cross_entropy"] = entropy.nats_right_image().mean
    values["caption_cross_entropy_wrong_image"] = entropy.nats_wrong_image().mean
    values["captions_ended"] = compute_caption_end_rate(
        model, told, max_caption_tokens=int(max(entropy.num_tokens))
    )
    return values


def compute_caption_end_rate(
    model: DuetModel, records: Sequence[Record], *, max_caption_tokens: int
) -> float:
    """The share of greedy captions that end by themselves within twice the tokens of the longest true one.

    No cross entropy tells: a model that knows its training captions by heart may not know where another one ends.
    """
    some = evenly_spaced(records, NUM_CAPTIONED_IMAGES)
    open_ = [
        model.renderer.render_caption_request(record.image, "")
        for record in some
        if record.image is not None
    ]
    written = continuous.generate_with_finish_reason(
        model.backbone, model.prefill_inputs(open_), min(2 * max_caption_tokens, MAX_CAPTION_TOKENS)
    )
    return sum(reason == "stop" for _, reason in written) / len(written)
