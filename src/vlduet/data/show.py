"""One record as a person reads it in a terminal, images as coloured half blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from vlduet.data import images
from vlduet.data.records import ImageRef, Parts, Record
from vlduet.errors import ImageError
from vlduet.logs import strip_control_characters

Token = tuple[str, bool, Sequence[str]]
"""A token's text, whether it carries loss, and the roles of the anchors that read it."""


def iter_labelled_parts(record: Record) -> Iterator[tuple[str, str | ImageRef]]:
    """(role, text or image) of every slice, in reading order."""
    if record.image is not None:
        yield "image", record.image
    for caption in record.short:
        yield "short", caption
    if record.long is not None:
        yield "long", record.long
    named: list[tuple[str, Parts]] = [("part", record.parts)]
    named += [(message.role, message.parts) for message in record.messages]
    named += [("query", record.query)]
    named += [(f"positive {i}", parts) for i, parts in enumerate(record.positive, 1)]
    named += [(f"negative {i}", parts) for i, parts in enumerate(record.negative, 1)]
    for role, parts in named:
        for i, part in enumerate(parts):
            yield (f"{role} {i + 1}" if role == "part" else role), part


def format_record(record: Record, *, width: int = 48, colour: bool = True) -> str:
    """The record for a terminal: its slices with their roles; images `width` cells wide, named only without colour."""
    title = (
        f"{record.id}  ({record.kind}, {record.place})"
        if record.place
        else f"{record.id}  ({record.kind})"
    )
    lines = [strip_control_characters(title)]
    for role, part in iter_labelled_parts(record):
        if isinstance(part, str):
            lines.append(f"{role:>12}  " + strip_control_characters(part, keep="\n"))
            continue
        lines.append(f"{role:>12}  {strip_control_characters(part.name)}")
        try:
            image = images.load_image(part)
        except ImageError as error:
            lines.append(f"{'':>12}  {strip_control_characters(str(error))}")
            continue
        lines[-1] += f"  {image.width} x {image.height}"
        if colour:
            lines += render_half_blocks(image, width)
    for key, value in record.metadata.items():
        lines.append(strip_control_characters(f"{key:>12}: {value}"))
    return "\n".join(lines)


def render_half_blocks(image: images.DecodedImage, width: int) -> list[str]:
    """The image as lines of `width` cells; each cell shows two pixels, one above the other, in 24-bit colour."""
    width = max(1, min(width, image.width))
    height = max(2, round(image.height * width / image.width))
    height = min(height + height % 2, 2 * width + 64)
    pixels = images.resize_pixels(image, width, height - height % 2)  # [H, W, 3]
    lines = []
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        cells = [
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m▀"
            for a, b in zip(upper, lower, strict=True)
        ]
        lines.append("".join(cells) + "\x1b[0m")
    return lines


def format_tokens(tokens: Iterable[Token], *, colour: bool = True) -> str:
    """The rendered sequence, one token a line: ``*`` marks loss, and the anchors' roles follow."""
    lines = []
    for number, (text, label, roles) in enumerate(tokens):
        line = f"{number:>5} {'*' if label else ' '} {text!r}" + (
            f"  <- {', '.join(roles)}" if roles else ""
        )
        lines.append(f"\x1b[32m{line}\x1b[0m" if colour and label else line)
    return "\n".join(lines)
