"""A dual encoder in the manner of CLIP: two small towers that bring the vectors of frozen encoders into one space.

    image -> vision encoder (frozen) -> tower -> unit vector
    text  -> text encoder (frozen)   -> tower -> unit vector

Trained from scratch by `recipe: clip`; what `encoders.cross` can be where there is no CLIP. Its folder:

    dual.json           the frozen encoders by relative path and fingerprint, widths, hashes, what made it
    dual.safetensors    towers and temperature
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlduet import __version__
from vlduet.data.batches import Batch, collate
from vlduet.data.records import Part, Parts, as_parts
from vlduet.data.sequences import Sequence, Slice
from vlduet.encoders.frozen import (
    FrozenEncoder,
    FrozenEncoders,
    get_modality,
    make_slice,
    open_encoder,
)
from vlduet.errors import DataError, ModelError
from vlduet.files import replace_folder_atomically
from vlduet.model import checkpoint
from vlduet.model.backbone import select_device
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FeatureCache
from vlduet.model.pooling import Readout
from vlduet.model.processing import IMAGE_BACKEND

MANIFEST_NAME, WEIGHTS_NAME = "dual.json", "dual.safetensors"
FORMAT_VERSION = 1
HIDDEN_DIM, DROPOUT = 512, 0.3
"""Small, and much dropout: a few thousand pairs are all that a towers' space has to be learned from."""
INITIAL_TEMPERATURE = 0.07
ROLE_BY_MODALITY = {"image": "vision", "text": "text"}
"""Which frozen encoder reads what."""


class DualEncoder(nn.Module):
    """Two towers over frozen encoders; for the training loop it is a model like `DuetModel`.

    Args:
        encoders: with the roles vision and text.
        dim: width of the common space.
        widths: of the encoders' vectors by role; default: asked of the encoders.
    """

    renderer: Any = None
    """It reads no tokens."""

    def __init__(
        self, encoders: FrozenEncoders, *, dim: int, encoder_dims: Mapping[str, int] | None = None
    ):
        super().__init__()
        self.encoders, self.dim = encoders, dim
        self.encoder_dims = dict(
            encoder_dims or {role: encoders.get_dim(role) for role in ROLE_BY_MODALITY.values()}
        )
        self.towers = nn.ModuleDict(
            {role: build_tower(width, dim) for role, width in sorted(self.encoder_dims.items())}
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / INITIAL_TEMPERATURE)))

    def forward(self, batch: Batch) -> Readout:
        """Embeddings of the anchors' slices; there is nothing to generate."""
        vectors = self.project_slices([anchor.slices[-1] for anchor in batch.anchors])
        anchors = tuple(replace(anchor, slices=()) for anchor in batch.anchors)
        return Readout(vectors, anchors, vectors.new_zeros(0))

    def project_slices(self, slices: Many[Slice]) -> Tensor:
        """Slices that the frozen encoders have seen -> float[N, dim], unit length."""
        found = self.logit_scale.new_zeros(len(slices), self.dim)
        for kind, role in ROLE_BY_MODALITY.items():
            rows = [i for i, one in enumerate(slices) if get_modality(one.part) == kind]
            if rows:
                read = torch.stack([slices[i].features[role] for i in rows]).to(found)
                found[rows] = nn.functional.normalize(self.towers[role](read), dim=1)
        return found

    def collate(self, sequences: list[Sequence], *, pack_to: int | None = None) -> Batch:
        """A batch; its tokens mean nothing."""
        return collate(sequences, pad_token_id=0, pack_to=pack_to).to(self.logit_scale.device)

    @torch.no_grad()
    def encode(self, items: Many[Part | Parts]) -> np.ndarray:
        """Images and texts -> float32[N, dim], unit length. Raises DataError for a mixture: it reads one slice."""
        rows = [as_parts(item) for item in items]
        if any(len(row) > 1 for row in rows):
            raise DataError(
                "a dual encoder reads one image or one text", fix="Use a model of another recipe"
            )
        slices = self.encoders.encode_slices([make_slice(row[0]) for row in rows])
        was = self.training
        found: np.ndarray = self.eval().project_slices(slices).float().cpu().numpy()
        self.train(was)
        return found

    encode_query = encode_document = encode

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides a vector."""
        frozen = {role: one.fingerprint for role, one in self.encoders.by_role.items()}
        return _compute_fingerprint(
            frozen, checkpoint.describe_tensors(self.own_tensors()), self.dim
        )

    @property
    def image_backend(self) -> str:
        """The library that decodes and resizes images."""
        return IMAGE_BACKEND

    def own_tensors(self) -> dict[str, Tensor]:
        """Everything trained."""
        return dict(self.named_parameters())

    def adapter_tensors(self) -> dict[str, Tensor]:
        """None: there is no base to adapt."""
        return {}

    def save_pretrained(
        self, folder: Path | str, *, provenance: Mapping[str, Any] | None = None
    ) -> None:
        """Write the folder, whole or not at all."""
        tensors = self.own_tensors()
        final = Path(folder).resolve()
        manifest = {
            "format": FORMAT_VERSION,
            "vlduet": __version__,
            "encoders": {
                role: {
                    "folder": os.path.relpath(one.folder.resolve(), final),
                    "fingerprint": one.fingerprint,
                }
                for role, one in self.encoders.by_role.items()
            },
            "widths": self.encoder_dims,
            "dim": self.dim,
            "trained": checkpoint.describe_tensors(tensors),
            "provenance": dict(provenance or {}),
        }
        with replace_folder_atomically(Path(folder), marker=MANIFEST_NAME) as inside:
            save_file(
                {n: t.detach().cpu().contiguous() for n, t in tensors.items()},
                inside / WEIGHTS_NAME,
            )
            (inside / MANIFEST_NAME).write_text(
                json.dumps(manifest, indent=1, sort_keys=True) + "\n"
            )

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, cache: FeatureCache | None = None, device: Any = "cpu"
    ) -> Self:
        """Open a folder.

        Raises:
            ModelError: another format, tensors that are not what was saved, or frozen encoders that are gone or changed.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        found = {}
        for role, told in manifest["encoders"].items():
            found[role] = open_encoder(
                Path(os.path.normpath(folder / told["folder"])), device=device
            )
            if found[role].fingerprint != told["fingerprint"]:
                what = f"the {role} encoder '{found[role].folder}' is another one now"
                raise ModelError(
                    what, place=folder / MANIFEST_NAME, fix="Bring the original back or train again"
                )
        encoders = FrozenEncoders(found, cache=cache or FeatureCache(None))
        model = cls(encoders, dim=manifest["dim"], encoder_dims=manifest["widths"])
        try:
            model.load_state_dict(load_file(folder / WEIGHTS_NAME))
        except (OSError, SafetensorError, RuntimeError) as error:
            what = f"broken model folder ({str(error).splitlines()[0]})"
            raise ModelError(what, place=folder, fix="Copy the whole folder again") from None
        checkpoint.verify_tensors(manifest, model.own_tensors(), place=folder)
        return model.to(device).eval()


