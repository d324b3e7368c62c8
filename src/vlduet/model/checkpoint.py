"""What stands in a model folder, written whole or not at all.

    vlduet.json            the manifest: base, prompts, head, image backend, every trained tensor with shape and hash
    duet.safetensors       head, temperature, projector, soft prompts
    adapter/               LoRA in PEFT's own layout, where there is one
    golden.safetensors     embeddings of fixed inputs at the time of saving, compared at loading
    config.json, ...       the checkpoint itself, where the folder is self-contained (base ".")

The base is named relative to the folder, with its fingerprint; it is never copied unless the model is merged.
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
from vlduet.model.backbone import fingerprint_checkpoint
from vlduet.model.processing import IMAGE_BACKEND

FORMAT_VERSION = 1
MANIFEST_NAME = "vlduet.json"
GOLDEN_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Largest allowed 1 - cosine between saved and recomputed golden vectors; half precisions get 2e-2."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder, read."""

    base_folder: Path
    """The folder of the Hugging Face checkpoint."""
    manifest: Mapping[str, Any]
    """Empty for a plain checkpoint that VLDuet never saved."""
    tensors: Mapping[str, Tensor]
    adapter_folder: Path | None
    golden_vectors: Tensor | None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a model folder, or a plain Hugging Face checkpoint folder.

    Raises:
        ModelError: nothing here, another format, another image backend, or the base is gone or changed.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        if not (folder / "config.json").is_file():
            fix = "Name a model folder; a dual encoder's is for what only embeds"
            raise ModelError(f"neither {MANIFEST_NAME} nor config.json here", place=folder, fix=fix)
        return Checkpoint(folder, {}, {}, None, None)
    manifest = _manifest(path)
    if manifest["format"] != FORMAT_VERSION:
        raise ModelError(
            f"format {manifest['format']}, this version reads {FORMAT_VERSION}",
            place=path,
            fix="Update vlduet",
        )
    if manifest["image_backend"] != IMAGE_BACKEND:
        raise ModelError(
            f"saved with image backend '{manifest['image_backend']}', this one is '{IMAGE_BACKEND}'",
            place=path,
        )
    base = Path(os.path.normpath(folder / manifest["base"]))
    if not (base / "config.json").is_file():
        raise ModelError(
            f"the base '{base}' is gone",
            place=path,
            fix="Bring it back, or edit base in vlduet.json",
        )
    if (now := fingerprint_checkpoint(base)) != manifest["base_fingerprint"]:
        raise ModelError(
            f"the base '{base}' is another one now ({now}, was {manifest['base_fingerprint']})",
            place=path,
            fix="Bring the original back or train again",
        )
    try:
        tensors = load_file(folder / "duet.safetensors")
        golden = load_file(folder / "golden.safetensors")["vectors"]
    except (FileNotFoundError, SafetensorError, KeyError) as error:
        raise ModelError(
            f"broken model folder ({error})", place=folder, fix="Copy the whole folder again"
        ) from None
    return Checkpoint(
        base, manifest, tensors, folder / "adapter" if manifest["adapter"] else None, golden
    )


def _manifest(path: Path) -> dict[str, Any]:
    """vlduet.json, with every key that `read` and its callers want. Raises ModelError."""
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        absent = {
            "format",
            "base",
            "base_fingerprint",
            "image_backend",
            "adapter",
            "trained",
            "prompts",
            "head",
        } - manifest.keys()
    except (ValueError, AttributeError) as error:
        raise ModelError(
            f"broken manifest ({error})", place=path, fix="Copy the whole folder again"
        ) from None
    if absent and manifest.get("format") in (None, FORMAT_VERSION):
        raise ModelError(
            f"'{sorted(absent)[0]}' is missing", place=path, fix="Copy the whole folder again"
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
    save_adapter: Callable[[Path], None] | None,
) -> None:
    """Write the files of a model into an existing folder (use `whole_folder` around it).

    Args:
        base: the base checkpoint's folder; None where its files are in `folder` itself.
        described: prompts, head and provenance, as they go into the manifest.
        own, adapter: every trained tensor, by name.
    """
    manifest = {
        "format": FORMAT_VERSION,
        "vlduet": __version__,
        "base": "." if base is None else os.path.relpath(base.resolve(), _final(folder)),
        "base_fingerprint": fingerprint_checkpoint(base or folder),
        "image_backend": IMAGE_BACKEND,
        "adapter": save_adapter is not None,
        "trained": describe_tensors({**own_tensors, **adapter_tensors}),
        **description,
    }
    save_file(
        {n: t.detach().cpu().contiguous() for n, t in own_tensors.items()},
        folder / "duet.safetensors",
    )
    save_file({"vectors": golden_vectors.contiguous()}, folder / "golden.safetensors")
    if save_adapter is not None:
        save_adapter(folder / "adapter")
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """name -> shape, dtype and content hash: the one manifest of everything trained."""
    return {
        name: {
            "shape": list(t.shape),
            "dtype": str(t.dtype).removeprefix("torch."),
            "sha256": _hash(t),
        }
        for name, t in sorted(tensors.items())
    }


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def verify_tensors(
    manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], *, place: Path
) -> None:
    """Every trained tensor came back, bit for bit. Raises ModelError that names the first that did not."""
    saved = manifest["trained"]
    lost = sorted(saved.keys() ^ tensors.keys())
    if lost:
        raise ModelError(
            f"trained tensor '{lost[0]}' was not loaded",
            place=place,
            fix="The folder is not complete",
        )
    for name, facts in describe_tensors(tensors).items():
        if facts["sha256"] != saved[name]["sha256"]:
            raise ModelError(
                f"tensor '{name}' is not what was saved", place=place, fix="Copy the folder again"
            )


def make_golden_inputs() -> list[Part | Parts]:
    """What every saved model embeds, and embeds again when it is loaded: a text, an image, and both."""
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    pixels = np.stack(
        [np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.full((64, 64), 128, np.uint8)],
        -1,
    )
    picture = ImageRef(data=images.encode_png(images.from_pixels(pixels)))
    return ["A red apple.", picture, (picture, "What is this?")]


def check_golden_vectors(saved: Tensor, now: Tensor, *, dtype: torch.dtype, place: Path) -> None:
    """The loaded model embeds as the saved one did. Raises ModelError with the difference."""
    worst = float((1 - torch.nn.functional.cosine_similarity(saved.double(), now.double())).max())
    if not worst <= GOLDEN_TOLERANCE.get(dtype, 2e-2):
        raise ModelError(
            f"embeddings differ from those at saving (1 - cosine = {worst:.1e})",
            place=place,
            fix="Compare the versions of transformers, torch and pillow with those in vlduet.json",
        )


def compute_fingerprint(
    described: Mapping[str, Any], base_fingerprint: str, tensors: Mapping[str, Tensor]
) -> str:
    """Names everything that decides an embedding."""
    parts = {
        "base": base_fingerprint,
        "image_backend": IMAGE_BACKEND,
        "prompts": described["prompts"],
        "head": described["head"],
        "tensors": {
            name: facts["sha256"]
            for name, facts in describe_tensors(tensors).items()
            if name != "logit_scale"
        },
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _final(folder: Path) -> Path:
    """Where a folder under `whole_folder` will stand: relative paths must hold there."""
    name = (
        folder.name.removeprefix(".").removesuffix(".writing")
        if folder.name.endswith(".writing")
        else folder.name
    )
    return folder.resolve().with_name(name)
