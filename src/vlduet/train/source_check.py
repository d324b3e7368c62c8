"""Check that every source of training records has something to learn for the losses of a run."""

from __future__ import annotations

from vlduet import distributed
from vlduet.data.sequences import trim
from vlduet.data.stream import Sample
from vlduet.errors import DataError
from vlduet.logs import logger
from vlduet.train.run import TrainingRun

MAX_PROBED_RECORDS = 256
"""Number of records of a source that are laid out to find one that is useful."""


def check_sources(run: TrainingRun) -> None:
    """Log a warning, on the main process, for every source without a record that a loss can use.

    Such a source wastes its share of the steps; it is allowed, because a control run may have
    sources for the losses that it leaves out. Up to MAX_PROBED_RECORDS records of a source are laid
    out, which decodes their images; the run is not modified.

    Raises:
        DataError: no source has a useful record (then all records are looked at): training would
            change nothing. The error describes the first source.
    """
    numbers = range(len(run.mixture.sources))
    problems = [
        problem
        for number in numbers
        if (problem := _find_source_problem(run, number, max_records=MAX_PROBED_RECORDS))
    ]
    if len(problems) == len(numbers):
        final_problems = [_find_source_problem(run, number, max_records=None) for number in numbers]
        if final_problems[0] is not None and all(final_problems):
            raise final_problems[0]
    if distributed.is_main_process():
        for problem in problems:
            logger.warning(f"warning: {problem}")


def _find_source_problem(
    run: TrainingRun, number: int, *, max_records: int | None
) -> DataError | None:
    """Return, not raise, why a source has nothing to learn; None once a useful record is found.

    A record is useful if its layout has an output that a loss with a weight needs. One whose layout
    raises DataError is not; the first such error is quoted. Other errors propagate.

    Args:
        number: number of the source, from 0.
        max_records: bound on the records that are laid out (which decodes their images), evenly
            spaced; None looks at all.
    """
    required = run.required_outputs()
    records = run.mixture.sources[number]
    stride = 1 if max_records is None else -(-len(records) // max_records)  # rounded up
    first_error: DataError | None = None
    for index in range(0, len(records), stride):
        sample = Sample(records[index], index, run.config.seed, f"{number}.{index}")
        try:
            sequences = run.recipe.layout(sample, run.model.renderer)
        except DataError as error:
            first_error = first_error or error
            continue
        for sequence in sequences:
            if trim(sequence, labels=required.labels, anchors=required.anchors):
                return None
    num_probed = len(range(0, len(records), stride))
    scope = f"its {len(records)}"
    if num_probed < len(records):
        scope = f"{num_probed} of its {len(records)}"
    losses = ", ".join(run.loss_weights())
    reason = f" (the first: {first_error})" if first_error else ""
    return DataError(
        f"none of {scope} records has anything for {losses} of {run.recipe.name}{reason}",
        place=run.config.data.train[number].path,
        fix="Look at it with `vlduet data check` and `vlduet data show`, or leave it out",
    )