def build_tower(width: int, dim: int) -> nn.Module:
    """float[N, width] unit vectors -> float[N, dim]."""
    hidden = (nn.Linear(width, HIDDEN_DIM), nn.GELU(), nn.Dropout(DROPOUT))
    return nn.Sequential(nn.LayerNorm(width), *hidden, nn.Linear(HIDDEN_DIM, dim))


def read_manifest(folder: Path) -> dict[str, Any]:
    """dual.json. Raises ModelError."""
    path = folder / MANIFEST_NAME
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        assert manifest["format"] == FORMAT_VERSION and manifest.keys() >= {
            "encoders",
            "widths",
            "dim",
            "trained",
        }
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise ModelError(
            "no dual encoder of this version here", place=path, fix="Train it with recipe: clip"
        ) from None
    return manifest


def open_frozen_encoder(
    folder: Path,
    *,
    cache: FeatureCache,
    trained_model: DuetModel | None = None,
    device: Any = "cpu",
) -> FrozenEncoder:
    """Any folder that fills a role: a dual encoder of ours, or what `open_encoder` takes. Raises ModelError as it does."""
    if (folder / MANIFEST_NAME).is_file():
        return open_dual_as_encoder(folder, cache=cache, device=device)
    return open_encoder(folder, trained_model=trained_model, device=device)


def open_dual_as_encoder(
    folder: Path, *, cache: FeatureCache, device: Any = "cpu"
) -> FrozenEncoder:
    """A trained dual encoder as the frozen encoder of a role."""
    manifest = read_manifest(folder)
    frozen = {role: told["fingerprint"] for role, told in manifest["encoders"].items()}

    def open_it() -> dict[str, Any]:
        model = DualEncoder.from_pretrained(folder, cache=cache, device=device)

        def encode(parts: list[Part]) -> Tensor:
            return torch.from_numpy(model.encode(parts))

        return {"image": encode, "text": encode}

    return FrozenEncoder(
        folder,
        ("image", "text"),
        open_it,
        _compute_fingerprint(frozen, manifest["trained"], manifest["dim"]),
    )


def open_embedder(folder: Path) -> DuetModel | DualEncoder:
    """The model of a folder that embeds, whether it generates or not. Raises ModelError as their `from_pretrained` do."""
    if (folder / MANIFEST_NAME).is_file():
        return DualEncoder.from_pretrained(folder, device=select_device())
    return DuetModel.from_pretrained(folder)


def _compute_fingerprint(frozen: Mapping[str, str], trained: Mapping[str, Any], dim: int) -> str:
    """Fingerprint of all that decides a vector: the frozen encoders' own, by role, and what was trained."""
    decides = {
        "encoders": {role: {"fingerprint": name} for role, name in frozen.items()},
        "trained": trained,
        "dim": dim,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
