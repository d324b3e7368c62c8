"""Refusals that keep a build from losing documents: of another source, and of what is not there.

`find_takeover_refusal` is called before a build writes documents, `find_pruning_refusal` before it
removes some.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlduet.data.readers.rows import IgnoredData
from vlduet.data.sources import RecordSource
from vlduet.errors import DataError, RetrievalError
from vlduet.retrieval.documents import Side, hash_parts, split_record
from vlduet.retrieval.source_state import SourceState
from vlduet.retrieval.stores.base import RowHashes


@dataclass(slots=True)
class _Collisions:
    """Documents of the source whose ids documents of another source have."""

    is_compared: bool
    """Whether the contents of these documents are compared."""
    ids: list[str] = field(default_factory=list)
    num_equal: int = 0
    num_different: int = 0
    """Documents with another content than the stored ones; those that cannot be read count not."""

    @property
    def is_same(self) -> bool:
        """Whether the contents say that these are the documents of the other source."""
        return self.num_equal > 0 and not self.num_different


def find_takeover_refusal(
    source: RecordSource,
    state: SourceState,
    *,
    side: Side,
    hashes: Mapping[str, RowHashes],
    force: bool,
) -> RetrievalError | None:
    """Return the error of a build that would overwrite documents of another source, or None.

    A file of records may update documents that it shares with another source, if all of them have
    the same content in both. If the other source is missing, and all documents that both have are
    equal in content, it was moved: its documents are taken over. So they are with `force`, but of a
    source that is still there only those with equal ids. Without other sources the source is not
    read here.
    """
    if not state.foreign:
        return None
    collisions: dict[int, _Collisions] = {}
    is_file = source.path.is_file()
    for record in source.read_silently(IgnoredData(), on_error=lambda error: None):
        try:
            documents = split_record(record, side)
        except DataError:
            continue
        for document in documents:
            owner = state.foreign.get(document.id)
            if owner is None:
                continue
            if owner not in collisions:
                # Once, not for every document: the drive of the other source may be slow.
                is_compared = not force and (is_file or state.is_missing(owner))
                collisions[owner] = _Collisions(is_compared)
            collision = collisions[owner]
            collision.ids.append(document.id)
            if not collision.is_compared:
                continue
            try:
                content_hash = hash_parts(document.parts, state.image_key)
            except DataError:
                continue
            is_equal = content_hash == hashes[document.id].content_hash
            collision.num_equal += is_equal
            collision.num_different += not is_equal
    for owner, collision in collisions.items():
        if not (force or collision.is_same):
            return _make_takeover_error(source.path, state, owner, collision)
    for owner, collision in collisions.items():
        if state.is_missing(owner):
            state.take_over(owner)
        else:
            state.claim(collision.ids)
    return None


def _make_takeover_error(
    source: Path, state: SourceState, owner: int, collision: _Collisions
) -> RetrievalError:
    """Return the error of documents that have ids of another source."""
    name, count = state.name(owner), len(collision.ids)
    known = f"{count} documents have" if count > 1 else "a document has"
    message = f"{known} the id of a document of {name}, such as '{collision.ids[0]}'"
    fix = "Build another index (--to), or let this source replace them (--force)"
    if state.is_missing(owner):
        message += f", and {collision.num_different} of them another content"
        fix = f"If {name} was moved here, add --force; else build another index (--to)"
    return RetrievalError(f"{message}: nothing was changed", place=source, fix=fix)


def find_pruning_refusal(
    source: Path,
    absent: Collection[str],
    *,
    num_stored: int,
    num_usable: int,
    num_unreadable: int,
    listing: object,
    force: bool,
) -> RetrievalError | None:
    """Return the error of a source by which absent documents must not be removed, or None.

    Whatever cannot be read is a reason, even if no document is absent.

    Args:
        source: file or folder that was read.
        absent: ids of stored documents that were not in it.
        num_stored: number of documents of the source that the index held before this build.
        num_usable: number of documents in the source now.
        num_unreadable: number of rows, files and folders that could not be read.
        listing: text that says where these are listed.
        force: prune also if most documents are absent, or if folders of theirs are empty.
    """
    reason, fix = "", ""
    if num_unreadable:
        reason = f"{num_unreadable} files or records cannot be read"
        fix = f"Repair or remove them ({listing}), and start again"
    elif not num_usable and num_stored:
        reason, fix = (
            "nothing in the source can be indexed",
            "Check the source, or delete the index",
        )
    elif linked := _find_linked(source, absent):
        reason = f"'{linked}' lies in a linked folder, which is not followed"
        fix = "Put the folder itself in the place of the link, or index it on its own"
    elif not force and num_stored - len(absent) < len(absent):
        num_present = num_stored - len(absent)
        reason = f"only {num_present} of {num_stored} indexed documents are in the source"
        fix = "Check that all drives are mounted; if they were deleted, add --force"
    elif not force and (empty := _find_emptied_folder(source, absent)):
        reason = f"the folder {empty[0]}, of which {empty[1]} documents are absent, is empty"
        fix = "Mount its drive; if the files were deleted, delete the folder too, or add --force"
    if not reason:
        return None
    return RetrievalError(f"{reason}, so nothing is pruned", place=source, fix=fix)


def _find_linked(source: Path, absent: Collection[str]) -> str | None:
    """Return the first id of a file that is there, but behind a link to a folder."""
    if not source.is_dir():
        return None
    is_linked: dict[Path, bool] = {source: False}

    def lies_behind_link(folder: Path) -> bool:
        if folder not in is_linked:
            is_linked[folder] = folder.is_symlink() or lies_behind_link(folder.parent)
        return is_linked[folder]

    for identity in absent:
        file = _locate(source, identity)
        if file is not None and os.path.exists(file) and lies_behind_link(file.parent):
            return identity
    return None


def _find_emptied_folder(source: Path, absent: Collection[str]) -> tuple[Path, int] | None:
    """Return an empty folder, and how many absent documents lay in it or below; None without any.

    A drive that is not mounted leaves such a folder.
    """
    if not source.is_dir():
        return None
    counts = Counter(file.parent for id_ in absent if (file := _locate(source, id_)) is not None)
    totals: Counter[Path] = Counter()
    for folder, count in counts.items():
        while folder != source and not os.path.isdir(folder):
            folder = folder.parent
        totals[folder] += count
    for folder, count in totals.items():
        try:
            if not os.listdir(folder):
                return folder, count
        except OSError:
            continue  # a folder that cannot be read is refused before
    return None


def _locate(source: Path, identity: str) -> Path | None:
    """Return the image file of a document of a folder by its id; None for an id of another form.

    Ids of images are their paths below the source; several documents of one have a number behind.
    """
    name = re.sub(r"#\d+$", "", identity)
    path = Path(name)
    if "\0" in name or path.is_absolute() or ".." in path.parts:
        return None
    return source / path
