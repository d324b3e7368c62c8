"""Frozen encoders that judge slices: the second, and last, door to checkpoints.

Three roles, each filled by a local folder:

    vision   two images      a vision model of transformers (DINOv2, EfficientNet, ...) or timm, or the tower of a checkpoint
    text     two texts       a sentence encoder (MiniLM, BGE, ...)
    cross    one of each     CLIP, SigLIP, or a dual encoder that `recipe: clip` trained

A vector is computed once and kept in the same cache as the vision features, under the hash of its content and of all that
decides it; weights are opened when the first vector is missing.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from vlduet.data import images
from vlduet.data.records import ImageRef, Part
from vlduet.data.sequences import Sequence, Slice
from vlduet.errors import ConfigError, DataError, ModelError
from vlduet.model.backbone import fingerprint_checkpoint, load_backbone
from vlduet.model.duet import DuetModel
from vlduet.model.families.registry import FAMILIES
from vlduet.model.feature_cache import FeatureCache
from vlduet.model.processing import (
    IMAGE_BACKEND,
    preprocess_image,
    read_config,
    translate_load_errors,
)

EncodeFunction = Callable[[list[Any]], Tensor]
"""Parts of one kind -> float[N, D], of any length."""

ROLE_MODALITIES: dict[str, tuple[str, ...]] = {
    "vision": ("image",),
    "text": ("text",),
    "cross": ("image", "text"),
}
"""What the encoder of a role must read."""
ENCODE_BATCH_SIZE = 32


def get_modality(part: Part) -> str:
    """image or text."""
    return "image" if isinstance(part, ImageRef) else "text"


def make_slice(part: Part) -> Slice:
    """A part with its content's exact name. Raises ImageError for an image that cannot be read."""
    content = (
        images.image_key(part)
        if isinstance(part, ImageRef)
        else hashlib.sha256(part.encode()).hexdigest()
    )
    return Slice(part, f"{get_modality(part)}:{content}")


@dataclass
class FrozenEncoder:
    """A frozen encoder that is opened when it is first needed."""

    folder: Path
    modalities: tuple[str, ...]
    """What it reads: image, text, or both."""
    load: Callable[[], Mapping[str, EncodeFunction]]
    """Loads the weights: kind -> function."""
    fingerprint: str
    """Names all that decides a vector."""

    @cached_property
    def encode_functions(self) -> Mapping[str, EncodeFunction]:
        """kind -> function."""
        return self.load()

    @cached_property
    def dim(self) -> int:
        """Numbers in a vector."""
        blank = ImageRef(
            data=images.encode_png(images.from_pixels(np.full((32, 32, 3), 128, np.uint8)))
        )
        part: Part = blank if self.modalities[0] == "image" else "."
        return len(self.encode_functions[self.modalities[0]]([part])[0])


