"""Query of a command: a text, repeated --text and --image in order, or a JSON file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from vlduet.data.records import Conversation, Parts

QUERY_FILE = (
    'JSON file with the query: [{"text": ...}, {"image": FILE}, ...], or {"messages": ...}.'
)
TEXT_OPTION = "Text of the query. Repeat it and --image: their order counts."
IMAGE_OPTION = "Image of the query; may be repeated."

Texts = Annotated[list[str] | None, typer.Option("--text", metavar="TEXT", help=TEXT_OPTION)]
Images = Annotated[list[Path] | None, typer.Option("--image", metavar="FILE", help=IMAGE_OPTION)]
QueryFile = Annotated[Path | None, typer.Option("--query", metavar="FILE", help=QUERY_FILE)]

OPTION_ORDER = "vlduet.option_order"
"""Key of `typer.Context.meta`: names of the parameters in the order of the command line."""


class QueryCommand(TyperCommand):
    """Command that remembers in which order its options were given, under `OPTION_ORDER`.

    Each option has a list of its values, but between several options the order would be lost.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line into `ctx` and return what is left of it."""
        _, _, parameters = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta[OPTION_ORDER] = [parameter.name for parameter in parameters]
        return super().parse_args(ctx, args)


def read_query(
    context: typer.Context,
    text: str | None,
    *,
    texts: list[str] | None,
    images: list[Path] | None,
    file: Path | None,
) -> Parts | Conversation:
    """Return the query of a `QueryCommand`; () if none is given.

    Args:
        context: context of the command, whose parameters are named `texts` and `images`.
        text: positional text; it follows all `texts` and `images`.
        texts: values of --text.
        images: values of --image, which need not exist.
        file: value of --query, see `vlduet.data.query_json`.

    Raises:
        DataError: the file is no query, or there is another part beside it.
    """
    from vlduet.data.query_json import read_query_file
    from vlduet.data.records import ImageRef, Part
    from vlduet.errors import DataError

    values: dict[str, Iterator[Part]] = {
        "texts": iter(texts or ()),
        "images": (ImageRef(path=path) for path in images or ()),
    }
    order = [name for name in context.meta[OPTION_ORDER] if name in values]
    parts = [next(values[name]) for name in order]
    if text is not None:
        parts.append(text)
    if file is None:
        return tuple(parts)
    if parts:
        fix = "Write all texts and images into the file"
        raise DataError("a query beside that of the file", place="--query", fix=fix)
    return read_query_file(file)
