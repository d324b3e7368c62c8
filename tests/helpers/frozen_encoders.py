"""Frozen encoders without weights: a vector is drawn from a content's key, so it is the same in every process."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from vlduet.encoders.frozen import ROLE_MODALITIES, FrozenEncoder, FrozenEncoders, make_slice
from vlduet.model.feature_cache import FeatureCache

ENCODER_DIMS = {"vision": 5, "text": 7, "cross": 4}


def draw_vector(part: object, role: str) -> torch.Tensor:
    seed = int(
        hashlib.sha256(f"{make_slice(part).content_key}:{role}".encode()).hexdigest()[:8], 16
    )  # type: ignore[arg-type]
    return torch.randn(ENCODER_DIMS[role], generator=torch.Generator().manual_seed(seed)) + 0.4


def build_random_encoders(*roles: str, cache: Path | None = None) -> FrozenEncoders:
    def make(role: str) -> FrozenEncoder:
        def encode(parts: list[object]) -> torch.Tensor:
            return torch.stack([draw_vector(part, role) for part in parts])

        return FrozenEncoder(
            Path(role),
            ROLE_MODALITIES[role],
            lambda: dict.fromkeys(ROLE_MODALITIES[role], encode),
            role,
        )

    return FrozenEncoders(
        {role: make(role) for role in roles or ROLE_MODALITIES}, cache=FeatureCache(cache)
    )
