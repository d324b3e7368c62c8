"""Format of a model folder: reading, writing and checking its files.

    vlduet.json            manifest: base, prompts, head, limits, image backend, trained tensors
    duet.safetensors       head, temperature, projector, soft prompts
    chat_template.jinja    chat template in use, if there is one
    adapter/               LoRA in PEFT's own layout, if there is an adapter
    golden.safetensors     embeddings of fixed inputs at the time of saving, compared at loading
    config.json, ...       the base checkpoint itself, if the folder is self-contained (base ".")

The base is named relative to the folder, with its fingerprint. It is not copied unless the model is
merged. `model/saving.py` applies this format to a `DuetModel`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlduet import __version__
from vlduet.data import images
from vlduet.data.records import ImageRef, Part, Parts
from vlduet.errors import ModelError
from vlduet.model.chat_template import TEMPLATE_FILE, fix_date, read_early_template
from vlduet.model.fingerprints import fingerprint_checkpoint
from vlduet.model.processing import IMAGE_BACKEND, translate_load_errors

FORMAT_VERSION = 1
"""Version of the folder format; a folder of another version is refused."""
MANIFEST_NAME = "vlduet.json"
"""File name of the manifest."""
GOLDEN_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Largest accepted 1 - cosine between saved and recomputed golden vectors, by dtype of the
weights."""
HALF_PRECISION_TOLERANCE = 2e-2
"""The same for all other dtypes."""
MANIFEST_KEYS = frozenset(
    ["format", "base", "base_fingerprint", "image_backend", "adapter", "trained", "prompts", "head"]
)
"""Keys that every manifest has."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Content of a model folder."""

    base_folder: Path
    """Folder of the Hugging Face checkpoint that the model was trained from."""
    manifest: Mapping[str, Any]
    """Content of vlduet.json; empty for a plain checkpoint that VLDuet never saved."""
    tensors: Mapping[str, Tensor]
    """Trained tensors by name, without the adapter's; empty for a plain checkpoint."""
    adapter_folder: Path | None
    """Folder of the LoRA adapter; None without one."""
    golden_vectors: Tensor | None
    """float32[3, E], embeddings of `make_golden_inputs`; None for a plain checkpoint."""
    chat_template: str | None = None
    """Chat template that was saved with the model; None: that of the base."""


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return the content of a model folder; weights of base and adapter are not read.

    Of a plain Hugging Face checkpoint (config.json, but no vlduet.json) nothing is read: the result
    has the folder as `base_folder` and everything else empty or None.

    Raises:
        ModelError: the folder holds no model, a file is broken or missing, it has another format or
            image backend, or the fingerprint of its base differs or its base is missing.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"neither {MANIFEST_NAME} nor config.json here",
                place=folder,
                fix="Name a model folder; a dual encoder's is for what only embeds",
            )
        return Checkpoint(folder, {}, {}, None, None)
    manifest = _read_manifest(path)
    if manifest["format"] != FORMAT_VERSION:
        raise ModelError(
            f"format {manifest['format']}, this version reads {FORMAT_VERSION}",
            place=path,
            fix="Update vlduet",
        )
    if manifest["image_backend"] != IMAGE_BACKEND:
        raise ModelError(
            f"saved with image backend '{manifest['image_backend']}', "
            f"this one is '{IMAGE_BACKEND}'",
            place=path,
        )
    base_folder = Path(os.path.normpath(folder / manifest["base"]))
    if not (base_folder / "config.json").is_file():
        raise ModelError(
            f"the base '{base_folder}' is gone",
            place=path,
            fix="Bring it back, or edit base in vlduet.json",
        )
    base_fingerprint = fingerprint_checkpoint(base_folder)
    if base_fingerprint != manifest["base_fingerprint"]:
        raise ModelError(
            f"the base '{base_folder}' has changed: its fingerprint is {base_fingerprint}, "
            f"was {manifest['base_fingerprint']}",
            place=path,
            fix="Bring the original back or train again",
        )
    try:
        tensors = load_file(folder / "duet.safetensors")
        golden_vectors = load_file(folder / "golden.safetensors")["vectors"]
    except (FileNotFoundError, SafetensorError, KeyError) as error:
        raise ModelError(
            f"broken model folder ({error})", place=folder, fix="Copy the whole folder again"
        ) from None
    adapter_folder = folder / "adapter" if manifest["adapter"] else None
    template_file = folder / TEMPLATE_FILE
    chat_template = None
    if template_file.is_file():
        chat_template = fix_date(template_file.read_text(encoding="utf-8"))
    elif "joined" not in manifest["prompts"]:
        with translate_load_errors(base_folder):
            chat_template = read_early_template(base_folder)
    return Checkpoint(base_folder, manifest, tensors, adapter_folder, golden_vectors, chat_template)


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return the content of a manifest file.

    Raises:
        ModelError: it is not a JSON object, or lacks one of MANIFEST_KEYS. A manifest of another
            format version may lack any: the caller refuses it by its version.
    """
    fix = "Copy the whole folder again"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        missing_keys = sorted(MANIFEST_KEYS - manifest.keys())
    except (ValueError, AttributeError) as error:
        raise ModelError(f"broken manifest ({error})", place=path, fix=fix) from None
    if missing_keys and manifest.get("format") in (None, FORMAT_VERSION):
        raise ModelError(f"'{missing_keys[0]}' is missing", place=path, fix=fix)
    return manifest


def write_checkpoint(
    folder: Path,
    *,
    base: Path | None,
    description: Mapping[str, Any],
    own_tensors: Mapping[str, Tensor],
    adapter_tensors: Mapping[str, Tensor],
    golden_vectors: Tensor,
    chat_template: str | None,
    save_adapter: Callable[[Path], None] | None,
) -> None:
    """Write the files of a model into an existing folder (in `replace_folder_atomically`).

    They are vlduet.json, duet.safetensors, golden.safetensors and perhaps ``adapter/``. Raises
    FileNotFoundError if the base has no config.json.

    Args:
        folder: folder to write into; with base None it already holds the checkpoint's files.
        base: folder of the base checkpoint; None for a self-contained folder.
        description: prompts, head and provenance, which become keys of the manifest.
        own_tensors: trained tensors by name, without the adapter's.
        adapter_tensors: LoRA matrices by name, for the manifest's list of trained tensors.
        golden_vectors: float32[3, E], embeddings of `make_golden_inputs`.
        chat_template: template in use; None without one.
        save_adapter: writes the adapter into a given folder; None without an adapter.
    """
    manifest = {
        "format": FORMAT_VERSION,
        "vlduet": __version__,
        "base": "." if base is None else os.path.relpath(base.resolve(), _final_folder(folder)),
        "base_fingerprint": fingerprint_checkpoint(base or folder),
        "image_backend": IMAGE_BACKEND,
        "adapter": save_adapter is not None,
        "trained": describe_tensors({**own_tensors, **adapter_tensors}),
        **description,
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in own_tensors.items()}
    save_file(tensors, folder / "duet.safetensors")
    save_file({"vectors": golden_vectors.contiguous()}, folder / "golden.safetensors")
    if chat_template is not None:
        (folder / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
    if save_adapter is not None:
        save_adapter(folder / "adapter")
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def _final_folder(folder: Path) -> Path:
    """Return the absolute path that a folder within `replace_folder_atomically` will have at last.

    Relative paths in the manifest must hold there. ``.NAME.writing`` becomes ``NAME`` in the same
    parent folder; other names stay.
    """
    name = folder.name
    if name.endswith(".writing"):
        name = name.removeprefix(".").removesuffix(".writing")
    return folder.resolve().with_name(name)


def describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return shape, dtype and SHA-256 of the content of every tensor, by name in sorted order."""
    return {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "sha256": _hash_tensor(tensor),
        }
        for name, tensor in sorted(tensors.items())
    }


