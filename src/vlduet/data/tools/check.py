"""Checks of files of records: ``vlduet data check train.jsonl test.jsonl``.

1. read       every record; a broken row is a problem with its line, field, cause and remedy
2. decode     every image, in threads; a broken or refused one is a problem, the others get a
              fingerprint
3. compare    ids within a file; images and captions across the files, for leaks between splits
"""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from vlduet.data import images
from vlduet.data.formats import read_records
from vlduet.data.records import ImageRef, Place, Record, iter_labelled_parts
from vlduet.data.tools import duplicates
from vlduet.data.tools.duplicates import ImageFingerprint
from vlduet.errors import DataError
from vlduet.logs import strip_control_characters

NUM_THREADS = 4
MAX_LISTED_LEAKS = 200
"""Largest number of leaks of one kind that a report lists; all are counted."""
MAX_PRINTED_LEAKS = 20
"""Largest number of leaks of one kind that ``str(report)`` prints."""
MIN_CAPTION_LENGTH = 12
"""Characters that a repeated caption must have to be a leak: "a dog" repeats by chance."""


@dataclass(frozen=True, slots=True)
class RecordProblem:
    """Error of one record, which training would leave out."""

    file: str
    line: int | None
    field: str | None
    cause: str
    fix: str | None

    def __str__(self) -> str:
        text = f"{Place(self.file, self.line, self.field)}: {self.cause}"
        return f"{text}. {self.fix}" if self.fix else text


@dataclass(frozen=True, slots=True)
class SplitLeak:
    """Image or caption that occurs in two of the files."""

    kind: str
    """``same image``, ``similar image`` or ``same caption``."""
    first_place: str
    """Place in the first file, as ``file:line``."""
    second_place: str
    """Place in the second file."""
    content: str
    """Names of the images, or the caption."""

    def to_json(self) -> dict[str, str]:
        """Return the leak with the keys of ``--json``: kind, one, other and what."""
        places = {"one": self.first_place, "other": self.second_place}
        return {"kind": self.kind, **places, "what": self.content}


@dataclass(slots=True)
class FileReport:
    """Contents of one file. The field names are the keys of ``--json``."""

    file: str
    records: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    """Number of records by kind."""
    images: int = 0
    """Number of references to images, repeated ones included."""
    distinct_images: int = 0
    """Number of readable images with different bytes."""
    captions: int = 0
    """Number of short and long captions."""
    bare: int = 0
    """Number of pairs without any caption."""
    words: dict[str, dict[str, float]] = field(default_factory=dict)
    """``min``, ``median`` and ``max`` number of words, by role of the text: short, long, slice,
    turn or retrieval."""

    def __str__(self) -> str:
        """Return the counts on one line; bare pairs and words only if there are any."""
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.kinds.items())) or "nothing"
        text = (
            f"{self.file}: {self.records} records ({kinds}), {self.images} images "
            f"({self.distinct_images} distinct), {self.captions} captions"
        )
        if self.bare:
            text += f" ({self.bare} pairs without any)"
        lengths = [
            f"{role} {count['min']:g}-{count['median']:g}-{count['max']:g}"
            for role, count in self.words.items()
        ]
        return f"{text}; words min-median-max: {', '.join(lengths)}" if lengths else text


@dataclass(slots=True)
class CheckReport:
    """Result of `check_files`."""

    files: list[FileReport]
    problems: list[RecordProblem]
    leaks: list[SplitLeak]
    """At most `MAX_LISTED_LEAKS` of each kind."""
    num_leaks: dict[str, int]
    """Number of leaks by kind, those that are not listed included."""

    @property
    def ok(self) -> bool:
        """True if every record can be used. Leaks are only warnings."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON types, with the additional key ``ok``."""
        leaks = [leak.to_json() for leak in self.leaks]
        return {"ok": self.ok, **asdict(self), "leaks": leaks}

    def __str__(self) -> str:
        """Return a line per file, problem and kind of leak, and a summary as the last line.

        At most `MAX_PRINTED_LEAKS` leaks follow the line of their kind, one per line. Control
        characters are replaced by blanks.
        """
        lines = [str(file) for file in self.files]
        lines += [f"error: {problem}" for problem in self.problems]
        for kind, count in sorted(self.num_leaks.items()):
            lines.append(f"warning: {count} x {kind} in two of the files")
            leaks = [leak for leak in self.leaks if leak.kind == kind][:MAX_PRINTED_LEAKS]
            for leak in leaks:
                lines.append(f"  {leak.first_place} and {leak.second_place}: {leak.content}")
        lines.append(f"{len(self.problems)} errors, {sum(self.num_leaks.values())} warnings")
        return "\n".join(map(strip_control_characters, lines))


