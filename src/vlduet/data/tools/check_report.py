"""Report of `check`: counts of each file, problems grouped by cause, and leaks between files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vlduet.data.images import MISSING_IMAGE
from vlduet.data.quarantine import generalize_cause
from vlduet.data.records import Place
from vlduet.data.sources import MAX_WARNINGS
from vlduet.logs import strip_control_characters

MAX_LISTED = 200
"""Largest number of leaks of one kind, and of problems of one file and cause, that a report lists;
all are counted."""
MAX_PRINTED_LEAKS = 20
"""Largest number of leaks of one kind that ``str(report)`` prints."""
MAX_PRINTED_PROBLEMS = 3
"""Largest number of problems of one file and cause that ``str(report)`` prints."""
MAX_PRINTED_KEYS = 20
"""Largest number of metadata keys of one file that ``str(report)`` prints."""


@dataclass(frozen=True, slots=True)
class RecordProblem:
    """Error of one record, which training would leave out."""

    file: str
    line: int | None
    field: str | None
    cause: str
    """Message of the error; for an image, behind its name."""
    fix: str | None

    def __str__(self) -> str:
        text = f"{Place(self.file, self.line, self.field)}: {self.cause}"
        return f"{text}. {self.fix}" if self.fix else text


@dataclass(slots=True)
class ProblemGroup:
    """Problems of one of the checked files that have one cause. `--json` has the same keys."""

    source: str
    """File or folder as it was given."""
    cause: str
    """Cause without names and numbers, see `generalize_cause`."""
    count: int = 0
    problems: list[RecordProblem] = field(default_factory=list)
    """The first `MAX_LISTED` problems."""

    def format_lines(self) -> list[str]:
        """Return a line per problem; of many, the first ones and a line with the number of others.

        Missing images have one line for all, because one remedy helps against all.
        """
        if self.cause == MISSING_IMAGE and self.count > 1:
            return [self._format_missing_images()]
        lines = [f"error: {problem}" for problem in self.problems[:MAX_PRINTED_PROBLEMS]]
        if self.count > MAX_PRINTED_PROBLEMS:
            count = self.count - MAX_PRINTED_PROBLEMS
            lines.append(f"error: {self.source}: {count:,} more of this kind ({self.cause})")
        return lines

    def _format_missing_images(self) -> str:
        """Return the number of missing images, the first names with their lines, and the remedy."""
        names = []
        for problem in self.problems[:MAX_PRINTED_PROBLEMS]:
            name = problem.cause.removesuffix(f": {MISSING_IMAGE}")
            names.append(name if problem.line is None else f"{name} (line {problem.line})")
        num_more = self.count - len(names)
        examples = ", ".join(names) + (f" and {num_more:,} more" if num_more else "")
        fix = f". {self.problems[0].fix}" if self.problems[0].fix else ""
        return f"error: {self.source}: {self.count:,} images do not exist: {examples}{fix}"


class ProblemList:
    """Problems of all files, grouped by file and cause, in the order of first occurrence."""

    def __init__(self) -> None:
        """Start without problems."""
        self.groups: dict[tuple[str, str], ProblemGroup] = {}
        """Group by source and cause."""

    def add(self, source: str, problem: RecordProblem, *, message: str) -> None:
        """Count a problem, and list it unless its group has `MAX_LISTED` of them.

        Args:
            source: file or folder that is being checked, as it was given.
            message: message of the error, from which the cause of the group follows.
        """
        cause = generalize_cause(message)
        group = self.groups.setdefault((source, cause), ProblemGroup(source, cause))
        group.count += 1
        if len(group.problems) < MAX_LISTED:
            group.problems.append(problem)


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
    metadata: dict[str, list[str]] = field(default_factory=dict)
    """Kinds of the values of each key of metadata: text, number, flag, list or object."""
    ignored: list[str] = field(default_factory=list)
    """Sentences about what was seen and not read."""
    doubtful_metadata: list[str] = field(default_factory=list)
    """Sentences about texts in metadata that are probably meant as numbers."""

    def format_lines(self) -> list[str]:
        """Return the counts on one line, the metadata if there is any, and warnings.

        Bare pairs and words are named only if there are any.
        """
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
        text = f"{text}; words min-median-max: {', '.join(lengths)}" if lengths else text
        lines = [text]
        if self.metadata:
            keys = [f"{key} ({' or '.join(kinds)})" for key, kinds in self.metadata.items()]
            num_more = len(keys) - MAX_PRINTED_KEYS
            more = f" and {num_more} more" if num_more > 0 else ""
            lines.append(f"  metadata: {', '.join(keys[:MAX_PRINTED_KEYS])}{more}")
        sentences = self.ignored[:MAX_WARNINGS]
        if num_more := len(self.ignored[MAX_WARNINGS:]):
            sentences.append(f"{num_more:,} more are not read (--json lists all)")
        sentences += self.doubtful_metadata
        return lines + [f"warning: {self.file}: {sentence}" for sentence in sentences]


@dataclass(slots=True)
class CheckReport:
    """Result of `check_files`."""

    files: list[FileReport]
    problem_groups: list[ProblemGroup]
    leaks: list[SplitLeak]
    """At most `MAX_LISTED` of each kind."""
    num_leaks: dict[str, int]
    """Number of leaks by kind, those that are not listed included."""

    @property
    def problems(self) -> list[RecordProblem]:
        """Listed problems of all groups, in the order of the groups."""
        return [problem for group in self.problem_groups for problem in group.problems]

    @property
    def num_errors(self) -> int:
        """Number of problems, those that are not listed included."""
        return sum(group.count for group in self.problem_groups)

    @property
    def num_warnings(self) -> int:
        """Number of leaks, and of sentences about what was not read and about metadata."""
        sentences = [file.ignored + file.doubtful_metadata for file in self.files]
        return sum(self.num_leaks.values()) + sum(map(len, sentences))

    @property
    def ok(self) -> bool:
        """True if every record can be used. Leaks, and what was not read, are only warnings."""
        return not self.problem_groups

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON types.

        Its keys are ``ok``, ``errors``, ``warnings``, ``files``, ``problems``, ``causes`` (source,
        cause and count of each group), ``leaks`` and ``num_leaks``.
        """
        causes = [
            {"source": group.source, "cause": group.cause, "count": group.count}
            for group in self.problem_groups
        ]
        return {
            "ok": self.ok,
            "errors": self.num_errors,
            "warnings": self.num_warnings,
            "files": [asdict(file) for file in self.files],
            "problems": [asdict(problem) for problem in self.problems],
            "causes": causes,
            "leaks": [leak.to_json() for leak in self.leaks],
            "num_leaks": self.num_leaks,
        }

    def __str__(self) -> str:
        """Return lines for each file, group of problems and kind of leak, and a summary at the end.

        At most `MAX_PRINTED_LEAKS` leaks follow the line of their kind, one per line. Control
        characters are replaced by blanks.
        """
        lines: list[str] = []
        for file in self.files:
            lines += file.format_lines()
        for group in self.problem_groups:
            lines += group.format_lines()
        for kind, count in sorted(self.num_leaks.items()):
            lines.append(f"warning: {count} x {kind} in two of the files")
            leaks = [leak for leak in self.leaks if leak.kind == kind][:MAX_PRINTED_LEAKS]
            for leak in leaks:
                lines.append(f"  {leak.first_place} and {leak.second_place}: {leak.content}")
        lines.append(f"{self.num_errors} errors, {self.num_warnings} warnings")
        return "\n".join(map(strip_control_characters, lines))
