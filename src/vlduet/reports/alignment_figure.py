"""Figure of two aligned records: two rows of slices, and dashed links where the alignment passes.

`draw_alignment` lays it out: images become thumbnails, and texts are wrapped and shortened.
`charts.draw_links` draws it.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from vlduet.data.images import load_image, scale_down, to_pixels
from vlduet.data.records import ImageRef, Part
from vlduet.errors import ConfigError
from vlduet.files import write_atomically
from vlduet.locks import lock_output
from vlduet.logs import strip_control_characters
from vlduet.reports.charts import Box, FigureFormat, LinkFigure, draw_links

if TYPE_CHECKING:
    from vlduet.inspect.alignment import Alignment

MAX_SLICES = 64
"""Largest number of slices of a record in a figure, which is then 100 inches wide."""
TEXT_COLUMNS = 21
"""Characters of a line of text in a box; those of Chinese and Japanese count twice."""
TEXT_LINES = 7
"""Number of lines of text in a box."""
CLOSING_CATEGORIES = ("Pe", "Pf", "Po")
"""Unicode categories of marks that no line may start with: closing brackets, and full stops."""
THUMBNAIL_SIDE = 240
"""Longer side of an image in pixels."""


def find_format(path: Path) -> FigureFormat:
    """Return the format of a figure by the ending of its file; raise ConfigError for another."""
    formats = get_args(FigureFormat)
    ending = path.suffix.lower().removeprefix(".")
    for name in formats:
        if ending == name:
            return name  # type: ignore[no-any-return]
    fix = f"Name a file with the ending {' or '.join('.' + name for name in formats)}"
    raise ConfigError("no format of a figure", place=path, fix=fix)


def write_alignment_figure(path: Path, alignment: Alignment) -> None:
    """Draw the figure of two aligned records and write it.

    An older file is replaced only once the new one is complete; missing folders are created.

    Raises:
        ConfigError: another ending than .svg or .png, or a record of more than `MAX_SLICES` slices.
        ImageError: an image cannot be decoded.
        LockError: another process is writing this file.
    """
    data = draw_alignment(alignment, find_format(path))
    with lock_output(path):
        write_atomically(path, lambda file: file.write(data))


def draw_alignment(alignment: Alignment, kind: FigureFormat) -> bytes:
    """Return the figure of two aligned records as a file; raises as `write_alignment_figure`.

    The first record is the upper row. A link is as wide and dark as the probability that the
    alignment passes through its two slices, and left out below `charts.MIN_LINK_WEIGHT`. The line
    below has the alignment kernel and both means.
    """
    for name, parts in ((alignment.first, alignment.rows), (alignment.second, alignment.columns)):
        if len(parts) > MAX_SLICES:
            message = f"record '{name}' has {len(parts)} slices, more than {MAX_SLICES}"
            raise ConfigError(message, place="--figure", fix="Use --html, or a shorter record")
    note = (
        f"alignment kernel {alignment.gak:.3f} · alignment-weighted mean {alignment.awm:.3f} · "
        f"mean {alignment.mean:.3f}\nby {strip_control_characters(alignment.source)}"
    )
    figure = LinkFigure(
        names=(shorten_line(alignment.first), shorten_line(alignment.second)),
        upper=tuple(map(make_box, alignment.rows)),
        lower=tuple(map(make_box, alignment.columns)),
        weights=alignment.posterior,
        note=note,
    )
    return draw_links(figure, kind)


def make_box(part: Part) -> Box:
    """Return the content of a box: wrapped text, or pixels uint8[h, w, 3] of a thumbnail."""
    if isinstance(part, ImageRef):
        return to_pixels(scale_down(load_image(part), THUMBNAIL_SIDE))
    return wrap_text(part, TEXT_COLUMNS, TEXT_LINES)


def shorten_line(text: str) -> str:
    """Return a text as one line of at most 80 characters, without control characters."""
    return wrap_text(text, 80, 1)


def wrap_text(text: str, columns: int, max_lines: int) -> str:
    """Return a text in at most `max_lines` lines of `columns`; one that is cut ends with "…".

    Lines are broken at blanks, and elsewhere in a word that is longer than a line and between the
    wide characters of Chinese, Japanese and Korean, which take two columns. Combining characters
    take none and stay with the character before them. Control characters become blanks.
    """
    lines = [""]
    for piece in _split_at_breaks(strip_control_characters(text)):
        if count_columns(lines[-1] + piece.rstrip()) > columns and lines[-1]:
            lines.append("")
        for character in piece if lines[-1] else piece.lstrip():
            if count_columns(lines[-1] + character) > columns and not character.isspace():
                lines.append("")
            lines[-1] += character
    lines = [line.strip() for line in lines]
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while count_columns(last) >= columns:
            last = last[:-1]
        lines[max_lines - 1 :] = [last + "…"]
    return "\n".join(lines)


def _split_at_breaks(text: str) -> list[str]:
    """Return a text in pieces between which a line may be broken, each with the blanks behind it.

    They are words and wide characters. A wide comma, full stop or closing bracket belongs to the
    piece before it.
    """
    pieces = [""]
    for character in text:
        begins_piece = pieces[-1][-1:].isspace() and not character.isspace()
        is_wide = unicodedata.east_asian_width(character) in "WF"
        if begins_piece or (is_wide and unicodedata.category(character) not in CLOSING_CATEGORIES):
            pieces.append("")
        pieces[-1] += " " if character.isspace() else character
    return pieces


def count_columns(text: str) -> int:
    """Return the width of a text in columns: 2 for a wide character, 0 for a combining one."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )
