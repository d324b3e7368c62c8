"""Local checkpoints opened as frozen encoders: `open_encoder` tells their kind by config.json."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from vlduet.data.records import ImageRef
from vlduet.encoders.frozen import EncodeFunction, FrozenEncoder, TokenCounter
from vlduet.errors import ModelError
from vlduet.library_errors import COPY_AGAIN
from vlduet.model.backbone import load_backbone
from vlduet.model.duet import DuetModel
from vlduet.model.families.registry import FAMILIES
from vlduet.model.fingerprints import fingerprint_checkpoint
from vlduet.model.folder_checks import check_checkpoint
from vlduet.model.processing import (
    IMAGE_BACKEND,
    preprocess_image,
    read_config,
    translate_load_errors,
)
from vlduet.structured_files import FieldTypes, read_json, read_json_object

Device = str | torch.device

UNLIMITED_TOKENS = 1 << 20
"""Number of tokens from which a tokenizer's limit means none: such tokenizers state a number with
thirty digits."""

DEFAULT_MAX_TOKENS = 256
"""Number of tokens of a text if neither the sentence encoder nor its tokenizer has a limit."""

LOCAL_ONLY = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of every `from_pretrained`: no download, and no code from the folder."""

FINGERPRINTED_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
"""Files beside the weights that decide a vector."""


def open_encoder(
    folder: Path,
    *,
    trained_model: DuetModel | None = None,
    device: Device = "cpu",
    saved_fingerprint: str | None = None,
) -> FrozenEncoder:
    """Return the encoder of a local checkpoint; its files are hashed, its weights not loaded yet.

    Args:
        folder: by its config.json a VLM (encodes images), CLIP or similar (images and texts), or a
            timm model (images). Any other with preprocessor_config.json is a vision model (images),
            and without it a sentence encoder (texts).
        trained_model: if `folder` is the checkpoint that it started from, its frozen vision tower
            is used instead of a second copy, and images are preprocessed with its limits.
        device: where the encoder computes.
        saved_fingerprint: fingerprint to compare with, see `fingerprint_checkpoint`.

    Raises:
        ModelError: no checkpoint, one that needs its own code, weights that are no safetensors, or
            a timm checkpoint without timm. The encoder's `load` raises ModelError for what only
            loading shows.
    """
    config = read_config(folder)
    check_checkpoint(folder, config)
    fingerprint = fingerprint_encoder(folder, like=saved_fingerprint)
    modalities: tuple[str, ...] = ("image",)
    load: Callable[[], Mapping[str, EncodeFunction]]
    count_tokens: Callable[[], TokenCounter] | None = None
    if config.get("model_type") in FAMILIES:
        shared_model = trained_model if _has_tower_of(trained_model, folder) else None
        load = partial(_load_vision_tower, folder, shared_model, device)
        if shared_model is not None and shared_model.backbone.image_settings:
            settings = json.dumps(shared_model.backbone.image_settings, sort_keys=True)
            digest = hashlib.sha256(f"{fingerprint}:{settings}".encode()).hexdigest()
            fingerprint = digest[: len(fingerprint)]
    elif {"vision_config", "text_config"} <= config.keys():
        modalities = ("image", "text")
        load = partial(_load_cross_encoder, folder, device)
        count_tokens = partial(_load_token_counter, folder, _read_text_positions(config))
    elif "architecture" in config and config.get("model_type", "timm_wrapper") == "timm_wrapper":
        _check_timm(folder, config)
        load = partial(_load_vision_model, folder, device)
    elif (folder / "preprocessor_config.json").is_file():
        load = partial(_load_vision_model, folder, device)
    else:
        modalities = ("text",)
        load = partial(_load_sentence_encoder, folder, device)
        count_tokens = partial(_load_token_counter, folder, None)
    return FrozenEncoder(folder, modalities, load, fingerprint, count_tokens)


