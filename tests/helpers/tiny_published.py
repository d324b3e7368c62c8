"""Tiny embedding models in the format of sentence-transformers, as publishers write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_families import FAMILY_BUILDERS

MESSAGE = {"method": "forward", "method_output_name": "last_hidden_state"}
MODALITIES = {"text": MESSAGE, "image": MESSAGE, "message": {**MESSAGE, "format": "structured"}}
"""Modality config of a vision-language model whose contents become chat messages."""
IDENTITY = "torch.nn.modules.linear.Identity"
GELU = "torch.nn.modules.activation.GELU"
PROMPTS = {"query": "Find it.", "document": "Represent it."}
"""Prompts that differ between queries and documents."""


def write_json(path: Path, value: object) -> None:
    """Write a JSON file; its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def build_published(
    folder: Path,
    *,
    family: str = "llava",
    pooling: Mapping[str, Any] | None = None,
    dense: tuple[tuple[int, str], ...] = (),
    transformer: Mapping[str, Any] | None = None,
    prompts: Mapping[str, str] = PROMPTS,
    default_prompt: str | None = None,
    path: str = "",
) -> Path:
    """Write a published embedding model with random weights and return its folder.

    Args:
        folder: new folder.
        family: name of the checkpoint's builder.
        pooling: content of 1_Pooling/config.json; None: the last token.
        dense: width and activation function of each Dense layer.
        transformer: keys of sentence_bert_config.json in addition to the modalities; a value None
            removes a key.
        prompts: prompts by name.
        default_prompt: name of the default prompt.
        path: folder of the transformer within `folder`.
    """
    checkpoint = FAMILY_BUILDERS[family](folder / path)
    _scale_up_weights(checkpoint)
    text_config = json.loads((checkpoint / "config.json").read_text())["text_config"]
    width = text_config["hidden_size"]
    settings = {
        "transformer_task": "feature-extraction",
        "modality_config": MODALITIES,
        "module_output_name": "token_embeddings",
        **(transformer or {}),
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    write_json(checkpoint / "sentence_bert_config.json", settings)
    pooling = pooling or {"pooling_mode": "lasttoken", "include_prompt": True}
    write_json(folder / "1_Pooling/config.json", {"embedding_dimension": width, **pooling})
    kinds = [("Transformer", path), ("Pooling", "1_Pooling")]
    torch.manual_seed(3)
    for number, (out_width, activation) in enumerate(dense, 2):
        name = f"{number}_Dense"
        config = {"in_features": width, "out_features": out_width, "bias": True}
        write_json(folder / name / "config.json", {**config, "activation_function": activation})
        linear = {"weight": torch.randn(out_width, width), "bias": torch.randn(out_width)}
        tensors = {f"linear.{key}": value for key, value in linear.items()}
        save_file(tensors, folder / name / "model.safetensors")
        kinds.append(("Dense", name))
        width = out_width
    kinds.append(("Normalize", f"{len(kinds)}_Normalize"))
    (folder / kinds[-1][1]).mkdir()
    package = "sentence_transformers.models"
    modules = [
        {"idx": i, "name": str(i), "path": module_path, "type": f"{package}.{kind}"}
        for i, (kind, module_path) in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    config = {"prompts": prompts, "default_prompt_name": default_prompt}
    write_json(
        folder / "config_sentence_transformers.json", {**config, "similarity_fn_name": "cosine"}
    )
    return folder


def _scale_up_weights(checkpoint: Path) -> None:
    """Multiply the matrices of a checkpoint by four, in place.

    With weights as small as they are initialised, a wrong token would change an embedding too
    little.
    """
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    scaled = {name: tensor * 4 if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    save_file(scaled, path, metadata={"format": "pt"})


def remove_lm_head(checkpoint: Path) -> None:
    """Write the weights of a checkpoint as its base model has them, which has no LM head."""
    path = checkpoint / "model.safetensors"
    tensors = {
        name.removeprefix("model.").replace("language_model.model.", "language_model."): tensor
        for name, tensor in load_file(path).items()
        if "lm_head" not in name
    }
    save_file(tensors, path, metadata={"format": "pt"})
