"""`vlduet config`: list, show and copy the presets, configs that are part of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlduet.cli._common import Json, print_json, print_text

app = typer.Typer(help="List, show and copy the presets.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A preset; see 'vlduet config list'.")]


@app.command("list")
def list_configs(*, as_json: Json = False) -> None:
    """List the presets that 'vlduet train' and 'vlduet compare' accept, with a summary of each.

    The summary is the first line of the preset if that is a comment. With --json, print one object
    of names and summaries.
    """
    from vlduet.config import find_config, list_presets

    summaries = {name: _read_summary(find_config(name)) for name in list_presets()}
    if as_json:
        print_json(summaries)
        return
    width = max(map(len, summaries))
    for name, summary in summaries.items():
        print_text(f"{name:{width}}  {summary}")


@app.command()
def show(name: Name) -> None:
    """Print a preset as it is written."""
    from vlduet.config import find_config

    print_text(find_config(name).read_text(encoding="utf-8"), end="")


@app.command()
def copy(
    name: Name,
    to: Annotated[Path, typer.Argument(metavar="TO", help="A new YAML file, or a folder.")],
) -> None:
    """Copy a preset to a file of your own, to change it and train with it, and print its path.

    In an existing folder TO, the copy keeps the preset's file name. Missing folders of TO are
    created. An unknown preset and an existing file are errors.
    """
    from vlduet.config import find_config
    from vlduet.errors import ConfigError
    from vlduet.files import write_text_atomically
    from vlduet.locks import lock_output

    preset = find_config(name)
    target = to / preset.name if to.is_dir() else to
    if target.exists():
        raise ConfigError("exists already", place=target, fix="Name a new file")
    with lock_output(target):
        write_text_atomically(target, preset.read_text(encoding="utf-8"))
    print_text(f"{target}: train with 'vlduet train {target}'")


def _read_summary(path: Path) -> str:
    """Return the first line of a preset's leading comment, or an empty text."""
    first_line = path.read_text(encoding="utf-8").partition("\n")[0]
    return first_line.removeprefix("#").strip() if first_line.startswith("#") else ""
