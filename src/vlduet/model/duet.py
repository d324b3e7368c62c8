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

from vlduet.data import branches
from vlduet.data.batches import FORWARD, ROW, Batch, by_length, collate
from vlduet.data.records import ImageRef, Message, Part, Parts, as_parts
from vlduet.data.sequences import IGNORE, PreparedImage, Sequence
from vlduet.errors import ModelError
from vlduet.files import recovered, whole_folder
from vlduet.model import checkpoint, decoding, generation
from vlduet.model.adapters import Lora, load_lora, merge, open_lora, save_lora
from vlduet.model.backbones import Backbone, Opened, default_device, fingerprint_of, load_backbone
from vlduet.model.captions import nearest
from vlduet.model.features import FeatureCache, features_of, file_version, with_features
from vlduet.model.generation import evaluating
from vlduet.model.processing import IMAGE_BACKEND
from vlduet.model.prompts import Prompts, Renderer
from vlduet.model.readout import EmbeddingHead, Readout, beside_tower, pool, supervised
from vlduet.model.soft import ROWS, SoftPrompts, learn
from vlduet.objectives.language import token_nll

Item = Part | Parts
"""What can be embedded: a text, an image, or several of both in order."""

Progress = Callable[[int], None] | None
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
        self.set_head(head, dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / INITIAL_TEMPERATURE), device=backbone.device))
        self.prompts = prompts
        self.soft: SoftPrompts | None = None
        self._peft: list[Any] = []  # a list hides it from torch, which would see every layer of the backbone twice
        self.features = FeatureCache(None)
        self.renderer = Renderer(replace(backbone.processing, prepare=self.prepare), prompts=prompts)
        self._known: dict[tuple[str, int, int], PreparedImage] = {}

    def set_head(self, kind: str, dim: int) -> None:
        """A new embedding head, of random weights."""
        head = EmbeddingHead(kind, self.backbone.width, dim, vision_width=self.backbone.vision_width)
        self.head = head.to(self.backbone.device)

    def set_prompts(self, prompts: Prompts) -> None:
        """Present content otherwise from now on; embeddings of before and after do not compare."""
        self.prompts = self.renderer.prompts = prompts

    # ------------------------------------------------------------------ the forward and its two readings

    def forward(self, batch: Batch) -> Readout:
        """One forward of the trunk over a padded or packed batch, read twice."""
        tower = self.read_in_tower(batch)
        inner = batch if tower is None else batch.without(tower)
        hidden = self.hidden_states(inner)  # [B, T, D]
        rows, at = supervised(inner.labels)
        hidden_at, wanted, cap = hidden[rows, at - 1], inner.labels[rows, at], self.backbone.cap
        nll = token_nll(hidden_at, self.lm_weight, wanted, bias=self.lm_bias, cap=cap)
        return Readout(self.embed(batch, hidden, inner.anchor_spans), batch.anchors, nll)

    def read_in_tower(self, batch: Batch) -> Tensor | None:
        """bool[A]: the anchors that are read from the vision tower, without the trunk; None where no prompt says so."""
        rows, starts, _ = batch.anchor_spans.unbind(1)
        return batch.image_mask[rows, starts] if self.prompts.image_pool == "vision" else None

    def embed(self, batch: Batch, hidden: Tensor, spans: Tensor) -> Tensor:
        """Embeddings of all anchors, float[A, E]; those that are not read in the tower stand at `spans` of `hidden`."""
        tower = self.read_in_tower(batch)
        found: Tensor = self.head(pool(hidden, spans, dtype=self.logit_scale.dtype))
        if tower is None or not tower.any():
            return found
        return beside_tower(found, self.head, batch, at=tower, features=self.vision_features(list(batch.images)))

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final hidden states float[B, T, D], after the final norm: what a server of the same checkpoint computes."""
        if not len(batch.ids):
            return self.logit_scale.new_zeros(*batch.ids.shape, self.backbone.width)
        given = {"attention_mask": batch.attention_mask(), "position_ids": batch.positions} | self.trunk_inputs(batch)
        return self.backbone.trunk(**given, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    def trunk_inputs(self, batch: Batch) -> dict[str, Any]:
        """Token embeddings with the projected image features in their places, float[B, T, D], and what goes beside them."""
        table = self.backbone.embedding
        embeddings: Tensor = table(batch.ids) if self.soft is None else self.soft(batch.ids, table)
        more = self.backbone.attention(batch) | self.backbone.words(batch.ids, batch.image_mask)
        if batch.images:
            features = self.vision_features(list(batch.images))
            projected = self.backbone.project(features).to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(batch.image_mask[..., None], projected)
            more |= self.backbone.deeper(features, batch.image_mask)
        return {"inputs_embeds": embeddings, **more}

    @property
    def lm_weight(self) -> Tensor:
        """The LM head, float[V, D]; learned prompt tokens are no words that can follow."""
        weight = self.backbone.lm_head.weight
        return weight if self.soft is None else weight[: self.soft.first]

    @property
    def lm_bias(self) -> Tensor | None:
        """Its bias, float[V]."""
        return None if (bias := self.backbone.lm_head.bias) is None else bias[: len(self.lm_weight)]

    def vision_features(self, prepared: list[PreparedImage]) -> Tensor:
        """What the projector reads, float[tokens, Dv]; each distinct image goes through the tower once."""
        found = features_of(prepared, self.features, self.backbone.vision)
        return torch.cat([features.to(self.backbone.device) for features in found])

    def prepare(self, ref: ImageRef) -> PreparedImage:
        """An image for the renderer. One whose features are cached is neither decoded nor preprocessed again."""
        version = file_version(ref.path)
        known = self._known.get(version) if version else None
        found = known and with_features(known, self.features)
        prepared = found or self.backbone.prepare(ref)
        if version:
            self._known[version] = replace(prepared, inputs={})
        return prepared

    # ------------------------------------------------------------------ embedding

    @torch.no_grad()
    def encode(
        self, items: Many[Item], *, query: bool = False, batch_tokens: int = FORWARD, progress: Progress = None
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
        with evaluating(self):
            for begin in range(0, len(items), 512):  # bounds the decoded images that live at one time
                rows = enumerate(items[begin : begin + 512], begin)
                sequences = [self.renderer.embed(as_parts(item), query=query, record=str(n)) for n, item in rows]
                for chosen in by_length([len(s) for s in sequences], batch_tokens):
                    batch = self.collate([sequences[i] for i in chosen], pack_to=max(ROW, len(sequences[chosen[-1]])))
                    vectors[[int(a.record) for a in batch.anchors]] = self(batch).embeddings.float().cpu().numpy()
                    if progress:
                        progress(len(chosen))
        return vectors

    def encode_query(self, items: Many[Item], *, batch_tokens: int = FORWARD, progress: Progress = None) -> np.ndarray:
        """`encode` for the asking side."""
        return self.encode(items, query=True, batch_tokens=batch_tokens, progress=progress)

    def encode_document(
        self, items: Many[Item], *, batch_tokens: int = FORWARD, progress: Progress = None
    ) -> np.ndarray:
        """`encode` for what is searched."""
        return self.encode(items, query=False, batch_tokens=batch_tokens, progress=progress)

    @staticmethod
    def similarity(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Cosine of unit vectors, float32[Q, N]."""
        return np.asarray(queries @ documents.T)

    def collate(self, sequences: list[Sequence], *, side: str = "right", pack_to: int | None = None) -> Batch:
        """A batch on the model's device."""
        return collate(sequences, pad_id=self.backbone.pad_id, side=side, pack_to=pack_to).to(self.backbone.device)

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
        self, messages: Many[Message], *, max_new_tokens: int = 128, stream: bool = False, temperature: float = 0.0
    ) -> str | Iterator[str]:
        """Answer a conversation.

        Args:
            messages: turns, the last one the user's.
            stream: True returns an iterator of text pieces.
            temperature: 0 is greedy.
        """
        start = self.start([self.renderer.chat(tuple(messages), answer=True)])
        if stream:
            return decoding.stream(self.backbone, start, max_new_tokens, temperature=temperature)
        return generation.generate(self.backbone, start, max_new_tokens, temperature=temperature)[0]

    def caption(
        self,
        images: Many[ImageRef],
        *,
        prompt: str = "",
        max_new_tokens: int = 32,
        batch: int = 32,
        drafts: int = 1,
        known: Mapping[str, np.ndarray] | None = None,
    ) -> list[str]:
        """Captions: the answer to `prompt`, or without one what follows the image's embedding prompt.

        Args:
            drafts: 1 is greedy; of several, by a beam search, the one nearest to the image by embedding is taken; 0 is none.
            known: texts and their vectors (`encode_query`); the nearest of all is taken where no draft is as near.
        """
        groups = (images[begin : begin + batch] for begin in range(0, len(images), batch))
        starts = (self.start([self.renderer.ask_for_caption(image, prompt) for image in group]) for group in groups)
        written = [one for s in starts for one in generation.drafts(self.backbone, s, max_new_tokens, beams=drafts)]
        return nearest(written, images=lambda: self.encode(images), embed=self.encode_query, known=known or {})

    @torch.no_grad()
    def start(self, sequences: list[Sequence]) -> generation.Start:
        """Open sequences -> one batch of prompts to be continued."""
        batch = self.collate(sequences, side="left")
        given = self.trunk_inputs(batch), (batch.segments > 0).long(), batch.positions
        return generation.Start(*given, self.renderer.eos_ids)

    def caption_nll(self, pairs: Many[tuple[ImageRef, str]], *, batch: int = 32) -> list[tuple[float, int]]:
        """(negative log likelihood in nats, tokens) of each caption after its image, end of text included."""
        groups = (pairs[begin : begin + batch] for begin in range(0, len(pairs), batch))
        return [one for group in groups for one in self.nll([self.renderer.caption(*pair) for pair in group])]

    @torch.no_grad()
    def nll(self, sequences: list[Sequence]) -> list[tuple[float, int]]:
        """(negative log likelihood in nats, tokens) of what each sequence supervises. What neighbours share is read once."""
        found = [(0.0, 0)] * len(sequences)
        with evaluating(self):
            for chosen, rows in branches.batches(sequences, FORWARD):
                batch = branches.collate(rows, pad_id=self.backbone.pad_id).to(self.backbone.device)
                counts = [sum(label != IGNORE for label in sequences[i].labels) for i in chosen]
                for i, part in zip(chosen, self(batch).nll.double().cpu().split(counts), strict=True):
                    found[i] = (float(part.sum()), len(part))
        return found

    # ------------------------------------------------------------------ what is trained, and keeping it

    def make_trainable(self, *, lora: Lora | None, projector: Opened, head: bool = True, soft: bool = False) -> None:
        """Freeze everything, then open what is asked for; adds LoRA layers, and soft prompts, where there are none yet."""
        if soft and self.soft is None:
            self.soft = learn(self.renderer, self.backbone)
            self.prompts = self.renderer.prompts
        self.requires_grad_(False)
        if self.soft is not None:
            self.soft.requires_grad_(soft)
        if lora is not None:
            self._peft = [open_lora(self.backbone, lora, self.peft)]
        self.backbone.open_projector(projector)
        self.head.requires_grad_(head)
        self.logit_scale.requires_grad_(head)

    @property
    def peft(self) -> Any:
        """PEFT's view of the model with its adapter; None without one."""
        return self._peft[0] if self._peft else None

    def own_tensors(self) -> dict[str, Tensor]:
        """Everything beside the base and the adapter: projector, head, temperature, soft prompts."""
        named: dict[str, Tensor] = {f"projector.{n}": p for n, p in self.backbone.projector.named_parameters()}
        named |= {f"head.{n}": p for n, p in self.head.named_parameters()}
        named |= {} if self.soft is None else {ROWS: self.soft.rows}
        return named | {"logit_scale": self.logit_scale}

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The LoRA matrices, by their name in the model."""
        return {n: p for n, p in self.backbone.model.named_parameters() if "lora_" in n}

    def describe(self) -> dict[str, Any]:
        """What decides an embedding beside the tensors, as it stands in the manifest."""
        return {"prompts": self.prompts.to_dict(), "head": {"kind": self.head.kind, "dim": self.head.dim}}

    @property
    def fingerprint(self) -> str:
        """Names everything that decides an embedding: base, trained tensors, prompts, head and image backend."""
        base = fingerprint_of(self.backbone.folder)
        return checkpoint.fingerprint(self.describe(), base, {**self.own_tensors(), **self.adapter_tensors()})

    def golden_vectors(self) -> Tensor:
        """Embeddings float32[3, E] of a fixed text, image and mixture."""
        return torch.from_numpy(self.encode(checkpoint.golden_inputs()))

    def save_pretrained(self, folder: Path | str, *, provenance: Mapping[str, Any] | None = None) -> None:
        """Write a model folder, whole or not at all: trained tensors and adapter beside a reference to the base.

        Args:
            provenance: what made this model (config, data, commit); kept in the manifest.

        Raises ModelError for the base's own folder, ConfigError for one with something else in it.
        """
        if Path(folder).resolve() == self.backbone.folder.resolve():
            raise ModelError("this folder is the model's base", place=folder, fix="Save elsewhere, or save it merged")
        with whole_folder(Path(folder), mark=checkpoint.MANIFEST) as inside:
            self._write(inside, base=self.backbone.folder, provenance=provenance or {})

    def save_merged(self, folder: Path | str, *, provenance: Mapping[str, Any] | None = None) -> None:
        """Write a self-contained folder with adapter and soft prompts folded into the weights: plain transformers opens it.

        The model itself is merged by this; it has no adapter afterwards. It may be written over its own base.
        """
        mark = "config.json" if Path(folder).resolve() == self.backbone.folder.resolve() else checkpoint.MANIFEST
        with whole_folder(Path(folder), mark=mark) as inside:
            if self.peft is not None:
                merge(self.peft)
                self._peft = []
            if self.soft is not None:
                self.soft.fold(self.backbone)
            self.backbone.save(inside)
            self._write(inside, base=None, provenance=provenance or {})
        self.backbone.folder = Path(folder)  # what is in memory is what lies there now

    def _write(self, folder: Path, *, base: Path | None, provenance: Mapping[str, Any]) -> None:
        checkpoint.write(
            folder,
            base=base,
            described={**self.describe(), "provenance": dict(provenance)},
            own=self.own_tensors(),
            adapter=self.adapter_tensors(),
            golden=self.golden_vectors(),
            save_adapter=None if self.peft is None else partial(save_lora, self.peft),
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
        device = device or default_device()
        kept = checkpoint.read(recovered(Path(folder)))
        backbone = load_backbone(kept.base, device=device, dtype=dtype)
        if not kept.manifest:
            return cls(backbone, prompts=prompts or Prompts()).eval()
        head = kept.manifest["head"]
        model = cls(backbone, prompts=Prompts(**kept.manifest["prompts"]), head=head["kind"], dim=head["dim"])
        if ROWS in kept.tensors:
            model.soft = SoftPrompts(backbone, kept.tensors[ROWS])
        with torch.no_grad():
            for name, tensor in model.own_tensors().items():
                if name not in kept.tensors or kept.tensors[name].shape != tensor.shape:
                    raise ModelError(f"tensor '{name}' is missing or of another shape", place=Path(folder))
                tensor.copy_(kept.tensors[name])
        if kept.adapter is not None:
            model._peft = [load_lora(backbone, kept.adapter)]
        checkpoint.verify(kept.manifest, {**model.own_tensors(), **model.adapter_tensors()}, place=Path(folder))
        if check_golden and kept.golden is not None:
            checkpoint.check_golden(kept.golden, model.golden_vectors(), dtype=backbone.model.dtype, place=Path(folder))
        return model.eval()
