"""Verification of model folders: lists of files in the manifest, and what differs from them.

The manifest lists every other file of its folder (``files``) and the files of a base elsewhere that
its fingerprint covers (``base_files``), and has a hash of itself (``manifest_sha256``). Those of
earlier versions have none of these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlduet.errors import ModelError
from vlduet.integrity import Damage, find_damage, hash_files, list_files, parse_files
from vlduet.model.fingerprints import fingerprint_checkpoint, hash_checkpoint

UNSEALED_KEYS = ("base", "manifest_sha256")
"""Keys of a manifest that its hash leaves out: the path of the base may be edited."""


def seal_manifest(
    manifest: Mapping[str, Any], folder: Path, *, base: Path | None
) -> dict[str, Any]:
    """Return a manifest with lists of all files in its folder and of its base, and its own hash.

    Args:
        manifest: content of the manifest, which will be the last file that is written.
        folder: folder of the model, with all files but the manifest.
        base: folder of the base; None if `folder` holds it.
    """
    sealed = {
        **json.loads(json.dumps(manifest)),  # as it will be read: tuples become lists
        "files": hash_files(folder, list_files(folder)),
        "base_files": {} if base is None else hash_checkpoint(base),
    }
    return {**sealed, "manifest_sha256": _hash_manifest(sealed)}


def verify_files(folder: Path, manifest: Mapping[str, Any], *, place: Path) -> None:
    """Check a model folder against its manifest; one of an earlier version has nothing to check.

    Raises:
        ModelError: the manifest, at `place`, or a file of its list is not what was written.
    """
    for damage in _find_folder_damage(folder, manifest, manifest_name=place.name, reread=False):
        raise ModelError(damage.reason, place=folder / damage.name, fix="Copy the folder again")


def verify_base(base_folder: Path, manifest: Mapping[str, Any], *, place: Path) -> None:
    """Check that the base of a model is the one that it was trained from.

    Raises:
        ModelError: a file of the base differs, is missing or was added; the error has the place
            `place`.
    """
    fix = "Bring the original back or train again"
    for damage in find_damage(base_folder, _list_files(manifest, "base_files")):
        raise ModelError(f"the base '{base_folder}' has changed: {damage}", place=place, fix=fix)
    saved = manifest["base_fingerprint"]
    fingerprint = fingerprint_checkpoint(base_folder, like=saved)
    if fingerprint != saved:
        message = f"its fingerprint is {fingerprint}, was {saved}"
        raise ModelError(f"the base '{base_folder}' has changed: {message}", place=place, fix=fix)


def find_model_damage(
    folder: Path, base_folder: Path, manifest: Mapping[str, Any], *, manifest_name: str
) -> tuple[list[str], int]:
    """Return a line for each damaged file of a model and its base, and the number of listed files.

    All files are read. If the base is not as it was, but has no damaged file in the list of the
    manifest, a line says so.

    Args:
        folder: folder of the model.
        base_folder: folder of its base, perhaps the same.
        manifest: content of the manifest, which is in a file `manifest_name`.
    """
    damage = _find_folder_damage(folder, manifest, manifest_name=manifest_name, reread=True)
    lines = [f"{folder / name}: {reason}" for name, reason in damage]
    base_files = _list_files(manifest, "base_files")
    for name, reason in find_damage(base_folder, base_files, reread=True):
        lines.append(f"{base_folder / name}: {reason}")
    saved = manifest["base_fingerprint"]
    if not lines and fingerprint_checkpoint(base_folder, like=saved) != saved:
        lines.append(f"{base_folder}: is not the base that the model was trained from")
    return lines, len(_list_files(manifest, "files")) + len(base_files)


def _find_folder_damage(
    folder: Path, manifest: Mapping[str, Any], *, manifest_name: str, reread: bool
) -> Iterator[Damage]:
    """Yield the damage of the manifest and of the files of its list."""
    is_sealed = "files" in manifest or "manifest_sha256" in manifest
    if is_sealed and manifest.get("manifest_sha256") != _hash_manifest(manifest):
        yield Damage(manifest_name, "has another content than the one that was written")
    yield from find_damage(folder, _list_files(manifest, "files"), reread=reread)


def _list_files(manifest: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a list of files of a manifest, {} if it is broken or of an earlier version.

    A broken one is damage of the manifest, which its hash shows.
    """
    try:
        return {**parse_files(manifest.get(key, {}))}
    except ValueError:
        return {}


def _hash_manifest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content without UNSEALED_KEYS, in any layout."""
    content = {key: value for key, value in manifest.items() if key not in UNSEALED_KEYS}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
