"""Analyse a model beyond its scores: the three analyses of VladVA (arXiv 2412.04378).

Everything is measured at the *reading token*: the token whose final hidden state is the embedding,
so the summary token of a prompt that ends in one. Where an image is embedded as the mean of its
tokens, it is the last of these, the only one that sees the whole image.

    entropy     H = -sum_v p(v) log p(v) of the next token at the reading token, in nats
    variance    sum_(i <= k) s_i^2 / sum_i s_i^2, s the singular values of the embeddings [N, E]
    attention   from the reading token to the tokens of the image, mean over heads and layers

A model that is trained to embed changes on all three: entropy rises (no single next token says it
all), more components carry the variance, and attention becomes even over the image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vlduet.data.batches import FORWARD_MAX_TOKENS, group_by_length
from vlduet.data.content_keys import content_key
from vlduet.data.images import Pixels, load_image
from vlduet.data.quarantine import Quarantine
from vlduet.data.records import ImageRef, Part, Parts, iter_labelled_parts
from vlduet.data.sequences import Sequence as TokenSequence
from vlduet.data.sources import SourceLike, as_source
from vlduet.errors import DataError
from vlduet.eval.examples import evenly_spaced
from vlduet.eval.metrics import bootstrap_interval
from vlduet.files import write_text_atomically
from vlduet.logs import ProgressBar
from vlduet.model.backbone import eval_mode
from vlduet.model.duet import DuetModel

Floats = NDArray[np.float64]

IMAGES_IN_MEMORY = 64
"""Number of items whose images are decoded at once."""
VARIANCE_SHARES = (0.5, 0.9, 0.99)
"""Shares of the variance for which the number of components is reported."""


# ------------------------------------------------------------------ the three numbers


def next_token_entropy(logits: Tensor) -> Tensor:
    """Return the entropy in nats of float[N, V] logits as float[N].

    It is 0 where the next token is certain, also with logits of -inf, and log V where all tokens
    are equally likely. Logits of lower precision are converted to float32.
    """
    log_p = logits.float().log_softmax(-1)
    # A log probability of -inf would give 0 * -inf = NaN.
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)


def explained_variance(embeddings: ArrayLike) -> Floats:
    """Return the cumulative explained variance of float[N, E] embeddings, float[min(N, E)].

    Entry k - 1 is the sum of the k largest squared singular values over the sum of all. The
    embeddings are not centred, as in the paper: what all have in common is the first component.
    N bounds the number of components, so only matrices with equal N can be compared.
    """
    energy = np.linalg.svd(np.asarray(embeddings, dtype=np.float64), compute_uv=False) ** 2
    curve: Floats = np.cumsum(energy) / energy.sum()
    return curve


def num_components(curve: Floats, share: float) -> int:
    """Return the smallest k whose explained variance in `curve` reaches `share`."""
    return int(np.searchsorted(curve, share - 1e-12) + 1)


def attention_to_image(
    layers: Sequence[Tensor], *, query_index: int, image_tokens: slice
) -> Floats:
    """Return the attention of one token to the tokens of an image, float[n].

    It is the mean over layers and heads. The sum is the share of the attention that the image gets.

    Args:
        layers: attention of one sequence, float[1, H, T, T] per layer, rows attend to columns.
        query_index: position of the attending token.
        image_tokens: positions of the n tokens of the image.
    """
    rows = [layer[0, :, query_index, image_tokens].float().mean(0) for layer in layers]
    weights: Floats = torch.stack(rows).mean(0).double().cpu().numpy()  # [L, n] -> [n]
    return weights


def evenness(weights: ArrayLike) -> float:
    """Return the entropy of weights as a share of the largest possible entropy.

    It is 1 where all weights are equal, or where there is only one, and 0 where one weight has
    everything. The weights, float[n], need not sum to 1 but must not be negative and must have a
    positive sum, which is not checked. No weights raise ValueError.
    """
    values = np.asarray(weights, dtype=np.float64)
    if len(values) == 1:
        return 1.0
    p = values[values > 0] / values.sum()
    return float(-(p * np.log(p)).sum() / math.log(len(values)))


# ------------------------------------------------------------------ the analysis of one model


@dataclass(frozen=True, slots=True)
class AnalysisItems:
    """Distinct images and texts on which models are analysed, in the order of the file."""

    images: tuple[ImageRef, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ContentReadings:
    """Values at the reading tokens of N items of one kind, images or texts."""

    embeddings: NDArray[np.float32]
    """float[N, E], unit length."""
    entropy: Floats
    """float[N], entropy of the next token in nats."""


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """Attention of the reading token of one image to the tokens of that image."""

    pixels: Pixels
    """uint8[H, W, 3], the image as the model sees it (scaled and cropped)."""
    weights: Floats
    """float[h, w], attention to every token, in the layout of the image."""
    share: float
    """Share of the reading token's attention that goes to the image."""
    evenness: float
    """Evenness of the attention over the image; see `evenness`."""


