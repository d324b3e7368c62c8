"""Saving and opening of a `DuetModel` in the folder format of `model/checkpoint.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from vlduet.errors import ModelError
from vlduet.files import recover_folder, replace_folder_atomically
from vlduet.hub import resolve_model
from vlduet.library_errors import COPY_AGAIN, translate_library_errors
from vlduet.model import checkpoint, golden_memory
from vlduet.model.adapters import save_lora
from vlduet.model.backbone import load_backbone, select_device
from vlduet.model.card import CARD_NAME, format_card
from vlduet.model.embedding import encode
from vlduet.model.fingerprints import fingerprint_checkpoint
from vlduet.model.limits import DEFAULT_MAX_TOKENS, Limits
from vlduet.model.prompts import Prompts
from vlduet.model.sentence_transformers_export import write_published_files
from vlduet.model.sentence_transformers_format import PublishedModel, read_published_model
from vlduet.model.soft_prompts import ROWS_TENSOR_NAME, SoftPrompts
from vlduet.structured_files import read_safetensors_header

if TYPE_CHECKING:
    from vlduet.model.duet import DuetModel

    ModelT = TypeVar("ModelT", bound=DuetModel)

GoldenCheck = bool | Literal["once"]
"""Whether an opened model is compared with the saved one, see `open_model`."""

WEIGHTS_NAME = "model.safetensors"
"""File of the weights of a checkpoint that has a single one."""
WEIGHTS_INDEX_NAME = "model.safetensors.index.json"
"""File in which transformers names the file of every weight."""


def describe_embedding(model: DuetModel) -> dict[str, Any]:
    """Return what the model's embeddings depend on beside tensors, as in the manifest.

    These are `prompts`, `head` and, if the tokens of an image are limited by them,
    `image_processor`: its attributes that differ from the checkpoint's.
    """
    description: dict[str, Any] = {
        "prompts": model.prompts.to_manifest(),
        "head": {"kind": model.head.kind, "dim": model.head.dim},
    }
    if model.backbone.image_settings:
        description["image_processor"] = model.backbone.image_settings
    return description


def compute_model_fingerprint(model: DuetModel, *, like: str | None = None) -> str:
    """Return hexadecimal digits that identify all that the model's embeddings depend on.

    Args:
        model: the model, whose base is hashed if its files have changed.
        like: fingerprint to compare the result with, see `fingerprint_checkpoint`. None: that of
            the base in the folder that the model was opened from.
    """
    base_fingerprint = fingerprint_checkpoint(
        model.backbone.folder, like=like or model.backbone.saved_fingerprint
    )
    return checkpoint.compute_fingerprint(
        model.embedding_settings(), base_fingerprint, _trained_tensors(model)
    )


def _trained_tensors(model: DuetModel) -> dict[str, Tensor]:
    """Return everything that is trained, by name: the model's own tensors and its adapter."""
    return {**model.own_tensors(), **model.adapter_tensors()}


def compute_golden_vectors(model: DuetModel) -> Tensor:
    """Return the embeddings float32[3, E] of the golden inputs, independent of `max_tokens`."""
    inputs = checkpoint.make_golden_inputs()
    return torch.from_numpy(encode(model, inputs, max_tokens=DEFAULT_MAX_TOKENS))


def save_pretrained(
    model: DuetModel, folder: Path | str, *, provenance: Mapping[str, Any] | None = None
) -> None:
    """Write a model folder atomically: trained tensors and adapter, and a reference to the base.

    The model embeds the golden inputs, in evaluation mode meanwhile. Its weights do not change.

    Args:
        folder: new folder, or an earlier model folder, which is replaced.
        provenance: facts about the model's origin (config, data, commit) for the manifest.

    Raises:
        ModelError: `folder` is the folder of the model's base.
        ConfigError: `folder` exists, is not empty and is no model folder.
    """
    base = model.backbone.folder
    if Path(folder).resolve() == base.resolve():
        raise ModelError(
            "this folder is the model's base", place=folder, fix="Save elsewhere, or save it merged"
        )
    with replace_folder_atomically(Path(folder), marker=checkpoint.MANIFEST_NAME) as temporary:
        _write_model(model, temporary, base=base, provenance=provenance or {})