@dataclass(slots=True)
class _FileContents:
    """Images and captions of one file, for comparing it with another."""

    fingerprints: dict[str, ImageFingerprint] = field(default_factory=dict)
    """Fingerprint of every distinct readable image, by `images.image_key`."""
    image_places: dict[str, tuple[str, str]] = field(default_factory=dict)
    """(place of the first record, name of the image), by `images.image_key`."""
    captions: dict[str, tuple[str, str]] = field(default_factory=dict)
    """(place of the first record, caption), by `_normalize`."""


ProgressWrapper = Callable[[Iterable[Record], str], Iterable[Record]]
"""Function of (records, label) that yields the records and shows progress."""


def check_files(
    paths: Sequence[Path],
    *,
    format: str | None = None,
    root: Path | None = None,
    progress: ProgressWrapper = lambda records, label: records,
) -> CheckReport:
    """Read all records and images of some files, and compare the files with one another.

    Args:
        paths: files or folders, such as the splits of a data set.
        format: key of `formats.FORMATS` of all of them; None detects it for each.
        root: folder that relative image paths start from; None means the folder of each file.
        progress: wraps the loop over the records of each file.

    Returns:
        A report with the files in the order of `paths`. Leaks are those of each two files.

    Raises:
        DataError, OSError: a source cannot be read at all (as `read_records`). Errors of records
            and images are in the report.
    """
    problems: list[RecordProblem] = []

    def add_row_error(error: DataError) -> None:
        problems.append(_to_problem(_parse_place(error.place), error.message, error.fix))

    reports: list[FileReport] = []
    contents: list[_FileContents] = []
    for path in paths:
        records = read_records(path, format=format, root=root, on_error=add_row_error)
        tracked = progress(records, f"checking {path.name}")
        report, file_contents = _check_file(path, tracked, problems)
        reports.append(report)
        contents.append(file_contents)
    leaks: list[SplitLeak] = []
    num_leaks: Counter[str] = Counter()
    for first, second in combinations(contents, 2):
        for leak in _find_leaks(first, second):
            num_leaks[leak.kind] += 1
            if num_leaks[leak.kind] <= MAX_LISTED_LEAKS:
                leaks.append(leak)
    return CheckReport(reports, problems, leaks, dict(num_leaks))


def _check_file(
    path: Path, records: Iterable[Record], problems: list[RecordProblem]
) -> tuple[FileReport, _FileContents]:
    """Return counts and contents of one file, whose images are decoded in threads.

    Repeated ids and images that cannot be decoded are appended to `problems`. Errors of the
    iterator `records` propagate.
    """
    report = FileReport(str(path))
    contents = _FileContents()
    first_place: dict[str, str] = {}  # by id
    lengths: dict[str, list[int]] = defaultdict(list)  # words, by role of the text
    checker = _ImageChecker(contents, problems)
    with checker.executor:
        for record in records:
            place = record.place or Place(str(path))
            report.records += 1
            report.kinds[record.kind] = report.kinds.get(record.kind, 0) + 1
            report.bare += record.kind == "pair" and not record.short and record.long is None
            if record.id in first_place:
                cause = f"id '{record.id}' stands at {first_place[record.id]} already"
                fix = "Give every record an id of its own"
                problems.append(_to_problem(place.with_field("id"), cause, fix))
            first_place.setdefault(record.id, str(place))
            for role, text in _iter_texts(record):
                lengths[role].append(len(text.split()))
                if role in ("short", "long"):
                    report.captions += 1
                    contents.captions.setdefault(_normalize(text), (str(place), text))
            for ref in record.images():
                report.images += 1
                checker.submit(ref, place)
        checker.finish()
    report.distinct_images = len(contents.fingerprints)
    report.words = {
        role: {"min": min(counts), "median": statistics.median(counts), "max": max(counts)}
        for role, counts in sorted(lengths.items())
    }
    return report, contents


_TEXT_ROLES = {"short": "short", "long": "long", "part": "slice"}
_TEXT_ROLES |= dict.fromkeys(("system", "user", "assistant"), "turn")
_TEXT_ROLES |= dict.fromkeys(("query", "positive", "negative"), "retrieval")