@dataclass(frozen=True, slots=True)
class ModelAnalysis:
    """Analysis of one model."""

    name: str
    fingerprint: str
    images: ContentReadings | None
    """Readings of the images; None where there were none."""
    texts: ContentReadings | None
    """Readings of the texts; None where there were none."""
    attention_maps: tuple[AttentionMap, ...]

    @property
    def readings(self) -> dict[str, ContentReadings]:
        """Readings by kind (``images``, ``texts``), for the kinds that there are."""
        kinds = {"images": self.images, "texts": self.texts}
        return {kind: readings for kind, readings in kinds.items() if readings is not None}


def collect_items(source: SourceLike, *, limit: int, dropped: Quarantine) -> AnalysisItems:
    """Return the first `limit` distinct images and the first `limit` distinct texts of a source.

    Parts are distinct if their `content_key` differs. All parts of a record count, in reading
    order, and reading stops as soon as there are enough of both.

    Args:
        source: a file with records of any kind, or a folder of images, with any settings. What is
            not read is logged.
        limit: largest number of images and of texts; fewer are returned if there are fewer.
        dropped: modified in place: gets records and images that cannot be read.

    Raises:
        DataError: the source cannot be read, or contains neither an image nor a text.
    """
    images: dict[str, ImageRef] = {}
    texts: dict[str, str] = {}

    def add(part: Part) -> None:
        """Add a part to `images` or `texts` unless that is full or has the same content.

        Raises DataError for a broken image, unless `images` is full.
        """
        if isinstance(part, ImageRef):
            if len(images) < limit:
                load_image(part)  # a broken image must not take the place of another one
                images.setdefault(content_key((part,)), part)
        elif len(texts) < limit:
            texts.setdefault(content_key((part,)), part)

    source = as_source(source)
    for record in source.read(on_error=lambda error: dropped.add(error.place, error)):
        for _, part in iter_labelled_parts(record):
            try:
                add(part)
            except DataError as error:
                dropped.add(record, error)
        if len(images) == len(texts) == limit:
            break
    if not images and not texts:
        message = f"neither an image nor a text ({dropped})"
        raise DataError(message, place=source.path, fix="Name a file of records")
    return AnalysisItems(tuple(images.values()), tuple(texts.values()))


def analyse_model(
    model: DuetModel, items: AnalysisItems, *, name: str, num_attention_maps: int
) -> ModelAnalysis:
    """Read all items with a model, and map its attention on some evenly spaced images.

    The model is in evaluation mode, and for the maps in eager attention, and is left as it was. A
    progress bar is shown. A kind without items has the readings None.

    Args:
        name: name of the model in tables and charts.
        num_attention_maps: number of images whose attention is mapped, all if there are fewer.

    Raises:
        DataError: an item cannot be embedded, for example because a text is empty.
    """
    num_items = len(items.images) + len(items.texts)
    images = [(image,) for image in items.images]
    texts = [(text,) for text in items.texts]
    with eval_mode(model), ProgressBar(total=num_items, label=f"reading with {name}") as bar:
        image_readings = _read(model, images, bar) if images else None
        text_readings = _read(model, texts, bar) if texts else None
        with eager_attention(model):
            maps = [
                attention_map(model, image)
                for image in evenly_spaced(items.images, num_attention_maps)
            ]
    return ModelAnalysis(name, model.fingerprint, image_readings, text_readings, tuple(maps))


