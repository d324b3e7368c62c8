"""Batches of every training step, prepared one step ahead in a thread.

1. samples    of this rank for a step (data/stream.py)
2. sequences  by the recipe's layout; a record that cannot be laid out is quarantined
3. trimmed    to what the losses need
4. chunks     groups of sequences that go through the model at once
5. batches    on the model's device
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from vlduet import distributed
from vlduet.data.batches import Batch, split_into_chunks
from vlduet.data.sequences import Sequence, trim
from vlduet.data.stream import Sample
from vlduet.errors import DataError
from vlduet.logs import logger
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import VISION_BATCH_IMAGES, replace_pixels_by_features
from vlduet.train.run import RequiredOutputs, TrainingRun

USAGE_LOG_RECORDS = 1000
"""Number of records after which the share of dropped and cut ones is logged."""


def iterate_batches(
    run: TrainingRun, start: int, stop: int | None = None
) -> Iterator[tuple[list[Sample], list[Batch]]]:
    """Yield this rank's samples and batches for every step from `start` to `stop` - 1.

    A thread prepares the next step meanwhile. Records that cannot be laid out are added to the
    run's quarantine. Nothing is yielded if `start` is not below `stop`.

    Args:
        start: first step.
        stop: step after the last one, by default the end of the run.

    Yields:
        All samples of the step, quarantined ones included, and its batches on the model's device.
        There is one batch; several with `train.chunk_tokens`; one for anchors and one for labels
        without `train.fused`; none where no record of this rank is usable or needed by a loss with
        a weight.

    Raises:
        ConfigError, ModelError: the recipe's layout or a frozen encoder fails for another reason
            than the record; raised when the step is requested.
    """
    stop = run.num_steps if stop is None else stop
    with ThreadPoolExecutor(1) as executor:
        upcoming = executor.submit(_prepare_step, run, start) if start < stop else None
        for step in range(start, stop):
            assert upcoming is not None
            samples, groups = upcoming.result()
            if step + 1 < stop:
                upcoming = executor.submit(_prepare_step, run, step + 1)
            batches = [run.model.collate(group, pack_to=run.config.train.pack) for group in groups]
            del groups  # thousands of sequences, which must not wait for the end of the step
            yield samples, batches


def _prepare_step(run: TrainingRun, step: int) -> tuple[list[Sample], list[list[Sequence]]]:
    """Return this rank's samples of a step, and its sequences in one group for each batch.

    Sequences are trimmed to the outputs that losses with a weight need; those without any are left
    out, and without sequences there is no group. Without `train.fused`, the sequences are grouped
    for anchors alone and then, again, for labels alone. With `train.chunk_tokens`, a group is one
    of `split_into_chunks`. Unusable records go to the run's quarantine; raises as
    `iterate_batches`.
    """
    train = run.config.train
    samples = run.mixture.step_samples(
        step,
        train.batch_size,
        rank=distributed.get_rank(),
        world_size=distributed.get_world_size(),
    )
    sequences: list[Sequence] = []
    for begin in range(0, len(samples), VISION_BATCH_IMAGES):  # bounds the pixels in memory
        sequences += _render_samples(run, samples[begin : begin + VISION_BATCH_IMAGES])
    required = run.required_outputs()
    passes = [required]
    if not train.fused:
        passes = [RequiredOutputs(False, required.anchors), RequiredOutputs(required.labels, False)]
    groups: list[list[Sequence]] = []
    for labels, anchors in passes:
        trimmed = [trim(sequence, labels=labels, anchors=anchors) for sequence in sequences]
        group = [sequence for sequence in trimmed if sequence is not None]
        if train.chunk_tokens:
            groups += split_into_chunks(group, train.chunk_tokens, pack_to=train.pack)
        elif group:
            groups.append(group)
    return samples, groups


def _render_samples(run: TrainingRun, samples: list[Sample]) -> list[Sequence]:
    """Return the sequences of samples in order, with the features of the run's frozen encoders.

    A sample can give any number of sequences: the recipe's layout decides.

    A sample that raises DataError (or ImageError) is left out and added to the run's quarantine;
    other errors propagate. What becomes of the samples is counted in the run's `usage`, and logged
    every USAGE_LOG_RECORDS records if any was dropped or cut since.

    In a run with chunks, images have vision features instead of pixels, because all sequences of a
    step wait in memory for their chunk; features that are not in the model's cache are computed and
    stored there.
    """
    sequences: list[Sequence] = []
    required = run.required_outputs()
    usage = run.usage
    for sample in samples:
        # Samples of unusable sources are not counted: a warning has named their source.
        is_counted = not run.find_source(sample).unusable_reason
        try:
            layout = run.recipe.layout(sample, run.model.renderer)
            sequences += run.encoders.attach_features(layout)
        except DataError as error:
            run.quarantine.add(sample.record, error)
            if is_counted:
                usage.add_drop(error)
        else:
            if is_counted:
                usage.add_sequences(layout, labels=required.labels, anchors=required.anchors)
        if usage.num_records % USAGE_LOG_RECORDS == 0 and usage.has_news():
            logger.info(f"so far, {usage}")
    if run.config.train.chunk_tokens and isinstance(run.model, DuetModel):
        return replace_pixels_by_features(
            sequences, run.model.feature_cache, run.model.backbone.compute_vision_features
        )
    return sequences
