"""What is wrong with files of records, and what is in them: ``vlduet data check train.jsonl test.jsonl``.

1. read      every record; each broken row is a problem with its line, field, cause and fix
2. look      every image decoded in threads: broken and refused ones are problems; the others leave a fingerprint
3. compare   ids within a file; images and captions across the files given, for what leaks from one split into another
"""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlduet.data import images
from vlduet.data.formats import read_records
from vlduet.data.records import ImageRef, Place, Record
from vlduet.data.tools import duplicates
from vlduet.data.tools.duplicates import ImageFingerprint
from vlduet.errors import DataError
from vlduet.logs import strip_control_characters

NUM_THREADS = 4
MAX_LISTED_LEAKS = 200
"""Leaks of one kind that are kept, at most; they are counted all the same."""
MAX_PRINTED_LEAKS = 20
"""Leaks of one kind that are printed; --json has all that are kept."""
MIN_CAPTION_LENGTH = 12
"""Characters below which a repeated caption says nothing ("a dog")."""


@dataclass(frozen=True, slots=True)
class RecordProblem:
    """A record that will be dropped, as things stand."""

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
    """The same thing in two of the files."""

    kind: str
    """same image, similar image or same caption."""
    one: str
    """Its place, as ``file:line``."""
    other: str
    what: str
    """The image's name, or the caption."""


@dataclass(slots=True)
class FileReport:
    """What one file holds."""

    file: str
    records: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    images: int = 0
    """Mentions of images in records."""
    distinct_images: int = 0
    """By content, of those that can be read."""
    captions: int = 0
    bare: int = 0
    """Pairs without any caption."""
    words: dict[str, dict[str, float]] = field(default_factory=dict)
    """By role of the text (short, long, slice, turn, retrieval): min, median and max words."""

    def __str__(self) -> str:
        kinds = (
            ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items())) or "nothing"
        )
        facts = f"{self.file}: {self.records} records ({kinds}), {self.images} images ({self.distinct_images} distinct)"
        lengths = [
            f"{role} {n['min']:g}-{n['median']:g}-{n['max']:g}" for role, n in self.words.items()
        ]
        words = f"; words min-median-max: {', '.join(lengths)}" if lengths else ""
        bare = f" ({self.bare} pairs without any)" if self.bare else ""
        return f"{facts}, {self.captions} captions{bare}{words}"


