"""One record as a person reads it: in the terminal, images as coloured half blocks, or as a self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence

from vlduet.data import images
from vlduet.data.records import ImageRef, Parts, Record
from vlduet.errors import ImageError
from vlduet.logs import plain

Token = tuple[str, bool, Sequence[str]]
"""A token's text, whether it carries loss, and the roles of the anchors that read it."""

_THUMBNAIL = 320


def slices(record: Record) -> Iterator[tuple[str, str | ImageRef]]:
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


def as_text(record: Record, *, width: int = 48, colour: bool = True) -> str:
    """The record for a terminal: its slices with their roles; images `width` cells wide, named only without colour."""
    title = f"{record.id}  ({record.kind}, {record.place})" if record.place else f"{record.id}  ({record.kind})"
    lines = [plain(title)]
    for role, part in slices(record):
        if isinstance(part, str):
            lines.append(f"{role:>12}  " + plain(part, keep="\n"))
            continue
        lines.append(f"{role:>12}  {plain(part.name)}")
        try:
            image = images.load(part)
        except ImageError as error:
            lines.append(f"{'':>12}  {plain(str(error))}")
            continue
        lines[-1] += f"  {image.width} x {image.height}"
        if colour:
            lines += half_blocks(image, width)
    for key, value in record.metadata.items():
        lines.append(plain(f"{key:>12}: {value}"))
    return "\n".join(lines)


def half_blocks(image: images.Decoded, width: int) -> list[str]:
    """The image as lines of `width` cells; each cell shows two pixels, one above the other, in 24-bit colour."""
    width = max(1, min(width, image.width))
    height = max(2, round(image.height * width / image.width))
    height = min(height + height % 2, 2 * width + 64)
    pixels = images.resized(image, width, height - height % 2)  # [H, W, 3]
    lines = []
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        cells = [
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m▀" for a, b in zip(upper, lower, strict=True)
        ]
        lines.append("".join(cells) + "\x1b[0m")
    return lines


def tokens_as_text(tokens: Iterable[Token], *, colour: bool = True) -> str:
    """The rendered sequence, one token a line: ``*`` marks loss, and the anchors' roles follow."""
    lines = []
    for number, (text, label, roles) in enumerate(tokens):
        line = f"{number:>5} {'*' if label else ' '} {text!r}" + (f"  <- {', '.join(roles)}" if roles else "")
        lines.append(f"\x1b[32m{line}\x1b[0m" if colour and label else line)
    return "\n".join(lines)


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #1d2433;
  background: #fafbfc } h1 { font-size: 1.25rem } table { border-collapse: collapse; width: 100% }
td { padding: .5rem .75rem; border-top: 1px solid #dfe3ea; vertical-align: top; overflow-wrap: anywhere }
td:first-child { color: #667; white-space: nowrap; width: 1% } img { max-width: 100%; background: #fff }
.token { display: inline-block; padding: 0 .15rem; margin: 1px; border-radius: 3px; background: #eceff4;
  white-space: pre } .loss { background: #bfe8c5 } .anchor { outline: 2px solid #d08770 } .error { color: #b00020 }
@media (prefers-color-scheme: dark) { body { background: #14171d; color: #dfe3ea } td { border-color: #333a46 }
  .token { background: #2a303b } .loss { background: #22592c } }
"""


def as_html(record: Record, tokens: Sequence[Token] = ()) -> str:
    """A page that needs no other file: the slices with images inline, the rendered tokens, the metadata."""
    rows = [(role, _cell(part)) for role, part in slices(record)]
    rows += [(key, html.escape(str(value))) for key, value in record.metadata.items()]
    body = "\n".join(f"<tr><td>{html.escape(role)}</td><td>{cell}</td></tr>" for role, cell in rows)
    spans = "".join(_token(token) for token in tokens)
    legend = "<p>Tokens on green carry loss; outlined ones are read by an anchor (hover to see which).</p>"
    rendered = f"<h2>Rendered sequence</h2>{legend}<p>{spans}</p>" if tokens else ""
    title = html.escape(f"{record.id} ({record.kind})")
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style>\n'
        f"<h1>{title}</h1>\n<p>{html.escape(str(record.place or ''))}</p>\n<table>\n{body}\n</table>\n{rendered}</html>\n"
    )


def _cell(part: str | ImageRef) -> str:
    if isinstance(part, str):
        return html.escape(part)
    try:
        image = images.load(part)
    except ImageError as error:
        return f'<span class="error">{html.escape(str(error))}</span>'
    url = images.thumbnail_data_url(image, _THUMBNAIL)
    name = html.escape(part.name, quote=True)
    return f'<img src="{url}" alt="{name}"><br><small>{name}, {image.width} x {image.height}</small>'


def _token(token: Token) -> str:
    text, label, roles = token
    kinds = " ".join(["token", *(["loss"] if label else []), *(["anchor"] if roles else [])])
    title = f' title="{html.escape(", ".join(roles), quote=True)}"' if roles else ""
    return f'<span class="{kinds}"{title}>{html.escape(text)}</span>'
