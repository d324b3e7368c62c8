"""Format of a model folder: reading, writing and checking its files.

    vlduet.json            manifest: base, prompts, head, limits, image backend, trained tensors,
                           statistics of scores (`score_statistics.py`) where there are some, and
                           size and hash of every file (`verification.py`)
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
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlduet import __version__
from vlduet.data import images
from vlduet.data.records import ImageRef, Part, Parts
from vlduet.errors import ModelError, quote_value
from vlduet.files import write_text_atomically
from vlduet.hub import describe_snapshot, find_base
from vlduet.integrity import reseal_manifest, seal_manifest, verify_manifest
from vlduet.library_errors import COPY_AGAIN, translate_library_errors
from vlduet.model import verification
from vlduet.model.chat_template import TEMPLATE_FILE, fix_date, read_early_template
from vlduet.model.fingerprints import fingerprint_checkpoint, hash_checkpoint
from vlduet.model.folder_checks import describe_folder_without_config, read_adapter_config
from vlduet.model.pooling import HEAD_KINDS
from vlduet.model.processing import IMAGE_BACKEND, translate_load_errors
from vlduet.model.prompts import Prompts
from vlduet.model.score_statistics import ScoreStatistics
from vlduet.model.sentence_transformers_format import read_published_model
from vlduet.structured_files import FieldTypes, check_fields, read_json_object

FORMAT_VERSION = 1
"""Version of the folder format; a folder of another version is refused."""
MANIFEST_NAME = "vlduet.json"
"""File name of the manifest."""
TENSORS_NAME = "duet.safetensors"
GOLDEN_NAME = "golden.safetensors"
GOLDEN_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Largest accepted 1 - cosine between saved and recomputed golden vectors, by dtype of the
weights."""
HALF_PRECISION_TOLERANCE = 2e-2
"""The same for all other dtypes."""
NUMBER_LIST = re.compile(r"\[\n[-\s\d.,e]+\]")
"""List of numbers in a JSON text with one value a line. Strings have no line end and do not match.
"""
MANIFEST_FIELDS: FieldTypes = {
    "format": int,
    "base": str,
    "base_fingerprint": str,
    "image_backend": str,
    "adapter": bool,
    "trained": dict,
    "prompts": dict,
    "head": dict,
    "head.kind": str,
    "head.dim": int,
}
"""Keys that every manifest has."""
OPTIONAL_FIELDS: FieldTypes = {
    "image_processor": (dict, type(None)),
    "limits.max_image_tokens": (int, type(None)),
    "limits.max_tokens": int,
}
"""Keys that manifests of earlier versions lack."""


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
            image backend, a file differs from the one that was saved, or its base does or is
            missing.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        if not (folder / "config.json").is_file():
            raise describe_folder_without_config(folder)
        return Checkpoint(folder, {}, {}, None, None)
    manifest = _read_manifest(path)
    adapter_config = folder / "adapter" / "adapter_config.json"
    if manifest["adapter"] and adapter_config.exists():
        read_adapter_config(adapter_config)  # names the key, where hashes name the file alone
    verify_manifest(folder, manifest, name=path.name)
    base_folder = _locate_base(folder, manifest)
    verification.verify_base(base_folder, manifest, place=path)
    with translate_library_errors(folder, subject="model folder"):
        tensors = load_file(folder / TENSORS_NAME)
        golden_vectors = load_file(folder / GOLDEN_NAME)["vectors"]
    if manifest["head"]["dim"] > max(golden_vectors.shape):  # before a head of this size is made
        message = f"head.dim is {manifest['head']['dim']}, {GOLDEN_NAME} has vectors "
        raise ModelError(f"{message}{[*golden_vectors.shape]}", place=path, fix=COPY_AGAIN)
    adapter_folder = folder / "adapter" if manifest["adapter"] else None
    template_file = folder / TEMPLATE_FILE
    chat_template = None
    if template_file.is_file():
        chat_template = fix_date(template_file.read_text(encoding="utf-8"))
    elif "joined" not in manifest["prompts"]:
        with translate_load_errors(base_folder):
            chat_template = read_early_template(base_folder)
    return Checkpoint(base_folder, manifest, tensors, adapter_folder, golden_vectors, chat_template)


def read_score_statistics(manifest: Mapping[str, Any], path: Path) -> ScoreStatistics | None:
    """Return the statistics of scores of a parsed manifest; None if it has none.

    Raises ModelError for a broken entry, with `path`, that of the manifest.
    """
    return ScoreStatistics.from_manifest(manifest.get("score_statistics"), place=str(path))


