"""Writing of the files that sentence-transformers reads beside a merged model's checkpoint.

Only a model whose prompts are a chat template, as those of published models, has such files:
sentence-transformers has no other prompts around images. `sentence_transformers_format.py` reads
them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import nn

from vlduet.model.sentence_transformers_format import (
    ACTIVATIONS,
    MODULES_FILE,
    OWN_PACKAGE,
    PLAIN_TEMPLATE,
    POOLING_MODES,
)

if TYPE_CHECKING:
    from vlduet.model.duet import DuetModel

METHOD = {"method": "forward", "method_output_name": "last_hidden_state"}
"""How the transformer is called for every modality."""


def write_published_files(model: DuetModel, folder: Path) -> None:
    """Write modules.json and what it names into the folder of a merged checkpoint.

    Nothing is written for a model without `prompts.template`.
    """
    prompts = model.prompts
    if not prompts.template:
        return
    modules = {"": "Transformer", "1_Pooling": "Pooling"}
    width = model.backbone.hidden_size
    modes = {pool: mode for mode, pool in POOLING_MODES.items()}
    pooling = {"embedding_dimension": width, "pooling_mode": modes[prompts.pool]}
    _write_json(folder / "1_Pooling", pooling | {"include_prompt": prompts.pool_system})
    layers = [layer for layer in model.head.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        path = f"{len(modules)}_Dense"
        modules[path] = "Dense"
        _write_dense(folder / path, layer, activation="none" if layer is layers[-1] else "gelu")
    modules[f"{len(modules)}_Normalize"] = "Normalize"
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"{OWN_PACKAGE}.models.{kind}"}
        for i, (path, kind) in enumerate(modules.items())
    ]
    _write_json(folder, entries, name=MODULES_FILE)
    config = {
        "prompts": {"query": prompts.query_system, "document": prompts.system},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    _write_json(folder, config, name="config_sentence_transformers.json")
    _write_json(folder, _describe_transformer(model), name="sentence_bert_config.json")


def _describe_transformer(model: DuetModel) -> dict[str, Any]:
    """Return the content of sentence_bert_config.json."""
    settings = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": METHOD},
        "module_output_name": "token_embeddings",
        "processor_kwargs": {"model_max_length": model.limits.max_tokens},
    }
    template = model.prompts.template
    if template == PLAIN_TEMPLATE:
        return settings
    arguments = {"chat_template": template}
    if "image_placeholder" in template:
        arguments["image_placeholder"] = model.renderer.image_placeholder
    message = {**METHOD, "format": "structured"}
    modalities = {"text": METHOD, "image": METHOD, "message": message}
    return settings | {
        "modality_config": modalities,
        "processing_kwargs": {"chat_template": arguments},
    }


def _write_dense(folder: Path, layer: nn.Linear, *, activation: str) -> None:
    """Write the folder of a Dense module that equals a linear layer and its activation."""
    names = {value: name for name, value in ACTIVATIONS.items()}
    sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
    _write_json(folder, {**sizes, "bias": True, "activation_function": names[activation]})
    tensors = {
        f"linear.{name}": tensor.detach().cpu().contiguous()
        for name, tensor in layer.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors")


def _write_json(folder: Path, content: object, *, name: str = "config.json") -> None:
    """Write a JSON file into a folder, which is created if needed."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
