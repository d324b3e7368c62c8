"""Frozen encoders without weights.

A vector is drawn from a hash of its content, so that it is the same in every process.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from vlduet.data.records import Part
from vlduet.encoders.frozen import ROLE_MODALITIES, FrozenEncoder, FrozenEncoders, make_slice
from vlduet.model.feature_cache import FeatureCache

ENCODER_DIMS = {"vision": 5, "text": 7, "cross": 4}
"""Role -> number of elements of its vectors."""


def draw_vector(part: Part, role: str) -> torch.Tensor:
    """Return the vector, not normalised, that the encoder of a role gives to a part."""
    digest = hashlib.sha256(f"{make_slice(part).content_key}:{role}".encode()).hexdigest()
    generator = torch.Generator().manual_seed(int(digest[:8], 16))
    return torch.randn(ENCODER_DIMS[role], generator=generator) + 0.4


def build_random_encoders(*roles: str, cache: Path | None = None) -> FrozenEncoders:
    """Return encoders of the roles, by default of all, with a cache in a folder or in memory."""

    def build_encoder(role: str) -> FrozenEncoder:
        def encode(parts: list[Part]) -> torch.Tensor:
            return torch.stack([draw_vector(part, role) for part in parts])

        modalities = ROLE_MODALITIES[role]
        return FrozenEncoder(
            Path(role), modalities, lambda: dict.fromkeys(modalities, encode), role
        )

    by_role = {role: build_encoder(role) for role in roles or ROLE_MODALITIES}
    return FrozenEncoders(by_role, cache=FeatureCache(cache))