def fingerprint_encoder(folder: Path, *, like: str | None = None) -> str:
    """Return a hash, hex digits, of weights, processors and pooling of a checkpoint folder.

    Of `FINGERPRINTED_FILES`, those that exist count. `like` and the number of digits are as those
    of `fingerprint_checkpoint`. Raises as that does, and FileNotFoundError without config.json.
    """
    checkpoint_fingerprint = fingerprint_checkpoint(folder, like=like)
    digest = hashlib.sha256(f"{checkpoint_fingerprint}:{IMAGE_BACKEND}".encode())
    for name in FINGERPRINTED_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()[: len(checkpoint_fingerprint)]


def _has_tower_of(model: DuetModel | None, folder: Path) -> bool:
    """Return whether a model started from the checkpoint in `folder`; False without a model."""
    if model is None:
        return False
    return fingerprint_checkpoint(model.backbone.folder) == fingerprint_checkpoint(folder)


def _load_vision_tower(
    folder: Path, shared_model: DuetModel | None, device: Device
) -> Mapping[str, EncodeFunction]:
    """Return {"image": function}, which gives the mean over a VLM's features of an image.

    The tower is that of `shared_model` (with its feature cache), or else it is loaded. Raises
    ModelError as `load_backbone` does.
    """
    if shared_model is not None:
        backbone = shared_model.backbone
        prepare_image = shared_model.prepare_image  # both use the model's feature cache
        compute_features = shared_model.vision_features
    else:
        backbone = load_backbone(folder, device=device)
        prepare_image = backbone.prepare_image
        compute_features = backbone.compute_vision_features

    def encode(refs: list[ImageRef]) -> Tensor:
        prepared = [prepare_image(ref) for ref in refs]
        # Further columns are DeepStack's, which the projector does not read.
        features = compute_features(prepared)[:, : backbone.vision_width]
        by_image = features.split([image.num_features for image in prepared])
        return torch.stack([image_features.mean(0) for image_features in by_image])

    return {"image": encode}