def save_merged(
    model: DuetModel, folder: Path | str, *, provenance: Mapping[str, Any] | None = None
) -> None:
    """Write a self-contained folder that plain transformers opens, atomically.

    A published embedding model is one for sentence-transformers, too (`write_published_files`).

    Modifies the model in place: the adapter is merged into the weights and removed, soft prompts
    are copied into the embedding table, and the model's base becomes `folder`. That may be the
    former base. If writing fails, the model is merged all the same.

    Args:
        folder: new folder, an earlier model folder, or the base's folder, which is replaced.
        provenance: facts about the model's origin for the manifest.

    Raises:
        ConfigError: `folder` exists, is not empty and is neither a model folder nor the base's;
            raised before the model is modified.
    """
    is_own_base = Path(folder).resolve() == model.backbone.folder.resolve()
    marker = "config.json" if is_own_base else checkpoint.MANIFEST_NAME
    with replace_folder_atomically(Path(folder), marker=marker) as temporary:
        model.merge_adapter()
        model.backbone.save_pretrained(temporary)
        _write_weights_index(temporary)
        write_published_files(model, temporary)
        _write_model(model, temporary, base=None, provenance=provenance or {})
    model.backbone.folder = Path(folder)
    model.backbone.saved_fingerprint = None


def _write_weights_index(folder: Path) -> None:
    """Write the index of a checkpoint with one file of weights; one with several has it already.

    Without an index, vLLM loads every ``.safetensors`` in the folder, ours included.
    """
    index_path = folder / WEIGHTS_INDEX_NAME
    if index_path.exists():
        return
    path = folder / WEIGHTS_NAME
    _, tensors = read_safetensors_header(path, error_class=ModelError, fix=COPY_AGAIN)
    weight_map = dict.fromkeys(tensors, WEIGHTS_NAME)
    index = {"metadata": {"total_size": path.stat().st_size}, "weight_map": weight_map}
    index_path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_model(
    model: DuetModel, folder: Path, *, base: Path | None, provenance: Mapping[str, Any]
) -> None:
    """Write a model's files into a folder; `base` None means it holds the base's, too."""
    has_adapter = model.peft_model is not None
    description = {
        **model.embedding_settings(),
        "image_processor": model.backbone.image_settings,
        "limits": model.limits.to_dict(),
        "provenance": dict(provenance),
    }
    if model.score_statistics is not None:
        description["score_statistics"] = model.score_statistics.to_manifest()
    checkpoint.write_checkpoint(
        folder,
        base=base,
        description=description,
        own_tensors=model.own_tensors(),
        adapter_tensors=model.adapter_tensors(),
        golden_vectors=compute_golden_vectors(model),
        chat_template=model.backbone.tokenizer.chat_template,
        save_adapter=partial(save_lora, model.peft_model) if has_adapter else None,
    )
    manifest = json.loads((folder / checkpoint.MANIFEST_NAME).read_text(encoding="utf-8"))
    # After the manifest, which therefore does not list the card: a user may complete it.
    (folder / CARD_NAME).write_text(format_card(manifest), encoding="utf-8")


def open_model(
    model_class: type[ModelT],
    folder: Path | str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    check_golden: GoldenCheck = True,
    prompts: Prompts | None = None,
    max_tokens: int | None = None,
    max_image_tokens: int | None = None,
) -> ModelT:
    """Return the model of a model folder, plain checkpoint or published model, in evaluation mode.

    A folder that a crash left under its backup name is restored first (`recover_folder`).

    Args:
        model_class: class of the result.
        folder: folder of `save_pretrained` or `save_merged`, or a Hugging Face checkpoint of a
            known family; or its name on the hub (`hub.resolve_model`).
        device: None is the GPU if there is one.
        dtype: see `DuetModel.from_pretrained`.
        check_golden: embed the golden inputs and compare them with those at saving; "once" does so
            only if this machine has not yet reproduced them with its libraries (`golden_memory`).
        prompts: prompts for a plain checkpoint, by default those of `Prompts`, or for that of a
            published model, in place of its own settings. A model folder has its own, and this
            argument is ignored.
        max_tokens: longest sequence; None: see `Limits.from_manifest`.
        max_image_tokens: most tokens of an image; None: see `Limits.from_manifest`. Another limit
            than the saved one changes the fingerprint where it changes the image processor.

    Raises:
        ModelError: there is no model, a file is broken or was changed, its base is missing or has
            changed, or the golden vectors differ.
    """
    folder = resolve_model(recover_folder(Path(folder)))
    published = find_published_model(folder)
    if published is not None and prompts is None:
        return _open_published(
            model_class,
            published,
            device=device,
            dtype=dtype,
            max_tokens=max_tokens,
            max_image_tokens=max_image_tokens,
        )
    saved = checkpoint.read_checkpoint(published.folder if published else folder)
    limits = Limits.from_manifest(saved.manifest, max_tokens=max_tokens)
    backbone = load_backbone(
        saved.base_folder,
        device=device or select_device(),
        dtype=dtype,
        chat_template=saved.chat_template,
        ignores_code=bool(saved.manifest),  # the code was not needed when the model was saved
    )
    if not saved.manifest:
        backbone.limit_image_tokens(max_image_tokens or limits.max_image_tokens)
        prompts = prompts or Prompts()
        return model_class(backbone, prompts=prompts, max_tokens=limits.max_tokens).eval()
    backbone.saved_fingerprint = saved.manifest["base_fingerprint"]
    image_settings = saved.manifest.get("image_processor")
    backbone.limit_image_tokens(limits.max_image_tokens, settings=image_settings)
    head = saved.manifest["head"]
    manifest_path = Path(folder) / checkpoint.MANIFEST_NAME
    model = model_class(
        backbone,
        prompts=Prompts.from_manifest(saved.manifest["prompts"], place=manifest_path),
        head=head["kind"],
        dim=head["dim"],
        max_tokens=limits.max_tokens,
    )
    if ROWS_TENSOR_NAME in saved.tensors:
        model.soft_prompts = SoftPrompts(backbone, saved.tensors[ROWS_TENSOR_NAME])
    _copy_tensors(saved.tensors, model, place=Path(folder))
    if saved.adapter_folder is not None:
        model.load_adapter(saved.adapter_folder)
    checkpoint.verify_tensors(saved.manifest, _trained_tensors(model), place=Path(folder))
    if check_golden and saved.golden_vectors is not None:
        _check_golden_vectors(saved, model, place=Path(folder), once=check_golden == "once")
    model.score_statistics = checkpoint.read_score_statistics(saved.manifest, manifest_path)
    if max_image_tokens is not None:
        _change_image_limit(model, max_image_tokens)
    return model.eval()


