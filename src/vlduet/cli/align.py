"""`vlduet align`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vlduet.data.records import Record


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(align)


Which = Annotated[
    str,
    typer.Argument(metavar="FILE[:N]", help="Record N of a file, from 0; without :N its first."),
]


def align(
    first: Which,
    second: Which,
    *,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", help="A config of recipe sugar: compare by its encoders and switches."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", metavar="DIR", help="Compare by this model's own embeddings instead."
        ),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(min=0.01, help="Width of the kernel [default: the config's, or 1]."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="OUT", help="Write a page too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how two records align, slice by slice."""
    import json

    from vlduet import config as settings_of
    from vlduet.errors import ConfigError
    from vlduet.inspect import alignment as drawn
    from vlduet.reports.terminal import format_alignment

    if (config is None) == (model is None):
        raise ConfigError(
            "nothing to compare with, or two things", fix="Give either --config or --model"
        )
    a, b = _record(first), _record(second)
    parts = (*drawn.split_into_slices(a), *drawn.split_into_slices(b))
    if config is not None:
        settings = settings_of.load_run_config(config)
        if settings.recipe.get("name") != "sugar":
            raise ConfigError(
                f"recipe '{settings.recipe.get('name')}'",
                place=config,
                fix="Name a config of recipe sugar",
            )
        cosines, judge = drawn.config_encoder_cosines(parts, settings), f"the encoders of {config}"
        delta = delta if delta is not None else float(settings.recipe.get("delta", 1.0))
    else:
        from vlduet.encoders.dual import open_embedder

        assert model is not None
        cosines, judge = (
            drawn.model_cosines(parts, open_embedder(model)),
            f"the embeddings of {model}",
        )
    found = drawn.align_records(
        a, b, cosines=cosines, source=judge, delta=1.0 if delta is None else delta
    )
    if html is not None:
        from vlduet.reports.pages import write_alignment_page

        write_alignment_page(html, found)
    if as_json:
        typer.echo(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        typer.echo(format_alignment(found) + (f"\n{html}" if html else ""))


def _record(which: str) -> Record:
    from vlduet.cli.data import read_record_at

    file, colon, number = which.rpartition(":")
    if colon and number.isdecimal():
        return read_record_at(Path(file), int(number))
    return read_record_at(Path(which), 0)