def _check_timm(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError unless timm and torchvision are installed and the architecture is a name.

    `config` must have the key `architecture`. transformers opens such folders with timm, on which
    it does not depend.
    """
    missing = [name for name in ("timm", "torchvision") if find_spec(name) is None]
    if missing:
        fix = f"pip install {' '.join(missing)}, with the torchvision that your torch needs"
        message = f"a timm checkpoint, and {' and '.join(missing)} not installed"
        raise ModelError(message, place=folder, fix=fix)
    architecture = str(config["architecture"])
    if not re.fullmatch(r"\w+(\.\w+)?", architecture):  # timm would download hf-hub:NAME
        message = f"'{architecture}' names no architecture"
        raise ModelError(message, place=folder / "config.json")


def _load_auto_model(folder: Path, device: Device) -> Any:
    """Return the model of a folder in float32, frozen, in evaluation mode.

    Raises:
        ModelError: it cannot be loaded, or tensors are missing.
    """
    with translate_load_errors(folder):
        config = AutoConfig.from_pretrained(folder, **LOCAL_ONLY)
        if config.model_type == "timm_wrapper" and config.model_args:
            # timm writes the number there, and the wrapper of transformers passes it itself.
            config.model_args.pop("num_classes", None)
        model, report = AutoModel.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            dtype=torch.float32,  # half precision, as saved, would not run on every device
            **LOCAL_ONLY,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        message = f"{len(missing)} tensors are missing, such as {', '.join(missing[:3])}"
        raise ModelError(message, place=folder)
    return model.requires_grad_(False).to(device).eval()


def _load_image_processor(folder: Path) -> Any:
    """Return the image processor of a folder, by `IMAGE_BACKEND`. Raises ModelError."""
    with translate_load_errors(folder):
        return AutoImageProcessor.from_pretrained(folder, backend=IMAGE_BACKEND, **LOCAL_ONLY)


def _load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder. Raises ModelError."""
    with translate_load_errors(folder):
        return AutoTokenizer.from_pretrained(folder, **LOCAL_ONLY)


def _preprocess_images(
    image_processor: Any, refs: list[ImageRef], device: Device
) -> dict[str, Tensor]:
    """Return the inputs of a vision model for at least one image, on the device.

    Each input has the rows of all images, in order. Raises ImageError for an unreadable image.
    """
    rows = [preprocess_image(image_processor, ref) for ref in refs]
    inputs = {}
    for name in rows[0]:
        inputs[name] = torch.cat([row[name] for row in rows]).to(device)
    return inputs


def _load_vision_model(folder: Path, device: Device) -> Mapping[str, EncodeFunction]:
    """Return {"image": function}, which gives a vision model's pooled output.

    It is the class token of DINOv2, and the mean over the map of a convolutional network. Raises
    ModelError if the model cannot be loaded; the function, if it has no pooled output.
    """
    model = _load_auto_model(folder, device)
    image_processor = _load_image_processor(folder)

    @torch.no_grad()
    def encode(refs: list[ImageRef]) -> Tensor:
        """Return float[N, D] of images. Raises ImageError, and ModelError without pooled output."""
        outputs = model(**_preprocess_images(image_processor, refs, device))
        pooled: Tensor | None = getattr(outputs, "pooler_output", None)
        if pooled is None:
            message = f"'{model.config.model_type}' gives no vector of an image"
            fix = "Use one that pools, such as a DINOv2, or a VLM, whose tower is used"
            raise ModelError(message, place=folder, fix=fix)
        return pooled.flatten(1)

    return {"image": encode}


def _load_sentence_encoder(folder: Path, device: Device) -> Mapping[str, EncodeFunction]:
    """Return the encoder by `load_text_encoder`, which is looked up at the call."""
    return {"text": load_text_encoder(folder, device=device)}


def load_text_encoder(folder: Path, *, device: Device = "cpu") -> Callable[[list[str]], Tensor]:
    """Load a local sentence encoder, and return a function: texts -> float[N, D], unit length.

    It pools as 1_Pooling/config.json says: the first token (BGE), or the mean over tokens
    (all-MiniLM-L6-v2), which is the default. Texts are cut at the limit of
    sentence_bert_config.json, else that of the tokenizer, else 256 tokens.

    Raises:
        ModelError: it cannot be loaded, pools otherwise, or its modules.json has more than a
            transformer, its pooling and normalisation.
    """
    check_checkpoint(folder, read_config(folder))
    max_tokens = _read_max_tokens(folder)  # checks the modules before anything is loaded
    tokenizer = _load_tokenizer(folder)
    with translate_load_errors(folder):
        model = AutoModel.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, **LOCAL_ONLY
        )
    model.to(device).eval()
    max_tokens = max_tokens or _get_tokenizer_limit(tokenizer)
    pools_first_token = _read_pooling(folder) == "cls"

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        """Return float32[N, D], unit length, of at least one text."""
        batch = tokenizer(
            texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        ).to(device)
        hidden = model(**batch).last_hidden_state  # [N, T, D]
        if pools_first_token:
            return F.normalize(hidden[:, 0], dim=1)
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    return encode


def _get_tokenizer_limit(tokenizer: Any) -> int:
    """Return the longest text of a tokenizer in tokens; DEFAULT_MAX_TOKENS if it has no limit."""
    limit = int(tokenizer.model_max_length)
    return DEFAULT_MAX_TOKENS if limit >= UNLIMITED_TOKENS else limit


def _read_text_positions(config: Mapping[str, Any]) -> int | None:
    """Return the number of positions of CLIP's text tower, if its config.json has it."""
    positions = config["text_config"].get("max_position_embeddings")
    return positions if isinstance(positions, int) else None


def _load_token_counter(folder: Path, max_tokens: int | None) -> TokenCounter:
    """Return the counter of a folder's tokenizer, of which it loads a copy of its own.

    Without `max_tokens`, its limit is that of `load_text_encoder`. Raises ModelError.
    """
    tokenizer = _load_tokenizer(folder)
    limit = max_tokens or _read_max_tokens(folder) or _get_tokenizer_limit(tokenizer)

    def count(texts: list[str]) -> list[int]:
        # All at once, and without masks: this is three times as fast.
        options = {"return_attention_mask": False, "return_token_type_ids": False}
        return [len(ids) for ids in tokenizer(texts, verbose=False, **options)["input_ids"]]

    return TokenCounter(count, limit)