def _change_image_limit(model: DuetModel, max_image_tokens: int) -> None:
    """Limit the tokens of an image, in place; other settings end the statistics of scores."""
    settings = dict(model.backbone.image_settings)
    model.backbone.limit_image_tokens(max_image_tokens)
    if model.backbone.image_settings != settings:
        model.score_statistics = None  # images have other embeddings now


def _check_golden_vectors(
    saved: checkpoint.Checkpoint, model: DuetModel, *, place: Path, once: bool
) -> None:
    """Raise ModelError if the model embeds the golden inputs otherwise than when it was saved.

    With `once`, nothing is computed if this was found before; what is found is remembered.
    """
    assert saved.golden_vectors is not None
    dtype, device = model.backbone.model.dtype, str(model.backbone.device)
    memory = golden_memory.find_memory(saved.manifest, dtype=dtype, device=device)
    if once and memory is not None and golden_memory.is_remembered(memory):
        return
    vectors = compute_golden_vectors(model)
    checkpoint.check_golden_vectors(saved.golden_vectors, vectors, dtype=dtype, place=place)
    if memory is not None:
        golden_memory.remember(memory)


@torch.no_grad()
def _copy_tensors(tensors: Mapping[str, Tensor], model: DuetModel, *, place: Path) -> None:
    """Copy saved tensors into a model's own, in place; raise ModelError if they do not fit."""
    for name, tensor in model.own_tensors().items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise ModelError(f"tensor '{name}' is missing or of another shape", place=place)
        tensor.copy_(tensors[name])


def find_published_model(folder: Path) -> PublishedModel | None:
    """Return the settings of a published embedding model; None for a model folder and all others.

    Raises ModelError as `read_published_model`.
    """
    if (folder / checkpoint.MANIFEST_NAME).is_file():
        return None
    return read_published_model(folder)


def _open_published(
    model_class: type[ModelT],
    published: PublishedModel,
    *,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    max_tokens: int | None,
    max_image_tokens: int | None,
) -> ModelT:
    """Return the model with a published model's settings; the arguments are as of `open_model`.

    Images have as many tokens as in sentence-transformers, up to three quarters of a sequence.
    """
    backbone = load_backbone(
        published.folder,
        device=device or select_device(),
        dtype=dtype,
        ignores_code=published.ignores_code,
    )
    max_tokens = published.find_max_tokens(max_tokens, context_length=backbone.context_length)
    settings = published.find_image_settings(backbone.image_processor)
    backbone.limit_image_tokens(None, settings=settings)
    max_image_tokens = max_image_tokens or max(1, max_tokens * 3 // 4)
    bounded = backbone.family.bounded_settings(backbone.image_processor, max_image_tokens)
    backbone.limit_image_tokens(max_image_tokens, settings={**settings, **bounded})
    model = model_class(
        backbone,
        prompts=published.complete_prompts(backbone.tokenizer.chat_template),
        head=published.head,
        dim=published.dim,
        max_tokens=max_tokens,
    )
    if published.head_tensors:
        with translate_library_errors(published.folder, subject="Dense layers"):
            model.head.load_state_dict(published.head_tensors)
    return model.eval()
