"""Container reader of webdataset archives. A broken row is yielded with its error.

1. list    the members: byte ranges of an uncompressed archive, else contents; others are counted
2. group   members with one key to a row
3. parse   the texts and the JSON of a row; images are referred to, not opened
"""

from __future__ import annotations

import itertools
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from vlduet.data.image_formats import IMAGE_SUFFIXES
from vlduet.data.images import read_byte_range, stat_file_version
from vlduet.data.readers.columns import plan_columns
from vlduet.data.readers.rows import ReadContext, SourceRow, split_caption_lines
from vlduet.data.records import ByteRange, ImageRef, Place, is_utf8_encodable
from vlduet.errors import DataError
from vlduet.structured_files import parse_json

TEXT_ROLES = ("short", "long", "query", "positive", "negative", "unread")
"""Fields of `ColumnPlan` that hold columns of texts; those of ``unread`` are reported."""
MAX_MEMBER_BYTES = 256 * 2**20
"""Largest size of one archive member: a compressed archive may unpack to any size."""
TEXT_ENDINGS = frozenset({"txt", "text", "caption", "captions"})
"""Last endings of members that are texts, in lower case."""
CAPTION_NAMES = TEXT_ENDINGS | {"output"}
"""Names before the last ending of a text that leave it a caption, as in ``KEY.output.txt``."""


MAX_EXTENDED_HEADER_BYTES = 2**20
"""Largest size of a header that holds a long name or attributes of a member."""
EXTENDED_HEADER_TYPES = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
"""Types of headers that tarfile reads as a whole."""


class _BoundedTarInfo(tarfile.TarInfo):
    """Header of a member that refuses extended headers of any size."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> Any:
        """Return the header of a block of 512 bytes, as tarfile does.

        Raises:
            DataError: it announces more than `MAX_EXTENDED_HEADER_BYTES`; tarfile would ignore its
                own exceptions.
        """
        header = super().frombuf(buf, encoding, errors)
        if header.type in EXTENDED_HEADER_TYPES and header.size > MAX_EXTENDED_HEADER_BYTES:
            message = f"an archive with a header of {header.size / 2**20:.0f} MiB"
            raise DataError(message, fix="Pack the files again; what follows in it was not read")
        return header


@dataclass(frozen=True, slots=True)
class _Member:
    """File of an archive that is read."""

    key: str
    """Path up to the first dot of the file's name; members with one key are a row."""
    ending: str
    """Rest of the name, without the dot and in lower case."""
    content: bytes | ByteRange | DataError
    """Bytes, or where they are; or why the row cannot be read."""


def read_tar_rows(source: Path, context: ReadContext) -> Iterator[SourceRow]:
    """Yield the rows of a webdataset ``.tar``, which may be compressed and is never unpacked.

    Members with one key form one row, with the value of `_parse_members` and ``ARCHIVE/KEY`` as
    default id. A member that is a link, a device, too large, malformed or repeated makes its row an
    error. A missing or broken archive yields the complete rows before the break, and one error.

    An uncompressed archive is listed to its end first; members with one key may lie anywhere in it,
    and images are byte ranges. A compressed one is streamed; images are bytes, and a key that
    occurs again behind another one is an error. Members that are not read are counted in `context`,
    but for those that archivers add (`_is_archiver_file`). A row without other members is none.
    """
    is_stream = not _is_seekable_archive(source)
    members = _list_members(source, context, is_stream=is_stream)
    for key, group in _group_neighbours(members, source) if is_stream else _group_by_key(members):
        place = Place(str(source), None, key or None)
        name = f"{source.name.partition('.')[0]}/{key}"
        try:
            value = _parse_members(_index_contents(group, place), place, context)
        except DataError as error:
            yield SourceRow(place, context, name, error=error)
        else:
            yield SourceRow(place, context, name, value)


# --- list


def _is_seekable_archive(source: Path) -> bool:
    """Return whether a file starts like an uncompressed archive; False if it cannot be opened."""
    try:
        tarfile.open(source, "r:", tarinfo=_BoundedTarInfo).close()
        return True
    except (tarfile.TarError, OSError, DataError):
        pass
    return False


