"""Memory of a training step: what a forward pass keeps for its backward pass, measured.

1. measure   the model reads a few tokens, and the tensors that autograd saves are counted
2. fit       bytes for a pass, token, pair of tokens, image token, label and embedding
3. estimate  these times the numbers of a batch, and the memory that the backward pass adds

The real model runs on its own device, so that adapters, attention kernels, dtypes and recomputed
layers count as they are. No step is taken, and no gradient is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlduet.data.batches import Batch
from vlduet.data.sequences import IGNORE_INDEX, Anchor, PreparedImage
from vlduet.model.duet import DuetModel
from vlduet.model.feature_cache import FEATURES_INPUT
from vlduet.objectives.language import POSITIONS_PER_CHUNK

PROBE_TOKENS = 4
"""Unit of the lengths of measured sequences: short, as a model of 7B may run on a CPU."""
OPTIMIZER_VALUES = 3
"""Number of values for each trained parameter: its gradient and the two moments of AdamW."""


def measure_saved_bytes(forward: Callable[[], object], model: nn.Module) -> int:
    """Return the bytes that a forward pass keeps for its backward pass.

    Every storage counts once and as a whole; those of the parameters and buffers of `model` do not
    count. Layers that are recomputed count with their inputs alone.
    """
    tensors = chain(model.parameters(), model.buffers())
    weights = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    sizes: dict[int, int] = {}
    saved = []  # A storage that is freed in between could give its address to another.

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(sizes.values())


class BatchSize(NamedTuple):
    """Numbers of a batch on which its memory depends."""

    passes: float = 1
    """Number of forward passes: 1 for a batch."""
    tokens: float = 0
    """Number of tokens, B * T, padding included."""
    token_pairs: float = 0
    """Number of elements of the attention mask, B * T * T."""
    image_tokens: float = 0
    """Number of tokens that vision features fill."""
    labels: float = 0
    """Number of supervised tokens."""
    anchors: float = 0
    """Number of embeddings."""

    def scale(self, factor: float) -> BatchSize:
        """Return the size of a batch with `factor` times as many rows, still in one pass."""
        return BatchSize(1, *(factor * number for number in self[1:]))


def count_batch(model: DuetModel, batch: Batch) -> BatchSize:
    """Return the size of a batch as the language model reads it (see `DuetModel.forward`)."""
    is_vision = model.vision_anchor_mask(batch)
    text_batch = batch if is_vision is None else batch.drop_anchors(is_vision)
    num_rows, length = text_batch.token_ids.shape
    return BatchSize(
        tokens=num_rows * length,
        token_pairs=num_rows * length**2,
        image_tokens=int(text_batch.image_mask.sum()),
        labels=batch.num_supervised_tokens,
        anchors=len(batch.anchors),
    )


@dataclass(frozen=True)
class ActivationProfile:
    """Bytes of the activations of a model, as `measure_activations` finds them."""

    saved: BatchSize
    """Bytes that are kept for the backward pass, for one of each number of a `BatchSize`."""
    layer: BatchSize
    """The same for a single layer that is not recomputed; per token and pair of tokens only."""
    logits: float
    """Bytes of the logits of a label in float32."""
    is_recomputed: bool
    """Whether layers are recomputed in the backward pass (`train.checkpointing`)."""

    def count_saved_bytes(self, size: BatchSize) -> float:
        """Return the bytes that the forward pass of a batch keeps for its backward pass."""
        saved = sum(number * num_bytes for number, num_bytes in zip(size, self.saved, strict=True))
        # The logits of many labels are recomputed in chunks (objectives/language.py).
        return saved - (size.labels * self.logits if size.labels > POSITIONS_PER_CHUNK else 0)

    def count_backward_bytes(self, size: BatchSize) -> float:
        """Return the bytes that the backward pass of a batch needs besides what was kept.

        It is the larger of the logits of a chunk of labels with their gradients, and the gradients
        of a layer, which take at most as much as its activations; these activations count, too, if
        they are recomputed.
        """
        layer = sum(number * num_bytes for number, num_bytes in zip(size, self.layer, strict=True))
        logits = 2 * min(size.labels, POSITIONS_PER_CHUNK) * self.logits
        return max(layer * (2 if self.is_recomputed else 1), logits)


def measure_activations(model: DuetModel, batches: list[Batch]) -> ActivationProfile:
    """Return the activations of a model that is set up for training, for batches like `batches`.

    Less than two hundred tokens pass through the language model, and an image through the vision
    tower if the features of the first one are not cached. The mode (train, eval) is restored;
    torch's global generators advance if the model has dropout.

    Args:
        model: it runs in training mode.
        batches: batches of the run. They decide whether probes have padding, packed rows, images,
            and position ids with axes.
    """
    was_training = model.training
    model.train()
    try:
        probe = _Probe(model, batches)
        passes, tokens, token_pairs = probe.fit_lengths()
        extras = probe.fit_extras()
        for name, num_bytes in extras.items():
            passes -= probe.extras[name] * num_bytes
        saved = BatchSize(passes, tokens, token_pairs, **extras)
        with _without_recomputation(model) as is_recomputed:
            if is_recomputed:
                _, tokens, token_pairs = probe.fit_lengths()
        num_layers = model.backbone.model.config.get_text_config().num_hidden_layers
        layer = BatchSize(0, tokens / num_layers, token_pairs / num_layers)
        logits = 4.0 * len(model.lm_head_weight)
        return ActivationProfile(saved, layer, logits, is_recomputed)
    finally:
        model.train(was_training)


@contextmanager
def _without_recomputation(model: nn.Module) -> Iterator[bool]:
    """Keep all activations of recomputed layers inside the block; yield whether there are any.

    The flags of transformers' layers are set, and restored at the end.
    """
    recomputed: list[Any] = []
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            recomputed.append(module)
    try:
        for module in recomputed:
            module.gradient_checkpointing = False
        yield bool(recomputed)
    finally:
        for module in recomputed:
            module.gradient_checkpointing = True


class _Probe:
    """Small batches of a model, and the bytes that their forward passes keep."""

    def __init__(self, model: DuetModel, batches: list[Batch]):
        """Take the kinds of rows, positions and images that `batches` have.

        Args:
            model: the model, in the mode to be measured.
            batches: see `measure_activations`; without any, rows are plain texts.
        """
        self.model = model
        self.has_padding = any(bool((batch.segment_ids == 0).any()) for batch in batches)
        self.is_packed = any(int(batch.segment_ids.max()) > 1 for batch in batches)
        self.axes = max((b.position_ids.shape[:-2] for b in batches), default=torch.Size())
        images = [image for batch in batches for image in batch.images]
        self.image = images[0] if images else None
        self._features = model.vision_features(images[:1])[:1] if images else None
        has_labels = any(batch.num_supervised_tokens for batch in batches)
        has_anchors = any(batch.anchors for batch in batches)
        # A pass without labels keeps other tensors than one with them, hence a unit of each.
        self.extras = {
            "image_tokens": PROBE_TOKENS if images else 0,
            "labels": PROBE_TOKENS if has_labels else 0,
            "anchors": PROBE_TOKENS if has_anchors else 0,
        }

    def fit_lengths(self) -> tuple[float, float, float]:
        """Return the bytes of a pass with `extras`, of a token and of a pair of tokens."""
        unit = PROBE_TOKENS
        # Three units and more: outputs must not be at image tokens.
        short, middle, long = [self.measure(multiple * unit) for multiple in (3, 4, 5)]
        token_pair = max(0.0, (short - 2 * middle + long) / (2 * unit**2))
        token = (long - short) / (2 * unit) - 8 * unit * token_pair
        return middle - 4 * unit * token - 16 * unit**2 * token_pair, token, token_pair

    def fit_extras(self) -> dict[str, float]:
        """Return the bytes of an image token, a label and an anchor, 0 where `extras` has none."""
        length = 5 * PROBE_TOKENS
        base = self.measure(length)
        num_bytes = {}
        for name, number in self.extras.items():
            larger = self.measure(length, {name: 2 * number}) if number else base
            num_bytes[name] = (larger - base) / PROBE_TOKENS
        return num_bytes

    def measure(self, length: int, extras: dict[str, int] | None = None) -> int:
        """Return the bytes that the forward pass of a row keeps; `extras` replace its own."""
        batch = self._build_batch(length, **(self.extras | (extras or {})))
        batch = batch.to(self.model.backbone.device)
        return measure_saved_bytes(lambda: self.model(batch), self.model)

    def _build_batch(self, length: int, *, image_tokens: int, labels: int, anchors: int) -> Batch:
        """Return a row of equal tokens: padding or a token, an image, and outputs at the end."""
        token_ids = torch.full((1, length), self.model.backbone.pad_token_id)
        label_ids = torch.full((1, length), IGNORE_INDEX)
        label_ids[:, length - labels :] = 0
        segment_ids = torch.ones(1, length, dtype=torch.long)
        if self.is_packed:
            segment_ids[:, length // 2 :] = 2
        if self.has_padding:
            segment_ids[:, 0] = 0
        image_mask = torch.zeros(1, length, dtype=torch.bool)
        image_mask[:, 1 : 1 + image_tokens] = True
        starts = torch.arange(length - anchors, length)
        spans = torch.stack([torch.zeros_like(starts), starts, starts + 1], 1)
        return Batch(
            token_ids=token_ids,
            labels=label_ids,
            segment_ids=segment_ids,
            position_ids=torch.arange(length).expand(*self.axes, 1, length),
            image_mask=image_mask,
            images=self._build_images(image_tokens),
            anchors=tuple(Anchor(int(i), int(i) + 1, "text", "", str(i)) for i in starts),
            anchor_spans=spans,
        )

    def _build_images(self, num_tokens: int) -> tuple[PreparedImage, ...]:
        """Return an image of so many tokens with features for each; () for none."""
        if self.image is None or self._features is None:
            return ()
        inputs: dict[str, Any] = {FEATURES_INPUT: self._features.expand(num_tokens, -1)}
        image = replace(
            self.image, inputs=inputs, num_tokens=num_tokens, grid=None, interleaved_tokens={}
        )
        return (image,)


def count_state_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights, and of gradients and AdamW moments of trained ones."""
    num_bytes = 0
    for parameter in model.parameters():
        num_values = 1 + (OPTIMIZER_VALUES if parameter.requires_grad else 0)
        num_bytes += parameter.numel() * parameter.element_size() * num_values
    return num_bytes
