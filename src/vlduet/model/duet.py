"""The model that both generates and embeds: one forward pass of the language model, two readings.

token ids, images -> token embeddings + projected vision features -> language model -> hidden states
                                             ├── at labels  -> LM head -> negative log-likelihoods
                                             └── at anchors -> pool -> head -> embeddings

This file holds the forward pass, its two readings and the trainable state. The other public methods
delegate to `embedding.py`, `likelihood.py`, `generation/` and `saving.py`.
"""

from __future__ import annotations

import math
from collections import abc
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from vlduet.data.batches import Batch, collate
from vlduet.data.records import ImageRef, Message
from vlduet.data.sequences import PreparedImage, Sequence
from vlduet.model import embedding, feature_cache, likelihood, saving
from vlduet.model.adapters import LoraSettings, enable_lora, load_lora, merge_lora
from vlduet.model.backbone import Backbone, ProjectorTraining
from vlduet.model.embedding import Embeddable
from vlduet.model.generation import interleave, offline, rerank
from vlduet.model.generation.inputs import build_prefill_inputs, require_lm_head
from vlduet.model.limits import DEFAULT_MAX_TOKENS, Limits, TruncationCallback
from vlduet.model.pooling import (
    EmbeddingHead,
    Readout,
    find_supervised_positions,
    merge_vision_embeddings,
    pool_hidden_states,
)
from vlduet.model.processing import IMAGE_BACKEND
from vlduet.model.prompts import Prompts, Renderer
from vlduet.model.score_statistics import ScoreStatistics
from vlduet.model.soft_prompts import ROWS_TENSOR_NAME, SoftPrompts, init_soft_prompts
from vlduet.objectives.language import compute_token_nll

INITIAL_TEMPERATURE = 0.07
"""Temperature of the contrastive loss before training."""


