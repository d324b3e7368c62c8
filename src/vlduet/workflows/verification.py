"""Verification of every kind of folder that VLDuet writes, for `vlduet model check`.

Each kind is recognised by its manifest, which is written last and lists the files of the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlduet.corpora.catalog import find_corpus_damage
from vlduet.data.jsonl_output import find_output_damage
from vlduet.encoders import dual
from vlduet.errors import DataError
from vlduet.files import recover_folder
from vlduet.model import checkpoint
from vlduet.retrieval.index import MANIFEST_FILENAME, find_index_damage
from vlduet.structured_files import read_json_object
from vlduet.train.checkpointing import STATE_FILE, STATE_FOLDER, find_state_damage

MODEL_FOLDER = "model"
"""Folder of the model within the folder of a run."""


def find_folder_damage(folder: Path) -> tuple[list[str], int]:
    """Return a line for each damaged file of a folder, and the number of files that are compared.

    All listed files are read. The folder holds a model (with its base), a dual encoder, an index, a
    corpus of `vlduet data fetch`, or a run with its model and its state; or `folder` is a file of
    records of ours. Where no list exists, as in a plain checkpoint or a folder of an earlier
    version, the number is 0.

    Raises:
        VLDuetError: the folder holds none of these, or a manifest is broken.
    """
    lines, num_files = [], 0
    for part, find_damage in _select_checks(recover_folder(folder)):
        part_lines, part_files = find_damage(part)
        lines += part_lines
        num_files += part_files
    return lines, num_files


def _select_checks(folder: Path) -> list[tuple[Path, Callable[[Path], tuple[list[str], int]]]]:
    """Return the folders to check, `folder` or those of a run within it, with their functions."""
    if folder.suffix == ".jsonl" and folder.is_file():
        return [(folder, _find_output_damage)]
    if (folder / dual.MANIFEST_NAME).is_file():
        return [(folder, dual.find_damage)]
    if (folder / STATE_FILE).is_file():
        return [(folder, find_state_damage)]
    if (folder / MANIFEST_FILENAME).is_file():
        return [(folder, _find_manifest_damage)]
    parts = [folder / name for name in (MODEL_FOLDER, STATE_FOLDER)]
    checks = [check for part in parts if part.is_dir() for check in _select_checks(part)]
    return checks or [(folder, checkpoint.find_damage)]


def _find_output_damage(path: Path) -> tuple[list[str], int]:
    """Return the damage of a file of records of ours and its images."""
    sentences, num_files = find_output_damage(path, reread=True)
    return [f"{path.parent / sentence}" for sentence in sentences], num_files


def _find_manifest_damage(folder: Path) -> tuple[list[str], int]:
    """Return the damage of an index or a corpus, which both have a manifest.json."""
    path = folder / MANIFEST_FILENAME
    manifest = read_json_object(path, error_class=DataError, fix="Copy the folder again")
    return find_corpus_damage(folder) if "corpus" in manifest else find_index_damage(folder)
