"""The model that both generates and embeds: one forward of the trunk, read at labels and at anchors.

ids, images -> token embeddings + projected vision features -> trunk -> hidden states
                                                                  ├── at labels  -> negative log likelihoods
                                                                  └── at anchors -> pool -> head -> embeddings
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from vlduet.data import prefix_sharing
from vlduet.data.batches import (
    FORWARD_MAX_TOKENS,
    PACKED_ROW_TOKENS,
    Batch,
    collate,
    group_by_length,
)
from vlduet.data.records import ImageRef, Message, Part, Parts, as_parts
from vlduet.data.sequences import IGNORE_INDEX, PreparedImage, Sequence
from vlduet.errors import ModelError
from vlduet.files import recover_folder, replace_folder_atomically
from vlduet.model import checkpoint
from vlduet.model.adapters import LoraSettings, enable_lora, load_lora, merge_lora, save_lora
from vlduet.model.backbone import (
    Backbone,
    ProjectorTraining,
    eval_mode,
    fingerprint_checkpoint,
    load_backbone,
    select_device,
)
from vlduet.model.feature_cache import (
    FeatureCache,
    attach_cached_features,
    compute_features,
    get_file_version,
)
from vlduet.model.generation import continuous, rerank
from vlduet.model.generation.inputs import PrefillInputs, build_prefill_inputs
from vlduet.model.pooling import (
    EmbeddingHead,
    Readout,
    find_supervised_positions,
    merge_vision_embeddings,
    pool_hidden_states,
)
from vlduet.model.processing import IMAGE_BACKEND
from vlduet.model.prompts import Prompts, Renderer
from vlduet.model.soft_prompts import ROWS_TENSOR_NAME, SoftPrompts, init_soft_prompts
from vlduet.objectives.language import compute_token_nll

Embeddable = Part | Parts
"""What can be embedded: a text, an image, or several of both in order."""

ProgressCallback = Callable[[int], None] | None
"""Is told how many items were done since the last call."""

INITIAL_TEMPERATURE = 0.07


class DuetModel(nn.Module):
    """A backbone, an embedding head, a temperature, and the prompts that decide what is embedded.

    Args:
        backbone: a loaded checkpoint.
        prompts: how content is presented for an embedding.
        head: `mlp`, `linear` or `none`; dim: width of the embeddings (ignored by `none`).
    """

    def __init__(self, backbone: Backbone, *, prompts: Prompts, head: str = "none", dim: int = 384):
        super().__init__()
        self.backbone = backbone
        if backbone.model.dtype in (torch.float16, torch.bfloat16):
            backbone.projector.float()  # what is trained is never in half precision: small steps would be lost
        self.reset_head(head, dim)
        self.logit_scale = nn.Parameter(
            torch.tensor(math.log(1 / INITIAL_TEMPERATURE), device=backbone.device)
        )
        self.prompts = prompts
        self.soft_prompts: SoftPrompts | None = None
        self._peft: list[
            Any
        ] = []  # a list hides it from torch, which would see every layer of the backbone twice
        self.feature_cache = FeatureCache(None)
        self.renderer = Renderer(
            replace(backbone.processor, prepare_image=self.prepare_image), prompts=prompts
        )
        self._known: dict[tuple[str, int, int], PreparedImage] = {}

    def reset_head(self, kind: str, dim: int) -> None:
        """A new embedding head, of random weights."""
        head = EmbeddingHead(
            kind, self.backbone.hidden_size, dim, vision_width=self.backbone.vision_width
        )
        self.head = head.to(self.backbone.device)

    def set_prompts(self, prompts: Prompts) -> None:
        """Present content otherwise from now on; embeddings of before and after do not compare."""
        self.prompts = self.renderer.prompts = prompts

    # ------------------------------------------------------------------ the forward and its two readings

    def forward(self, batch: Batch) -> Readout:
        """One forward of the trunk over a padded or packed batch, read twice."""
        tower = self.vision_anchor_mask(batch)
        inner = batch if tower is None else batch.drop_anchors(tower)
        hidden = self.hidden_states(inner)  # [B, T, D]
        rows, at = find_supervised_positions(inner.labels)
        hidden_at, wanted, cap = (
            hidden[rows, at - 1],
            inner.labels[rows, at],
            self.backbone.logit_softcap,
        )
        nll = compute_token_nll(
            hidden_at, self.lm_head_weight, wanted, bias=self.lm_head_bias, logit_softcap=cap
        )
        return Readout(self.embed_anchors(batch, hidden, inner.anchor_spans), batch.anchors, nll)

    def vision_anchor_mask(self, batch: Batch) -> Tensor | None:
        """bool[A]: the anchors that are read from the vision tower, without the trunk; None where no prompt says so."""
        rows, starts, _ = batch.anchor_spans.unbind(1)
        return batch.image_mask[rows, starts] if self.prompts.image_pool == "vision" else None

    def embed_anchors(self, batch: Batch, hidden: Tensor, spans: Tensor) -> Tensor:
        """Embeddings of all anchors, float[A, E]; those that are not read in the tower stand at `spans` of `hidden`."""
        tower = self.vision_anchor_mask(batch)
        found: Tensor = self.head(pool_hidden_states(hidden, spans, dtype=self.logit_scale.dtype))
        if tower is None or not tower.any():
            return found
        return merge_vision_embeddings(
            found, self.head, batch, at=tower, features=self.vision_features(list(batch.images))
        )

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final hidden states float[B, T, D], after the final norm: what a server of the same checkpoint computes."""
        if not len(batch.token_ids):
            return self.logit_scale.new_zeros(*batch.token_ids.shape, self.backbone.hidden_size)
        given = {
            "attention_mask": batch.attention_mask(),
            "position_ids": batch.position_ids,
        } | self.language_model_inputs(batch)
        return self.backbone.language_model(**given, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    def language_model_inputs(self, batch: Batch) -> dict[str, Any]:
        """Token embeddings with the projected image features in their places, float[B, T, D], and what goes beside them."""
        table = self.backbone.token_embedding
        embeddings: Tensor = (
            table(batch.token_ids)
            if self.soft_prompts is None
            else self.soft_prompts(batch.token_ids, table)
        )
        more = self.backbone.attention_mask_inputs(batch) | self.backbone.per_layer_inputs(
            batch.token_ids, batch.image_mask
        )
        if batch.images:
            features = self.vision_features(list(batch.images))
            projected = self.backbone.project_vision_features(features).to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(batch.image_mask[..., None], projected)
            more |= self.backbone.deepstack_inputs(features, batch.image_mask)
        return {"inputs_embeds": embeddings, **more}

    @property
    def lm_head_weight(self) -> Tensor:
        """The LM head, float[V, D]; learned prompt tokens are no words that can follow."""
        weight = self.backbone.lm_head.weight
        return weight if self.soft_prompts is None else weight[: self.soft_prompts.first_token_id]

    @property
    def lm_head_bias(self) -> Tensor | None:
        """Its bias, float[V]."""
        return (
            None
            if (bias := self.backbone.lm_head.bias) is None
            else bias[: len(self.lm_head_weight)]
        )

    def vision_features(self, prepared: list[PreparedImage]) -> Tensor:
        """What the projector reads, float[tokens, Dv]; each distinct image goes through the tower once."""
        found = compute_features(
            prepared, self.feature_cache, self.backbone.compute_vision_features
        )
        return torch.cat([features.to(self.backbone.device) for features in found])

    def prepare_image(self, ref: ImageRef) -> PreparedImage:
        """An image for the renderer. One whose features are cached is neither decoded nor preprocessed again."""
        version = get_file_version(ref.path)
        known = self._known.get(version) if version else None
        found = known and attach_cached_features(known, self.feature_cache)
        prepared = found or self.backbone.prepare_image(ref)
        if version:
            self._known[version] = replace(prepared, inputs={})
        return prepared

    # ------------------------------------------------------------------ embedding

    @torch.no_grad()
    def encode(
        self,
        items: Many[Embeddable],
        *,
        is_query: bool = False,
        batch_tokens: int = FORWARD_MAX_TOKENS,
        progress: ProgressCallback = None,
    ) -> np.ndarray:
        """Embed texts, images and mixtures.

        Args:
            items: each a text, an ImageRef, or a tuple of both.
            query: True for the asking side, where the prompts distinguish it.
            batch_tokens: tokens of one forward; items are batched by length, and short ones packed into rows.

        Returns:
            float32[N, E], unit length, in the order of `items`.

        Raises:
            DataError, ImageError: an item that cannot be embedded; nothing is skipped silently.
        """
        vectors = np.empty((len(items), self.dim), dtype=np.float32)
        with eval_mode(self):
            for begin in range(
                0, len(items), 512
            ):  # bounds the decoded images that live at one time
                rows = enumerate(items[begin : begin + 512], begin)
                sequences = [
                    self.renderer.render_embedding(
                        as_parts(item), is_query=is_query, record_name=str(n)
                    )
                    for n, item in rows
                ]
                for chosen in group_by_length([len(s) for s in sequences], batch_tokens):
                    batch = self.collate(
                        [sequences[i] for i in chosen],
                        pack_to=max(PACKED_ROW_TOKENS, len(sequences[chosen[-1]])),
                    )
                    vectors[[int(a.record_name) for a in batch.anchors]] = (
                        self(batch).embeddings.float().cpu().numpy()
                    )
                    if progress:
                        progress(len(chosen))
        return vectors

    def encode_query(
        self,
        items: Many[Embeddable],
        *,
        batch_tokens: int = FORWARD_MAX_TOKENS,
        progress: ProgressCallback = None,
    ) -> np.ndarray:
        """`encode` for the asking side."""
        return self.encode(items, is_query=True, batch_tokens=batch_tokens, progress=progress)

    def encode_document(
        self,
        items: Many[Embeddable],
        *,
        batch_tokens: int = FORWARD_MAX_TOKENS,
        progress: ProgressCallback = None,
    ) -> np.ndarray:
        """`encode` for what is searched."""
        return self.encode(items, is_query=False, batch_tokens=batch_tokens, progress=progress)

    @staticmethod
    def similarity(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Cosine of unit vectors, float32[Q, N]."""
        return np.asarray(queries @ documents.T)

    def collate(
        self, sequences: list[Sequence], *, padding_side: str = "right", pack_to: int | None = None
    ) -> Batch:
        """A batch on the model's device."""
        return collate(
            sequences, pad_token_id=self.backbone.pad_token_id, padding_side=padding_side, pack_to=pack_to
        ).to(self.backbone.device)

    @property
    def dim(self) -> int:
        """E, the width of the embeddings."""
        return self.head.dim

    @property
    def image_backend(self) -> str:
        """The library that decodes and resizes images."""
        return IMAGE_BACKEND

    # ------------------------------------------------------------------ generation

    def generate(
        self,
        messages: Many[Message],
        *,
        max_new_tokens: int = 128,
        stream: bool = False,
        temperature: float = 0.0,
    ) -> str | Iterator[str]:
        """Answer a conversation.

        Args:
            messages: turns, the last one the user's.
            stream: True returns an iterator of text pieces.
            temperature: 0 is greedy.
        """
        start = self.prefill_inputs(
            [self.renderer.render_chat(tuple(messages), add_generation_prompt=True)]
        )
        if stream:
            return continuous.stream_text(
                self.backbone, start, max_new_tokens, temperature=temperature
            )
        return continuous.generate_texts(
            self.backbone, start, max_new_tokens, temperature=temperature
        )[0]

    def caption_images(
        self,
        images: Many[ImageRef],
        *,
        prompt: str = "",
        max_new_tokens: int = 32,
        batch_size: int = 32,
        num_drafts: int = 1,
    ) -> list[str]:
        """Captions: the answer to `prompt`, or without one what follows the image's embedding prompt.

        Args:
            drafts: 1 is greedy; of several, by a beam search, the one nearest to the image by embedding is taken; 0 is none.
            known: texts and their vectors (`encode_query`); the nearest of all is taken where no draft is as near.
        """
        return rerank.caption_images(
            self,
            images,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            num_drafts=num_drafts,
        )

    def prefill_inputs(self, sequences: list[Sequence]) -> PrefillInputs:
        """Return one batch of left-padded prompts; see `build_prefill_inputs`."""
        return build_prefill_inputs(self, sequences)

    def compute_caption_nll(
        self, pairs: Many[tuple[ImageRef, str]], *, batch_size: int = 32
    ) -> list[tuple[float, int]]:
        """(negative log likelihood in nats, tokens) of each caption after its image, end of text included."""
        groups = (pairs[begin : begin + batch_size] for begin in range(0, len(pairs), batch_size))
        return [
            one
            for group in groups
            for one in self.compute_sequence_nll(
                [self.renderer.render_caption(*pair) for pair in group]
            )
        ]

    @torch.no_grad()
    def compute_sequence_nll(self, sequences: list[Sequence]) -> list[tuple[float, int]]:
        """(negative log likelihood in nats, tokens) of what each sequence supervises. What neighbours share is read once."""
        found = [(0.0, 0)] * len(sequences)
        with eval_mode(self):
            for chosen, rows in prefix_sharing.group_rows(sequences, FORWARD_MAX_TOKENS):
                batch = prefix_sharing.collate_shared_prefixes(
                    rows, pad_token_id=self.backbone.pad_token_id
                ).to(self.backbone.device)
                counts = [
                    sum(label != IGNORE_INDEX for label in sequences[i].labels) for i in chosen
                ]
                for i, part in zip(
                    chosen, self(batch).nll.double().cpu().split(counts), strict=True
                ):
                    found[i] = (float(part.sum()), len(part))
        return found

    # ------------------------------------------------------------------ what is trained, and keeping it

    def make_trainable(
        self,
        *,
        lora: LoraSettings | None,
        projector: ProjectorTraining,
        head: bool = True,
        soft_prompts: bool = False,
    ) -> None:
        """Freeze everything, then open what is asked for; adds LoRA layers, and soft prompts, where there are none yet."""
        if soft_prompts and self.soft_prompts is None:
            self.soft_prompts = init_soft_prompts(self.renderer, self.backbone)
            self.prompts = self.renderer.prompts
        self.requires_grad_(False)
        if self.soft_prompts is not None:
            self.soft_prompts.requires_grad_(soft_prompts)
        if lora is not None:
            self._peft = [enable_lora(self.backbone, lora, self.peft_model)]
        self.backbone.unfreeze_projector(projector)
        self.head.requires_grad_(head)
        self.logit_scale.requires_grad_(head)

    @property
    def peft_model(self) -> Any:
        """PEFT's view of the model with its adapter; None without one."""
        return self._peft[0] if self._peft else None

    def own_tensors(self) -> dict[str, Tensor]:
        """Everything beside the base and the adapter: projector, head, temperature, soft prompts."""
        named: dict[str, Tensor] = {
            f"projector.{n}": p for n, p in self.backbone.projector.named_parameters()
        }
        named |= {f"head.{n}": p for n, p in self.head.named_parameters()}
        named |= {} if self.soft_prompts is None else {ROWS_TENSOR_NAME: self.soft_prompts.rows}
        return named | {"logit_scale": self.logit_scale}

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The LoRA matrices, by their name in the model."""
        return {n: p for n, p in self.backbone.model.named_parameters() if "lora_" in n}

    def embedding_settings(self) -> dict[str, Any]:
        """What decides an embedding beside the tensors, as it stands in the manifest."""
        return {
            "prompts": self.prompts.to_dict(),
            "head": {"kind": self.head.kind, "dim": self.head.dim},
        }

    @property
    def fingerprint(self) -> str:
        """Names everything that decides an embedding: base, trained tensors, prompts, head and image backend."""
        base = fingerprint_checkpoint(self.backbone.folder)
        return checkpoint.compute_fingerprint(
            self.embedding_settings(), base, {**self.own_tensors(), **self.adapter_tensors()}
        )

    def compute_golden_vectors(self) -> Tensor:
        """Embeddings float32[3, E] of a fixed text, image and mixture."""
        return torch.from_numpy(self.encode(checkpoint.make_golden_inputs()))

    def save_pretrained(
        self, folder: Path | str, *, provenance: Mapping[str, Any] | None = None
    ) -> None:
        """Write a model folder, whole or not at all: trained tensors and adapter beside a reference to the base.

        Args:
            provenance: what made this model (config, data, commit); kept in the manifest.

        Raises ModelError for the base's own folder, ConfigError for one with something else in it.
        """
        if Path(folder).resolve() == self.backbone.folder.resolve():
            raise ModelError(
                "this folder is the model's base",
                place=folder,
                fix="Save elsewhere, or save it merged",
            )
        with replace_folder_atomically(Path(folder), marker=checkpoint.MANIFEST_NAME) as inside:
            self._write(inside, base=self.backbone.folder, provenance=provenance or {})

    def save_merged(
        self, folder: Path | str, *, provenance: Mapping[str, Any] | None = None
    ) -> None:
        """Write a self-contained folder with adapter and soft prompts folded into the weights: plain transformers opens it.

        The model itself is merged by this; it has no adapter afterwards. It may be written over its own base.
        """
        mark = (
            "config.json"
            if Path(folder).resolve() == self.backbone.folder.resolve()
            else checkpoint.MANIFEST_NAME
        )
        with replace_folder_atomically(Path(folder), marker=mark) as inside:
            if self.peft_model is not None:
                merge_lora(self.peft_model)
                self._peft = []
            if self.soft_prompts is not None:
                self.soft_prompts.fold_into_embedding(self.backbone)
            self.backbone.save_pretrained(inside)
            self._write(inside, base=None, provenance=provenance or {})
        self.backbone.folder = Path(folder)  # what is in memory is what lies there now

    def _write(self, folder: Path, *, base: Path | None, provenance: Mapping[str, Any]) -> None:
        checkpoint.write_checkpoint(
            folder,
            base=base,
            description={**self.embedding_settings(), "provenance": dict(provenance)},
            own_tensors=self.own_tensors(),
            adapter_tensors=self.adapter_tensors(),
            golden_vectors=self.compute_golden_vectors(),
            save_adapter=None if self.peft_model is None else partial(save_lora, self.peft_model),
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        check_golden: bool = True,
        prompts: Prompts | None = None,
    ) -> Self:
        """Open a model folder, or wrap a plain Hugging Face checkpoint (no head, VladVA's prompts).

        Args:
            device: default is the GPU where there is one.
            dtype: of trunk and tower; projector, head and adapter are in float32. Default: float32 on a CPU, and on a GPU
                bfloat16 for a checkpoint that was saved in half precision.
            check_golden: embed the golden inputs and compare with those saved.
            prompts: for a plain checkpoint; a saved model has its own.

        Raises:
            ModelError: see `checkpoint.read` and `backbones.load_backbone`; or golden vectors that differ.
        """
        device = device or select_device()
        kept = checkpoint.read_checkpoint(recover_folder(Path(folder)))
        backbone = load_backbone(kept.base_folder, device=device, dtype=dtype)
        if not kept.manifest:
            return cls(backbone, prompts=prompts or Prompts()).eval()
        head = kept.manifest["head"]
        model = cls(
            backbone,
            prompts=Prompts(**kept.manifest["prompts"]),
            head=head["kind"],
            dim=head["dim"],
        )
        if ROWS_TENSOR_NAME in kept.tensors:
            model.soft_prompts = SoftPrompts(backbone, kept.tensors[ROWS_TENSOR_NAME])
        with torch.no_grad():
            for name, tensor in model.own_tensors().items():
                if name not in kept.tensors or kept.tensors[name].shape != tensor.shape:
                    raise ModelError(
                        f"tensor '{name}' is missing or of another shape", place=Path(folder)
                    )
                tensor.copy_(kept.tensors[name])
        if kept.adapter_folder is not None:
            model._peft = [load_lora(backbone, kept.adapter_folder)]
        checkpoint.verify_tensors(
            kept.manifest, {**model.own_tensors(), **model.adapter_tensors()}, place=Path(folder)
        )
        if check_golden and kept.golden_vectors is not None:
            checkpoint.check_golden_vectors(
                kept.golden_vectors,
                model.compute_golden_vectors(),
                dtype=backbone.model.dtype,
                place=Path(folder),
            )
        return model.eval()
