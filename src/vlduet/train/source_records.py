"""Training records of all sources, without those that no loss of the run can use.

1. read        every source with its settings; broken rows are left out and listed
2. held out    the share of `data.validation`, selected by a hash of the content
3. left out    records with nothing for a loss that has a weight, judged by their fields alone
4. drawn       `max_records` of the others at random, if there are more

What is left is the data set that the order of training is a function of.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter

from vlduet.config import RunConfig, TrainSourceSection
from vlduet.data.holdout import is_in_holdout
from vlduet.data.image_store import ImageStore
from vlduet.data.quarantine import Quarantine, generalize_cause
from vlduet.data.records import Record
from vlduet.data.sources import RecordSource
from vlduet.errors import DataError
from vlduet.recipes.recipe import BoundRecipe, has_answer

KIND_NAMES = {
    "chat": "a chat",
    "interleaved": "a document",
    "retrieval": "a retrieval record",
}
"""Names of the kinds of records other than pairs, for messages."""


@dataclass
class SourceRecords:
    """Records of one source that are trained on, and counts of the others."""

    section: TrainSourceSection
    """Item of `data.train` that names the source."""
    records: list[Record] = field(default_factory=list)
    """Records in the order of the source. If none of them has anything for the losses, all: in a
    control run without some of the losses, such a source keeps its share of the steps."""
    unusable_reason: str = ""
    """Why none of the records has anything for the losses; empty if one has."""
    num_holdout: int = 0
    """Number of records that are held out for validation."""
    num_not_drawn: int = 0
    """Number of records that `max_records` excludes at random."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of broken rows and of records that are left out of `records`, by cause."""
    remedies: dict[str, str] = field(default_factory=dict)
    """Remedy of a cause, as an imperative sentence; not every cause has one."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the ids of the records in their order; other records have another one."""
        digest = hashlib.sha256()
        for record in self.records:
            digest.update(record.id.encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()[:16]

    @property
    def num_rows(self) -> int:
        """Number of rows of the source that are not held out."""
        return len(self.records) + self.num_not_drawn + self.left_out.total()

    def leave_out(self, error: DataError) -> None:
        """Count a row that is left out for a reason."""
        cause = generalize_cause(error.message)
        self.left_out[cause] += 1
        if error.fix:
            self.remedies.setdefault(cause, error.fix)


def read_source_records(
    config: RunConfig, recipe: BoundRecipe, *, quarantine: Quarantine, store: ImageStore
) -> list[SourceRecords]:
    """Read all sources of a config into memory and select their records; no image is decoded.

    Rows that are left out are listed in `quarantine`. Images that are no files, nor in a file, are
    written to `store`. The result depends on config and files only,
    so that all processes have the same.

    Raises:
        DataError: a source is missing, cannot be read or recognised, or has no record at all; or
            no source has a record with something for the losses.
    """
    sources = [
        _read_source(config, section, recipe=recipe, quarantine=quarantine, store=store)
        for section in config.data.train
    ]
    if all(source.unusable_reason for source in sources):
        raise build_unusable_source_error(sources[0], recipe, config)
    return sources


def _read_source(
    config: RunConfig,
    section: TrainSourceSection,
    *,
    recipe: BoundRecipe,
    quarantine: Quarantine,
    store: ImageStore,
) -> SourceRecords:
    """Read one source and select its records, as `read_source_records` does."""
    source = SourceRecords(section)

    def leave_out(error: DataError) -> None:
        quarantine.add(error.place, error)
        source.leave_out(error)

    share = config.data.validation if isinstance(config.data.validation, float) else 0.0
    losses = select_losses(config)
    unusable: list[tuple[Record, DataError]] = []

    def read_usable_records() -> Iterator[Record]:
        for record in RecordSource.from_config(section).read(on_error=leave_out):
            if share and is_in_holdout(record, share):
                source.num_holdout += 1
            elif losses.isdisjoint(recipe.find_losses(record)):
                error = describe_unusable_record(record, losses)
                unusable.append((store.write_images(record), error))
            else:
                yield record

    max_records = section.max_records
    drawn, source.num_not_drawn = draw_records(read_usable_records(), max_records, store=store)
    if unusable and not drawn:
        candidates = (record for record, _ in unusable)
        source.records, source.num_not_drawn = draw_records(candidates, max_records, store=store)
        source.unusable_reason = str(unusable[0][1])
        return source
    source.records = drawn
    for record, error in unusable:
        quarantine.add(record, error)
        source.leave_out(error)
    return source


def draw_records(
    records: Iterable[Record], max_records: int | None, *, store: ImageStore
) -> tuple[list[Record], int]:
    """Draw up to `max_records` of the records; None: all of them.

    The choice depends on both numbers alone, so that runs with other seeds have the same. Images
    that are no files, nor in a file, are written to `store` when their record is drawn, also if a
    later one takes its place. No more than `max_records` records are in memory.

    Returns:
        The drawn records in their order, and the number of the others.
    """
    if max_records is None:
        return [store.write_images(record) for record in records], 0
    generator = random.Random(0)
    drawn: list[tuple[int, Record]] = []
    num_records = 0
    for index, record in enumerate(records):  # reservoir sampling: every subset is as likely
        num_records += 1
        slot = index if index < max_records else generator.randrange(index + 1)
        if slot < max_records:
            drawn[slot : slot + 1] = [(index, store.write_images(record))]
    drawn.sort(key=itemgetter(0))
    return [record for _, record in drawn], num_records - len(drawn)


def select_losses(config: RunConfig) -> set[str]:
    """Return the names of the losses that have a weight."""
    return {name for name, weight in config.objectives.items() if weight}


def describe_unusable_record(record: Record, losses: set[str]) -> DataError:
    """Return, not raise, an error that says why a record has nothing for the losses."""
    nothing = f"has nothing for {', '.join(sorted(losses))}"
    if record.kind == "pair" and not record.short and not record.long:
        fix = "`vlduet caption` writes captions"
        return DataError("an image without a caption", place=record.place, fix=fix)
    if record.kind == "pair":
        length = "short" if record.short else "long"
        noun = f"an image with a {length} caption alone"
    elif record.kind == "chat" and not has_answer(record):
        noun = "a chat without an answer to learn"
    else:
        noun = KIND_NAMES[record.kind]
    return DataError(f"{noun} {nothing}", place=record.place)


def build_unusable_source_error(
    source: SourceRecords, recipe: BoundRecipe, config: RunConfig
) -> DataError:
    """Return, not raise, the error of a source that has nothing for the losses of a run.

    It quotes `source.unusable_reason`.
    """
    losses = ", ".join(name for name, weight in config.objectives.items() if weight)
    message = f"none of its {len(source.records):,} records has anything for {losses}"
    return DataError(
        f"{message} of {recipe.name} (the first: {source.unusable_reason})",
        place=source.section.path,
        fix="Look at it with `vlduet data check` and `vlduet data show`, or leave it out",
    )
