"""Frozen encoders of slices: any local checkpoint in one of three roles.

    vision   compares two images: a vision model of transformers (DINOv2, EfficientNet, ...) or
             timm, or the vision tower of a vision-language model
    text     compares two texts: a sentence encoder (MiniLM, BGE, ...)
    cross    compares an image and a text: CLIP, SigLIP, or a dual encoder of `recipe: clip`

A vector is computed once and stored in the cache of the vision features, under a hash of the
content and of everything that decides the vector. The weights are loaded when a vector is missing.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from vlduet.data import images
from vlduet.data.records import ImageRef, Part
from vlduet.data.sequences import Anchor, Sequence, Slice
from vlduet.errors import ConfigError, DataError, ModelError
from vlduet.model.feature_cache import FeatureCache

EncodeFunction = Callable[[list[Any]], Tensor]
"""Parts of one modality -> float[N, D], of any norm."""


@dataclass(frozen=True, slots=True)
class TokenCounter:
    """Number of tokens that a text encoder reads of a text, and the limit at which it cuts it."""

    count: Callable[[list[str]], list[int]]
    """At least one text -> number of tokens of each, special ones included."""
    max_tokens: int
    """Limit in tokens."""


ROLE_MODALITIES: dict[str, tuple[str, ...]] = {
    "vision": ("image",),
    "text": ("text",),
    "cross": ("image", "text"),
}
"""Role -> modalities that its encoder must encode."""

ENCODE_BATCH_SIZE = 32
"""Number of parts that an encoder encodes at once."""


def get_modality(part: Part) -> str:
    """Return `image` for an image reference and `text` for a string."""
    return "image" if isinstance(part, ImageRef) else "text"


def make_slice(part: Part) -> Slice:
    """Return a part with a hash of its exact content as key, without features.

    Raises:
        ImageError: the image cannot be read.
    """
    if isinstance(part, ImageRef):
        return Slice(part, f"image:{images.image_key(part)}")
    return Slice(part, f"text:{hashlib.sha256(part.encode()).hexdigest()}")


@dataclass
class FrozenEncoder:
    """Frozen encoder whose weights are loaded when they are first needed."""

    folder: Path
    modalities: tuple[str, ...]
    """Modalities that it encodes: `image`, `text`, or both in one space."""
    load: Callable[[], Mapping[str, EncodeFunction]]
    """Loads the weights and returns modality -> encoding function. Raises ModelError."""
    fingerprint: str
    """Hash of everything that decides a vector."""
    load_token_counter: Callable[[], TokenCounter] | None = None
    """Loads the tokenizer and returns its counter; None for encoders without texts."""

    @cached_property
    def token_counter(self) -> TokenCounter | None:
        """Counter of the tokens of texts; its tokenizer is loaded at the first access."""
        return self.load_token_counter() if self.load_token_counter else None

    @cached_property
    def encode_functions(self) -> Mapping[str, EncodeFunction]:
        """Modality -> encoding function; loads the weights at the first access."""
        return self.load()

    @cached_property
    def dim(self) -> int:
        """Number of elements of a vector, measured once by encoding a grey image, else a dot.

        Loads the weights. Raises ModelError if that fails.
        """
        part: Part = "."
        if self.modalities[0] == "image":
            pixels = np.full((32, 32, 3), 128, np.uint8)
            part = ImageRef(data=images.encode_png(images.from_pixels(pixels)))
        return len(self.encode_functions[self.modalities[0]]([part])[0])


class FrozenEncoders:
    """Frozen encoders of a run, by role, and the cache of their vectors."""

    def __init__(self, encoders: Mapping[str, FrozenEncoder], *, cache: FeatureCache):
        """Take encoders, whose weights stay unloaded.

        Args:
            encoders: role -> encoder; not every role needs one.
            cache: where vectors are stored.

        Raises:
            ConfigError: an encoder lacks a modality of its role.
        """
        self.by_role = encoders
        self.cache = cache
        self._dims: dict[str, int] = {}
        # A thread lays out the next batch meanwhile, and tokenizers are not thread-safe.
        self._lock = threading.Lock()
        for role, encoder in encoders.items():
            lacking = sorted(set(ROLE_MODALITIES[role]) - set(encoder.modalities))
            if lacking:
                reads = " and ".join(encoder.modalities)
                needs = " and ".join(lacking)
                message = f"{encoder.folder} reads {reads}s, {role} needs {needs}s too"
                fix = "See docs/train.md for what each role takes"
                raise ConfigError(message, place=f"encoders.{role}", fix=fix)

    def attach_features(self, sequences: list[Sequence]) -> list[Sequence]:
        """Return copies of the sequences with features of all roles at the slices of their anchors.

        Equal slices are encoded once, and new vectors are stored in the cache. Without slices, the
        list itself is returned.

        Raises:
            DataError: an encoder returns NaN, infinity or only zeros for a slice.
            ImageError: an image without a cached vector cannot be decoded.
            ModelError: an encoder cannot be loaded, or a cached vector has another number of
                elements than the encoder's others.
        """
        slices: dict[str, Slice] = {}
        for sequence in sequences:
            for anchor in sequence.anchors:
                slices.update((part.content_key, part) for part in anchor.slices)
        if not slices:
            return sequences
        encoded = dict(zip(slices, self.encode_slices(list(slices.values())), strict=True))

        def attach(anchor: Anchor) -> Anchor:
            return replace(anchor, slices=tuple(encoded[s.content_key] for s in anchor.slices))

        return [replace(s, anchors=tuple(map(attach, s.anchors))) for s in sequences]

    def encode_slices(self, slices: list[Slice]) -> list[Slice]:
        """Return copies of the slices with the features of all roles that encode their modality.

        The vectors are those of `compute_vectors`, which stores new ones in the cache. Raises as
        `attach_features` does.
        """
        with self._lock:
            vectors_of_role = {role: self.compute_vectors(role, slices) for role in self.by_role}
        encoded = []
        for part in slices:
            features = {}
            for role, vectors in vectors_of_role.items():
                if part.content_key in vectors:
                    features[role] = vectors[part.content_key]
            encoded.append(replace(part, features=features))
        return encoded

    def get_dim(self, role: str) -> int:
        """Return the number of elements of a vector of this role's encoder.

        Encodes something to measure it, unless a vector of the role has been seen.
        """
        return self._dims.setdefault(role, self.by_role[role].dim)

    def compute_vectors(self, role: str, slices: list[Slice]) -> dict[str, Tensor]:
        """Return content key -> vector, float32[D] of unit length, from the cache where possible.

        Only slices of the role's modalities get one. The weights are loaded only if a vector is not
        in the cache; new ones are stored there. Raises as `attach_features` does.
        """
        encoder = self.by_role[role]
        vectors: dict[str, Tensor] = {}
        for modality in ROLE_MODALITIES[role]:
            missing: dict[str, Slice] = {}
            for part in slices:
                if get_modality(part.part) != modality:
                    continue
                cached = self.cache.get(_cache_key(part, encoder))
                if cached is not None and is_usable_vector(cached):
                    vectors[part.content_key] = cached
                else:
                    missing[part.content_key] = part
            remaining = list(missing.values())
            for begin in range(0, len(remaining), ENCODE_BATCH_SIZE):
                batch = remaining[begin : begin + ENCODE_BATCH_SIZE]
                encoded = encoder.encode_functions[modality]([part.part for part in batch])
                for part, vector in zip(batch, encoded, strict=True):
                    vector = vector.detach().cpu().float()
                    vectors[part.content_key] = self._normalize_and_store(role, part, vector)
        for vector in vectors.values():
            dim = self._dims.setdefault(role, len(vector))
            if len(vector) != dim:
                expected = f"the others of this encoder {dim}"
                message = f"{role}: a cached vector has {len(vector)} numbers, {expected}"
                fix = "Delete the folder data.cache"
                raise ModelError(message, place=encoder.folder, fix=fix)
        return vectors

    def _normalize_and_store(self, role: str, part: Slice, vector: Tensor) -> Tensor:
        """Return a new vector of unit length, and store that in the cache.

        Raises:
            DataError: `vector` is not finite, or zero; the message names encoder and part.
        """
        encoder = self.by_role[role]
        if not is_usable_vector(vector):
            problem = "NaN" if bool(vector.isnan().any()) else "infinite numbers or zeros alone"
            name = part.part.name if isinstance(part.part, ImageRef) else repr(part.part[:60])
            message = f"the {role} encoder {encoder.folder} gives {problem} for {name}"
            raise DataError(message, fix=f"Leave it out, or choose another encoders.{role}")
        vector = F.normalize(vector, dim=0)
        self.cache.put(_cache_key(part, encoder), vector)
        return vector


def is_usable_vector(vector: Tensor) -> bool:
    """Return whether a tensor is one vector with a direction: finite, and not zero."""
    return vector.dim() == 1 and bool(vector.isfinite().all()) and float(vector.norm()) > 1e-6


def _cache_key(part: Slice, encoder: FrozenEncoder) -> str:
    """Return the key in the cache of a slice's vector by an encoder."""
    return hashlib.sha256(f"{part.content_key}:{encoder.fingerprint}".encode()).hexdigest()