def write_score_statistics(folder: Path, statistics: ScoreStatistics) -> None:
    """Replace the statistics of scores in a model folder; nothing else in it changes.

    Raises ModelError for a folder without a manifest, or with a broken one.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        fix = "Write a model folder with 'vlduet model limit' first, and use that"
        raise ModelError(f"a checkpoint without {MANIFEST_NAME}", place=folder, fix=fix)
    store_score_statistics(path, _read_manifest(path), statistics)


def store_score_statistics(
    path: Path, manifest: Mapping[str, Any], statistics: ScoreStatistics
) -> None:
    """Write a manifest with other statistics of scores to its file, atomically."""
    changed = {**manifest, "score_statistics": statistics.to_manifest()}
    write_text_atomically(path, format_manifest(reseal_manifest(changed)))


def format_manifest(manifest: Mapping[str, Any]) -> str:
    """Return a manifest as JSON with sorted keys; a list of numbers takes one line."""
    text = json.dumps(manifest, indent=1, sort_keys=True)
    return NUMBER_LIST.sub(lambda match: " ".join(match[0].split()), text) + "\n"


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return the facts about the origin of a model folder; {} for all other folders.

    No file but the manifest is read. Raises as `read_checkpoint` does for the manifest alone.
    """
    path = folder / MANIFEST_NAME
    return dict(_read_manifest(path).get("provenance", {})) if path.is_file() else {}


def find_damage(folder: Path) -> tuple[list[str], int]:
    """Return a line for each damaged file of a model folder, and the number of verified files.

    All of them are read, with those of the base. Of a plain checkpoint or a model of an earlier
    version, which have no list of files, the result is ([], 0) unless the base differs.

    Raises:
        ModelError: the folder holds no model, or its manifest is broken or its base missing.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        published = read_published_model(folder)
        read_checkpoint(published.folder if published else folder)  # refuses what is no checkpoint
        return [], 0
    manifest = _read_manifest(path)
    base_folder = _locate_base(folder, manifest)
    return verification.find_model_damage(folder, base_folder, manifest, manifest_name=path.name)


def _locate_base(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """Return the folder of a model's base; raise ModelError if it is missing."""
    base_folder = Path(os.path.normpath(folder / manifest["base"]))
    base_name = manifest.get("base_name")
    base_folder = find_base(base_folder, base_name)
    if not (base_folder / "config.json").is_file():
        bring = f" (vlduet model pull {base_name})" if base_name else ""
        raise ModelError(
            f"the base '{base_folder}' is gone",
            place=folder / MANIFEST_NAME,
            fix=f"Bring it back{bring}, or edit base in vlduet.json",
        )
    return base_folder


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return the content of a manifest file.

    Raises:
        ModelError: it is not a JSON object, or a key is missing or of another type, or the kind of
            head is unknown, or the format or the image backend is another one.
        ConfigError: a prompt is unknown or invalid.
    """
    manifest = read_json_object(path, {"format": int}, error_class=ModelError, fix=COPY_AGAIN)
    if manifest["format"] != FORMAT_VERSION:
        raise ModelError(
            f"format {manifest['format']}, this version reads {FORMAT_VERSION}",
            place=path,
            fix="Update vlduet",
        )
    check_fields(
        manifest,
        MANIFEST_FIELDS,
        place=path,
        error_class=ModelError,
        fix=COPY_AGAIN,
        optional=OPTIONAL_FIELDS,
    )
    for name, description in manifest["trained"].items():
        place = f"{path}: trained.{name}"
        fields = {"sha256": str}
        check_fields(description, fields, place=place, error_class=ModelError, fix=COPY_AGAIN)
    head = manifest["head"]
    if head["kind"] not in HEAD_KINDS or head["dim"] < 1:
        message = f"head.kind is {quote_value(head['kind'])}, head.dim {head['dim']}"
        fix = f"Update vlduet, which knows {', '.join(HEAD_KINDS)}, or copy the folder again"
        raise ModelError(message, place=path, fix=fix)
    Prompts.from_manifest(manifest["prompts"], place=path)
    read_score_statistics(manifest, path)
    if manifest["image_backend"] != IMAGE_BACKEND:
        raise ModelError(
            f"saved with image backend '{manifest['image_backend']}', "
            f"this one is '{IMAGE_BACKEND}'",
            place=path,
        )
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

    They are vlduet.json, duet.safetensors, golden.safetensors, and perhaps ``adapter/``. Raises
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
    manifest: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "vlduet": __version__,
        "base": "." if base is None else os.path.relpath(base.resolve(), _final_folder(folder)),
        "base_fingerprint": fingerprint_checkpoint(base or folder),
        "base_name": None if base is None else describe_snapshot(base),
        "image_backend": IMAGE_BACKEND,
        "adapter": save_adapter is not None,
        "trained": describe_tensors({**own_tensors, **adapter_tensors}),
        **description,
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in own_tensors.items()}
    save_file(tensors, folder / TENSORS_NAME)
    save_file({"vectors": golden_vectors.contiguous()}, folder / GOLDEN_NAME)
    if chat_template is not None:
        (folder / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
    if save_adapter is not None:
        save_adapter(folder / "adapter")
    manifest["base_files"] = {} if base is None else hash_checkpoint(base)
    manifest = seal_manifest(manifest, folder)
    (folder / MANIFEST_NAME).write_text(format_manifest(manifest))


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
        ModelError: the shapes differ, or the cosine of a pair is too low, or not a number.
    """
    if saved.shape != now.shape:
        raise ModelError(
            f"{GOLDEN_NAME} has vectors {list(saved.shape)}, the model {list(now.shape)}",
            place=place,
            fix=COPY_AGAIN,
        )
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
    """Return hexadecimal digits that identify everything an embedding depends on.

    There are as many as in `base_fingerprint`, so that those of earlier versions can be told apart.

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
    content = json.dumps(identity, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[: len(base_fingerprint)]
