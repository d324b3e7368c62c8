"""Checks of files of records: ``vlduet data check train.jsonl test.jsonl``.

1. read       every record; a broken row is a problem with its line, field, cause and remedy
2. decode     every image, in threads; a broken or refused one is a problem, the others get a
              fingerprint
3. compare    ids within a file; images and captions across the files, for leaks between splits
"""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from vlduet.data import images
from vlduet.data.readers.rows import IgnoredData
from vlduet.data.records import Place, Record, iter_labelled_parts
from vlduet.data.sources import STRICT_FIX, RecordSource, SourceLike, as_source
from vlduet.data.tools.check_report import (
    MAX_LISTED,
    CheckReport,
    FileReport,
    ProblemList,
    RecordProblem,
    SplitLeak,
)
from vlduet.data.tools.duplicates import ImageFingerprint, caption_key, find_near_duplicates
from vlduet.data.tools.image_contents import ImageContent, read_image_contents
from vlduet.data.tools.metadata_texts import MetadataTexts
from vlduet.data.tools.missing_images import suggest_remedy
from vlduet.errors import DataError


@dataclass(slots=True)
class _FileContents:
    """Images and captions of one file, for comparing it with another."""

    fingerprints: dict[str, ImageFingerprint] = field(default_factory=dict)
    """Fingerprint of every distinct readable image, by `images.image_key`."""
    image_places: dict[str, tuple[str, str]] = field(default_factory=dict)
    """(place of the first record, name of the image), by `images.image_key`."""
    captions: dict[str, tuple[str, str]] = field(default_factory=dict)
    """(place of the first record, caption), by `caption_key`."""


ProgressWrapper = Callable[[Iterable[Record], str], Iterable[Record]]
"""Function of (records, label) that yields the records and shows progress."""


def check_files(
    sources: Sequence[SourceLike],
    *,
    progress: ProgressWrapper = lambda records, label: records,
) -> CheckReport:
    """Read all records and images of some files, and compare the files with one another.

    Args:
        sources: files or folders, such as the splits of a data set. What a `strict` one holds and
            is not read is a problem, else a sentence in `FileReport.ignored`.
        progress: wraps the loop over the records of each file.

    Returns:
        A report with the files in the order of `sources`. Leaks are those of each two files.

    Raises:
        DataError, OSError: a source cannot be read at all (as `read_records`). Errors of records
            and images are in the report.
    """
    problems = ProblemList()
    checks = []
    for source in map(as_source, sources):
        check = _FileCheck(source, problems)
        check.run(progress)
        checks.append(check)
    leaks: list[SplitLeak] = []
    num_leaks: Counter[str] = Counter()
    for first, second in combinations(checks, 2):
        for leak in _find_leaks(first.contents, second.contents):
            num_leaks[leak.kind] += 1
            if num_leaks[leak.kind] <= MAX_LISTED:
                leaks.append(leak)
    files = [check.report for check in checks]
    return CheckReport(files, list(problems.groups.values()), leaks, dict(num_leaks))