class FrozenEncoders:
    """The frozen encoders of a run, by role.

    Args:
        encoders: role -> encoder; roles without one are never asked.
        cache: where vectors are kept.

    Raises:
        ConfigError: an encoder that cannot read what its role asks.
    """

    def __init__(self, encoders: Mapping[str, FrozenEncoder], *, cache: FeatureCache):
        self.by_role, self.cache = encoders, cache
        self._width: dict[str, int] = {}
        self._lock = (
            threading.Lock()
        )  # batches are laid out in a thread, and tokenizers do not share
        for role, encoder in encoders.items():
            if lost := sorted(set(ROLE_MODALITIES[role]) - set(encoder.modalities)):
                what = f"{encoder.folder} reads {' and '.join(encoder.modalities)}s, {role} needs {' and '.join(lost)}s too"
                raise ConfigError(
                    what, place=f"encoders.{role}", fix="See docs/train.md for what each role takes"
                )

    def attach_features(self, sequences: list[Sequence]) -> list[Sequence]:
        """The same sequences, with the features of all roles at the slices of their anchors.

        Raises:
            DataError: a slice for which an encoder gives NaN or nothing but zeros.
            ModelError: a vector of another width than the encoder's others.
        """
        slices = {
            one.content_key: one for s in sequences for anchor in s.anchors for one in anchor.slices
        }
        if not slices:
            return sequences
        seen = dict(zip(slices, self.encode_slices(list(slices.values())), strict=True))
        return [
            replace(
                s,
                anchors=tuple(
                    replace(a, slices=tuple(seen[one.content_key] for one in a.slices))
                    for a in s.anchors
                ),
            )
            for s in sequences
        ]

    def encode_slices(self, slices: list[Slice]) -> list[Slice]:
        """The same slices, with the features of all roles that compare their kind. Raises as `see` does."""
        with self._lock:
            found = {role: self.compute_vectors(role, slices) for role in self.by_role}
        return [
            replace(
                one,
                features={
                    role: vectors[one.content_key]
                    for role, vectors in found.items()
                    if one.content_key in vectors
                },
            )
            for one in slices
        ]

    def get_dim(self, role: str) -> int:
        """Numbers in a vector of this role's encoder."""
        return self._width.setdefault(role, self.by_role[role].dim)

    def compute_vectors(self, role: str, slices: list[Slice]) -> dict[str, Tensor]:
        """Slice.key -> float32[D], unit length, of the slices that the role compares. Raises as `see` does."""
        encoder = self.by_role[role]
        found: dict[str, Tensor] = {}
        for kind in ROLE_MODALITIES[role]:
            missing: dict[str, Slice] = {}
            for one in slices:
                if get_modality(one.part) == kind:
                    cached = self.cache.get(_key(one, encoder))
                    if cached is not None and is_usable_vector(cached):
                        found[one.content_key] = cached
                    else:
                        missing[one.content_key] = one
            todo = list(missing.values())
            for begin in range(0, len(todo), ENCODE_BATCH_SIZE):
                chunk = todo[begin : begin + ENCODE_BATCH_SIZE]
                for one, vector in zip(
                    chunk, encoder.encode_functions[kind]([one.part for one in chunk]), strict=True
                ):
                    found[one.content_key] = self._keep(role, one, vector.detach().cpu().float())
        for vector in found.values():
            if len(vector) != self._width.setdefault(role, len(vector)):
                what = f"a cached vector has {len(vector)} numbers, the others of this encoder {self._width[role]}"
                raise ModelError(
                    f"{role}: {what}", place=encoder.folder, fix="Delete the folder data.cache"
                )
        return found

    def _keep(self, role: str, one: Slice, vector: Tensor) -> Tensor:
        encoder = self.by_role[role]
        if not is_usable_vector(vector):
            what = "NaN" if bool(vector.isnan().any()) else "infinite numbers or zeros alone"
            name = one.part.name if isinstance(one.part, ImageRef) else repr(one.part[:60])
            fix = f"Leave it out, or choose another encoders.{role}"
            raise DataError(f"the {role} encoder {encoder.folder} gives {what} for {name}", fix=fix)
        vector = F.normalize(vector, dim=0)
        self.cache.put(_key(one, encoder), vector)
        return vector


def is_usable_vector(vector: Tensor) -> bool:
    """One direction in space: finite, and not zero."""
    return vector.dim() == 1 and bool(vector.isfinite().all()) and float(vector.norm()) > 1e-6


def _key(one: Slice, encoder: FrozenEncoder) -> str:
    return hashlib.sha256(f"{one.content_key}:{encoder.fingerprint}".encode()).hexdigest()


# ------------------------------------------------------------------ opening a folder


def open_encoder(
    folder: Path, *, trained_model: DuetModel | None = None, device: str | torch.device = "cpu"
) -> FrozenEncoder:
    """A local folder -> its encoder, told by its config.json; weights are not read yet.

    Args:
        folder: see the top of this file.
        own: the model that is trained: where `folder` is its base, its frozen tower is used, and not loaded twice.
        device: where the encoder computes.

    Raises:
        ModelError: no checkpoint there, or one that wants to run its own code.
    """
    config = read_config(folder)
    kinds: tuple[str, ...]
    if config.get("model_type") in FAMILIES:
        kinds, loader = ("image",), partial(_tower, folder, trained_model, device)
    elif {"vision_config", "text_config"} <= config.keys():
        kinds, loader = ("image", "text"), partial(_contrastive, folder, device)
    elif "architecture" in config and config.get("model_type", "timm_wrapper") == "timm_wrapper":
        _readable_timm(folder, config)
        kinds, loader = ("image",), partial(_vision, folder, device)
    elif (folder / "preprocessor_config.json").is_file():
        kinds, loader = ("image",), partial(_vision, folder, device)
    else:
        kinds, loader = ("text",), partial(_sentences, folder, device)
    return FrozenEncoder(folder, kinds, loader, fingerprint_encoder(folder))


