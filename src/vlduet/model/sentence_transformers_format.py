"""Published embedding models: folders in the format of sentence-transformers, read as our settings.

    modules.json                        Transformer, Pooling, perhaps Dense layers, Normalize
    config_sentence_transformers.json   prompts by name, and the default one
    sentence_bert_config.json           how the transformer is called: chat template, limits, images
    1_Pooling/config.json               tokens over which hidden states are averaged
    2_Dense/config.json, model.safetensors

The transformer is a checkpoint of a supported family, in the folder itself or below it. Nothing is
executed. What cannot be represented is refused by name; the vectors of all others are equal to
those of sentence-transformers. Models without such files are in `embedding_presets.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlduet.errors import ModelError, quote_value
from vlduet.library_errors import COPY_AGAIN, translate_library_errors
from vlduet.model.chat_template import TEMPLATE_FOLDER, fix_date
from vlduet.model.embedding_presets import recognise_preset
from vlduet.model.families.registry import FAMILIES, find_family
from vlduet.model.prompts import Prompts
from vlduet.structured_files import FieldTypes, check_fields, read_json, read_json_object

MODULES_FILE = "modules.json"
"""File that makes a folder one of sentence-transformers."""
OWN_PACKAGE = "sentence_transformers"
"""Package of the modules that are read."""
PLAIN_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ image_placeholder if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endfor %}"
)
"""Template of models without chat messages: the prompt and the content, one after the other."""
LONGEST_SEQUENCE = 8192
"""Most tokens of a sequence where a published model does not say; Qwen3-VL-Embedding has as many.
"""
POOLING_MODES = {"lasttoken": "last", "mean": "mean", "cls": "first"}
"""Value of `Prompts.pool` by pooling mode."""
EARLY_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Pooling mode by the key of earlier versions."""
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""Names of the prompt of documents; the first that exists counts."""
ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": "none",
    "torch.nn.modules.activation.GELU": "gelu",
}
"""Activation functions that a head can have."""
NOT_FOR_IMAGES = {
    *("model_max_length", "padding_side", "truncation_side", "chat_template", "use_fast"),
    *("backend", "device", "return_tensors", "revision", "token", "local_files_only"),
    "trust_remote_code",
}
"""Arguments of a processor that do not concern its images, or do not change them."""
CALL_ARGUMENTS = {"padding", "truncation", "max_length", "return_tensors", "restore_suffix"}
"""Arguments of the call of a chat template that are no variables of it."""
HARMLESS_TEXT_ARGUMENTS = CALL_ARGUMENTS | {"padding_side", "truncation_side", "logits_to_keep"}
"""Arguments of a tokenizer's call that change no token of a text that fits."""
TRANSFORMER_FIELDS: FieldTypes = {
    "config_args": dict,
    "config_kwargs": dict,
    "do_lower_case": bool,
    "max_seq_length": (int, type(None)),
    "modality_config": dict,
    "processing_kwargs": dict,
    "processing_kwargs.chat_template": dict,
    "processing_kwargs.common": dict,
    "processing_kwargs.image": dict,
    "processing_kwargs.image.max_pixels": int,
    "processing_kwargs.image.min_pixels": int,
    "processing_kwargs.text": dict,
    "processing_kwargs.text.max_length": (int, type(None)),
    "processor_kwargs": dict,
    "processor_kwargs.chat_template": str,
    "processor_kwargs.max_pixels": int,
    "processor_kwargs.min_pixels": int,
    "processor_kwargs.model_max_length": (int, type(None)),
    "tokenizer_args": dict,
    "transformer_task": str,
}
"""Keys of sentence_bert_config.json that are read."""


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """Embedding settings of a published model."""

    folder: Path
    """Folder of the checkpoint itself."""
    prompts: Prompts
    """Prompts whose `template` lacks the checkpoint's own chat template if `uses_own_template`."""
    uses_own_template: bool = False
    """`prompts.template` comes before the checkpoint's own chat template (`complete_prompts`)."""
    head: str = "none"
    """Kind of the `EmbeddingHead`."""
    head_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """float32 tensors of the head by name."""
    max_tokens: int | None = None
    """Longest sequence; None: the model does not say."""
    image_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the image processor that differ from those of the checkpoint."""
    ignores_code: bool = False
    """Code of the publisher, which only wraps an architecture of transformers, is not needed."""

    def complete_prompts(self, chat_template: str | None) -> Prompts:
        """Return the prompts, given the chat template of the checkpoint.

        Raises:
            ModelError: they need a chat template, and the checkpoint has none.
        """
        if not self.uses_own_template:
            template = self.prompts.template
            if "task" not in template or re.search(r"\btask\b", chat_template or ""):
                return self.prompts
            # Only a template of the checkpoint's own decides if the task is passed.
            return replace(self.prompts, template=f"{{% set task = no_task %}}\n{template}")
        if not chat_template:
            message, fix = "messages need a chat template, and there is none", COPY_AGAIN
            raise ModelError(message, place=self.folder, fix=fix)
        return replace(self.prompts, template=self.prompts.template + chat_template)

    @property
    def dim(self) -> int:
        """Width of the embeddings of a head; 1, without effect, if there is none."""
        return len([*self.head_tensors.values()][-1]) if self.head_tensors else 1

    def find_max_tokens(self, max_tokens: int | None, *, context_length: int | None) -> int:
        """Return the longest sequence: the given one, else the published one, else a bound.

        The bound is `LONGEST_SEQUENCE`, or the context length of the checkpoint if that is shorter.
        """
        bound = min(LONGEST_SEQUENCE, context_length or LONGEST_SEQUENCE)
        return max_tokens or self.max_tokens or bound

    def find_image_settings(self, image_processor: Any) -> dict[str, Any]:
        """Return `image_arguments` as attributes of the checkpoint's image processor.

        Raises:
            ModelError: it has no such attribute, or one of another type.
        """
        settings = dict(self.image_arguments)
        pixels = [settings.pop(name, None) for name in ("min_pixels", "max_pixels")]
        if any(pixels):
            size = image_processor.size
            least, most = pixels[0] or size.shortest_edge, pixels[1] or size.longest_edge
            settings["size"] = {"shortest_edge": least, "longest_edge": most}
        attributes = image_processor.to_dict()
        for name, value in settings.items():
            default = attributes.get(name)
            if name not in attributes or not isinstance(
                value, type(default) if default else object
            ):
                message = f"argument {quote_value(name)} of the processor"
                raise _refuse(f"{message}, {quote_value(value)}", place=self.folder)
        return settings


def read_published_model(folder: Path) -> PublishedModel | None:
    """Return the embedding settings of a folder in sentence-transformers format, or of a preset.

    A preset counts where there is no modules.json, or one that needs code of the publisher. The
    result is None for all other folders.

    Raises:
        ModelError: a file is broken or missing, or the model cannot be represented: it embeds only
            texts, reads in both directions, or has a module, pooling or option that is not read.
    """
    path = folder / MODULES_FILE
    modules: Any = []
    if path.exists():
        modules = read_json(path, error_class=ModelError, fix=COPY_AGAIN)
        if not isinstance(modules, list):
            raise ModelError("not a list of modules", place=path, fix=COPY_AGAIN)
    if not any(OWN_PACKAGE in str(module) for module in modules):
        config = _read_settings(folder / "config.json", {})
        preset = recognise_preset(folder, config.get("model_type"))
        if preset is not None:
            return PublishedModel(folder, preset.prompts, ignores_code=True)
    if not path.exists():
        return None
    kinds, folders = _list_modules(folder, modules, place=path)
    checkpoint = folders[0]
    place = checkpoint / "sentence_bert_config.json"
    settings = _read_settings(place, TRANSFORMER_FIELDS)
    has_messages = _check_transformer(settings, place=place)
    system, query_system = _read_prompts(
        folder / "config_sentence_transformers.json", is_normalized="Normalize" in kinds
    )
    pool, counts_prompt = _read_pooling(folders[kinds.index("Pooling")] / "config.json")
    template, uses_own_template = PLAIN_TEMPLATE, False
    if has_messages:
        template, uses_own_template = _read_template(checkpoint, settings, place=place)
    dense = [path for path, kind in zip(folders, kinds, strict=True) if kind == "Dense"]
    head, head_tensors = _read_head(dense)
    prompts = Prompts(
        image="{image}",
        text="{text}",
        parts="{parts}",
        template=template,
        system=system,
        query_system=query_system,
        pool=pool,
        # Prompts in messages are never left out, whatever the file says.
        pool_system=counts_prompt or has_messages,
    )
    return PublishedModel(
        checkpoint,
        prompts,
        uses_own_template=uses_own_template,
        head=head,
        head_tensors=head_tensors,
        max_tokens=_read_max_tokens(settings),
        image_arguments=_read_image_arguments(settings, place=place),
    )


def _list_modules(folder: Path, modules: list[Any], *, place: Path) -> tuple[list[str], list[Path]]:
    """Return the kinds of the modules that change an embedding, and their folders.

    Raises ModelError for one that is not read, a transformer that cannot generate, or another order
    than that of the module docstring.
    """
    kinds, folders = [], []
    for module in modules:
        types: FieldTypes = {"type": str, "path": str}
        check_fields(module, types, place=place, error_class=ModelError, fix=COPY_AGAIN)
        path = PurePosixPath(module["path"])
        if path.is_absolute() or ".." in path.parts:
            raise ModelError("a module outside of the folder", place=place, fix=COPY_AGAIN)
        kind = _read_kind(module["type"], place=place)
        if kind != "Dropout":
            kinds.append(kind)
            folders.append(folder / path)
    if kinds[:1] == ["Transformer"]:
        _check_generates(folders[0])
    order = ", ".join(kinds)
    if not re.fullmatch("Transformer, Pooling(, Dense)*(, Normalize)?", order):
        raise _refuse(f"a model of {order or 'no modules'}", place=place)
    return kinds, folders


def _refuse(message: str, *, place: Path) -> ModelError:
    """Return, not raise, the error of something that our settings cannot represent."""
    fix = "VLDuet cannot read such a model: use another, or train its base"
    return ModelError(f"{message}, which is not supported", place=place, fix=fix)


def _read_settings(path: Path, types: FieldTypes) -> dict[str, Any]:
    """Return the object of a JSON file whose keys have these types if they exist; {} without it."""
    if not path.exists():
        return {}
    return read_json_object(path, error_class=ModelError, fix=COPY_AGAIN, optional=types)


def _read_kind(type_name: str, *, place: Path) -> str:
    """Return the class of a module, without its package; raise ModelError for an unknown one."""
    package, _, kind = type_name.rpartition(".")
    if package.partition(".")[0] != OWN_PACKAGE:
        message = f"module {quote_value(type_name)} is code of the publisher, which is never run"
        raise ModelError(message, place=place, fix="Use a model without code of its own")
    if kind not in ("Transformer", "Pooling", "Dense", "Normalize", "Dropout"):
        raise _refuse(f"module {quote_value(kind)}", place=place)
    return kind


def _check_generates(folder: Path) -> None:
    """Raise ModelError for an encoder, an unknown family, or attention in both directions."""
    path = folder / "config.json"
    config = read_json_object(path, error_class=ModelError, fix=COPY_AGAIN)
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES and not any("vision" in key for key in config):
        raise ModelError(
            f"a text encoder of sentence-transformers ({model_type[:80]}), which sees no images "
            "and cannot generate",
            place=folder,
            fix="Name it under encoders.text (docs/train.md), or use a vision-language model",
        )
    find_family(model_type, folder)
    for section in (config, config.get("text_config")):
        if isinstance(section, dict) and section.get("is_causal") is False:
            raise _refuse("attention in both directions (is_causal: false)", place=path)


def _check_transformer(settings: Mapping[str, Any], *, place: Path) -> bool:
    """Return whether contents become chat messages; raise ModelError for what is not supported."""
    task = settings.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise _refuse(f"transformer_task {quote_value(task)}", place=place)
    for key in ("query_length", "document_length", "query_expansion", "do_lower_case"):
        if settings.get(key):
            raise _refuse(key, place=place)
    names = sorted({*settings.get("config_kwargs", {}), *settings.get("config_args", {})})
    if names:
        raise _refuse(f"config_kwargs {quote_value(names[0])}", place=place)
    text_arguments = {*settings.get("processing_kwargs", {}).get("text", {})}
    unknown = sorted(text_arguments - HARMLESS_TEXT_ARGUMENTS)
    if unknown:
        raise _refuse(f"processing_kwargs.text.{unknown[0]}", place=place)
    modalities = settings.get("modality_config", {"text": {}})
    for name in ("text", "image", "message"):
        parameters = modalities.get(name, {})
        fields = {"method": str}
        check_fields(
            parameters, place=place, error_class=ModelError, fix=COPY_AGAIN, optional=fields
        )
        method = parameters.get("method", "forward")
        output = parameters.get("method_output_name", "last_hidden_state")
        if method != "forward" or output not in ("last_hidden_state", ["last_hidden_state"]):
            place_name = f"modality_config.{name}"
            raise _refuse(f"{place_name}: {quote_value(f'{method} {output}')}", place=place)
    return "message" in modalities


def _read_template(folder: Path, settings: Mapping[str, Any], *, place: Path) -> tuple[str, bool]:
    """Return the beginning of the template of embeddings, and if the checkpoint's own follows it.

    The beginning sets the variables of the call. A template that the call names or spells is a part
    of it.
    """
    arguments = dict(settings.get("processing_kwargs", {}).get("chat_template", {}))
    # This one escapes user texts that spell control tokens, which ours always does.
    arguments.pop("sanitize_control_tokens", None)
    template = arguments.pop("chat_template", None)
    template = template or settings.get("processor_kwargs", {}).get("chat_template")
    lines = []
    for name, value in sorted(arguments.items()):
        if name in CALL_ARGUMENTS:
            continue
        is_plain = isinstance(value, str | bool | int | float)
        if not (is_plain and name.isidentifier()):
            raise _refuse(f"processing_kwargs.chat_template.{name[:80]}", place=place)
        lines.append(f"{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}\n")
    beginning = "".join(lines)
    if template is None:
        return beginning, True
    if not isinstance(template, str):
        raise _refuse("processing_kwargs.chat_template.chat_template", place=place)
    if re.fullmatch(r"\w[\w.-]*", template):
        path = folder / TEMPLATE_FOLDER / f"{template}.jinja"
        if template == "default" and not path.is_file():
            return beginning, True
        if not path.is_file():
            raise ModelError("the chat template is missing", place=path, fix=COPY_AGAIN)
        template = path.read_text(encoding="utf-8")
    return beginning + fix_date(template), False


def _read_prompts(path: Path, *, is_normalized: bool) -> tuple[str, str]:
    """Return the prompts of documents and of queries, "" for none.

    The default prompt is that of a kind that has none of its own. Raises ModelError if the file is
    broken, or embeddings have a length that counts.
    """
    types: FieldTypes = {
        "prompts": dict,
        "default_prompt_name": (str, type(None)),
        "similarity_fn_name": (str, type(None)),
    }
    config = _read_settings(path, types)
    similarity = config.get("similarity_fn_name") or "cosine"
    if similarity != "cosine" and not is_normalized:
        raise _refuse(f"similarity {quote_value(similarity)} without Normalize", place=path)
    prompts = {k: v for k, v in config.get("prompts", {}).items() if v is not None}
    for name, text in prompts.items():
        if not isinstance(text, str):
            message = f"prompt {quote_value(name)} is no text"
            raise ModelError(message, place=path, fix=COPY_AGAIN)
    query = "query" if "query" in prompts else None
    document = next((name for name in DOCUMENT_PROMPTS if name in prompts), None)
    default = config.get("default_prompt_name")
    if default is not None and default not in prompts:
        message = f"default_prompt_name is {quote_value(default)}, which is no prompt"
        raise ModelError(message, place=path, fix=COPY_AGAIN)
    if default not in (None, query, document):
        document, query = document or default, query or default
    return prompts.get(document or "", ""), prompts.get(query or "", "")


def _read_pooling(path: Path) -> tuple[str, bool]:
    """Return the value of `Prompts.pool`, and if tokens of a prompt count."""
    types: FieldTypes = {"include_prompt": bool, **dict.fromkeys(EARLY_POOLING_FLAGS, bool)}
    config = read_json_object(path, error_class=ModelError, fix=COPY_AGAIN, optional=types)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in EARLY_POOLING_FLAGS.items() if config.get(key)] or ["mean"]
    modes = modes if isinstance(modes, list) else [modes]
    if len(modes) != 1 or str(modes[0]) not in POOLING_MODES:
        raise _refuse(f"pooling {' and '.join(map(str, modes))[:80]}", place=path)
    return POOLING_MODES[str(modes[0])], bool(config.get("include_prompt", True))


def _read_head(folders: list[Path]) -> tuple[str, dict[str, Tensor]]:
    """Return kind and tensors of the head that equals Dense layers, one after the other.

    Linear layers without an activation between them become one.
    """
    if not folders:
        return "none", {}
    layers = [_read_dense(folder) for folder in folders]
    activations = [activation for _, _, activation in layers]
    if activations == ["gelu", "none"] and layers[0][0].shape[0] == layers[0][0].shape[1]:
        (weight, bias, _), (last_weight, last_bias, _) = layers
        names = ("layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias")
        return "mlp", dict(zip(names, (weight, bias, last_weight, last_bias), strict=True))
    if set(activations) != {"none"}:
        raise _refuse(f"Dense layers with activations {activations}", place=folders[0])
    weight, bias, _ = layers[0]
    for next_weight, next_bias, _ in layers[1:]:
        weight, bias = next_weight @ weight, next_weight @ bias + next_bias
    return "linear", {"layers.weight": weight.float(), "layers.bias": bias.float()}


def _read_dense(folder: Path) -> tuple[Tensor, Tensor, str]:
    """Return weight float64[E, D], bias float64[E] and activation of a Dense layer."""
    path = folder / "config.json"
    fields: FieldTypes = {"activation_function": str}
    config = read_json_object(path, fields, error_class=ModelError, fix=COPY_AGAIN)
    activation = ACTIVATIONS.get(config["activation_function"])
    if activation is None:
        name = config["activation_function"].rpartition(".")[2]
        raise _refuse(f"a Dense layer with {quote_value(name)}", place=path)
    if config.get("use_residual"):
        raise _refuse("a Dense layer with use_residual", place=path)
    for key in ("module_input_name", "module_output_name"):
        if (config.get(key) or "sentence_embedding") != "sentence_embedding":
            raise _refuse(f"a Dense layer with {key} {quote_value(config[key])}", place=path)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        message = "model.safetensors is missing; pickled weights are never read"
        raise ModelError(message, place=folder, fix=COPY_AGAIN)
    with translate_library_errors(weights, subject="Dense layer"):
        tensors = load_file(weights)
    weight = tensors.get("linear.weight")
    if weight is None or weight.ndim != 2:
        raise ModelError("no matrix linear.weight", place=weights, fix=COPY_AGAIN)
    bias = tensors.get("linear.bias", torch.zeros(len(weight)))
    if bias.shape != (len(weight),):
        raise ModelError("linear.bias is of another width", place=weights, fix=COPY_AGAIN)
    return weight.double(), bias.double(), activation


def _read_max_tokens(settings: Mapping[str, Any]) -> int | None:
    """Return the longest sequence that the transformer's settings state; None if they do not."""
    limits = (
        settings.get("processing_kwargs", {}).get("text", {}).get("max_length"),
        settings.get("processor_kwargs", {}).get("model_max_length"),
        settings.get("max_seq_length"),
    )
    stated = [limit for limit in limits if limit is not None and limit > 0]
    return stated[0] if stated else None


def _read_image_arguments(settings: Mapping[str, Any], *, place: Path) -> dict[str, Any]:
    """Return the arguments of the image processor: those of its creation, then of its calls."""
    created = {**settings.get("tokenizer_args", {}), **settings.get("processor_kwargs", {})}
    calls = settings.get("processing_kwargs", {})
    called = {**calls.get("common", {}), **calls.get("image", {})}
    arguments = {**created, **called}
    if {"min_pixels", "max_pixels"} & arguments.keys() and "size" in arguments:
        raise _refuse("both size and a number of pixels", place=place)
    return {name: value for name, value in arguments.items() if name not in NOT_FOR_IMAGES}