def _hash_tensor(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def verify_tensors(
    manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], *, place: Path
) -> None:
    """Check that all trained tensors of a manifest were loaded, bit for bit, and no others.

    Contents are compared by SHA-256, so `tensors` must have the dtypes of saving.

    Raises:
        ModelError: names the first tensor that is missing, unknown or different, and `place`, the
            folder.
    """
    saved = manifest["trained"]
    not_in_both = sorted(saved.keys() ^ tensors.keys())
    if not_in_both:
        raise ModelError(
            f"trained tensor '{not_in_both[0]}' was not loaded",
            place=place,
            fix="The folder is not complete",
        )
    for name, description in describe_tensors(tensors).items():
        if description["sha256"] != saved[name]["sha256"]:
            raise ModelError(
                f"tensor '{name}' is not what was saved", place=place, fix="Copy the folder again"
            )


def make_golden_inputs() -> list[Part | Parts]:
    """Return the fixed inputs that a model embeds when saved and again when loaded.

    They are a text, an image of colour ramps (64 x 64, as PNG bytes), and a tuple of that image and
    a question.
    """
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    red = np.tile(ramp, (64, 1))
    pixels = np.stack([red, red.T, np.full((64, 64), 128, np.uint8)], -1)  # [64, 64, 3]
    image = ImageRef(data=images.encode_png(images.from_pixels(pixels)))
    return ["A red apple.", image, (image, "What is this?")]


def check_golden_vectors(saved: Tensor, now: Tensor, *, dtype: torch.dtype, place: Path) -> None:
    """Check that a loaded model embeds the golden inputs as the saved one did.

    Args:
        saved: float32[3, E], golden vectors in the folder.
        now: float32[3, E], golden vectors of the loaded model.
        dtype: dtype of the model's weights, which decides the tolerance of 1 - cosine
            (GOLDEN_TOLERANCES, else HALF_PRECISION_TOLERANCE).
        place: folder that an error names.

    Raises:
        ModelError: the cosine of a pair of vectors is too low, or not a number.
    """
    cosines = torch.nn.functional.cosine_similarity(saved.double(), now.double())
    worst = float((1 - cosines).max())
    if not worst <= GOLDEN_TOLERANCES.get(dtype, HALF_PRECISION_TOLERANCE):  # also refuses NaN
        raise ModelError(
            f"embeddings differ from those at saving (1 - cosine = {worst:.1e})",
            place=place,
            fix="Compare the versions of transformers, torch and pillow with those in vlduet.json",
        )


def compute_fingerprint(
    description: Mapping[str, Any], base_fingerprint: str, tensors: Mapping[str, Tensor]
) -> str:
    """Return 16 hexadecimal digits that identify everything an embedding depends on.

    Args:
        description: `prompts`, `head` and, unless empty, `image_processor` as in the manifest;
            other keys are ignored.
        base_fingerprint: fingerprint of the base checkpoint.
        tensors: all trained tensors; the temperature, which no embedding depends on, is ignored.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if name != "logit_scale"}
    identity = {
        "base": base_fingerprint,
        "image_backend": IMAGE_BACKEND,
        "prompts": description["prompts"],
        "head": description["head"],
        "tensors": {name: _hash_tensor(tensor) for name, tensor in tensors.items()},
    }
    if description.get("image_processor"):  # models of earlier versions have no such key
        identity["image_processor"] = description["image_processor"]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
