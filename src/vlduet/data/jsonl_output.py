"""Records written to a ``.jsonl`` file, which appears when it is complete."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vlduet.data import images
from vlduet.data.quarantine import Quarantine, quarantine_path
from vlduet.data.readers.containers import expand_pattern, is_pattern
from vlduet.data.record_json import record_to_json
from vlduet.data.records import ImageRef, Record, is_utf8_encodable, map_images
from vlduet.errors import DataError
from vlduet.files import fsync_paths, write_text_atomically
from vlduet.integrity import find_manifest_damage, get_listed_files, seal_manifest
from vlduet.locks import lock_output, remove_drafts
from vlduet.structured_files import read_json_object

LIST_REMEDY = "Write it again, or delete the list .NAME.files.json beside it if you edited it"


@contextmanager
def lock_jsonl_output(
    target: Path, source: Path, *, allow_existing: bool = False
) -> Iterator[Quarantine]:
    """Check and lock `target` for the block, and yield an empty quarantine of what it leaves out.

    The folder of `target` is created, and the quarantine file of an earlier run deleted, as are
    drafts that killed runs left of its images and of the list of its files.

    Args:
        allow_existing: as `check_output_path`.

    Raises:
        DataError: as `check_output_path`; nothing is written then.
        LockError: another process is writing `target`.
    """
    check_output_path(target, source, allow_existing=allow_existing)
    with lock_output(target):
        remove_drafts(image_folder(target))
        remove_drafts(target.parent, _list_path(target).name)
        yield Quarantine.create(quarantine_path(target))


def image_folder(target: Path) -> Path:
    """Return the folder of the images that a ``.jsonl`` file refers to: ``<stem>-images``."""
    return target.parent / f"{target.stem}-images"


def check_output_path(target: Path, source: Path, *, allow_existing: bool = False) -> None:
    """Check that `target` can be written while `source` is read. Nothing is written.

    Args:
        allow_existing: accept an existing file of the folder `source`, which the caller replaces.

    Raises:
        DataError: `target` is no ``.jsonl``, is the source, or (without `allow_existing`) exists
            directly in the folder `source`.
    """
    if target.suffix != ".jsonl":
        fix = f"Write {target.with_suffix('.jsonl')}"
        raise DataError(f"'{target}' is no .jsonl file", place="--to", fix=fix)
    if target.resolve() == source.resolve():
        fix = "Name another file"
        raise DataError(f"'{target}' is the source itself", place="--to", fix=fix)
    if not allow_existing and is_file_inside(target, source):
        message = f"'{target}' is there already, and is read as a part of {source}"
        raise DataError(message, place="--to", fix="Name a file outside, or a new one")


def is_file_inside(path: Path, folder: Path) -> bool:
    """Return whether `path` exists and lies directly in `folder`, or matches it as a pattern."""
    if is_pattern(folder):
        return path.resolve() in [file.resolve() for file in expand_pattern(folder)]
    return path.exists() and path.resolve().parent == folder.resolve()


def stream_to_jsonl(records: Iterable[Record], target: Path) -> Iterator[Record]:
    """Write records to a ``.jsonl`` file, and yield each one after it is written.

    The generator must be exhausted: nothing happens before it is advanced, `target` appears, or is
    replaced, when all records are written, and stays as it was if an error stops the generator.
    The folder of `target` is created. Images without a file of their own are written to the folder
    ``<stem of target>-images`` beside it (`images.write_image_file`) and referred to there in the
    file; the yielded records are the unchanged ones. At last, size and hash of `target` and of the
    images are written to a list beside it, which `find_output_damage` reads.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = image_folder(target)
    partial_file = target.with_name(f".{target.name}.partial")
    names = {target.name: None}

    def store_image(ref: ImageRef) -> ImageRef:
        """Return the reference of an image's file, which is written and listed if it is new."""
        stored = images.write_image_file(ref, folder)
        if stored is not ref and stored.path is not None:
            names[f"{folder.name}/{stored.path.name}"] = None
        return stored

    try:
        with partial_file.open("w", encoding="utf-8") as file:
            for record in records:
                stored = map_images(record, store_image)
                raw = record_to_json(stored, root=target.parent)
                line = json.dumps(raw, ensure_ascii=False)
                # A lone surrogate has no bytes in UTF-8, but can be spelled in ASCII.
                file.write((line if is_utf8_encodable(line) else json.dumps(raw)) + "\n")
                yield record
        fsync_paths([partial_file])
        _list_path(target).unlink(missing_ok=True)  # that of an earlier version of `target`
        partial_file.replace(target)
        manifest = seal_manifest({}, target.parent, names=names)
        write_text_atomically(_list_path(target), json.dumps(manifest))
    finally:
        partial_file.unlink(missing_ok=True)


def _list_path(target: Path) -> Path:
    """Return the path of the list of an output's files; names with a dot are no records."""
    return target.with_name(f".{target.name}.files.json")


def find_output_damage(path: Path, *, reread: bool = False) -> tuple[list[str], int]:
    """Return a sentence for each file of an output of `stream_to_jsonl` that is not as written.

    A file that was edited counts as well. The second result is the number of listed files; ([], 0)
    without a list beside `path`, which was made by others or an earlier version. `reread`: see
    `integrity.find_damage`.
    """
    list_path = _list_path(path)
    if not list_path.exists():
        return [], 0
    try:
        manifest = read_json_object(list_path, error_class=DataError, fix=LIST_REMEDY)
    except DataError as error:
        return [f"{list_path.name}: {error.message}"], 1
    damage = find_manifest_damage(path.parent, manifest, name=list_path.name, reread=reread)
    return [str(file_damage) for file_damage in damage], len(get_listed_files(manifest))
