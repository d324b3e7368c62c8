"""The door to transformers: a checkpoint folder -> `Backbone`, the five things that VLDuet needs of any VLM.

A backbone says how many tokens an image takes, what the vision tower makes of it (`vision`, usually frozen), how that enters
the language model (`projector`), and which modules are the trunk and the LM head. What differs between families is in
`families`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial
from inspect import Parameter, signature
from operator import attrgetter
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
from vlduet.model.families.registry import find_family
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

ProjectorTraining: TypeAlias = bool | Literal["last"]
"""What of a projector is trained: all, nothing, or its last linear layer alone."""


class Backbone(nn.Module):
    """A loaded checkpoint, seen through the same five parts whatever its family.

    Attributes:
        model: the transformers model, with its LM head.
        tokenizer, image_processor, processing: of the same folder.
        folder: where it was read from.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Tokenizer, image_processor: Any, *, folder: Path
    ):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.folder = folder
        self.family = find_family(model.config.model_type, folder)
        self.processor = Processor.build(
            self.family,
            model.config,
            model.generation_config,
            tokenizer=tokenizer,
            prepare_image=self.prepare_image,
        )

    @property
    def language_model(self) -> nn.Module:
        """The language model without its head: float[B, T, D] -> final hidden states, after the final norm."""
        return attrgetter(self.family.language_model_path)(self.model.model)  # type: ignore[no-any-return]

    @property
    def projector(self) -> nn.Module:
        """What `project` goes through."""
        return attrgetter(self.family.projector_path)(self.model.model)  # type: ignore[no-any-return]

    def project_vision_features(self, features: Tensor) -> Tensor:
        """Vision features float[tokens, Dv] -> float[tokens, D], in the projector's precision."""
        read = features[:, : self.vision_width]
        wide = read.to(next(self.projector.parameters()).dtype)
        return self.family.project(self.model.model, self.projector, wide)

    def attention_mask_inputs(self, batch: Batch) -> dict[str, Any]:
        """Attention masks for a trunk that would not make the right ones: of layers with a window, or whose images see each
        other (`Family.masks`).

        A kind of layers each, float[B, 1, T, T], 0 or the lowest number; a window counts from a token back.
        """
        kinds = self.family.attention_mask_kinds(self.model.config)
        if not kinds:
            return {}
        window = self.model.config.get_text_config().sliding_window
        near = batch.position_ids[:, None, :, None] - batch.position_ids[:, None, None, :] < window
        sees = {
            mutual: batch.block_causal_mask(bidirectional_images=mutual)
            for mutual in {*kinds.values()}
        }
        allowed = {
            k: sees[m] & near if k == "sliding_attention" else sees[m] for k, m in kinds.items()
        }
        none = torch.zeros((), dtype=self.model.dtype, device=near.device)
        lowest = torch.finfo(self.model.dtype).min
        return {
            "attention_mask": {
                kind: torch.where(mask, none, lowest) for kind, mask in allowed.items()
            }
        }

    def per_layer_inputs(self, ids: Tensor, image_mask: Tensor | None = None) -> dict[str, Any]:
        """What the trunk takes of words beside their embeddings: Gemma 4's tables for its layers. Where `image_mask`,
        bool[B, T], says so, there is none."""
        return dict(
            self.family.extra_inputs(
                self.language_model, ids if image_mask is None else ids.masked_fill(image_mask, -1)
            )
        )

    def deepstack_inputs(self, features: Tensor, image_mask: Tensor) -> dict[str, Any]:
        """What the trunk takes beside embeddings: features for its first layers, where the family has such (DeepStack)."""
        more = features[:, self.vision_width :]
        if not more.shape[1]:
            return {}
        return {
            "visual_pos_masks": image_mask,
            "deepstack_visual_embeds": list(more.split(self.hidden_size, 1)),
        }

    def resize_token_embeddings(self, min_rows: int) -> None:
        """Give the tables of words at least so many rows; the new ones are random."""
        known = len(self.token_embedding.weight)
        if min_rows > known:
            with silence_transformers():
                self.model.resize_token_embeddings(min_rows, mean_resizing=False)
            self.family.on_vocab_resize(self.language_model, known)

    def unfreeze_projector(self, training: ProjectorTraining) -> None:
        """Let it be trained or freeze it."""
        linear = [m for m in self.projector.modules() if isinstance(m, nn.Linear)]
        # Gemma's is a matrix and a norm: no layer of it is the last one.
        (linear[-1] if training == "last" and linear else self.projector).requires_grad_(
            bool(training)
        )

    @property
    def vision_width(self) -> int:
        """Dv, the width of the vision features that the projector reads."""
        return self.family.vision_width(self.projector)

    @property
    def vision_tower(self) -> nn.Module:
        """The vision tower."""
        return attrgetter(self.family.vision_tower_path)(self.model.model)  # type: ignore[no-any-return]

    @property
    def lm_head(self) -> nn.Linear:
        """Hidden states -> logits, before they are capped."""
        return self.model.get_output_embeddings()  # type: ignore[no-any-return]

    @property
    def logit_softcap(self) -> float | None:
        """c, where logits are c tanh(logits / c) behind the LM head."""
        return self.family.logit_softcap(self.model.config)

    def compute_logits(self, states: Tensor) -> Tensor:
        """What may follow hidden states, float[..., D] -> float[..., V]."""
        return softcap_logits(self.lm_head(states), self.logit_softcap)

    @property
    def token_embedding(self) -> nn.Embedding:
        """Token ids -> float[D]."""
        return self.model.get_input_embeddings()  # type: ignore[no-any-return]

    @property
    def pad_token_id(self) -> int:
        """The token that padding is made of; nothing sees it."""
        found = self.tokenizer.pad_token_id
        return 0 if found is None else int(found)

    @property
    def hidden_size(self) -> int:
        """D, the width of the trunk."""
        return int(self.token_embedding.weight.shape[1])

    @property
    def context_length(self) -> int | None:
        """The longest sequence that the trunk has positions for; None where its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.token_embedding.weight.device

    def train(self, mode: bool = True) -> Self:
        """As any module's, but the frozen tower is left in eval: its batch norms must not learn from what passes. Not for a
        moment is it in training, for the thread that lays out the next batch may be looking through it."""
        frozen = set(self.vision_tower.modules())
        for module in self.modules():
            module.training = mode and module not in frozen
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Keep only what enters every layer of the trunk; its backward computes the layer again (dropout replayed)."""
        trunk: Any = self.language_model
        with silence_transformers():
            # The reentrant variant gives no gradient where a layer's input has none: all of LoRA's (peft#2880).
            trunk.gradient_checkpointing_enable({"use_reentrant": False})

    def save_pretrained(self, folder: Path) -> None:
        """Write the checkpoint's own files: weights as safetensors, config, tokenizer, image processor."""
        with silence_transformers():
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        for name in ("processor_config.json", "chat_template.jinja"):
            if (self.folder / name).is_file() and not (folder / name).is_file():
                shutil.copy(self.folder / name, folder / name)
        processor = folder / "processor_config.json"
        told = json.loads(processor.read_text()) if processor.is_file() else {}
        if (
            "image_processor" in told
        ):  # it goes before preprocessor_config.json, which has our settings
            ours = told | {"image_processor": self.image_processor.to_dict()}
            processor.write_text(json.dumps(ours, indent=2) + "\n")

    def prepare_image(self, ref: ImageRef) -> PreparedImage:
        """Decode and preprocess one image. Raises ImageError where it cannot or must not be decoded."""
        inputs = preprocess_image(self.image_processor, ref, preprocess=self.family.preprocess)
        key = hashlib.sha256(
            f"{images.image_key(ref)}:{self.vision_fingerprint}".encode()
        ).hexdigest()
        return build_prepared_image(
            self.family, self.model.config, self.tokenizer, inputs=inputs, key=key
        )

    def vision_tower_pixels(self, prepared: PreparedImage) -> Tensor:
        """A prepared image as the tower sees it, float[3, H, W]: scaled, cropped, normalised."""
        return self.family.vision_tower_pixels(self.model.config, prepared.inputs)

    def overview_features(self, prepared: PreparedImage) -> slice:
        """Of an image's features those that stand for its `pixels`: not the ones of tiles that are cut out of it."""
        return self.family.overview_features(self.model.config, prepared.inputs)

    def compute_vision_features(self, prepared: list[PreparedImage]) -> Tensor:
        """The vision tower on several images -> float[total tokens, Dv]. No gradient: the tower is frozen.

        On a CPU one after the other, which is as fast: what is made of an image must not depend on its company in the last
        bit, or a run would not be the same again, whose images meet others when some are cached.
        """
        together = [[one] for one in prepared] if self.device.type == "cpu" else [prepared]
        return torch.cat([self._run_vision_tower(some) for some in together])

    @torch.no_grad()
    def _run_vision_tower(self, prepared: list[PreparedImage]) -> Tensor:
        names = prepared[0].inputs.keys()
        inputs = {
            name: torch.cat([p.inputs[name] for p in prepared]).to(self.device) for name in names
        }
        return self.family.vision_features(self.model, inputs)

    @property
    def vision_fingerprint(self) -> str:
        """Names what decides the vision features: processor settings, image backend, the tower's config and weights.

        Of every tensor of the tower some twenty values, spread evenly: reading all of a large tower takes seconds.
        """
        if not hasattr(self, "_vision_fingerprint"):
            tower = self.model.config.vision_config.to_json_string()
            what = f"{IMAGE_BACKEND}:{self.image_processor.to_json_string()}:{tower}"
            flat = [tensor.detach().flatten() for tensor in self.vision_tower.state_dict().values()]
            some = torch.cat([each[:: max(1, len(each) // 16)].cpu().double() for each in flat])
            self._vision_fingerprint = hashlib.sha256(
                what.encode() + some.numpy().tobytes()
            ).hexdigest()[:16]
        return self._vision_fingerprint


def select_device() -> torch.device:
    """The GPU where there is one."""
    # With its number: each thread has a current device of its own, and only the main one's is this process's.
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def load_backbone(
    folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Backbone:
    """Open a local checkpoint folder: safetensors only, no code of the checkpoint is ever run.

    Args:
        dtype: default is float32 on a CPU, and on a GPU bfloat16 for a checkpoint that was saved in half precision.

    Raises:
        ModelError: not a folder, an unknown family, remote code, pickled or broken files, or tensors that are missing.
    """
    config = read_config(folder)
    family = find_family(config.get("model_type", ""), folder)
    if not list(folder.glob("model*.safetensors")):
        raise ModelError(
            "no .safetensors weights",
            place=folder,
            fix="Convert the checkpoint: pickled weights are never read",
        )
    if dtype is None:
        half = str(config.get("dtype") or config.get("torch_dtype")) in ("float16", "bfloat16")
        dtype = torch.bfloat16 if half and torch.device(device).type != "cpu" else torch.float32
    with translate_load_errors(folder):
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    tokenizer, processor = load_tokenizer_and_image_processor(folder, family, model.config)
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelError(
            f"{len(report['missing_keys'])} tensors are missing, such as {some}", place=folder
        )
    model.requires_grad_(False)
    _take_embeddings(model)
    return Backbone(model.to(device).eval(), tokenizer, processor, folder=folder)


def _take_embeddings(model: Any) -> None:
    """transformers looks for `inputs_embeds` in a signature, where Gemma's has it among its `kwargs`."""
    own = model.prepare_inputs_for_generation
    told = signature(own)
    if "inputs_embeds" not in told.parameters:
        *named, rest = told.parameters.values()
        taken = Parameter("inputs_embeds", Parameter.KEYWORD_ONLY, default=None)
        model.prepare_inputs_for_generation = same = partial(own)
        same.__signature__ = told.replace(parameters=[*named, taken, rest])  # type: ignore[attr-defined]


FINGERPRINT_SAMPLE_BYTES, FINGERPRINT_STRIDE_BYTES = 1 << 12, 1 << 20
"""Bytes that a fingerprint reads of every tensor, and of each so many of it."""


def fingerprint_checkpoint(folder: Path) -> str:
    """Names a checkpoint by its config and kilobytes of every megabyte of every tensor, without reading gigabytes.

    Whatever trains a tensor moves nearly all of its numbers; merged adapters leave all other tensors as they were.
    Raises ModelError for weights that are not safetensors.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for weights in sorted(folder.glob("model*.safetensors")):
        with weights.open("rb") as file:
            digest.update(f"{weights.name}:{weights.stat().st_size}".encode())
            size = file.read(8)
            header = file.read(min(int.from_bytes(size, "little"), weights.stat().st_size))
            digest.update(header)
            start = len(size) + len(header)
            try:
                spans = [
                    facts["data_offsets"]
                    for name, facts in json.loads(header).items()
                    if name != "__metadata__"
                ]
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ModelError(
                    "not a safetensors file", place=weights, fix="Copy the checkpoint again"
                ) from error
            for begin, end in sorted(spans):
                for at in range(begin, end, FINGERPRINT_STRIDE_BYTES):
                    file.seek(start + at)
                    digest.update(file.read(min(end - at, FINGERPRINT_SAMPLE_BYTES)))
    return digest.hexdigest()[:16]
