"""Validation during training: retrieval and captions, on records that are never trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vlduet.config import RunConfig, SourceSection
from vlduet.data.formats import RowErrorHandler
from vlduet.data.holdout import is_in_holdout
from vlduet.data.images import MISSING_IMAGE, load_image
from vlduet.data.quarantine import Quarantine
from vlduet.data.readers.rows import IgnoredData
from vlduet.data.records import Record
from vlduet.data.sources import RecordSource, SourceLike, as_source
from vlduet.encoders.dual import DualEncoder
from vlduet.errors import ConfigError, DataError
from vlduet.eval import protocols
from vlduet.eval.examples import evenly_spaced
from vlduet.logs import logger
from vlduet.model.duet import DuetModel
from vlduet.model.generation import offline
from vlduet.model.limits import log_truncation
from vlduet.model.score_statistics import ScoreStatistics
from vlduet.retrieval.calibration import measure_score_statistics

MAX_VALIDATION_RECORDS = 256
"""Number of records that are used: the first of the file, so that validations are comparable."""
NUM_CAPTIONED_IMAGES = 16
"""Number of these images, evenly spaced, that the model captions."""
MAX_CAPTION_TOKENS = 256
"""Length limit of such a caption, however long the captions of the file are."""


@dataclass(frozen=True, slots=True)
class Validator:
    """Measurements of a model on pairs that it was not trained on; see `make_validator`."""

    pairs: Sequence[Record]
    seed: int

    def __call__(self, model: DuetModel | DualEncoder) -> dict[str, float]:
        """Return the metrics of a model, by name (`compute_validation_metrics`)."""
        return compute_validation_metrics(model, self.pairs, seed=self.seed)

    def calibrate(self, model: DuetModel | DualEncoder) -> ScoreStatistics | None:
        """Return the scores of unrelated pairs (`measure_score_statistics`)."""
        return measure_score_statistics(model, self.pairs)


def make_config_validator(config: RunConfig, *, seed: int) -> Validator:
    """Return the validator of the records that `data.validation` of a config names.

    They are those of `read_validation_pairs`, which says what is raised. The seed is that of
    `make_validator`.
    """
    return Validator(read_validation_pairs(config), seed)


def read_validation_pairs(config: RunConfig) -> list[Record]:
    """Return the validation records of a config: the first `MAX_VALIDATION_RECORDS` usable pairs.

    They are those of the source that `data.validation` names, or, if it is a share, the training
    records that are held out from all sources in turn. Broken records are logged and left out.

    Raises:
        ConfigError: `data.validation` is not set.
        DataError: there is no usable pair, or a source cannot be read.
    """
    section = config.data.validation
    if section is None:
        fix = "Name a source of pairs, or the share of the training records to hold out"
        raise ConfigError("there are no records", place="data.validation", fix=fix)
    if isinstance(section, SourceSection):
        return _read_source_pairs(RecordSource.from_config(section))
    sources = [RecordSource.from_config(source) for source in config.data.train]

    def read(on_error: RowErrorHandler) -> Iterator[Record]:
        """Yield the records of all sources that are held out."""
        for source in sources:  # training reads them too, and reports what is not read
            for record in source.read_silently(IgnoredData(), on_error=on_error):
                if is_in_holdout(record, section):
                    yield record

    return _read_pairs(read, place=sources[0].path)


def make_validator(source: SourceLike, *, seed: int) -> Validator:
    """Read a source, and return the validator of its pairs.

    Args:
        source: records, which are read to their end. The first `MAX_VALIDATION_RECORDS` pairs with
            a short caption and a readable image are used; broken records are logged and left out.
        seed: seed of the choice of the wrong image for each caption.

    Raises:
        DataError: there is no usable pair, or the source cannot be read.
    """
    return Validator(_read_source_pairs(as_source(source)), seed)


def _read_source_pairs(source: RecordSource) -> list[Record]:
    """Return the first usable pairs of one source; see `_read_pairs`."""
    return _read_pairs(lambda on_error: source.read(on_error=on_error), place=source.path)


def _read_pairs(
    read: Callable[[RowErrorHandler], Iterator[Record]], *, place: Path
) -> list[Record]:
    """Return the first usable pairs of a source, as `make_validator` selects them.

    Args:
        read: returns all records; calls its argument with the error of every broken row.
        place: place of the DataError that is raised if there is no usable pair.
    """
    dropped = Quarantine()
    first_error: DataError | None = None

    def on_error(error: DataError) -> None:
        nonlocal first_error
        first_error = first_error or error
        dropped.add(error.place, error)

    pairs: list[Record] = []
    for record in read(on_error):
        if len(pairs) < MAX_VALIDATION_RECORDS and is_usable_pair(record, on_error=on_error):
            pairs.append(record)
    if not pairs:
        message = "no pair with an image and a short caption"
        fix = "Name pair records in data.validation"
        if first_error:
            message += f" ({dropped}; the first: {first_error.place}: {first_error.message})"
            if first_error.message == MISSING_IMAGE:
                fix = "Name the folder of the images as `root` of the source"
        raise DataError(message, place=place, fix=fix)
    if first_error:
        logger.info(f"validation: {dropped}; the first: {first_error}")
    return pairs


def is_usable_pair(record: Record, *, on_error: RowErrorHandler | None = None) -> bool:
    """Return whether a record has a short caption and an image that can be decoded.

    The error of a broken or missing image goes to `on_error`; by default it is logged.
    """
    if record.image is None or not record.short:
        return False
    try:
        load_image(record.image)
    except DataError as error:
        if on_error is None:
            logger.info(f"left out: {error}")
        else:
            on_error(error)
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
    retrieval = measure_retrieval(model, records)
    text_to_image = retrieval.text_to_image.hit_rates()
    image_to_text = retrieval.image_to_text.hit_rates()
    values = {f"text_to_image/{name}": rate for name, rate in text_to_image.items()}
    values |= {f"image_to_text/{name}": rate for name, rate in image_to_text.items()}
    if isinstance(model, DualEncoder):  # it cannot generate
        return values
    captions = select_captions(records)
    entropy = protocols.measure_caption_cross_entropy(
        model.compute_caption_nll, captions, seed=seed
    )
    values["caption_cross_entropy"] = entropy.nats_right_image().mean
    values["caption_cross_entropy_wrong_image"] = entropy.nats_wrong_image().mean
    values["captions_ended"] = compute_caption_end_rate(
        model, captions, max_caption_tokens=int(max(entropy.num_tokens))
    )
    return values


def measure_retrieval(
    model: DuetModel | DualEncoder, records: Sequence[Record]
) -> protocols.RetrievalResult:
    """Return the retrieval of records that are pairs (`protocols.measure_retrieval`).

    Captions that are longer than the model's limit are cut, as in training; their number is logged.
    """
    with log_truncation("retrieval") as on_truncate:
        return protocols.measure_retrieval(
            partial(model.encode_document, on_truncate=on_truncate),
            partial(model.encode_query, on_truncate=on_truncate),
            records=records,
        )


def select_captions(records: Sequence[Record]) -> list[Record]:
    """Return copies of pairs with one short caption: the long one, else the first short one."""
    return [replace(record, short=(record.long or record.short[0],)) for record in records]


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
    generated = offline.generate_with_finish_reason(
        model.backbone, model.prefill_inputs(prompts), limit
    )
    return sum(finish_reason == "stop" for _, finish_reason in generated) / len(generated)