def _iter_texts(record: Record) -> Iterator[tuple[str, str]]:
    """Yield (role, text) for every text: short, long, slice, turn or retrieval."""
    for label, part in iter_labelled_parts(record):
        if isinstance(part, str):
            yield _TEXT_ROLES[label.split()[0]], part


def _normalize(text: str) -> str:
    """Return a caption without case, punctuation and repeated white space."""
    return " ".join(re.sub(r"[^\w]+", " ", text.casefold()).split())


class _ImageChecker:
    """Fingerprints images in threads, a few dozen ahead of the records.

    Results are taken in the order of submission, so that equal files give equal reports. They go
    to `contents`, errors to `problems`.
    """

    def __init__(self, contents: _FileContents, problems: list[RecordProblem]):
        """Create the executor, which the caller must shut down.

        Args:
            contents: receives the fingerprint and the place of every readable image.
            problems: list to which an error per unreadable image is appended.
        """
        self.contents = contents
        self.problems = problems
        self.executor = ThreadPoolExecutor(NUM_THREADS)
        self._pending: deque[tuple[Future[tuple[str, ImageFingerprint]], ImageRef, Place]] = deque()
        self._submitted_paths: set[Path] = set()

    def submit(self, ref: ImageRef, place: Place) -> None:
        """Queue one image of the record at `place`; a path that was queued before is ignored.

        If more than ``8 * NUM_THREADS`` images are pending, wait for the oldest and store its
        result.
        """
        if ref.path is not None:
            if ref.path in self._submitted_paths:
                return
            self._submitted_paths.add(ref.path)
        self._pending.append((self.executor.submit(_key_and_fingerprint, ref), ref, place))
        if len(self._pending) > 8 * NUM_THREADS:
            self._take_result()

    def finish(self) -> None:
        """Wait for the images that are still in work."""
        while self._pending:
            self._take_result()

    def _take_result(self) -> None:
        """Wait for the oldest pending image, of which there must be one, and store its result.

        Its fingerprint and place go to `contents` by content key, unless an equal image is there
        already; a DataError is appended to `problems` instead. Other exceptions propagate.
        """
        future, ref, place = self._pending.popleft()
        try:
            key, fingerprint = future.result()
        except DataError as error:
            cause = f"{ref.name}: {error.message}"
            self.problems.append(_to_problem(place.with_field("image"), cause, error.fix))
            return
        self.contents.fingerprints.setdefault(key, fingerprint)
        self.contents.image_places.setdefault(key, (str(place), ref.name))


def _key_and_fingerprint(ref: ImageRef) -> tuple[str, ImageFingerprint]:
    data = ImageRef(data=images.read_bytes(ref))  # read once, for both
    return images.image_key(data), duplicates.fingerprint_image(data)


def _find_leaks(first: _FileContents, second: _FileContents) -> Iterator[SplitLeak]:
    """Yield the leaks between two files: same images, similar images, then same captions.

    They are in the order of the first file. Equal images are not reported as similar ones too.
    Captions shorter than `MIN_CAPTION_LENGTH` after `_normalize` are ignored.
    """
    shared = {key for key in first.fingerprints if key in second.fingerprints}
    for key in first.fingerprints:
        if key in shared:
            place, name = first.image_places[key]
            yield SplitLeak("same image", place, second.image_places[key][0], name)
    rows = [key for key in first.fingerprints if key not in shared]
    columns = [key for key in second.fingerprints if key not in shared]
    pairs = duplicates.find_near_duplicates(
        [first.fingerprints[key] for key in rows], [second.fingerprints[key] for key in columns]
    )
    for i, j in pairs:
        place, name = first.image_places[rows[i]]
        other_place, other_name = second.image_places[columns[j]]
        yield SplitLeak("similar image", place, other_place, f"{name} and {other_name}")
    for text, (place, caption) in first.captions.items():
        if len(text) >= MIN_CAPTION_LENGTH and text in second.captions:
            yield SplitLeak("same caption", place, second.captions[text][0], caption)


def _parse_place(text: str | None) -> Place:
    """Return the `Place` that was printed as `text`; file ``?`` for None."""
    match = re.fullmatch(r"(.*?)(?::(\d+))?(?::([^:/\\]+))?", text or "?", re.DOTALL)
    assert match is not None
    file, line, field_name = match.groups()
    return Place(file, int(line) if line else None, field_name)


def _to_problem(place: Place, cause: str, fix: str | None) -> RecordProblem:
    """Return the problem of the value at `place`."""
    return RecordProblem(place.file, place.line, place.field, cause, fix)
