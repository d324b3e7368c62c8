"""Splits of a file of records that do not leak: ``vlduet data split all.jsonl --to splits``.

1. read     every record and image; records with an image that cannot be decoded are left out
2. group    records with equal or similar images, or equal captions, and those that they connect
3. assign   each group to one split, the large ones first, so that the sizes are those wanted
4. write    the source is read again for each split, so that memory holds no record
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vlduet.data.jsonl_output import check_output_path, stream_to_jsonl
from vlduet.data.quarantine import Quarantine
from vlduet.data.readers.rows import IgnoredData
from vlduet.data.records import ImageRef, Record
from vlduet.data.sources import RecordSource, SourceLike, as_source
from vlduet.data.tools.duplicates import ImageFingerprint, UnionFind, caption_key
from vlduet.data.tools.image_contents import ImageContent, ImageResult, read_image_contents
from vlduet.errors import ConfigError, DataError
from vlduet.files import write_text_atomically
from vlduet.locks import lock_folder
from vlduet.logs import logger, track_progress

DEFAULT_SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
"""Shares of the records by split, with the names that the splits of corpora have."""
REPORT_FILENAME = "split.json"
MAX_GROUP_SHARE = 0.5
"""Share of the records in one group above which a warning is logged."""


@dataclass(frozen=True, slots=True)
class SplitReport:
    """Result of `split_records`. The field names are the keys of ``--json``."""

    source: str
    seed: int
    shares: dict[str, float]
    files: dict[str, str]
    """Written file by split."""
    records: dict[str, int]
    """Number of records by split."""
    groups: dict[str, int]
    """Number of groups by split."""
    largest_group: int
    """Number of records of the largest group."""
    group_sizes: dict[int, int]
    """Number of groups by their number of records."""
    dropped: int
    """Number of records that were left out."""
    causes: dict[str, int]
    """Number of these by cause."""


def split_records(
    source: SourceLike,
    folder: Path,
    *,
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
) -> SplitReport:
    """Write the records of `source` to one file per split, so that the splits share no content.

    Records are in one split if they share an image or a caption (`caption_key`), if their images
    are near-duplicates, or if others connect them. Equal arguments give equal files; records keep
    their order, and image paths stay valid. Existing files are replaced. A warning is logged for
    what is not read, and for a group of more than `MAX_GROUP_SHARE` of the records.

    Args:
        source: file or folder of records.
        folder: gets ``<split>.jsonl`` for each split, the report as `REPORT_FILENAME`, and
            ``split.quarantine.jsonl`` with the records that are left out. It is created.
        shares: share of the records by name of the split, the sum 1; None means `DEFAULT_SHARES`.
        seed: seed of the assignment of groups of equal size.

    Raises:
        ConfigError: `shares` are not valid, see `check_shares`.
        DataError: there are too few groups for the splits, a file is not a valid target, or the
            source cannot be read. No split is written then.
        LockError: another process is writing `folder`.
    """
    shares = dict(DEFAULT_SHARES if shares is None else shares)
    check_shares(shares)
    source = as_source(source)
    files = {name: folder / f"{name}.jsonl" for name in shares}
    for file in files.values():
        check_output_path(file, source.path)
    with lock_folder(folder):
        dropped = Quarantine.create(folder / "split.quarantine.jsonl")
        grouping = _read_groups(source, dropped)
        groups = grouping.list_groups()
        splits = assign_splits(groups, grouping.ids, shares=shares, seed=seed, place=source.path)
        largest = max(groups, key=len)
        if len(largest) > MAX_GROUP_SHARE * len(grouping.ids):
            examples = ", ".join(grouping.ids[i] for i in largest[:3])
            logger.warning(
                f"{source.path}: {len(largest):,} of {len(grouping.ids):,} records are in one "
                f"group, because images look alike or captions are equal: {examples}, ..."
            )
        split_by_position = dict(zip(grouping.positions, splits, strict=True))
        for name, file in files.items():
            selected = _select_records(source, split_by_position, name)
            written = stream_to_jsonl(selected, file)
            for _ in track_progress(
                written, total=splits.count(name), label=f"writing {file.name}"
            ):
                pass
        report = SplitReport(
            source=str(source.path),
            seed=seed,
            shares=shares,
            files={name: str(file) for name, file in files.items()},
            records={name: splits.count(name) for name in shares},
            groups=dict(Counter(splits[members[0]] for members in groups)),
            largest_group=len(largest),
            group_sizes=dict(sorted(Counter(map(len, groups)).items())),
            dropped=dropped.count,
            causes=dropped.count_by_cause(),
        )
        write_text_atomically(folder / REPORT_FILENAME, json.dumps(asdict(report), indent=1) + "\n")
    return report


def check_shares(shares: Mapping[str, float]) -> None:
    """Raise ConfigError unless there are two or more valid splits whose shares have the sum 1.

    A name consists of letters, digits, ``-`` and ``_``; a share is above 0.
    """
    place = "--shares"
    for name, share in shares.items():
        if not re.fullmatch(r"[\w-]+", name):
            fix = "Use letters, digits, - and _"
            raise ConfigError(f"a split named '{name}'", place=place, fix=fix)
        if not share > 0:
            raise ConfigError(f"{name}={share:g}", place=place, fix="Give a share above 0")
    total = sum(shares.values())
    if len(shares) < 2 or not abs(total - 1) < 1e-3:
        message = f"{len(shares)} shares with the sum {total:g}"
        fix = "Give two or more with the sum 1, such as train=.8,val=.1,test=.1"
        raise ConfigError(message, place=place, fix=fix)


def assign_splits(
    groups: Sequence[Sequence[int]],
    ids: Sequence[str],
    *,
    shares: Mapping[str, float],
    seed: int,
    place: Path,
) -> list[str]:
    """Return the split of each of N records, the same for all records of a group.

    Groups are assigned from the largest to the smallest, those of equal size in an order that
    follows from `seed` and ids. Each goes to the split that lacks the largest part of its size, of
    those that it fits in.

    Args:
        groups: numbers of the records of each group; all N numbers occur once.
        ids: N ids.
        shares: share of the records by split.
        place: source, for the error.

    Raises:
        DataError: a split would be empty.
    """
    sizes = {name: max(1, round(share * len(ids))) for name, share in shares.items()}
    sizes[max(sizes, key=sizes.__getitem__)] += len(ids) - sum(sizes.values())

    def sort_key(members: Sequence[int]) -> tuple[int, bytes]:
        text = f"{seed}:{min(ids[i] for i in members)}"
        return -len(members), hashlib.sha256(text.encode("utf-8", "replace")).digest()

    splits = [""] * len(ids)
    free = dict(sizes)  # number of records that each split lacks
    for members in sorted(groups, key=sort_key):
        fitting = [name for name in free if len(members) <= free[name]]
        if fitting:
            split = max(fitting, key=lambda name: free[name] / sizes[name])
        else:
            split = max(free, key=free.__getitem__)
        free[split] -= len(members)
        for i in members:
            splits[i] = split
    if empty := [name for name in shares if name not in splits]:
        count = f"{len(ids)} records are {len(groups)} groups of equal or similar content"
        fix = "Give more different records, or fewer splits with --shares"
        raise DataError(f"{count}: nothing is left for {', '.join(empty)}", place=place, fix=fix)
    return splits


class _Grouping:
    """Records with the contents that connect them.

    Attributes:
        ids: id of each record.
        positions: position of each record among those that the source yields.
    """

    def __init__(self) -> None:
        """Start without records."""
        self.ids: list[str] = []
        self.positions: list[int] = []
        self._captions: list[set[str]] = []  # keys, by record
        self._images: list[list[int]] = []  # indices into _fingerprints, by record
        self._image_indices: dict[str, int] = {}  # by image key
        self._fingerprints: list[ImageFingerprint] = []

    def add(self, record: Record, position: int, contents: Sequence[ImageContent]) -> None:
        """Add a record, of whose images all contents are given."""
        indices = []
        for content in contents:
            if content.key not in self._image_indices:
                self._image_indices[content.key] = len(self._fingerprints)
                self._fingerprints.append(content.fingerprint)
            indices.append(self._image_indices[content.key])
        texts = list(record.short) + ([record.long] if record.long else [])
        if not any(isinstance(part, ImageRef) for part in record.query):
            texts += [part for part in record.query if isinstance(part, str)]
        self.ids.append(record.id)
        self.positions.append(position)
        self._captions.append({key for key in map(caption_key, texts) if key is not None})
        self._images.append(indices)

    def list_groups(self) -> list[list[int]]:
        """Return the groups of connected records, by number in the order of `add`."""
        similar_images = UnionFind(len(self._fingerprints))
        similar_images.union_near_duplicates(self._fingerprints)
        groups = UnionFind(len(self.ids))
        first_record: dict[str | int, int] = {}  # by caption key, and number of an image group
        for record, (captions, images) in enumerate(zip(self._captions, self._images, strict=True)):
            keys: list[str | int] = [*captions, *map(similar_images.find, images)]
            for key in keys:
                groups.union(first_record.setdefault(key, record), record)
        return groups.groups()


def _read_groups(source: RecordSource, dropped: Quarantine) -> _Grouping:
    """Read all records and images of a source; list those that are broken in `dropped`.

    Raises DataError if none is usable, or as `RecordSource.read`.
    """
    grouping = _Grouping()
    records = source.read(on_error=lambda error: dropped.add(error.place, error))
    tracked = track_progress(records, label=f"reading {source.path.name}")
    for position, (record, results) in enumerate(read_image_contents(tracked)):
        contents = _check_contents(record, results, dropped)
        if contents is not None:
            grouping.add(record, position, contents)
    if not grouping.ids:
        raise DataError(f"no usable record ({dropped})", place=source.path, fix="Correct them")
    return grouping


def _check_contents(
    record: Record, results: Sequence[ImageResult], dropped: Quarantine
) -> list[ImageContent] | None:
    """Return the contents of a record's images; None, and list it, if one cannot be decoded."""
    contents = []
    for result in results:
        if isinstance(result, DataError):
            dropped.add(record, result)
            return None
        contents.append(result)
    return contents


def _select_records(
    source: RecordSource, split_by_position: Mapping[int, str], split: str
) -> Iterator[Record]:
    """Yield the records of a split, which the source is read for again.

    Raises DataError if it now yields fewer records than before.
    """
    position = -1
    records = source.read_silently(IgnoredData(), on_error=lambda error: None)
    for position, record in enumerate(records):
        if split_by_position.get(position) == split:
            yield record
    if position < max(split_by_position):
        fix = "Leave it alone, and start again"
        raise DataError("changed while it was being split", place=source.path, fix=fix)
