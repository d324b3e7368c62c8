"""Access to a transformers checkpoint: a folder is opened as a `Backbone`, the same for every VLM.

A backbone tells how many tokens an image takes, computes vision features (the tower is usually
frozen), projects them into the language model, and gives access to the language model and its LM
head. Differences between architectures are in `vlduet.model.families`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from vlduet.data import images
from vlduet.data.batches import Batch
from vlduet.data.records import ImageRef
from vlduet.data.sequences import PreparedImage
from vlduet.errors import ModelError
from vlduet.library_errors import COPY_AGAIN
from vlduet.model.attention_masks import build_attention_masks
from vlduet.model.families.registry import find_family
from vlduet.model.folder_checks import check_checkpoint
from vlduet.model.processing import (
    IMAGE_BACKEND,
    Processor,
    Tokenizer,
    build_prepared_image,
    load_tokenizer_and_image_processor,
    preprocess_image,
    read_config,
    silence_transformers,
    translate_load_errors,
)
from vlduet.objectives.language import softcap_logits
from vlduet.structured_files import read_json_object

ProjectorTraining: TypeAlias = bool | Literal["last"]
"""Trained part of the projector: all of it, nothing, or its last linear layer only."""
LM_HEAD_NAME = "lm_head.weight"
"""Name of the LM head's tensor."""


