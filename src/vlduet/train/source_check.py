"""Look at training records before the first step, and count what would be dropped or cut.

1. draw       up to MAX_PROBED_RECORDS records, the first of the training order, are laid out
2. refuse     a source that loses more than `data.max_dropped` of its records
3. warn       of whatever the config asks for and the records cannot give

The main process looks, and all processes come to its result.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from vlduet import distributed
from vlduet.data.images import MISSING_IMAGE
from vlduet.data.stream import SCHEDULE_BLOCK_SIZE, Sample
from vlduet.data.tools.missing_images import suggest_remedy
from vlduet.errors import DataError
from vlduet.hub import resolve_dataset
from vlduet.model.duet import DuetModel
from vlduet.model.prompts import Renderer
from vlduet.train.image_probe import ImageProbe
from vlduet.train.optim import count_warmup_steps
from vlduet.train.run import TrainingRun
from vlduet.train.source_records import build_unusable_source_error
from vlduet.train.usage import NOTHING_TO_LEARN, UsageCounts, format_causes

MAX_PROBED_RECORDS = 2000
"""Number of records that are laid out before the first step, at most."""
MAX_EPOCHS = 50
"""Number of epochs above which a warning is given."""
MIN_VALIDATION_RECORDS = 10
"""Number of records held out below which a warning is given."""


@dataclass
class SourceCheck:
    """Result of looking at the records of a run, by source."""

    by_source: list[UsageCounts] = field(default_factory=list)
    """Counts of the records that were laid out, for every source; all 0 for unusable ones."""
    num_images: int = 0
    """Number of images that were looked at."""
    num_decoded: int = 0
    """Number of images that were decoded; of the others, the header was read."""

    @property
    def num_records(self) -> int:
        """Number of records that were laid out."""
        return sum(counts.num_records for counts in self.by_source)


def check_sources(run: TrainingRun) -> SourceCheck:
    """Lay out a sample of the training records, and count what training would drop or cut.

    All records are laid out if there are at most MAX_PROBED_RECORDS, otherwise the first of the
    training order, without repetition. Dropped ones are listed in the run's quarantine, on the main
    process. A source whose laid-out records have nothing for the losses is marked as unusable in
    `run.sources`. A collective call: every rank must make it.

    Raises:
        DataError: a source loses more than `data.max_dropped` of its records, rows that were left
            out when it was read included; or no source has anything for the losses.
        ConfigError, ModelError: the layout of a record fails for another reason than the record.
    """

    def check_on_main() -> tuple[SourceCheck, list[str]]:
        return _check_sources(run), [source.unusable_reason for source in run.sources]

    check, reasons = distributed.call_on_main(check_on_main)
    for source, reason in zip(run.sources, reasons, strict=True):
        source.unusable_reason = reason
    return check


def _check_sources(run: TrainingRun) -> SourceCheck:
    """Look at the records of a run in this process, as `check_sources` does."""
    is_duet = isinstance(run.model, DuetModel)
    probe = ImageProbe(run.model.renderer.prepare_image if is_duet else None)
    renderer = run.model.renderer
    if is_duet:
        renderer = renderer.with_options(prepare_image=probe.prepare_image)
    check = SourceCheck([UsageCounts() for _ in run.sources])
    for sample in _draw_samples(run):
        number = int(sample.origin.partition(".")[0])
        if not run.sources[number].unusable_reason:
            _probe_sample(run, sample, renderer, probe, counts=check.by_source[number])
    check.num_images, check.num_decoded = probe.num_images, probe.num_decoded
    for source, counts in zip(run.sources, check.by_source, strict=True):
        if counts.num_records and counts.causes[NOTHING_TO_LEARN] == counts.num_records:
            source.unusable_reason = NOTHING_TO_LEARN
    unusable = [source for source in run.sources if source.unusable_reason]
    if len(unusable) == len(run.sources):
        raise build_unusable_source_error(unusable[0], run.recipe, run.config)
    for number, counts in enumerate(check.by_source):
        if not run.sources[number].unusable_reason:
            _check_share(run, number, counts)
    return check


def _draw_samples(run: TrainingRun) -> list[Sample]:
    """Return all records of a run as samples, or the first MAX_PROBED_RECORDS of its order.

    Records that occur again among these are left out.
    """
    mixture = run.mixture
    if mixture.num_records > MAX_PROBED_RECORDS:
        samples = [mixture[position] for position in range(MAX_PROBED_RECORDS)]
        return list({sample.origin: sample for sample in reversed(samples)}.values())[::-1]
    return [
        Sample(record, index, mixture.seed, f"{number}.{index}")
        for number, records in enumerate(mixture.sources)
        for index, record in enumerate(records)
    ]


def _probe_sample(
    run: TrainingRun,
    sample: Sample,
    renderer: Renderer,
    probe: ImageProbe,
    *,
    counts: UsageCounts,
) -> None:
    """Lay out a sample with placeholders for its images, and add the result to `counts`.

    A record that cannot be laid out is listed in the run's quarantine; other errors propagate.
    """
    required = run.required_outputs()
    try:
        record = probe.replace_images(sample.record)
        placeholder = Sample(record, sample.position, sample.seed, sample.origin)
        sequences = run.recipe.layout(placeholder, renderer)
    except DataError as error:
        run.quarantine.add(sample.record, error)
        counts.add_drop(error)
    else:
        counts.add_sequences(sequences, labels=required.labels, anchors=required.anchors)


def _has_record_for(run: TrainingRun, loss: str) -> bool:
    """Return whether a usable record may have something for a loss, by its fields."""
    return any(
        loss in run.recipe.find_losses(record)
        for source in run.sources
        if not source.unusable_reason
        for record in source.records
    )


def _check_share(run: TrainingRun, number: int, counts: UsageCounts) -> None:
    """Raise DataError if source `number` loses more than `data.max_dropped` of its records.

    The share is exact if all records were laid out, else an estimate by those that were.
    """
    source = run.sources[number]
    left_out_share = source.left_out.total() / max(1, source.num_rows)
    problem_share = counts.num_problems / max(1, counts.num_records)
    share = left_out_share + (1 - left_out_share) * problem_share
    limit = run.config.data.max_dropped
    if share <= limit:
        return
    causes = source.left_out + counts.causes
    if counts.num_records == len(source.records):
        scope = f"{causes.total():,} of {source.num_rows:,} records would be dropped or cut"
    else:
        scope = f"about {share:.0%} of {source.num_rows:,} records would be dropped or cut"
    listing = run.quarantine.path
    where = f", listed in {listing}" if listing is not None and listing.exists() else ""
    main_cause = causes.most_common(1)[0][0]
    remedy = (source.remedies | counts.remedies).get(main_cause, "Correct them")
    if main_cause == MISSING_IMAGE:
        section = source.section
        path = resolve_dataset(section.path)
        root = section.root or (path if path.is_dir() else path.parent)
        missing = [Path(place) for place in counts.places[main_cause]]
        key = f"data.train.{number}.root="
        remedy = suggest_remedy(missing, root, setting=f"Set {key}") or f"Set {key}FOLDER"
    setting = f"data.max_dropped={math.ceil(share * 100) / 100:g}"
    raise DataError(
        f"{scope} ({format_causes(causes)}{where}), which is more than data.max_dropped allows "
        f"({limit:.0%})",
        place=source.section.path,
        fix=f"{remedy.rstrip('.')}; or accept it: {setting}",
    )


# ------------------------------------------------------------------ messages


def describe_length(run: TrainingRun) -> str:
    """Return ``170 steps, 10 epochs of 521 records``."""
    epochs = f"{count_epochs(run):,.3g} epochs of {run.mixture.num_records:,} records"
    return f"{run.num_steps:,} steps, {epochs}"


def count_epochs(run: TrainingRun) -> float:
    """Return how many samples a run trains on, divided by the number of its records."""
    return run.num_steps * run.config.train.batch_size / run.mixture.num_records


def describe_data(run: TrainingRun, check: SourceCheck) -> str:
    """Return one line: what a run trains on, and what became of the records that were looked at."""
    left_out: Counter[str] = sum((source.left_out for source in run.sources), start=Counter())
    causes: Counter[str] = sum((counts.causes for counts in check.by_source), start=Counter())
    num_holdout = sum(source.num_holdout for source in run.sources)
    clauses = [describe_length(run)]
    num_not_drawn = sum(source.num_not_drawn for source in run.sources)
    if num_not_drawn:
        clauses.append(f"{num_not_drawn:,} more are not drawn (max_records)")
    if num_holdout:
        clauses.append(f"{num_holdout:,} held out for validation")
    if left_out:
        clauses.append(f"{left_out.total():,} left out ({format_causes(left_out)})")
    looked_at = f"of {check.num_records:,} looked at, {causes.total():,} are dropped or cut"
    clauses.append(f"{looked_at} ({format_causes(causes)})" if causes else looked_at)
    if check.num_decoded < check.num_images:
        clauses.append(f"{check.num_decoded:,} of {check.num_images:,} images were decoded for it")
    return "; ".join(clauses)


def describe_risks(run: TrainingRun, check: SourceCheck) -> list[str]:
    """Return warnings of what a config asks for and its records cannot give; [] for a sane plan.

    Each is one sentence with a remedy: unusable sources, losses without anything to learn, a batch
    larger than the data, more than MAX_EPOCHS epochs, nothing but warm-up, few records held out.
    """
    train, num_records = run.config.train, run.mixture.num_records
    warnings = []
    for source, count in zip(run.sources, run.mixture.counts, strict=True):
        if source.unusable_reason:
            error = build_unusable_source_error(source, run.recipe, run.config)
            share = count / SCHEDULE_BLOCK_SIZE
            warnings.append(f"{error}: {share:.0%} of every batch stay empty")
    num_labels = sum(counts.num_labels for counts in check.by_source)
    num_anchors = sum(counts.num_anchors for counts in check.by_source)
    for loss, weight in run.loss_weights().items():
        # Of several losses of embeddings, one may have all of them.
        has_output = bool(num_labels if loss == "language" else num_anchors)
        if not has_output or not _has_record_for(run, loss):
            output = "supervised tokens" if loss == "language" else "embeddings"
            scope = "any record" if check.num_records == num_records else "the records looked at"
            requirement = run.recipe.requirements.get(loss, "records of another kind")
            warnings.append(
                f"objectives.{loss} is {weight:g}, and there are no {output} in {scope}: it needs "
                f"{requirement}"
            )
    if train.batch_size > num_records:
        warnings.append(
            f"a batch of {train.batch_size:,} is larger than the {num_records:,} records, which it "
            f"repeats: lower train.batch_size, such as to {max(2, min(32, num_records // 4))}"
        )
    epochs = count_epochs(run)
    if epochs > MAX_EPOCHS:
        warnings.append(
            f"{epochs:,.0f} epochs: every record is trained on {epochs:,.0f} times. Set "
            "train.epochs instead of train.steps, such as train.epochs=10"
        )
    if count_warmup_steps(run.num_steps, train.warmup) >= run.num_steps:
        warnings.append(
            f"the warm-up takes all of the {run.num_steps} steps: train longer, or lower "
            "train.warmup"
        )
    num_holdout = sum(source.num_holdout for source in run.sources)
    if isinstance(run.config.data.validation, float) and num_holdout < MIN_VALIDATION_RECORDS:
        warnings.append(
            f"{num_holdout} records are held out for validation, whose numbers will say little: "
            "raise data.validation"
        )
    return warnings
