"""Dual encoder in the manner of CLIP: two small towers over frozen encoders, with a common space.

    image -> vision encoder (frozen) -> tower -> unit vector
    text  -> text encoder (frozen)   -> tower -> unit vector

`recipe: clip` trains it, and it can be `encoders.cross` where there is no CLIP. Its folder:

    dual.json           path (relative) and fingerprint of each frozen encoder, dimensions, hashes
                        of the tensors, provenance, statistics of scores
                        (`model/score_statistics.py`), size and hash of the other file
    dual.safetensors    towers and temperature
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlduet import __version__
from vlduet.data.batches import Batch, collate
from vlduet.data.records import Message, Part, Parts, as_parts
from vlduet.data.sequences import Sequence, Slice
from vlduet.encoders.frozen import (
    FrozenEncoder,
    FrozenEncoders,
    TokenCounter,
    get_modality,
    make_slice,
)
from vlduet.encoders.loading import Device, fingerprint_encoder, open_encoder
from vlduet.errors import DataError, ModelError
from vlduet.files import replace_folder_atomically
from vlduet.hub import describe_snapshot, find_base, resolve_model
from vlduet.integrity import describe_damage, hash_files, seal_manifest, verify_manifest
from vlduet.library_errors import translate_library_errors
from vlduet.model import checkpoint
from vlduet.model.backbone import eval_mode, select_device
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache
from vlduet.model.fingerprints import hash_checkpoint
from vlduet.model.limits import TruncationCallback, log_first_truncation, too_long_error
from vlduet.model.pooling import Readout
from vlduet.model.processing import IMAGE_BACKEND
from vlduet.model.saving import GoldenCheck
from vlduet.model.score_statistics import ScoreStatistics
from vlduet.structured_files import check_fields, read_json_object, read_safetensors_header

MANIFEST_NAME = "dual.json"
WEIGHTS_NAME = "dual.safetensors"
FORMAT_VERSION = 1
INITIAL_TEMPERATURE = 0.07

# Small towers with much dropout, since there may be only a few thousand pairs to learn from.
HIDDEN_DIM = 512
DROPOUT = 0.3

ROLE_BY_MODALITY = {"image": "vision", "text": "text"}
"""Modality -> role of the frozen encoder below its tower."""


class DualEncoder(nn.Module):
    """Two towers over frozen encoders; a model like `DuetModel` for the training loop."""

    renderer: Any = None
    """Not used: a dual encoder reads no tokens."""
    score_statistics: ScoreStatistics | None = None
    """Scores of unrelated contents; None if they are not known."""

    def __init__(
        self, encoders: FrozenEncoders, *, dim: int, encoder_dims: Mapping[str, int] | None = None
    ):
        """Create new towers from torch's global random generator, on the CPU.

        Args:
            encoders: frozen encoders of the roles `vision` and `text`.
            dim: dimension of the common space.
            encoder_dims: role -> dimension of its encoder's vectors. None: measured, which loads
                the encoders and raises ModelError if that fails.
        """
        super().__init__()
        if not encoder_dims:
            encoder_dims = {role: encoders.get_dim(role) for role in ROLE_BY_MODALITY.values()}
        self.encoders = encoders
        self.dim = dim
        self.encoder_dims = dict(encoder_dims)
        self.towers = nn.ModuleDict(
            {role: build_tower(width, dim) for role, width in sorted(self.encoder_dims.items())}
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / INITIAL_TEMPERATURE)))

    def forward(self, batch: Batch) -> Readout:
        """Return the embedding of the last slice of every anchor; no token has a likelihood.

        The slices must have features. The anchors of the readout have none, to save memory.
        """
        embeddings = self.project_slices([anchor.slices[-1] for anchor in batch.anchors])
        anchors = tuple(replace(anchor, slices=()) for anchor in batch.anchors)
        return Readout(embeddings, anchors, embeddings.new_zeros(0))

    def project_slices(self, slices: Many[Slice]) -> Tensor:
        """Return the embeddings of slices with features, float[N, dim], unit length.

        In training mode, the towers drop out. Raises KeyError for a slice without features.
        """
        embeddings = self.logit_scale.new_zeros(len(slices), self.dim)
        for modality, role in ROLE_BY_MODALITY.items():
            rows = [i for i, part in enumerate(slices) if get_modality(part.part) == modality]
            if rows:
                features = torch.stack([slices[i].features[role] for i in rows]).to(embeddings)
                embeddings[rows] = nn.functional.normalize(self.towers[role](features), dim=1)
        return embeddings

    def collate(self, sequences: list[Sequence], *, pack_to: int | None = None) -> Batch:
        """Return a batch on the model's device; its tokens have no meaning."""
        return collate(sequences, pad_token_id=0, pack_to=pack_to).to(self.logit_scale.device)

    @torch.no_grad()
    def encode(
        self, items: Many[Part | Parts], *, on_truncate: TruncationCallback | None = None
    ) -> np.ndarray:
        """Return the embeddings of images and texts, float32[N, dim], unit length, without dropout.

        Vectors of the frozen encoders are taken from their cache and stored there.

        Args:
            items: each an image or a text.
            on_truncate: allows texts to be cut to the limit of the text encoder, and is called for
                every item that is cut. None refuses such items.

        Raises:
            DataError: an item that is not one image or one text, that is longer than the limit
                without `on_truncate`, or whose vector by the frozen encoder is not finite or zero.
            ModelError: a frozen encoder cannot be loaded.
            ImageError: an unreadable image.
        """
        rows = [as_parts(item) for item in items]
        if any(len(row) != 1 or isinstance(row[0], Message) for row in rows):
            fix = "Use a model of another recipe, or one part of the conversation or document"
            raise DataError("a dual encoder reads one image or one text", fix=fix)
        for position, num_tokens in enumerate(self.count_tokens(items)):
            # Images have none, and alone they need no tokenizer.
            if num_tokens and num_tokens > self.max_text_tokens:
                if on_truncate is None:
                    raise too_long_error(num_tokens, self.max_text_tokens)
                on_truncate(position, num_tokens)
        slices = self.encoders.encode_slices([make_slice(row[0]) for row in rows])
        with eval_mode(self):
            embeddings: np.ndarray = self.project_slices(slices).float().cpu().numpy()
        return embeddings

    encode_query = encode_document = encode

    def count_tokens(self, items: Many[Part | Parts]) -> list[int]:
        """Return the number of tokens of every item's texts, before any is cut; 0 for images."""
        counts = [0] * len(items)
        texts: list[str] = []
        positions: list[int] = []
        for position, item in enumerate(items):
            texts_of_item = [part for part in as_parts(item) if isinstance(part, str)]
            texts += texts_of_item
            positions += [position] * len(texts_of_item)
        if texts and (counter := self.encoders.by_role["text"].token_counter):
            for position, num_tokens in zip(positions, counter.count(texts), strict=True):
                counts[position] += num_tokens
        return counts

    @property
    def max_text_tokens(self) -> int:
        """Longest text of the text encoder in tokens, or a very large number if it has no limit."""
        counter = self.encoders.by_role["text"].token_counter
        return counter.max_tokens if counter else sys.maxsize

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides an embedding."""
        fingerprints = {role: e.fingerprint for role, e in self.encoders.by_role.items()}
        trained = checkpoint.describe_tensors(self.own_tensors())
        return _compute_fingerprint(fingerprints, trained, self.dim)

    @property
    def image_backend(self) -> str:
        """Library that decodes and resizes images."""
        return IMAGE_BACKEND

    def own_tensors(self) -> dict[str, Tensor]:
        """Return all parameters by name: towers and temperature."""
        return dict(self.named_parameters())

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Return {}: there is no base model to adapt."""
        return {}

    def save_pretrained(
        self, folder: Path | str, *, provenance: Mapping[str, Any] | None = None
    ) -> None:
        """Write dual.json and dual.safetensors (towers and temperature), completely or not at all.

        The frozen encoders are not copied: their paths, relative to the folder, are stored.

        Args:
            folder: created, or replaced if it is a dual encoder's.
            provenance: what made the model, for the manifest.

        Raises:
            ConfigError: the folder is a file, or has other content than a dual encoder.
        """
        target = Path(folder).resolve()
        encoders = {}
        for role, encoder in self.encoders.by_role.items():
            path = os.path.relpath(encoder.folder.resolve(), target)
            name = describe_snapshot(encoder.folder)
            fields = {"folder": path, "fingerprint": encoder.fingerprint}
            encoders[role] = fields if name is None else {**fields, "name": name}
        tensors = self.own_tensors()
        manifest = {
            "format": FORMAT_VERSION,
            "vlduet": __version__,
            "encoders": encoders,
            "widths": self.encoder_dims,
            "dim": self.dim,
            "trained": checkpoint.describe_tensors(tensors),
            "provenance": dict(provenance or {}),
        }
        if self.score_statistics is not None:
            manifest["score_statistics"] = self.score_statistics.to_manifest()
        on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        with replace_folder_atomically(Path(folder), marker=MANIFEST_NAME) as new_folder:
            save_file(on_cpu, new_folder / WEIGHTS_NAME)
            manifest = seal_manifest(manifest, new_folder)
            (new_folder / MANIFEST_NAME).write_text(checkpoint.format_manifest(manifest))

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, cache: FeatureCache | None = None, device: Device = "cpu"
    ) -> Self:
        """Open a folder that `save_pretrained` has written, in evaluation mode.

        The frozen encoders are checked, but their weights are not loaded yet.

        Args:
            folder: the folder; the frozen encoders must be where they were, relative to it.
            cache: for the vectors of the frozen encoders. None: in memory.
            device: for the towers and the frozen encoders.

        Raises:
            ModelError: no dual.json, one of another format, tensors that are broken or differ from
                the saved ones, or a frozen encoder that is missing or has changed.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        encoders: dict[str, FrozenEncoder] = {}
        for role, description in manifest["encoders"].items():
            path = _locate_encoder(folder, description)
            saved = description["fingerprint"]
            encoders[role] = open_encoder(path, device=device, saved_fingerprint=saved)
            if encoders[role].fingerprint != saved:
                message = f"the {role} encoder '{path}' is another one now"
                fix = "Bring the original back or train again"
                raise ModelError(message, place=folder / MANIFEST_NAME, fix=fix)
        frozen = FrozenEncoders(encoders, cache=cache or FeatureCache(None))
        _check_sizes(folder, manifest)
        with translate_library_errors(folder / MANIFEST_NAME, subject="dim or widths"):
            model = cls(frozen, dim=manifest["dim"], encoder_dims=manifest["widths"])
        with translate_library_errors(folder, subject="model folder"):
            model.load_state_dict(load_file(folder / WEIGHTS_NAME))
        checkpoint.verify_tensors(manifest, model.own_tensors(), place=folder)
        model.score_statistics = checkpoint.read_score_statistics(manifest, folder / MANIFEST_NAME)
        return model.to(device).eval()


def build_tower(encoder_dim: int, dim: int) -> nn.Module:
    """Return a new tower: float[N, encoder_dim] unit vectors -> float[N, dim], not normalised."""
    return nn.Sequential(
        nn.LayerNorm(encoder_dim),
        nn.Linear(encoder_dim, HIDDEN_DIM),
        nn.GELU(),
        nn.Dropout(DROPOUT),
        nn.Linear(HIDDEN_DIM, dim),
    )


def find_damage(folder: Path) -> tuple[list[str], int]:
    """Return a line for each damaged file of a dual encoder, and the number of listed files.

    All of them are read; so is a frozen encoder that is another one than at training. Raises
    ModelError if the manifest is broken or an encoder is missing.
    """
    manifest = _read_manifest_file(folder)
    lines, num_files = describe_damage(folder, manifest, name=MANIFEST_NAME)
    for description in manifest["encoders"].values():
        encoder_folder = _locate_encoder(folder, description)
        saved = description["fingerprint"]
        hash_files(encoder_folder, hash_checkpoint(encoder_folder), reread=True)
        if fingerprint_encoder(encoder_folder, like=saved) != saved:
            lines.append(f"{encoder_folder}: is not the encoder of the training")
    return lines, num_files


def _check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ModelError if the manifest has a size that the tensors in the folder do not have."""
    _, tensors = read_safetensors_header(
        folder / WEIGHTS_NAME, error_class=ModelError, fix="Copy the folder again"
    )
    axes = {axis for tensor in tensors.values() for axis in tensor["shape"]}
    for name, size in {"dim": manifest["dim"], **manifest["widths"]}.items():
        if size not in axes:
            message = f"'{name}' is {size}, which no tensor in {WEIGHTS_NAME} has"
            raise ModelError(message, place=folder / MANIFEST_NAME, fix="Copy the folder again")