class Backbone(nn.Module):
    """A loaded VLM checkpoint; `load_backbone` opens one.

    Attributes:
        model: the transformers model, with its LM head.
        tokenizer, image_processor: loaded from the same folder.
        folder: where the checkpoint was read from.
        has_lm_head: False for a checkpoint that was saved to embed only: its LM head is random.
        max_image_tokens: most tokens of an image; None: as many as the image processor's own
            settings give.
        image_settings: attributes of the image processor that differ from the checkpoint's own.
        family: architecture-specific behaviour.
        processor: what a renderer needs to know about the checkpoint.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Tokenizer, image_processor: Any, *, folder: Path
    ):
        """Wrap a model, which is neither copied nor modified.

        Args:
            model: the transformers model, with its LM head.
            tokenizer: the tokenizer of the checkpoint.
            image_processor: with the `processor_overrides` of the family already set.
            folder: the checkpoint's folder; not read here.

        Raises:
            ModelError: the `model_type` in the model's config is not supported.
        """
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.folder = folder
        self.has_lm_head = True
        self.saved_fingerprint: str | None = None  # of `folder`, in the manifest of a model
        self.max_image_tokens: int | None = None
        self.image_settings: dict[str, Any] = {}
        self._own_image_settings: dict[str, Any] = {}
        self.family = find_family(model.config.model_type, folder)(model.config)
        self.processor = Processor.build(
            self.family,
            model.generation_config,
            tokenizer=tokenizer,
            prepare_image=self.prepare_image,
        )

    @property
    def language_model(self) -> nn.Module:
        """Language model without its LM head; its hidden states follow the final norm."""
        return self._submodule(self.family.language_model_path)

    @property
    def vision_tower(self) -> nn.Module:
        """Vision tower."""
        return self._submodule(self.family.vision_tower_path)

    @property
    def projector(self) -> nn.Module:
        """Module that maps vision features to token embeddings."""
        return self._submodule(self.family.projector_path)

    def _submodule(self, path: str) -> nn.Module:
        """Return a module of the inner model by its dotted attribute path."""
        module: nn.Module = self.model.get_submodule(f"model.{path}")
        return module

    @property
    def lm_head(self) -> nn.Linear:
        """Linear layer from hidden states to logits, before the softcap."""
        return self.model.get_output_embeddings()  # type: ignore[no-any-return]

    @property
    def token_embedding(self) -> nn.Embedding:
        """Embedding table of token ids, float[V, D]."""
        return self.model.get_input_embeddings()  # type: ignore[no-any-return]

    @property
    def hidden_size(self) -> int:
        """D, the width of the language model."""
        return int(self.token_embedding.weight.shape[1])

    @property
    def vision_width(self) -> int:
        """Dv, the width of the vision features that the projector reads."""
        return self.family.vision_width(self.projector)

    @property
    def context_length(self) -> int | None:
        """Largest number of positions of the language model; None if its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def logit_softcap(self) -> float | None:
        """c if logits are c * tanh(logits / c) after the LM head, else None."""
        return self.family.logit_softcap()

    @property
    def pad_token_id(self) -> int:
        """Token id of padding, which nothing attends to; 0 if the tokenizer has none."""
        token_id = self.tokenizer.pad_token_id
        return 0 if token_id is None else int(token_id)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.token_embedding.weight.device

    def prepare_image(self, ref: ImageRef) -> PreparedImage:
        """Return one image, decoded and preprocessed, on the CPU.

        Its cache key is a hash of its content and of `vision_fingerprint`.

        Raises:
            ImageError: the image is missing, cannot or must not be decoded, or its shape is not
                supported.
            ModelError: the config asks for an unsupported variant of the architecture.
        """
        inputs = preprocess_image(self.image_processor, ref, preprocess=self.family.preprocess)
        key = f"{images.image_key(ref)}:{self.vision_fingerprint}"
        digest = hashlib.sha256(key.encode()).hexdigest()
        return build_prepared_image(self.family, self.tokenizer, inputs=inputs, cache_key=digest)

    def limit_image_tokens(
        self, max_image_tokens: int | None, *, settings: Mapping[str, Any] | None = None
    ) -> None:
        """Limit the tokens of an image, in place, starting from the checkpoint's own settings.

        Images that were prepared before must not be used any more. The settings become
        `image_settings`; `save_pretrained` writes them, so that others give as many tokens.

        Args:
            max_image_tokens: most tokens of an image (`Family.bounded_settings`); None: no limit.
            settings: attributes of the image processor to use instead of those that follow.
        """
        self.family.apply_settings(self.image_processor, self._own_image_settings)
        if settings is None:
            settings = {}
            if max_image_tokens is not None:
                settings = self.family.bounded_settings(self.image_processor, max_image_tokens)
        self._own_image_settings = self.family.apply_settings(self.image_processor, settings)
        self.max_image_tokens, self.image_settings = max_image_tokens, dict(settings)
        vars(self).pop("_vision_fingerprint", None)

    def vision_tower_pixels(self, prepared: PreparedImage) -> Tensor:
        """Return a prepared image as the tower receives it, float[3, H, W], normalised."""
        return self.family.vision_tower_pixels(prepared.inputs)

    def overview_features(self, prepared: PreparedImage) -> slice:
        """Return the slice of an image's feature rows that describe its `vision_tower_pixels`."""
        return self.family.overview_features(prepared.inputs)

    def compute_vision_features(self, prepared: list[PreparedImage]) -> Tensor:
        """Run the vision tower on images and return float[tokens of all images, Dv], no gradient.

        At least one image is required. Families with DeepStack append D columns per layer. On a
        CPU, images are encoded one by one, which is as fast: batching would change the last bits of
        the features, and a run whose images meet other images (because some are cached) would not
        be reproducible.
        """
        if self.device.type != "cpu":
            return self._run_vision_tower(prepared)
        return torch.cat([self._run_vision_tower([image]) for image in prepared])

    @torch.no_grad()
    def _run_vision_tower(self, prepared: list[PreparedImage]) -> Tensor:
        """Return float[tokens of all images, Dv (+ DeepStack)] of one or more images in one batch.

        The features are on the backbone's device and have no gradient.
        """
        inputs = {}
        for name in prepared[0].inputs:
            inputs[name] = torch.cat([image.inputs[name] for image in prepared]).to(self.device)
        return self.family.vision_features(self.model, inputs)

    def project_vision_features(self, features: Tensor) -> Tensor:
        """Project features float[tokens, Dv (+ DeepStack)] to float[tokens, D].

        The result has the precision of the projector. DeepStack columns are ignored.
        """
        dtype = next(self.projector.parameters()).dtype
        features = features[:, : self.vision_width].to(dtype)
        return self.family.project(self.model, self.projector, features)

    @property
    def vision_fingerprint(self) -> str:
        """Hash of what decides the vision features, 16 hexadecimal digits.

        It covers the settings of the image processor, the image backend, and the config and weights
        of the tower. Of every tensor 16 to 31 evenly spaced values are read (all if it has fewer):
        reading all of a large tower takes seconds. The first result is stored; weights or settings
        that are changed later do not change it.
        """
        if not hasattr(self, "_vision_fingerprint"):
            tower_config = self.model.config.vision_config.to_json_string()
            settings = f"{IMAGE_BACKEND}:{self.image_processor.to_json_string()}:{tower_config}"
            samples = []
            for tensor in self.vision_tower.state_dict().values():
                values = tensor.detach().flatten()
                samples.append(values[:: max(1, len(values) // 16)].cpu().double())
            content = settings.encode() + torch.cat(samples).numpy().tobytes()
            self._vision_fingerprint = hashlib.sha256(content).hexdigest()[:16]
        return self._vision_fingerprint

    def attention_mask_inputs(self, batch: Batch, *, num_past: int = 0) -> dict[str, Any]:
        """Return {"attention_mask": masks} for language models that would not build the right ones.

        The masks are those of `build_attention_masks`. Empty for families whose models build the
        right masks themselves. ModelError for a model that attends to later text, so that it cannot
        generate (Gemma 4).
        """
        kinds = self.family.attention_mask_kinds()
        if not kinds:
            return {}
        window = self.model.config.get_text_config().sliding_window
        masks = build_attention_masks(
            batch, kinds, window=window, num_past=num_past, dtype=self.model.dtype
        )
        return {"attention_mask": masks}

    def per_layer_inputs(
        self, token_ids: Tensor, image_mask: Tensor | None = None
    ) -> dict[str, Any]:
        """Return what the language model needs of tokens besides their embeddings (Gemma 4).

        Args:
            token_ids: int64[B, T].
            image_mask: bool[B, T], True at feature tokens of images, which have no table entry.

        Returns:
            Keyword arguments of the language model; empty for families without such inputs.
        """
        if image_mask is not None:
            token_ids = token_ids.masked_fill(image_mask, -1)
        return dict(self.family.extra_inputs(self.language_model, token_ids))

    def deepstack_inputs(self, features: Tensor, image_mask: Tensor) -> dict[str, Any]:
        """Return the DeepStack features as keyword arguments of the language model.

        Args:
            features: float[tokens, Dv + layers * D], as `compute_vision_features` returns them.
            image_mask: bool[B, T], True at the positions of these tokens.

        Returns:
            `visual_pos_masks`, which is `image_mask`, and `deepstack_visual_embeds`, a list with
            float[tokens, D] for each of the first layers. Empty for families without DeepStack.
        """
        deepstack_features = features[:, self.vision_width :]
        if not deepstack_features.shape[1]:
            return {}
        layers = list(deepstack_features.split(self.hidden_size, 1))
        return {"visual_pos_masks": image_mask, "deepstack_visual_embeds": layers}

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Return next-token logits float[..., V] of hidden states float[..., D], softcapped."""
        return softcap_logits(self.lm_head(hidden_states), self.logit_softcap)

    def resize_token_embeddings(self, min_rows: int) -> None:
        """Grow the token embedding and the LM head, in place, to at least `min_rows` rows.

        Does nothing if there are as many. New rows are random (torch's global generator), and the
        vocabulary size in the model's config follows. Per-layer tables of Gemma 4 get new rows with
        the embedding of padding.
        """
        old_vocab_size = len(self.token_embedding.weight)
        if min_rows > old_vocab_size:
            with silence_transformers():
                self.model.resize_token_embeddings(min_rows, mean_resizing=False)
            self.family.on_vocab_resize(self.language_model, old_vocab_size)

    def unfreeze_projector(self, training: ProjectorTraining) -> None:
        """Set `requires_grad` of the projector's parameters, in place.

        Args:
            training: True or False sets all of them. With `last`, its last linear layer becomes
                trainable and the other parameters stay as they are; a projector without linear
                layers (Gemma 3: a matrix and a norm) is trained whole.
        """
        module = self.projector
        linear_layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        if training == "last" and linear_layers:
            module = linear_layers[-1]
        module.requires_grad_(bool(training))

    def train(self, mode: bool = True) -> Self:
        """Set all modules to training mode, or for False to evaluation mode; return `self`.

        The vision tower is always set to evaluation mode: the batch norms of the frozen tower must
        not learn from what passes. It is never in training mode, not even briefly, because the
        thread that prepares the next batch may be using it.
        """
        tower_modules = set(self.vision_tower.modules())
        for module in self.modules():
            module.training = mode and module not in tower_modules
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Store only the inputs of language-model layers; the backward pass recomputes the rest."""
        language_model: Any = self.language_model
        with silence_transformers():
            # The reentrant variant gives no gradient if a layer's input has none, as with LoRA
            # (https://github.com/huggingface/peft/issues/2880).
            language_model.gradient_checkpointing_enable({"use_reentrant": False})

    def save_pretrained(self, folder: Path) -> None:
        """Write the checkpoint to a folder: safetensors, config, tokenizer, image processor.

        The folder is created if needed, and files of the same names are replaced. The tokenizer's
        chat template becomes the only one. `processor_config.json` is copied from `self.folder`
        unless the new folder has one, and gets the present settings of the image processor.
        `self.folder` stays.
        """
        tensors = None if self.has_lm_head else self.model.state_dict()
        with silence_transformers():
            if tensors is not None:
                del tensors[LM_HEAD_NAME]
            self.model.save_pretrained(folder, state_dict=tensors)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        path = folder / "processor_config.json"
        if (self.folder / path.name).is_file() and not path.is_file():
            shutil.copy(self.folder / path.name, path)
        config = {}
        if path.is_file():
            config = read_json_object(path, error_class=ModelError, fix=COPY_AGAIN)
        # transformers reads both keys instead of chat_template.jinja and preprocessor_config.json.
        has_template = config.pop("chat_template", None) is not None
        if "image_processor" in config:
            config["image_processor"] = self.image_processor.to_dict()
        if has_template or "image_processor" in config:
            path.write_text(json.dumps(config, indent=2) + "\n")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode inside the block and restore its mode afterwards.

    The mode is restored after an error, too, by `model.train()`: for all submodules alike. A model
    already in evaluation mode is not touched: visiting its modules takes milliseconds.
    """
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def select_device() -> torch.device:
    """Return the current GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # With its index: the current device is a setting of each thread, and only the main thread's is
    # the one of this process.
    return torch.device("cuda", torch.cuda.current_device())


def load_backbone(
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
    ignores_code: bool = False,
) -> Backbone:
    """Open a local checkpoint folder and return its model, frozen and in evaluation mode.

    Only safetensors are read, no code of the checkpoint is ever run, and nothing is downloaded.

    Args:
        folder: folder with config.json and model*.safetensors.
        device: where the weights go; torch's own error if it is not available.
        dtype: default is float32 on a CPU; on a GPU bfloat16 if the checkpoint was saved in half
            precision, else float32.
        chat_template: chat template in place of the checkpoint's own.
        ignores_code: as of `read_config`.

    Raises:
        ModelError: not a checkpoint folder, an unknown family, remote code, pickled or broken
            files, or missing tensors other than the LM head.
    """
    config = read_config(folder, ignores_code=ignores_code)
    family_class = find_family(config.get("model_type", ""), folder)
    check_checkpoint(folder, config)
    if dtype is None:
        saved_dtype = str(config.get("dtype") or config.get("torch_dtype"))
        is_half = saved_dtype in ("float16", "bfloat16")
        is_gpu = torch.device(device).type != "cpu"
        dtype = torch.bfloat16 if is_half and is_gpu else torch.float32
    with translate_load_errors(folder):
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    family = family_class(model.config)
    tokenizer, image_processor = load_tokenizer_and_image_processor(
        folder, family, chat_template=chat_template
    )
    missing = sorted(report["missing_keys"] - {LM_HEAD_NAME})
    if missing:
        names = ", ".join(missing[:3])
        raise ModelError(f"{len(missing)} tensors are missing, such as {names}", place=folder)
    model.requires_grad_(False)
    _accept_inputs_embeds(model)
    backbone = Backbone(model.to(device).eval(), tokenizer, image_processor, folder=folder)
    backbone.has_lm_head = LM_HEAD_NAME not in report["missing_keys"]
    return backbone


def _accept_inputs_embeds(model: Any) -> None:
    """Let transformers' `generate` start from embeddings, by a new method of `model` in place.

    Its `prepare_inputs_for_generation` becomes a wrapper with the same behaviour whose signature
    names `inputs_embeds`; nothing is changed if it already does. `generate` looks for
    `inputs_embeds` in that signature, where Gemma's models have it among their `**kwargs`.
    """
    method = model.prepare_inputs_for_generation
    method_signature = signature(method)
    if "inputs_embeds" in method_signature.parameters:
        return
    *parameters, kwargs = method_signature.parameters.values()
    inputs_embeds = Parameter("inputs_embeds", Parameter.KEYWORD_ONLY, default=None)
    wrapper: Any = partial(method)
    wrapper.__signature__ = method_signature.replace(
        parameters=[*parameters, inputs_embeds, kwargs]
    )
    model.prepare_inputs_for_generation = wrapper