class DuetModel(nn.Module):
    """A vision-language checkpoint with an embedding head, a temperature and embedding prompts.

    Attributes:
        feature_cache: cache of vision features, in memory unless it is replaced.
        renderer: renderer of sequences, used by recipes.
        soft_prompts: trained prompt tokens; None without any.
        logit_scale: log of 1 / temperature, float32[].
    """

    image_backend = IMAGE_BACKEND
    """Name of the library that decodes and resizes images."""
    score_statistics: ScoreStatistics | None = None
    """Scores of unrelated contents; None if they are not known, as after a change of the model."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        prompts: Prompts,
        head: str = "none",
        dim: int = 384,
        max_tokens: int = DEFAULT_MAX_TOKENS,
    ):
        """Wrap a loaded checkpoint; no parameter is frozen or unfrozen.

        Args:
            backbone: the checkpoint, not copied. If it has half precision, its projector is
                converted to float32 in place.
            prompts: presentation of contents for an embedding.
            head: kind of the embedding head, `mlp`, `linear`, `none` or `split` (see
                `EmbeddingHead`), initialised by torch's global generator.
            dim: E, width of the embeddings; the head `none` has the language model's width instead.
            max_tokens: longest sequence; texts are cut to it, images never.
        """
        super().__init__()
        self.backbone = backbone
        if backbone.model.dtype in (torch.float16, torch.bfloat16):
            # Trained tensors are never in half precision: small optimizer steps would be lost.
            backbone.projector.float()
        self.reset_head(head, dim)
        initial_scale = torch.tensor(math.log(1 / INITIAL_TEMPERATURE), device=backbone.device)
        self.logit_scale = nn.Parameter(initial_scale)
        self.soft_prompts: SoftPrompts | None = None
        # A list hides the wrapper from torch, which would see every layer of the backbone twice.
        self._peft_model: list[Any] = []
        self.feature_cache = feature_cache.FeatureCache(None)
        processor = replace(backbone.processor, prepare_image=self.prepare_image)
        self.renderer = Renderer(processor, prompts=prompts, max_tokens=max_tokens)
        self._prepared_images: dict[feature_cache.ImageVersion, PreparedImage] = {}

    # ------------------------------------------------------------------ forward pass and readings

    def forward(self, batch: Batch) -> Readout:
        """Run the language model once over a batch and read it at anchors and labels.

        It runs in the model's present mode (train or eval). Vision features carry no gradient; they
        are taken from `feature_cache`, or computed and stored there.

        Returns:
            The embeddings of all A anchors, float[A, E], and the negative log-likelihoods of all S
            labels, float[S], with their graph. Either may be empty; labels need an LM head.
        """
        is_vision = self.vision_anchor_mask(batch)
        text_batch = batch if is_vision is None else batch.drop_anchors(is_vision)
        hidden = self.hidden_states(text_batch)  # [B, T, D]
        embeddings = self.embed_anchors(batch, hidden, text_batch.anchor_spans)
        rows, columns = find_supervised_positions(text_batch.labels)
        if len(rows):
            require_lm_head(self.backbone)
        nll = compute_token_nll(
            hidden[rows, columns - 1],
            self.lm_head_weight,
            text_batch.labels[rows, columns],
            bias=self.lm_head_bias,
            logit_softcap=self.backbone.logit_softcap,
        )
        return Readout(embeddings, batch.anchors, nll)

    def hidden_states(self, batch: Batch) -> Tensor:
        """Return the hidden states float[B, T, D] after the final norm.

        They equal `last_hidden_state` of the base model in transformers, so a server of the same
        checkpoint computes the same embeddings. Without rows, the language model does not run and
        the result is an empty float32 tensor. Raises as `language_model_inputs`.
        """
        if not len(batch.token_ids):
            return self.logit_scale.new_zeros(*batch.token_ids.shape, self.backbone.hidden_size)
        inputs = {"attention_mask": batch.attention_mask(), "position_ids": batch.position_ids}
        inputs |= self.language_model_inputs(batch)  # a family may replace the attention mask
        outputs = self.backbone.language_model(**inputs, use_cache=False)
        return outputs.last_hidden_state  # type: ignore[no-any-return]

    def language_model_inputs(self, batch: Batch, *, num_past: int = 0) -> dict[str, Any]:
        """Return keyword arguments of the language model for a batch, without its position ids.

        The batch follows `num_past` tokens in a key-value cache.

        Returns:
            `inputs_embeds`, float[B, T, D]: token embeddings with projected vision features at
            image tokens; and what the family adds, such as attention masks or DeepStack features.

        Raises:
            ModelError: the language model attends to later text and cannot generate (Gemma 4).
        """
        table = self.backbone.token_embedding
        if self.soft_prompts is None:
            embeddings: Tensor = table(batch.token_ids)
        else:
            embeddings = self.soft_prompts(batch.token_ids, table)
        inputs = self.backbone.attention_mask_inputs(batch, num_past=num_past)
        inputs |= self.backbone.per_layer_inputs(batch.token_ids, batch.image_mask)
        if batch.images:
            features = self.vision_features(list(batch.images))
            projected = self.backbone.project_vision_features(features).to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(batch.image_mask[..., None], projected)
            inputs |= self.backbone.deepstack_inputs(features, batch.image_mask)
        return {"inputs_embeds": embeddings, **inputs}

    def vision_features(self, prepared: list[PreparedImage]) -> Tensor:
        """Return the projector's input float[tokens, Dv] for images, concatenated in order.

        At least one image is required. Each distinct image that is not cached goes through the
        vision tower once, and its features are stored in the cache.
        """
        features = feature_cache.compute_features(
            prepared, self.feature_cache, self.backbone.compute_vision_features
        )
        return torch.cat([image_features.to(self.backbone.device) for image_features in features])

    def embed_anchors(self, batch: Batch, hidden: Tensor, spans: Tensor) -> Tensor:
        """Return the embeddings float[A, E], unit length, of all anchors of a batch, in order.

        Args:
            batch: the whole batch. Its images are read only if some of its anchors are embedded by
                the vision tower (`vision_anchor_mask`), which requires a `split` head.
            hidden: float[B', T, D], hidden states of the rows that the language model has read.
            spans: int64[a, 3], spans in `hidden` of the other anchors, in their order.
        """
        pooled = pool_hidden_states(hidden, spans, dtype=self.logit_scale.dtype)
        embeddings: Tensor = self.head(pooled)
        is_vision = self.vision_anchor_mask(batch)
        if is_vision is None or not is_vision.any():
            return embeddings
        features = self.vision_features(list(batch.images))
        return merge_vision_embeddings(
            embeddings, self.head, batch, is_vision=is_vision, features=features
        )

    def vision_anchor_mask(self, batch: Batch) -> Tensor | None:
        """Return bool[A], True at anchors whose embedding comes from the vision tower alone.

        They start on an image token. None unless `prompts.image_pool` is `vision`.
        """
        if self.prompts.image_pool != "vision":
            return None
        rows, starts, _ = batch.anchor_spans.unbind(1)
        return batch.image_mask[rows, starts]

    @property
    def lm_head_weight(self) -> Tensor:
        """Weight of the LM head, float[V, D], without the soft prompt tokens."""
        weight = self.backbone.lm_head.weight
        return weight if self.soft_prompts is None else weight[: self.soft_prompts.first_token_id]

    @property
    def lm_head_bias(self) -> Tensor | None:
        """Bias of the LM head, float[V]; None without one."""
        bias = self.backbone.lm_head.bias
        return None if bias is None else bias[: len(self.lm_head_weight)]

    # ------------------------------------------------------------------ inputs

    def prepare_image(self, ref: ImageRef) -> PreparedImage:
        """Return an image ready for the vision tower.

        An image in a file with unchanged size and time of modification whose features are cached is
        neither decoded nor preprocessed again; it has those features as inputs instead of pixels.
        Images that are only bytes are always decoded.

        Raises:
            ImageError, ModelError: as `Backbone.prepare_image`.
        """
        versions, preprocess = self._prepared_images, self.backbone.prepare_image
        return feature_cache.prepare_image(
            ref, self.feature_cache, by_version=versions, preprocess=preprocess
        )

    def collate(
        self, sequences: list[Sequence], *, padding_side: str = "right", pack_to: int | None = None
    ) -> Batch:
        """Return a batch of sequences on the model's device (see `data.batches.collate`)."""
        pad_id = self.backbone.pad_token_id
        batch = collate(sequences, pad_token_id=pad_id, padding_side=padding_side, pack_to=pack_to)
        return batch.to(self.backbone.device)

    @property
    def prompts(self) -> Prompts:
        """Presentation of contents for an embedding; `set_prompts` changes it."""
        return self.renderer.prompts

    def set_prompts(self, prompts: Prompts) -> None:
        """Replace the embedding prompts; earlier embeddings are not comparable with later ones."""
        self.renderer = self.renderer.with_options(prompts=prompts)
        self.score_statistics = None

    @property
    def limits(self) -> Limits:
        """Limits of sequences and images, which are saved with the model."""
        return Limits(self.renderer.max_tokens, self.backbone.max_image_tokens)

    @property
    def max_text_tokens(self) -> int:
        """Longest content in tokens, with those of its prompt, that is embedded without a cut."""
        return self.renderer.max_tokens

    @property
    def dim(self) -> int:
        """E, the width of the embeddings."""
        return self.head.dim

    # ------------------------------------------------------------------ trainable state

    def reset_head(self, kind: str, dim: int) -> None:
        """Replace the embedding head by a new `EmbeddingHead`, initialised by torch's generator."""
        head = EmbeddingHead(
            kind, self.backbone.hidden_size, dim, vision_width=self.backbone.vision_width
        )
        self.head = head.to(self.backbone.device)

    def make_trainable(
        self,
        *,
        lora: LoraSettings | None,
        projector: ProjectorTraining,
        head: bool = True,
        soft_prompts: bool = False,
    ) -> None:
        """Freeze all parameters but the requested ones, in place; the mode (train, eval) stays.

        Args:
            lora: train the adapter, which is added if there is none; None adds and trains none.
            projector: train the projector, or only its `last` linear layer.
            head: train the embedding head and the temperature.
            soft_prompts: train soft prompts. If the model has none, they are created from the
                current prompts and replace them, and the tokenizer gets their tokens.

        Raises:
            ConfigError: the existing adapter has other settings than `lora`, its `targets` are
                unknown, the language model has none of its layers, or the prompts have no tokens.
        """
        self.score_statistics = None
        if soft_prompts and self.soft_prompts is None:
            self.soft_prompts, prompts = init_soft_prompts(self.renderer, self.backbone)
            self.set_prompts(prompts)
        self.requires_grad_(False)
        if self.soft_prompts is not None:
            self.soft_prompts.requires_grad_(soft_prompts)
        if lora is not None:
            self._peft_model = [enable_lora(self.backbone, lora, self.peft_model)]
        self.backbone.unfreeze_projector(projector)
        self.head.requires_grad_(head)
        self.logit_scale.requires_grad_(head)

    @property
    def peft_model(self) -> Any:
        """PEFT's wrapper of the backbone's model; None without an adapter."""
        return self._peft_model[0] if self._peft_model else None

    def load_adapter(self, folder: Path) -> None:
        """Attach a saved LoRA adapter, frozen; effects and errors are those of `load_lora`."""
        self._peft_model = [load_lora(self.backbone, folder)]

    def merge_adapter(self) -> None:
        """Merge the trained parts into the backbone's weights, in place.

        The adapter is removed. Rows of soft prompts are copied into the embedding table, which
        grows if needed, and `soft_prompts` stays. Without either, nothing changes.
        """
        if self.peft_model is not None:
            merge_lora(self.peft_model)
            self._peft_model = []
        if self.soft_prompts is not None:
            self.soft_prompts.fold_into_embedding(self.backbone)

    def own_tensors(self) -> dict[str, Tensor]:
        """Return projector, head, temperature and soft prompts by their names in saved models.

        Names are `projector.NAME`, `head.NAME`, ROWS_TENSOR_NAME (only with soft prompts) and
        `logit_scale`. The tensors are the parameters themselves; base and adapter are left out.
        """
        tensors: dict[str, Tensor] = dict(self.backbone.projector.named_parameters("projector"))
        tensors |= self.head.named_parameters("head")
        if self.soft_prompts is not None:
            tensors[ROWS_TENSOR_NAME] = self.soft_prompts.rows
        return tensors | {"logit_scale": self.logit_scale}

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Return the LoRA matrices (the parameters themselves) by name."""
        parameters = self.backbone.model.named_parameters()
        return {name: parameter for name, parameter in parameters if "lora_" in name}

    def embedding_settings(self) -> dict[str, Any]:
        """Return what embeddings depend on beside tensors (see `saving.describe_embedding`)."""
        return saving.describe_embedding(self)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that an embedding depends on (`saving.compute_model_fingerprint`)."""
        return saving.compute_model_fingerprint(self)

    # ------------------------------------------------------------------ embedding and likelihood

    encode = embedding.encode
    embed_sequences = embedding.embed_sequences

    def encode_query(
        self, items: abc.Sequence[Embeddable], *, on_truncate: TruncationCallback | None = None
    ) -> np.ndarray:
        """Return the embeddings float32[N, E] of queries (see `embedding.encode`)."""
        return embedding.encode(self, items, is_query=True, on_truncate=on_truncate)

    def encode_document(
        self, items: abc.Sequence[Embeddable], *, on_truncate: TruncationCallback | None = None
    ) -> np.ndarray:
        """Return the embeddings float32[N, E] of documents (see `embedding.encode`)."""
        return embedding.encode(self, items, on_truncate=on_truncate)

    @staticmethod
    def similarity(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Return the cosines float32[Q, N] of unit vectors float32[Q, E] and float32[N, E]."""
        return np.asarray(queries @ documents.T)

    def compute_sequence_nll(self, sequences: list[Sequence]) -> list[tuple[float, int]]:
        """Return (total nats, number of labels) of each sequence (see `likelihood`)."""
        return likelihood.compute_sequence_nll(self, sequences)

    def compute_caption_nll(
        self, pairs: abc.Sequence[tuple[ImageRef, str]], *, batch_size: int = 32
    ) -> list[tuple[float, int]]:
        """Return (total nats, number of tokens) of each caption (see `likelihood`)."""
        return likelihood.compute_caption_nll(self, pairs, batch_size=batch_size)

    # ------------------------------------------------------------------ generation

    def generate(
        self,
        messages: abc.Sequence[Message],
        *,
        max_new_tokens: int = 128,
        stream: bool = False,
        temperature: float = 0.0,
    ) -> str | abc.Iterator[str]:
        """Return the model's answer to a conversation, without surrounding whitespace.

        It may be empty. The backbone is in evaluation mode, without gradients, meanwhile.

        Args:
            messages: turns in order, the last one of the user.
            max_new_tokens: longest answer in tokens, at which it is cut.
            stream: return an iterator over non-empty pieces instead, not stripped at the end.
                The prompt's images are encoded at once; tokens are generated as it is advanced.
            temperature: 0 is greedy; else tokens are sampled from torch's global generator.

        Raises:
            DataError, ImageError, ConfigError: as `Renderer.render_chat`.
            ModelError, ValueError: by the iterator with `stream`; the logits are not finite, or
                `max_new_tokens` is below 1.
        """
        prompt = self.renderer.render_chat(tuple(messages), add_generation_prompt=True)
        inputs = self.prefill_inputs([prompt])
        pieces = offline.stream_text(self.backbone, inputs, max_new_tokens, temperature=temperature)
        return pieces if stream else "".join(pieces).strip()

    def caption_images(
        self,
        images: abc.Sequence[ImageRef],
        *,
        prompt: str = "",
        max_new_tokens: int = 32,
        batch_size: int = 32,
        num_drafts: int = 1,
    ) -> list[str]:
        """Return one caption for each image (see `generation.rerank.caption_images`)."""
        return rerank.caption_images(
            self,
            images,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            num_drafts=num_drafts,
        )

    prefill_inputs = build_prefill_inputs
    interleave = interleave.interleave

    # ------------------------------------------------------------------ saving and opening

    def save_pretrained(
        self, folder: Path | str, *, provenance: abc.Mapping[str, Any] | None = None
    ) -> None:
        """Write a model folder that refers to its base (see `saving.save_pretrained`)."""
        saving.save_pretrained(self, folder, provenance=provenance)

    def save_merged(
        self, folder: Path | str, *, provenance: abc.Mapping[str, Any] | None = None
    ) -> None:
        """Merge this model and write a folder for plain transformers (see `saving.save_merged`)."""
        saving.save_merged(self, folder, provenance=provenance)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        check_golden: saving.GoldenCheck = True,
        prompts: Prompts | None = None,
        max_tokens: int | None = None,
        max_image_tokens: int | None = None,
    ) -> Self:
        """Open a model folder, or wrap a Hugging Face checkpoint, in evaluation mode.

        Args:
            folder: model folder, checkpoint of a known family, or published embedding model.
            device: None is the GPU if there is one.
            dtype: of language model and vision tower; projector, head and adapter have float32.
                None is float32 on a CPU, and bfloat16 on a GPU for a checkpoint that was saved in
                half precision.
            check_golden: compare embeddings of fixed inputs with those at saving (`open_model`).
            prompts: prompts for a checkpoint, by default VladVA's; a model folder has its own.
            max_tokens: longest sequence; None: as saved, or 2,048 (`Limits.from_manifest`).
            max_image_tokens: most tokens of an image; None: as saved, or 1,536 for a checkpoint.

        Raises:
            ModelError: no model, a broken or changed file, a missing base, or other golden vectors.
        """
        return saving.open_model(
            cls,
            folder,
            device=device,
            dtype=dtype,
            check_golden=check_golden,
            prompts=prompts,
            max_tokens=max_tokens,
            max_image_tokens=max_image_tokens,
        )