def _locate_encoder(folder: Path, description: Mapping[str, Any]) -> Path:
    """Return the folder of a frozen encoder by its description in the manifest of `folder`."""
    path = Path(os.path.normpath(folder / description["folder"]))
    return find_base(path, description.get("name"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of dual.json, after its folder was compared with it.

    Raises:
        ModelError: it is missing or broken, lacks a key, or has another format, or a file of the
            folder is not what was saved.
    """
    manifest = _read_manifest_file(folder)
    verify_manifest(folder, manifest, name=MANIFEST_NAME)
    return manifest


def _read_manifest_file(folder: Path) -> dict[str, Any]:
    """Return the content of dual.json; raise ModelError as `read_manifest` for the file alone."""
    path = folder / MANIFEST_NAME
    fix = "Copy the folder again, or train it with recipe: clip"
    manifest = read_json_object(path, {"format": int}, error_class=ModelError, fix=fix)
    if manifest["format"] != FORMAT_VERSION:
        message = "no dual encoder of this version here"
        raise ModelError(message, place=path, fix="Train it with recipe: clip")
    fields = {"encoders": dict, "widths": dict, "dim": int, "trained": dict}
    check_fields(manifest, fields, place=path, error_class=ModelError, fix=fix)
    roles = dict.fromkeys(ROLE_BY_MODALITY.values(), int)
    check_fields(manifest["widths"], roles, place=path, error_class=ModelError, fix=fix)
    for encoder in manifest["encoders"].values():
        names = {"folder": str, "fingerprint": str}
        check_fields(encoder, names, place=path, error_class=ModelError, fix=fix)
    checkpoint.read_score_statistics(manifest, path)
    return manifest


def open_frozen_encoder(
    folder: Path,
    *,
    cache: FeatureCache,
    trained_model: DuetModel | None = None,
    device: Device = "cpu",
) -> FrozenEncoder:
    """Return the encoder of any folder that can fill a role; its weights are not loaded yet.

    Args:
        folder: a dual encoder, or a checkpoint that `open_encoder` takes.
        cache: for the vectors of the encoders below a dual encoder.
        trained_model: see `open_encoder`.
        device: where the encoder computes.

    Raises:
        ModelError: no such folder.
    """
    folder = resolve_model(folder)
    if (folder / MANIFEST_NAME).is_file():
        return open_dual_as_encoder(folder, cache=cache, device=device)
    return open_encoder(folder, trained_model=trained_model, device=device)


def open_dual_as_encoder(
    folder: Path, *, cache: FeatureCache, device: Device = "cpu"
) -> FrozenEncoder:
    """Return a trained dual encoder as a frozen encoder of images and texts.

    Its weights are not loaded yet: `DualEncoder.from_pretrained` does so at the first use, and may
    raise ModelError then. Raises ModelError as `read_manifest` does.
    """
    manifest = read_manifest(folder)

    def load() -> dict[str, Any]:
        model = DualEncoder.from_pretrained(folder, cache=cache, device=device)
        note = log_first_truncation(f"encoder {folder}")

        def encode(parts: list[Part]) -> Tensor:
            return torch.from_numpy(model.encode(parts, on_truncate=note))

        return {"image": encode, "text": encode}

    def load_token_counter() -> TokenCounter:
        text_folder = _locate_encoder(folder, manifest["encoders"]["text"])
        counter = open_frozen_encoder(text_folder, cache=cache).token_counter
        assert counter is not None, "the encoder of texts has a tokenizer"
        return counter

    fingerprints = {role: e["fingerprint"] for role, e in manifest["encoders"].items()}
    fingerprint = _compute_fingerprint(fingerprints, manifest["trained"], manifest["dim"])
    return FrozenEncoder(folder, ("image", "text"), load, fingerprint, load_token_counter)


def open_embedder(folder: Path, *, check_golden: GoldenCheck = True) -> DuetModel | DualEncoder:
    """Return the model of a folder, which embeds and perhaps generates, on the default device.

    Args:
        folder: the folder, or the name of a model on a hub.
        check_golden: as of `DuetModel.from_pretrained`; a dual encoder has nothing to compare.

    Raises:
        ModelError: neither a dual encoder nor a model or checkpoint of `DuetModel`.
    """
    folder = resolve_model(folder)
    if (folder / MANIFEST_NAME).is_file():
        return DualEncoder.from_pretrained(folder, device=select_device())
    return DuetModel.from_pretrained(folder, check_golden=check_golden)


def write_score_statistics(folder: Path, statistics: ScoreStatistics) -> None:
    """Replace the statistics of scores in the folder of a `DuetModel` or a `DualEncoder`.

    Nothing else in the folder changes. Raises ModelError if it has neither manifest.
    """
    path = folder / MANIFEST_NAME
    if path.is_file():
        checkpoint.store_score_statistics(path, _read_manifest_file(folder), statistics)
    else:
        checkpoint.write_score_statistics(folder, statistics)


def _compute_fingerprint(
    encoder_fingerprints: Mapping[str, str], trained: Mapping[str, Any], dim: int
) -> str:
    """Return a hash, 16 hex digits, of everything that decides an embedding.

    Args:
        encoder_fingerprints: role -> fingerprint of its frozen encoder.
        trained: description of the trained tensors, with their hashes.
        dim: dimension of the common space.
    """
    content = {
        "encoders": {role: {"fingerprint": name} for role, name in encoder_fingerprints.items()},
        "trained": trained,
        "dim": dim,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