@torch.no_grad()
def _read(model: DuetModel, items: Sequence[Parts], bar: ProgressBar) -> ContentReadings:
    """Return embedding and next-token entropy of every item in order, and advance the bar.

    The caller puts the model in evaluation mode. Raises DataError for an item that cannot be
    embedded.
    """
    embeddings = np.empty((len(items), model.dim), dtype=np.float32)
    entropy = np.empty(len(items), dtype=np.float64)
    for begin in range(0, len(items), IMAGES_IN_MEMORY):
        chunk = items[begin : begin + IMAGES_IN_MEMORY]
        sequences = [model.renderer.render_embedding(parts) for parts in chunk]
        for indices in group_by_length([len(s) for s in sequences], FORWARD_MAX_TOKENS):
            batch = model.collate([sequences[i] for i in indices])
            hidden = model.hidden_states(batch)  # [B, T, D]
            spans = batch.anchor_spans  # one anchor per sequence, in the order of the sequences
            rows = [begin + i for i in indices]
            # Anchors that are read in the vision tower have no hidden state in the language model.
            in_tower = model.vision_anchor_mask(batch)
            embedding_spans = spans if in_tower is None else spans[~in_tower]
            vectors = model.embed_anchors(batch, hidden, embedding_spans)
            embeddings[rows] = vectors.float().cpu().numpy()
            states = hidden[spans[:, 0], spans[:, 2] - 1]  # [B, D]
            # Folded soft prompts are extra rows of the LM head that are no words.
            logits = model.backbone.compute_logits(states)[:, : len(model.lm_head_weight)]
            entropy[rows] = next_token_entropy(logits).double().cpu().numpy()
            bar.advance(len(indices))
    return ContentReadings(embeddings, entropy)


@contextmanager
def eager_attention(model: DuetModel) -> Iterator[None]:
    """Switch the language model to eager attention inside the block, and back afterwards.

    It is switched back after an exception too. Fused attention kernels never write the attention
    weights to memory.
    """
    language_model: Any = model.backbone.language_model
    previous = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        language_model.set_attn_implementation(previous)


@torch.no_grad()
def attention_weights(model: DuetModel, sequence: TokenSequence) -> list[Tensor]:
    """Return the attention weights of one sequence, float[1, H, T, T] per language model layer.

    Call it inside `eager_attention`; other implementations return no weights.
    """
    batch = model.collate([sequence])
    language_model: Any = model.backbone.language_model
    outputs = language_model(
        **model.language_model_inputs(batch),
        position_ids=batch.position_ids,
        use_cache=False,
        output_attentions=True,
    )
    return list(outputs.attentions)


def attention_map(model: DuetModel, image: ImageRef) -> AttentionMap:
    """Return the attention of an image's reading token to the image's tokens, mean of all layers.

    Call it inside `eager_attention` and with the model in evaluation mode. Where a family encodes
    an overview and tiles, the map shows the overview, and share and evenness count all tokens of
    the image. Text tokens between those of the image do not count. Raises ImageError for an image
    that cannot be read.
    """
    sequence = model.renderer.render_embedding((image,))
    start, prepared = sequence.images[0]
    layers = attention_weights(model, sequence)
    weights = attention_to_image(
        layers,
        query_index=sequence.anchors[0].end - 1,
        image_tokens=slice(start, start + prepared.num_tokens),
    )
    weights = np.delete(weights, list(prepared.interleaved_tokens))
    # The renderer's prepared image may hold cached features without pixels.
    with_pixels = model.backbone.prepare_image(image)
    pixels = denormalize_pixels(
        model.backbone.vision_tower_pixels(with_pixels), model.backbone.image_processor
    )
    overview = weights[model.backbone.overview_features(with_pixels)]
    return AttentionMap(
        pixels,
        to_patch_grid(overview, *pixels.shape[:2]),
        share=float(weights.sum()),
        evenness=evenness(weights),
    )


