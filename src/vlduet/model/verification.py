"""Verification of model folders: lists of files in the manifest, and what differs from them.

The manifest lists every other file of its folder (``files``) and the files of a base elsewhere that
its fingerprint covers (``base_files``), and has a hash of itself (``manifest_sha256``). Those of
earlier versions have none of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlduet.errors import ModelError
from vlduet.integrity import describe_damage, find_damage, get_listed_files
from vlduet.model.fingerprints import fingerprint_checkpoint


def verify_base(base_folder: Path, manifest: Mapping[str, Any], *, place: Path) -> None:
    """Check that the base of a model is the one that it was trained from.

    Raises:
        ModelError: a file of the base differs, is missing or was added; the error has the place
            `place`.
    """
    fix = "Bring the original back or train again"
    for damage in find_damage(base_folder, get_listed_files(manifest, "base_files")):
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
    lines, num_files = describe_damage(folder, manifest, name=manifest_name)
    base_files = get_listed_files(manifest, "base_files")
    for name, reason in find_damage(base_folder, base_files, reread=True):
        lines.append(f"{base_folder / name}: {reason}")
    saved = manifest["base_fingerprint"]
    if not lines and fingerprint_checkpoint(base_folder, like=saved) != saved:
        lines.append(f"{base_folder}: is not the base that the model was trained from")
    return lines, num_files + len(base_files)