def _list_members(source: Path, context: ReadContext, *, is_stream: bool) -> Iterator[_Member]:
    """Yield the members of an archive that are read, and count the others in `context`.

    A broken archive ends with an error under the key of the last member, "" without one; nothing is
    raised.

    Args:
        is_stream: give contents instead of byte ranges, for a compressed archive.
    """
    key = ""
    try:
        # Not "r|*", which reads the first of several compressed streams and ignores the others.
        mode: Literal["r:*", "r:"] = "r:*" if is_stream else "r:"
        with (
            source.open("rb") as file,
            tarfile.open(fileobj=file, mode=mode, tarinfo=_BoundedTarInfo) as archive,
        ):
            version = None if is_stream else stat_file_version(file)
            while (entry := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # a list of all headers
                if archive.offset <= entry.offset:  # would be read again and again
                    raise tarfile.ReadError("a member of negative size")
                if entry.isdir() or not _is_read(entry, context):
                    continue
                path = PurePosixPath(entry.name)
                stem, _, ending = path.name.partition(".")
                key = str(path.parent / stem)
                if not is_utf8_encodable(entry.name):
                    key, ending = ascii(key), ascii(ending)
                yield _Member(key, ending.lower(), _get_content(archive, entry, source, version))
            if not is_stream:
                file.seek(archive.offset)
            _require_zeros(archive.fileobj)
    except DataError as error:
        place = Place(str(source), None, key or None)
        yield _Member(key, "", DataError(error.message, place=place, fix=error.fix))
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        message = f"truncated or broken archive ({error})"
        fix = "Copy or download the shard again; what follows in it was not read"
        place = Place(str(source), None, key or None)
        yield _Member(key, "", DataError(message, place=place, fix=fix))


def _is_read(entry: tarfile.TarInfo, context: ReadContext) -> bool:
    """Return whether a member is read, or refused as a part of its row; count it if not.

    Those that archivers add, such as ``._a.jpg`` and ``__MACOSX``, are not counted. The others are
    counted as ``*.ENDING``, by the whole name without an ending, or by the hidden file or folder.
    """
    path = PurePosixPath(entry.name)
    hidden = [part for part in path.parts if part.startswith(".") and part != ".."]
    ending = path.name.partition(".")[2].lower()
    last = ending.rpartition(".")[2]
    if any(re.match(r"\._|\.DS_Store$|__MACOSX$|PaxHeaders?\b", part) for part in path.parts):
        return False
    is_image_or_text = f".{last}" in IMAGE_SUFFIXES or last in TEXT_ENDINGS | {"json", "cls"}
    if not hidden and (is_image_or_text or _find_column(ending, context)):
        return True
    label = hidden[0] if hidden else f"*.{ending}" if ending else path.name
    context.ignored.add("member", label if is_utf8_encodable(label) else ascii(label))
    return False


def _get_content(
    archive: tarfile.TarFile,
    entry: tarfile.TarInfo,
    source: Path,
    version: tuple[int, int] | None,
) -> bytes | ByteRange | DataError:
    """Return where the content of a member lies in `source`, or without `version` the content.

    The content of a sparse member, which has gaps, is returned too. The error, which is not raised,
    is of a member that is no regular file, is larger than `MAX_MEMBER_BYTES`, or has a name that
    is not UTF-8.

    Raises:
        tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError: the archive is broken.
    """
    is_utf8 = is_utf8_encodable(entry.name)
    place = Place(str(source), None, entry.name if is_utf8 else ascii(entry.name))
    if not is_utf8:
        return DataError("a name that is not UTF-8", place=place, fix="Rename it and pack it again")
    if not entry.isreg():
        message = "a link or device in an archive, which is refused"
        return DataError(message, place=place, fix="Pack the file itself")
    if entry.size > MAX_MEMBER_BYTES:
        message = f"{entry.size / 2**20:.0f} MiB in one member"
        fix = f"Keep members below {MAX_MEMBER_BYTES // 2**20} MiB"
        return DataError(message, place=place, fix=fix)
    if version is None or entry.issparse():
        file = archive.extractfile(entry)
        assert file is not None, "a regular file"
        return file.read()
    return ByteRange(source, entry.offset_data, entry.size, str(place), version)


def _require_zeros(file: Any) -> None:
    """Raise tarfile.ReadError if anything but zeros follows in a file: tarfile would ignore it."""
    while block := file.read(tarfile.RECORDSIZE):
        if block.strip(b"\0"):
            raise tarfile.ReadError("data behind the end of the archive")


# --- group


def _group_by_key(members: Iterable[_Member]) -> Iterator[tuple[str, list[_Member]]]:
    """Yield (key, all its members) in the order of first occurrence."""
    groups: dict[str, list[_Member]] = {}
    for member in members:
        groups.setdefault(member.key, []).append(member)
    for key in list(groups):
        yield key, groups.pop(key)  # which frees the memory


def _group_neighbours(
    members: Iterable[_Member], source: Path
) -> Iterator[tuple[str, list[_Member]]]:
    """Yield (key, members that follow one another); a key that occurs again has an error."""
    keys = set[str]()
    for key, neighbours in itertools.groupby(members, key=attrgetter("key")):
        group = list(neighbours)
        if key in keys:
            fix = "Pack the archive sorted by name (tar --sort=name), or uncompressed"
            message = f"members of '{key}' are no neighbours in a compressed archive"
            error = DataError(message, place=Place(str(source), None, key), fix=fix)
            group.insert(0, _Member(key, "", error))
        keys.add(key)
        yield key, group


def _index_contents(members: Iterable[_Member], place: Place) -> dict[str, bytes | ByteRange]:
    """Return the contents of a row's members by ending, those with names behind the others.

    Numbers in names are ordered by value.

    Raises:
        DataError: the last error among the members, or there are two with the same ending.
    """
    contents: dict[str, bytes | ByteRange] = {}
    row_error: DataError | None = None
    for member in members:
        if isinstance(member.content, DataError):
            row_error = member.content
        elif member.ending in contents:
            message = f"two members '{member.ending}'"
            fix = "Keep one of them; upper and lower case count as equal"
            row_error = DataError(message, place=place, fix=fix)
        else:
            contents[member.ending] = member.content
    if row_error is not None:
        raise row_error

    def order(ending: str) -> tuple[bool, list[str | int]]:
        texts = re.split(r"([0-9]+)", ending)
        return "." in ending, [int(text) if text.isdigit() else text for text in texts]

    return {ending: contents[ending] for ending in sorted(contents, key=order)}


# --- parse


def _find_column(ending: str, context: ReadContext) -> str | None:
    """Return the column that the user named for a member: its ending, or the name before it.

    Case does not matter. None if there is no such column.
    """
    names = {ending, ending.rpartition(".")[0]}
    columns = (name.strip() for text in context.columns.values() for name in text.split(","))
    return next((column for column in columns if column and column.lower() in names), None)


def _parse_members(
    contents: dict[str, bytes | ByteRange], place: Place, context: ReadContext
) -> dict[str, Any]:
    """Return the value of a row: the object in ``json``, and the other members.

    Members replace keys of the object, which are counted as not read if they differ; but captions
    are added to those of the object, and images replace ``image`` and ``images``.

    What a member is follows from its last ending, in any case:

    - An image becomes ``image``; several become the list ``images``. If there are images without a
      name before the ending, or with a number as name, those with names are counted as not read.
      ``query.jpg`` and ``negative_0.jpg`` become the columns ``query_image`` and so on.
    - The non-blank lines of a text become ``captions``, if the name before its ending is empty, in
      `CAPTION_NAMES`, a number, or that of an image (``photo.jpg`` and ``photo.txt``). Any other
      name that has a role in a table makes it the column of that name (``long.txt``). Other texts
      are counted as not read.
    - ``NAME.json`` becomes the column ``NAME`` beside ``json``; alone, it takes its place.
    - ``cls`` becomes the text ``cls``.
    - A member that the user named as a column becomes that column (`_find_column`).

    Raises:
        DataError: ``json`` is broken or no object, a text is not UTF-8, or the archive has changed.
    """
    value = _parse_json_members(contents, place, context)
    captions: list[str] = []
    pictures: dict[str, ImageRef] = {}  # by ending
    names = {ending.rpartition(".")[0] for ending in contents if _is_image(ending)} - {"input"}
    for ending, content in contents.items():
        name, _, last = ending.rpartition(".")
        column = _find_column(ending, context)
        if _is_image(ending):
            if isinstance(content, ByteRange):
                ref = ImageRef(byte_range=content)
            else:
                ref = ImageRef(data=content)
            if column or _has_role(f"{name}_image", ("query", "positive", "negative")):
                _set_column(value, column or f"{name}_image", ref, context)
            else:
                pictures[ending] = ref
        elif last != "json":
            text = _read_text(content, place.with_field(ending))
            if not column and last != "cls" and _is_caption_name(name):
                captions += split_caption_lines(text)
            elif column or ending == "cls" or _has_role(name, TEXT_ROLES):
                if text.strip():
                    _set_column(value, column or name or ending, text.strip(), context)
            elif name in names:
                captions += split_caption_lines(text)
            else:
                context.ignored.add("member", f"*.{ending}")
    if captions:
        caption = value.get("caption")
        if isinstance(caption, str) and set(split_caption_lines(caption)) <= set(captions):
            del value["caption"]  # img2dataset writes the same text into both
        other_captions = value.pop("captions", [])
        if isinstance(other_captions, list | str):
            captions += [other_captions] if isinstance(other_captions, str) else other_captions
        else:
            context.ignored.add("column", "captions")
        value["captions"] = captions
    refs = _select_images(pictures, context)
    if refs:
        value.pop("image", None)
        value.pop("images", None)
        value |= {"image": refs[0]} if len(refs) == 1 else {"images": refs}
    return value


def _is_image(ending: str) -> bool:
    """Return whether the last ending is one of `IMAGE_SUFFIXES`."""
    return f".{ending.rpartition('.')[2]}" in IMAGE_SUFFIXES


@lru_cache(maxsize=1024)
def _has_role(column: str, roles: tuple[str, ...]) -> bool:
    """Return whether a table's column of this name has one of some fields of `ColumnPlan`."""
    plan = plan_columns((column,), {})
    return any(getattr(plan, role) for role in roles)


def _is_caption_name(name: str) -> bool:
    """Return whether the name before a text's last ending leaves it a caption; true if empty."""
    return all(
        text in CAPTION_NAMES or text.isdigit() or _is_image(text)
        for text in name.split(".")
        if text
    )


def _read_text(content: bytes | ByteRange, place: Place) -> str:
    """Return the text of a member without a byte order mark.

    Raises:
        DataError: it is not UTF-8, or the archive has changed.
    """
    data = read_byte_range(content) if isinstance(content, ByteRange) else content
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"broken text ({error})"
        raise DataError(message, place=place, fix="Write UTF-8") from None


def _set_column(value: dict[str, Any], column: str, content: Any, context: ReadContext) -> None:
    """Set a column of a row, in place; if it replaces another value, count that as not read."""
    if value.get(column) not in (None, content):
        context.ignored.add("column", column)
    value[column] = content


def _parse_json_members(
    contents: dict[str, bytes | ByteRange], place: Place, context: ReadContext
) -> dict[str, Any]:
    """Return the object of ``json`` or of the only member of JSON; that of others as columns.

    Without such members it is empty. Raises DataError for broken JSON, and for an object that is
    none.
    """
    endings = [ending for ending in contents if ending.rpartition(".")[2] == "json"]
    columns: dict[str, Any] = {}
    for ending in endings:
        json_place = place.with_field(ending)
        text = _read_text(contents[ending], json_place)
        fix = "Write one JSON object"
        value = parse_json(text, place=json_place, error_class=DataError, fix=fix)
        if ending != "json" and len(endings) > 1:
            _set_column(columns, ending.rpartition(".")[0], value, context)
        elif isinstance(value, dict):
            columns |= value
        else:
            raise DataError("not a JSON object", place=json_place, fix="Write {...}")
    return columns


def _select_images(pictures: dict[str, ImageRef], context: ReadContext) -> list[ImageRef]:
    """Return the images of a row in order; count those that are not read.

    Args:
        pictures: images by ending. If there are some without a name before the last ending, or with
            a number as name, the others are not read.
    """
    names = {ending: ending.rpartition(".")[0] for ending in pictures}
    named = [ending for ending, name in names.items() if not re.fullmatch(r"[0-9.]*", name)]
    if len(named) == len(names):
        return list(pictures.values())
    for ending in named:
        context.ignored.add("member", f"*.{ending}")
    return [ref for ending, ref in pictures.items() if ending not in named]