def denormalize_pixels(prepared: Tensor, processor: Any) -> Pixels:
    """Return the input of the vision tower, float[3, H, W] on the CPU, as uint8[H, W, 3].

    The normalisation of the image processor is undone if its `do_normalize` is set; 0 to 1 then
    becomes 0 to 255, rounded, and values beyond are clipped.
    """
    pixels = prepared.float().permute(1, 2, 0).numpy()  # [H, W, 3]
    if getattr(processor, "do_normalize", False):
        pixels = pixels * np.asarray(processor.image_std) + np.asarray(processor.image_mean)
    picture: Pixels = np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8)
    return picture


def to_patch_grid(weights: Floats, height: int, width: int) -> Floats:
    """Return float[n] token weights as float[h, w], in the proportions of a height x width picture.

    The first weight is left out where only the others fill a grid (it is a class token's). Weights
    that fit no grid are returned as one row, float[1, n]. No weights raise ValueError.
    """
    for num_class_tokens in (0, 1):
        count = len(weights) - num_class_tokens
        rows = round(math.sqrt(count * height / width))
        columns = round(math.sqrt(count * width / height))
        if rows * columns == count > 0:
            return weights[num_class_tokens:].reshape(rows, columns)
    return weights[None]


# ------------------------------------------------------------------ numbers


def summarize(analyses: Sequence[ModelAnalysis]) -> list[dict[str, Any]]:
    """Return the numbers of every model as plain values.

    Returns:
        One dict per model: ``name``, ``fingerprint``; ``images`` and ``texts`` (None where not
        measured) with ``count``, ``entropy``, ``components`` (number by share of the variance) and
        ``explained_variance``; ``attention`` (None without maps) with ``count``, ``share`` and
        ``evenness``. Entropy, share and evenness are 95 % bootstrap intervals over items.
    """
    return [
        {
            "name": analysis.name,
            "fingerprint": analysis.fingerprint,
            "images": _summarize_readings(analysis.images),
            "texts": _summarize_readings(analysis.texts),
            "attention": _summarize_attention(analysis.attention_maps),
        }
        for analysis in analyses
    ]


def _summarize_readings(readings: ContentReadings | None) -> dict[str, Any] | None:
    """Return the numbers of one kind of content as JSON values; None for None.

    They are the number of items, the mean entropy with its interval, the numbers of components and
    the curve of explained variance. Readings of no items raise AssertionError.
    """
    if readings is None:
        return None
    curve = explained_variance(readings.embeddings)
    return {
        "count": len(readings.entropy),
        "entropy": asdict(bootstrap_interval(readings.entropy)),
        "components": {f"{share:g}": num_components(curve, share) for share in VARIANCE_SHARES},
        "explained_variance": [round(float(value), 6) for value in curve],
    }


def _summarize_attention(maps: Sequence[AttentionMap]) -> dict[str, Any] | None:
    """Return the numbers of attention maps, or None for no maps."""
    if not maps:
        return None
    return {
        "count": len(maps),
        "share": asdict(bootstrap_interval([item.share for item in maps])),
        "evenness": asdict(bootstrap_interval([item.evenness for item in maps])),
    }


def write_summary(
    path: Path, summaries: Sequence[dict[str, Any]], *, source: Path, command: str
) -> None:
    """Write ``analysis.json``: the numbers of `summarize`, the analysed file and the command."""
    content = {"source": str(source), "command": command, "models": summaries}
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")