@dataclass(slots=True)
class CheckReport:
    """All of it; `to_json` for machines."""

    files: list[FileReport]
    problems: list[RecordProblem]
    leaks: list[SplitLeak]
    num_leaks: dict[str, int]
    """By kind, also those that are not listed."""

    @property
    def ok(self) -> bool:
        """Whether every record can be used. Leaks are for the user to judge."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        lines = [str(file) for file in self.files]
        lines += [f"error: {problem}" for problem in self.problems]
        for kind, count in sorted(self.num_leaks.items()):
            lines.append(f"warning: {count} x {kind} in two of the files")
            found = [leak for leak in self.leaks if leak.kind == kind]
            lines += [
                f"  {leak.one} and {leak.other}: {leak.what}" for leak in found[:MAX_PRINTED_LEAKS]
            ]
        lines.append(f"{len(self.problems)} errors, {sum(self.num_leaks.values())} warnings")
        return "\n".join(map(strip_control_characters, lines))


@dataclass(slots=True)
class _Seen:
    """What is remembered of one file for comparing."""

    prints: dict[str, ImageFingerprint] = field(default_factory=dict)
    """Content key -> fingerprint."""
    where: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Content key -> (first place, image's name)."""
    captions: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Caption for comparing -> (first place, caption)."""


ProgressWrapper = Callable[[Iterable[Record], str], Iterable[Record]]


def check_files(
    paths: Sequence[Path],
    *,
    format: str | None = None,
    root: Path | None = None,
    progress: ProgressWrapper = lambda records, label: records,
) -> CheckReport:
    """Read, look and compare.

    Args:
        paths: files or folders; given together, they are compared with one another.
        format: of all of them, a key of `formats.FORMATS`; None tells each by its keys.
        root: where relative image paths start; None takes each file's folder.
        watch: wraps the loop over the records of a file, with a label, for a progress bar.

    Raises:
        DataError: a source that cannot be read at all.
    """
    problems: list[RecordProblem] = []
    files, seen = [], []
    for path in paths:
        records = read_records(
            path, format=format, root=root, on_error=lambda error: problems.append(_problem(error))
        )
        report, memory = _one(path, progress(records, f"checking {path.name}"), problems)
        files.append(report)
        seen.append(memory)
    leaks: list[SplitLeak] = []
    counts: Counter[str] = Counter()
    for i, one in enumerate(seen):
        for other in seen[i + 1 :]:
            for leak in _compare(one, other):
                counts[leak.kind] += 1
                if counts[leak.kind] <= MAX_LISTED_LEAKS:
                    leaks.append(leak)
    return CheckReport(files, problems, leaks, dict(counts))


def _one(
    path: Path, records: Iterable[Record], problems: list[RecordProblem]
) -> tuple[FileReport, _Seen]:
    report, seen, first = FileReport(str(path)), _Seen(), dict[str, str]()
    lengths: dict[str, list[int]] = defaultdict(list)
    looker = _Looker(seen, problems)
    with looker.pool:
        for record in records:
            place = record.place or Place(str(path))
            report.records += 1
            report.kinds[record.kind] = report.kinds.get(record.kind, 0) + 1
            report.bare += record.kind == "pair" and not record.short and record.long is None
            if record.id in first:
                cause = f"id '{record.id}' stands at {first[record.id]} already"
                problems.append(
                    _at(place.with_field("id"), cause, "Give every record an id of its own")
                )
            first.setdefault(record.id, str(place))
            for role, text in _texts(record):
                lengths[role].append(len(text.split()))
                if role in ("short", "long"):
                    report.captions += 1
                    seen.captions.setdefault(_comparable(text), (str(place), text))
            for ref in record.images():
                report.images += 1
                looker.look(ref, place)
        looker.finish()
    report.distinct_images = len(seen.prints)
    report.words = {
        role: {"min": min(n), "median": statistics.median(n), "max": max(n)}
        for role, n in sorted(lengths.items())
    }
    return report, seen


def _texts(record: Record) -> Iterator[tuple[str, str]]:
    yield from (("short", text) for text in record.short)
    if record.long:
        yield "long", record.long
    yield from (("slice", part) for part in record.parts if isinstance(part, str))
    for turn in record.messages:
        yield from (("turn", part) for part in turn.parts if isinstance(part, str))
    for item in (record.query, *record.positive, *record.negative):
        yield from (("retrieval", part) for part in item if isinstance(part, str))


def _comparable(text: str) -> str:
    return " ".join(re.sub(r"[^\w]+", " ", text.casefold()).split())


class _Looker:
    """Images fingerprinted in threads, a few dozen ahead; results are taken in order, so reports are equal every time."""

    def __init__(self, seen: _Seen, problems: list[RecordProblem]):
        self.seen, self.problems = seen, problems
        self.pool = ThreadPoolExecutor(NUM_THREADS)
        self._waiting: deque[tuple[Future[tuple[str, ImageFingerprint]], ImageRef, Place]] = deque()
        self._asked: dict[Path, None] = {}

    def look(self, ref: ImageRef, place: Place) -> None:
        """Ask for one image; a file that was looked at before is not decoded again."""
        if ref.path is not None:
            if ref.path in self._asked:
                return
            self._asked[ref.path] = None
        self._waiting.append((self.pool.submit(_fingerprint, ref), ref, place))
        if len(self._waiting) > 8 * NUM_THREADS:
            self._take()

    def finish(self) -> None:
        """Wait for all."""
        while self._waiting:
            self._take()

    def _take(self) -> None:
        future, ref, place = self._waiting.popleft()
        try:
            key, print_ = future.result()
        except DataError as error:
            self.problems.append(
                _at(place.with_field("image"), f"{ref.name}: {error.message}", error.fix)
            )
            return
        self.seen.prints.setdefault(key, print_)
        self.seen.where.setdefault(key, (str(place), ref.name))


def _fingerprint(ref: ImageRef) -> tuple[str, ImageFingerprint]:
    data = ImageRef(data=images.read_bytes(ref))  # read once, for both
    return images.image_key(data), duplicates.fingerprint_image(data)


def _compare(one: _Seen, other: _Seen) -> Iterator[SplitLeak]:
    """What two files share. An image that is the same is not named as similar too."""
    same = [key for key in one.prints if key in other.prints]
    for key in same:
        yield SplitLeak("same image", one.where[key][0], other.where[key][0], one.where[key][1])
    shared = set(same)
    rows, columns = ([key for key in seen.prints if key not in shared] for seen in (one, other))
    near = duplicates.find_near_duplicates(
        [one.prints[k] for k in rows], [other.prints[k] for k in columns]
    )
    for i, j in near:
        a, b = one.where[rows[i]], other.where[columns[j]]
        yield SplitLeak("similar image", a[0], b[0], f"{a[1]} and {b[1]}")
    for text, (place, caption) in one.captions.items():
        if len(text) >= MIN_CAPTION_LENGTH and text in other.captions:
            yield SplitLeak("same caption", place, other.captions[text][0], caption)


def _problem(error: DataError) -> RecordProblem:
    """An error's place, taken apart again."""
    match = re.fullmatch(r"(.*?)(?::(\d+))?(?::([^:/\\]+))?", error.place or "?", re.DOTALL)
    assert match is not None
    file, line, field = match.groups()
    return RecordProblem(file, int(line) if line else None, field, error.message, error.fix)


def _at(place: Place, cause: str, fix: str | None) -> RecordProblem:
    return RecordProblem(place.file, place.line, place.field, cause, fix)