def fingerprint_encoder(folder: Path) -> str:
    """Names weights, processors and pooling of a checkpoint folder."""
    digest = hashlib.sha256(f"{fingerprint_checkpoint(folder)}:{IMAGE_BACKEND}".encode())
    names = (
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "modules.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
    )
    for name in names:
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()[:16]


def _tower(
    folder: Path, own: DuetModel | None, device: str | torch.device
) -> Mapping[str, EncodeFunction]:
    """The mean of the vision tower's features of a VLM."""
    if own is not None and fingerprint_checkpoint(own.backbone.folder) == fingerprint_checkpoint(
        folder
    ):
        backbone, prepare, look = (
            own.backbone,
            own.prepare_image,
            own.vision_features,
        )  # and its cache
    else:
        backbone = load_backbone(folder, device=device)
        prepare, look = backbone.prepare_image, backbone.compute_vision_features

    def encode(refs: list[ImageRef]) -> Tensor:
        prepared = [prepare(ref) for ref in refs]
        tokens = look(prepared)[:, : backbone.vision_width].split(
            [image.num_features for image in prepared]
        )
        return torch.stack([one.mean(0) for one in tokens])

    return {"image": encode}


def _readable_timm(folder: Path, config: Mapping[str, Any]) -> None:
    """transformers opens timm's folders by timm, which it does not bring."""
    if missing := [name for name in ("timm", "torchvision") if find_spec(name) is None]:
        fix = f"pip install {' '.join(missing)}, with the torchvision that your torch needs"
        raise ModelError(
            f"a timm checkpoint, and {' and '.join(missing)} not installed", place=folder, fix=fix
        )
    if not re.fullmatch(
        r"\w+(\.\w+)?", str(config["architecture"])
    ):  # timm downloads what begins with hf-hub:
        raise ModelError(
            f"'{config['architecture']}' names no architecture", place=folder / "config.json"
        )


def _model(folder: Path, device: str | torch.device) -> Any:
    with translate_load_errors(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if config.model_type == "timm_wrapper" and config.model_args:
            config.model_args.pop(
                "num_classes", None
            )  # timm writes it there, and transformers' wrapper says it itself
        model, report = AutoModel.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            dtype=torch.float32,  # as it was saved, half precision would not even run everywhere
        )
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelError(
            f"{len(report['missing_keys'])} tensors are missing, such as {some}", place=folder
        )
    return model.requires_grad_(False).to(device).eval()


def _processor(folder: Path) -> Any:
    with translate_load_errors(folder):
        return AutoImageProcessor.from_pretrained(
            folder, backend=IMAGE_BACKEND, local_files_only=True, trust_remote_code=False
        )


def _pixels(processor: Any, refs: list[ImageRef], device: str | torch.device) -> dict[str, Tensor]:
    rows = [preprocess_image(processor, ref) for ref in refs]
    return {name: torch.cat([row[name] for row in rows]).to(device) for name in rows[0]}


def _vision(folder: Path, device: str | torch.device) -> Mapping[str, EncodeFunction]:
    """The pooled output of a vision model: DINOv2's class token, a convolutional network's mean over the map."""
    model, processor = _model(folder, device), _processor(folder)

    @torch.no_grad()
    def encode(refs: list[ImageRef]) -> Tensor:
        pooled: Tensor | None = getattr(
            model(**_pixels(processor, refs, device)), "pooler_output", None
        )
        if pooled is None:
            fix = "Use one that pools, such as a DINOv2, or a VLM, whose tower is used"
            raise ModelError(
                f"'{model.config.model_type}' gives no vector of an image", place=folder, fix=fix
            )
        return pooled.flatten(1)

    return {"image": encode}