class _FileCheck:
    """Check of one file: its counts and contents; its problems go to a list of all files."""

    def __init__(self, source: RecordSource, problems: ProblemList):
        """Start with nothing counted."""
        self.source = source
        self.problems = problems
        self.report = FileReport(str(source.path))
        self.contents = _FileContents()
        self.first_place: dict[str, str] = {}  # by id
        self.lengths: dict[str, list[int]] = defaultdict(list)  # words, by role of the text
        self.missing_images: dict[Path, Place] = {}
        self.broken_images = set[str]()  # names
        self.num_broken_rows = 0
        self.texts = MetadataTexts()

    def run(self, progress: ProgressWrapper) -> None:
        """Read the file, and fill `report` and `contents`. Raises what `read_records` raises."""
        ignored = IgnoredData()
        records = self.source.read_silently(ignored, on_error=self._add_row_error)
        tracked = progress(records, f"checking {self.source.path.name}")
        for record, results in read_image_contents(tracked):
            place = record.place or Place(str(self.source.path))
            self._count_record(record, place)
            for ref, result in zip(record.images(), results, strict=True):
                self.report.images += 1
                if isinstance(result, ImageContent):
                    key = result.key
                    self.contents.fingerprints.setdefault(key, result.fingerprint)
                    self.contents.image_places.setdefault(key, (str(place), ref.name))
                elif ref.name not in self.broken_images:
                    self.broken_images.add(ref.name)
                    self._add_image_error(ref.path, ref.name, place.with_field("image"), result)
        self._add_missing_images()
        if not self.report.records and not self.num_broken_rows:
            fix = "Write at least one; below the header of a table"
            self._add(Place(str(self.source.path)), "there is no record", fix)
        self.report.doubtful_metadata += self.texts.describe_numbers()
        if self.source.strict:
            for message in ignored.messages():
                self._add(Place(str(self.source.path)), message, STRICT_FIX)
        else:
            self.report.ignored += ignored.messages()
        self.report.ignored += ignored.describe_system_files()
        self.report.distinct_images = len(self.contents.fingerprints)
        self.report.words = {
            role: {"min": min(counts), "median": statistics.median(counts), "max": max(counts)}
            for role, counts in sorted(self.lengths.items())
        }

    def _count_record(self, record: Record, place: Place) -> None:
        """Count kind, texts and metadata of a record; a repeated id is a problem."""
        report = self.report
        report.records += 1
        report.kinds[record.kind] = report.kinds.get(record.kind, 0) + 1
        report.bare += record.kind == "pair" and not record.short and record.long is None
        if record.id in self.first_place:
            cause = f"id '{record.id}' stands at {self.first_place[record.id]} already"
            message = "an id stands twice"
            fix = "Give every record an id of its own"
            self._add(place.with_field("id"), cause, fix, message=message)
        self.first_place.setdefault(record.id, str(place))
        for role, text in _iter_texts(record):
            self.lengths[role].append(len(text.split()))
            if role in ("short", "long"):
                report.captions += 1
                key = caption_key(text)
                if key is not None:
                    self.contents.captions.setdefault(key, (str(place), text))
        self.texts.add(record.metadata, place)
        for key, value in record.metadata.items():
            kinds = report.metadata.setdefault(str(key), [])
            kind = _name_kind(value)
            if kind is not None and kind not in kinds:
                kinds.append(kind)

    def _add(
        self, place: Place, cause: str, fix: str | None, *, message: str | None = None
    ) -> None:
        """Add a problem; `message` decides its group, by default its cause."""
        problem = RecordProblem(place.file, place.line, place.field, cause, fix)
        self.problems.add(str(self.source.path), problem, message=message or cause)

    def _add_row_error(self, error: DataError) -> None:
        self.num_broken_rows += 1
        self._add(_parse_place(error.place), error.message, error.fix)

    def _add_image_error(
        self, path: Path | None, name: str, place: Place, error: DataError
    ) -> None:
        """Add the error of an image, or if it is missing, only its path to `missing_images`."""
        if path is not None and error.message == images.MISSING_IMAGE:
            self.missing_images[path] = place
        else:
            self._add(place, f"{name}: {error.message}", error.fix, message=error.message)

    def _add_missing_images(self) -> None:
        """Add a problem for each path of `missing_images`, all with the same remedy."""
        if not self.missing_images:
            return
        folder = self.source.path if self.source.path.is_dir() else self.source.path.parent
        root = self.source.root or folder
        fix = suggest_remedy(list(self.missing_images), root)
        fix = fix or f"Correct the paths, which start from {root}, or name another --root"
        for path, place in self.missing_images.items():
            message = images.MISSING_IMAGE
            self._add(place, f"{path}: {message}", fix, message=message)


_TEXT_ROLES = {"short": "short", "long": "long", "part": "slice"}
_TEXT_ROLES |= dict.fromkeys(("system", "user", "assistant"), "turn")
_TEXT_ROLES |= dict.fromkeys(("query", "positive", "negative"), "retrieval")


def _iter_texts(record: Record) -> Iterator[tuple[str, str]]:
    """Yield (role, text) for every text: short, long, slice, turn or retrieval."""
    for label, part in iter_labelled_parts(record):
        if isinstance(part, str):
            yield _TEXT_ROLES[label.split()[0]], part


def _name_kind(value: Any) -> str | None:
    """Return the kind of a metadata value: text, flag, number, list or object; None for null."""
    names = {str: "text", bool: "flag", int: "number", float: "number", list: "list"}
    return None if value is None else names.get(type(value), "object")


def _find_leaks(first: _FileContents, second: _FileContents) -> Iterator[SplitLeak]:
    """Yield the leaks between two files: same images, similar images, then same captions.

    They are in the order of the first file. Equal images are not reported as similar ones too.
    Captions are compared by `caption_key`, and short ones are ignored.
    """
    shared = {key for key in first.fingerprints if key in second.fingerprints}
    for key in first.fingerprints:
        if key in shared:
            place, name = first.image_places[key]
            yield SplitLeak("same image", place, second.image_places[key][0], name)
    rows = [key for key in first.fingerprints if key not in shared]
    columns = [key for key in second.fingerprints if key not in shared]
    pairs = find_near_duplicates(
        [first.fingerprints[key] for key in rows], [second.fingerprints[key] for key in columns]
    )
    for i, j in pairs:
        place, name = first.image_places[rows[i]]
        other_place, other_name = second.image_places[columns[j]]
        yield SplitLeak("similar image", place, other_place, f"{name} and {other_name}")
    for text, (place, caption) in first.captions.items():
        if text in second.captions:
            yield SplitLeak("same caption", place, second.captions[text][0], caption)


def _parse_place(text: str | None) -> Place:
    """Return the `Place` that was printed as `text`; file ``?`` for None."""
    match = re.fullmatch(r"(.*?)(?::(\d+))?(?::([^:/\\]+))?", text or "?", re.DOTALL)
    assert match is not None
    file, line, field_name = match.groups()
    return Place(file, int(line) if line else None, field_name)