def _read_settings(path: Path, types: FieldTypes) -> dict[str, Any]:
    """Return the object of a JSON file; {} if there is none.

    Raises ModelError if it is broken, or a value is not of the type that its key has in `types`.
    """
    if not path.exists():
        return {}
    return read_json_object(path, error_class=ModelError, fix=COPY_AGAIN, optional=types)


def _read_max_tokens(folder: Path) -> int | None:
    """Return the limit of sentence_bert_config.json in tokens, or None if it has none.

    Raises:
        ModelError: modules.json lists another kind than Transformer, Pooling and Normalize, or
            a file is broken.
    """
    modules_path = folder / "modules.json"
    modules: Any = []
    if modules_path.exists():
        modules = read_json(modules_path, error_class=ModelError, fix=COPY_AGAIN)
    if not (isinstance(modules, list) and all(isinstance(module, dict) for module in modules)):
        raise ModelError("not a list of objects", place=modules_path, fix=COPY_AGAIN)
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    unsupported = sorted({*kinds} - {"Transformer", "Pooling", "Normalize"})
    if unsupported:
        message = f"it asks for {', '.join(unsupported)}, which is not read"
        fix = "Use an encoder of a transformer and its pooling alone"
        raise ModelError(message, place=modules_path, fix=fix)
    types: FieldTypes = {"max_seq_length": (int, type(None))}
    settings = _read_settings(folder / "sentence_bert_config.json", types)
    max_tokens: int | None = settings.get("max_seq_length")
    return max_tokens


def _read_pooling(folder: Path) -> str:
    """Return `cls` or `mean` from 1_Pooling/config.json; `mean` if it names none or is missing.

    Raises:
        ModelError: another pooling, or several, or the file is broken.
    """
    path = folder / "1_Pooling" / "config.json"
    config = _read_settings(path, {"pooling_mode": str})
    names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    flags = [name for name, is_on in config.items() if name.startswith("pooling_mode_") and is_on]
    default = names.get(flags[0], flags[0]) if len(flags) == 1 else "mean"
    pooling = config.get("pooling_mode", default)
    if pooling not in names.values() or len(flags) > 1:
        fix = "Use an encoder that pools by cls or mean"
        raise ModelError(f"pooling {flags or pooling}", place=path, fix=fix)
    return str(pooling)


def _load_cross_encoder(folder: Path, device: Device) -> Mapping[str, EncodeFunction]:
    """Return {"image": function, "text": function} by CLIP, SigLIP or similar, in one space.

    Both give float32[N, D], not normalised; texts are cut at the model's limit.

    Raises:
        ModelError: it cannot be loaded, or has no space that images and texts share.
    """
    model = _load_auto_model(folder, device)
    image_processor = _load_image_processor(folder)
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        message = f"'{model.config.model_type}' has no space that images and texts share"
        raise ModelError(message, place=folder, fix="Use CLIP, SigLIP or their like")
    tokenizer = _load_tokenizer(folder)
    max_tokens = model.config.text_config.max_position_embeddings
    # SigLIP was trained on padded texts and reads the last position.
    padding = "max_length" if model.config.model_type.startswith("siglip") else True

    @torch.no_grad()
    def encode_images(refs: list[ImageRef]) -> Tensor:
        inputs = _preprocess_images(image_processor, refs, device)
        return _get_pooled(model.get_image_features(**inputs))

    @torch.no_grad()
    def encode_texts(texts: list[str]) -> Tensor:
        batch = tokenizer(
            texts, padding=padding, truncation=True, max_length=max_tokens, return_tensors="pt"
        ).to(device)
        return _get_pooled(model.get_text_features(**batch))

    return {"image": encode_images, "text": encode_texts}


def _get_pooled(output: Any) -> Tensor:
    """Return the vectors of an output, which is a tensor in some versions of transformers."""
    pooled: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return pooled
