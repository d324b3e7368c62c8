"""Frozen encoders without weights: a vector is drawn from a content's key, so it is the same in every process."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from vlduet.model.encoders import ROLES, Encoder, Encoders, slice_of
from vlduet.model.features import FeatureCache

WIDTHS = {"vision": 5, "text": 7, "cross": 4}


def vector(part: object, role: str) -> torch.Tensor:
    seed = int(hashlib.sha256(f"{slice_of(part).key}:{role}".encode()).hexdigest()[:8], 16)  # type: ignore[arg-type]
    return torch.randn(WIDTHS[role], generator=torch.Generator().manual_seed(seed)) + 0.4


def judges(*roles: str, cache: Path | None = None) -> Encoders:
    def make(role: str) -> Encoder:
        def encode(parts: list[object]) -> torch.Tensor:
            return torch.stack([vector(part, role) for part in parts])

        return Encoder(Path(role), ROLES[role], lambda: dict.fromkeys(ROLES[role], encode), role)

    return Encoders({role: make(role) for role in roles or ROLES}, cache=FeatureCache(cache))