def _sentences(folder: Path, device: str | torch.device) -> Mapping[str, EncodeFunction]:
    return {"text": load_text_encoder(folder, device=device)}


def load_text_encoder(
    folder: Path, *, device: str | torch.device = "cpu"
) -> Callable[[list[str]], Tensor]:
    """A local sentence encoder -> function of texts giving float[N, D] unit vectors.

    Pooled as the folder says in 1_Pooling/config.json: by the first token (BGE), or else the mean (all-MiniLM-L6-v2). As
    long as sentence_bert_config.json says, or else the tokenizer; where neither does, 256 tokens.

    Raises ModelError for a folder whose modules.json asks for more than a transformer, its pooling and unit length.
    """
    read_config(folder)
    longest = _longest_text(folder)  # before anything is loaded
    with translate_load_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        model = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
        )
    model.to(device).eval()
    longest = longest or (
        tokenizer.model_max_length if tokenizer.model_max_length < UNLIMITED_TOKENS else 256
    )
    first = _pooling(folder) == "cls"

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        batch = tokenizer(
            texts, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(device)
        hidden = model(**batch).last_hidden_state  # [N, T, D]
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        pooled = hidden[:, 0] if first else (hidden * mask).sum(1) / mask.sum(1)
        return F.normalize(pooled, dim=1)

    return encode


UNLIMITED_TOKENS = 1 << 20
"""Tokens: tokenizers that know no limit have a number with thirty digits."""


def _longest_text(folder: Path) -> int | None:
    """Tokens that a sentence encoder reads, if it says so. Raises ModelError for modules that would change its vectors."""
    told = {name: folder / name for name in ("modules.json", "sentence_bert_config.json")}
    modules, config = (
        json.loads(path.read_text()) if path.is_file() else {} for path in told.values()
    )
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if others := sorted({*kinds} - {"Transformer", "Pooling", "Normalize"}):
        what = f"it asks for {', '.join(others)}, which is not read"
        raise ModelError(
            what,
            place=told["modules.json"],
            fix="Use an encoder of a transformer and its pooling alone",
        )
    longest: int | None = config.get("max_seq_length")
    return longest


def _pooling(folder: Path) -> str:
    """cls or mean. Raises ModelError for another one."""
    path = folder / "1_Pooling" / "config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    chosen = [name for name, on in config.items() if name.startswith("pooling_mode_") and on]
    names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    pooling = config.get(
        "pooling_mode", names.get(chosen[0], chosen[0]) if len(chosen) == 1 else "mean"
    )
    if pooling not in names.values() or len(chosen) > 1:
        raise ModelError(
            f"pooling {chosen or pooling}",
            place=path,
            fix="Use an encoder that pools by cls or mean",
        )
    return str(pooling)


def _contrastive(folder: Path, device: str | torch.device) -> Mapping[str, EncodeFunction]:
    """CLIP, SigLIP and their like: one space for both kinds."""
    model, processor = _model(folder, device), _processor(folder)
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        what = f"'{model.config.model_type}' has no space that images and texts share"
        raise ModelError(what, place=folder, fix="Use CLIP, SigLIP or their like")
    with translate_load_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    longest = model.config.text_config.max_position_embeddings
    # SigLIP was trained on padded texts and reads the last position.
    padding = "max_length" if model.config.model_type.startswith("siglip") else True

    @torch.no_grad()
    def see(refs: list[ImageRef]) -> Tensor:
        return _pooled(model.get_image_features(**_pixels(processor, refs, device)))

    @torch.no_grad()
    def read(texts: list[str]) -> Tensor:
        batch = tokenizer(
            texts, padding=padding, truncation=True, max_length=longest, return_tensors="pt"
        ).to(device)
        return _pooled(model.get_text_features(**batch))

    return {"image": see, "text": read}


def _pooled(out: Any) -> Tensor:
    found: Tensor = out if isinstance(out, Tensor) else out.pooler_output
    return found
