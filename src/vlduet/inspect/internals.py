"""What training does to a model beside its scores: the three analyses of VladVA (arXiv 2412.04378).

Everything is taken at the *reading token*: the token whose final hidden state is the embedding, so the summary token of
a prompt that ends in one. Where an image is read as the mean of its tokens, it is the last of these, the only one that
sees the whole image.

    entropy     H = -sum_v p(v) log p(v) of the next token at the reading token, in nats
    variance    sum_(i <= k) s_i^2 / sum_i s_i^2, with s the singular values of the embeddings as a matrix [N, E]
    attention   from the reading token to the tokens of the image, mean over heads and layers

A model that is made to embed spreads out on all three: entropy rises (no single next word says it all), more components
carry the variance, and attention becomes even over the image.
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

from vlduet.data import images as pictures
from vlduet.data.batches import FORWARD_MAX_TOKENS, group_by_length
from vlduet.data.content_keys import content_key
from vlduet.data.formats import read_records
from vlduet.data.quarantine import Quarantine
from vlduet.data.records import ImageRef, Part, Parts
from vlduet.data.sequences import Sequence as Tokens
from vlduet.data.show import iter_labelled_parts
from vlduet.errors import DataError
from vlduet.eval.metrics import Interval, bootstrap_interval
from vlduet.files import write_text_atomically
from vlduet.logs import ProgressBar
from vlduet.model.duet import DuetModel
from vlduet.model.generation.beam import eval_mode
from vlduet.reports import pages as pages
from vlduet.reports.charts import Series
from vlduet.reports.galleries import evenly_spaced

Floats = NDArray[np.float64]

IMAGES_IN_MEMORY = 64
"""Items whose images are in memory at a time."""
VARIANCE_SHARES = (0.5, 0.9, 0.99)
"""Of the variance: how many components reach these."""
CURVE_POINTS = 40
"""Of a curve."""
SIDE = 240
"""Pixels of a picture on the page."""


# ------------------------------------------------------------------ the three numbers: pure functions


def next_token_entropy(logits: Tensor) -> Tensor:
    """float[N, V] -> float[N], nats: 0 for a model that knows the next token, log V for one that knows nothing."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)  # 0 * -inf is nan


def explained_variance(embeddings: ArrayLike) -> Floats:
    """float[N, E] -> float[min(N, E)]: the share of the first k squared singular values in the sum of all, k = 1, 2, ...

    Not centred, as in the paper: what all embeddings have in common counts as the first component. Only matrices of equal
    N compare, because N bounds the number of components.
    """
    energy = np.linalg.svd(np.asarray(embeddings, dtype=np.float64), compute_uv=False) ** 2
    found: Floats = np.cumsum(energy) / energy.sum()
    return found


def num_components(curve: Floats, share: float) -> int:
    """The least k whose explained variance is `share` or more."""
    return int(np.searchsorted(curve, share - 1e-12) + 1)


def attention_to_image(
    layers: Sequence[Tensor], *, query_index: int, image_tokens: slice
) -> Floats:
    """Attention from one token to an image's tokens, float[n]: mean over layers and heads; sums to what the image gets of 1.

    Args:
        layers: of one sequence, float[1, H, T, T] each, rows attend to columns.
        at: the attending token; image: the image's tokens.
    """
    rows = torch.stack(
        [layer[0, :, query_index, image_tokens].float().mean(0) for layer in layers]
    )  # [L, n]
    found: Floats = rows.mean(0).double().cpu().numpy()
    return found


def evenness(weights: ArrayLike) -> float:
    """Entropy of weights as a share of the largest possible: 1 where all are equal, 0 where one has everything."""
    values = np.asarray(weights, dtype=np.float64)
    p = values[values > 0] / values.sum()
    return float(-(p * np.log(p)).sum() / math.log(len(values))) if len(values) > 1 else 1.0


# ------------------------------------------------------------------ one model, measured


@dataclass(frozen=True, slots=True)
class AnalysisItems:
    """What is measured: distinct images and texts, in the order of the file."""

    images: tuple[ImageRef, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ContentReadings:
    """One kind of content, read."""

    embeddings: NDArray[np.float32]
    """float[N, E], unit length."""
    entropy: Floats
    """nats[N]"""


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """Where the reading token of one image looks."""

    picture: str
    """As the model sees it (scaled, cropped), as a data URL."""
    weights: Floats
    """float[h, w]"""
    share: float
    """Of the reading token's attention that goes to the image."""
    evenness: float


@dataclass(frozen=True, slots=True)
class ModelAnalysis:
    """One model."""

    name: str
    fingerprint: str
    images: ContentReadings | None
    """None where there are none."""
    texts: ContentReadings | None
    attention_maps: tuple[AttentionMap, ...]


def collect_items(source: Path, *, limit: int, dropped: Quarantine) -> AnalysisItems:
    """The first `limit` distinct images and texts of records of any kind, or of a folder of images.

    Raises:
        DataError: the source cannot be read, or holds neither.
    """
    found: dict[bool, dict[str, Part]] = {True: {}, False: {}}
    for record in read_records(source, on_error=lambda error: dropped.add(error.place, error)):
        for _, part in iter_labelled_parts(record):
            kept = found[isinstance(part, ImageRef)]
            if len(kept) < limit:
                try:
                    if isinstance(part, ImageRef):
                        pictures.load_image(part)  # a broken one must not take the place of another
                    kept.setdefault(content_key((part,)), part)
                except DataError as error:
                    dropped.add(record, error)
        if min(len(kept) for kept in found.values()) == limit:
            break
    if not found[True] and not found[False]:
        raise DataError(
            f"neither an image nor a text ({dropped})", place=source, fix="Name a file of records"
        )
    images = tuple(part for part in found[True].values() if isinstance(part, ImageRef))
    return AnalysisItems(
        images, tuple(part for part in found[False].values() if isinstance(part, str))
    )


def analyse_model(
    model: DuetModel, items: AnalysisItems, *, name: str, num_attention_maps: int
) -> ModelAnalysis:
    """Read all items, and look at `examples` images, evenly spaced."""
    with (
        eval_mode(model),
        ProgressBar(
            total=len(items.images) + len(items.texts), label=f"reading with {name}"
        ) as bar,
    ):
        images, texts = (
            _read(model, [(item,) for item in some], bar) if some else None
            for some in (items.images, items.texts)
        )
        shown = evenly_spaced(items.images, num_attention_maps)
        with eager_attention(model):
            looks = tuple(attention_map(model, image) for image in shown)
    return ModelAnalysis(name, model.fingerprint, images, texts, looks)


@torch.no_grad()
def _read(model: DuetModel, items: Sequence[Parts], bar: ProgressBar) -> ContentReadings:
    embeddings = np.empty((len(items), model.dim), dtype=np.float32)
    entropy = np.empty(len(items), dtype=np.float64)
    for begin in range(0, len(items), IMAGES_IN_MEMORY):
        sequences = [
            model.renderer.render_embedding(parts)
            for parts in items[begin : begin + IMAGES_IN_MEMORY]
        ]
        for chosen in group_by_length([len(s) for s in sequences], FORWARD_MAX_TOKENS):
            batch = model.collate([sequences[i] for i in chosen])
            hidden = model.hidden_states(batch)  # [B, T, D]
            spans = batch.anchor_spans  # one anchor a sequence, in their order
            at = [begin + i for i in chosen]
            tower = model.vision_anchor_mask(batch)
            vectors = model.embed_anchors(batch, hidden, spans if tower is None else spans[~tower])
            embeddings[at] = vectors.float().cpu().numpy()
            states = hidden[spans[:, 0], spans[:, 2] - 1]
            logits = model.backbone.compute_logits(states)[:, : len(model.lm_head_weight)]  # [B, V]
            entropy[at] = next_token_entropy(logits).double().cpu().numpy()
            bar.advance(len(chosen))
    return ContentReadings(embeddings, entropy)


@contextmanager
def eager_attention(model: DuetModel) -> Iterator[None]:
    """Attention weights exist inside: fused kernels never write them down."""
    trunk: Any = model.backbone.language_model
    before = trunk.config._attn_implementation
    trunk.set_attn_implementation("eager")
    try:
        yield
    finally:
        trunk.set_attn_implementation(before)


@torch.no_grad()
def attention_weights(model: DuetModel, sequence: Tokens) -> list[Tensor]:
    """float[1, H, T, T] of every layer of the trunk, for one sequence. Call it inside `eager`."""
    batch = model.collate([sequence])
    trunk: Any = model.backbone.language_model
    out = trunk(
        **model.language_model_inputs(batch),
        position_ids=batch.position_ids,
        use_cache=False,
        output_attentions=True,
    )
    return list(out.attentions)


def attention_map(model: DuetModel, image: ImageRef) -> AttentionMap:
    """Where the reading token of an image looks. Call it inside `eager`."""
    sequence = model.renderer.render_embedding((image,))
    start, prepared = sequence.images[0]
    layers = attention_weights(model, sequence)
    at = sequence.anchors[0].end - 1
    weights = attention_to_image(
        layers, query_index=at, image_tokens=slice(start, start + prepared.num_tokens)
    )
    weights = np.delete(weights, list(prepared.interleaved_tokens))
    whole = model.backbone.prepare_image(image)  # the renderer's may hold cached features alone
    pixels = denormalize_pixels(
        model.backbone.vision_tower_pixels(whole), model.backbone.image_processor
    )
    picture = pictures.encode_thumbnail_data_url(pictures.from_pixels(pixels), SIDE)
    drawn = to_patch_grid(weights[model.backbone.overview_features(whole)], *pixels.shape[:2])
    return AttentionMap(picture, drawn, float(weights.sum()), evenness(weights))


def denormalize_pixels(prepared: Tensor, processor: Any) -> pictures.Pixels:
    """float[3, H, W] as it enters the vision tower -> uint8[H, W, 3], its normalisation undone."""
    pixels = prepared.float().permute(1, 2, 0).numpy()  # [H, W, 3]
    if getattr(processor, "do_normalize", False):
        pixels = pixels * np.asarray(processor.image_std) + np.asarray(processor.image_mean)
    found: pictures.Pixels = np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8)
    return found


def to_patch_grid(weights: Floats, height: int, width: int) -> Floats:
    """float[n] -> float[h, w] by the proportions of the picture; tokens that no grid explains (a class token) go first.

    Tokens that fit no grid at all stay one row.
    """
    for extra in (0, 1):
        count = len(weights) - extra
        rows, columns = (
            round(math.sqrt(count * height / width)),
            round(math.sqrt(count * width / height)),
        )
        if rows * columns == count > 0:
            return weights[extra:].reshape(rows, columns)
    return weights[None]


# ------------------------------------------------------------------ what is written


def summarize(measured: Sequence[ModelAnalysis]) -> list[dict[str, Any]]:
    """The numbers, a dict a model; intervals are 95 % bootstrap intervals over items."""

    def reading(one: ContentReadings) -> dict[str, Any]:
        curve = explained_variance(one.embeddings)
        return {
            "count": len(one.entropy),
            "entropy": _interval(one.entropy),
            "components": {f"{share:g}": num_components(curve, share) for share in VARIANCE_SHARES},
            "explained_variance": [round(float(value), 6) for value in curve],
        }

    return [
        {
            "name": one.name,
            "fingerprint": one.fingerprint,
            "images": reading(one.images) if one.images else None,
            "texts": reading(one.texts) if one.texts else None,
            "attention": {
                "count": len(one.attention_maps),
                "share": _interval([seen.share for seen in one.attention_maps]),
                "evenness": _interval([seen.evenness for seen in one.attention_maps]),
            }
            if one.attention_maps
            else None,
        }
        for one in measured
    ]


def _interval(values: ArrayLike) -> dict[str, float]:
    found: Interval = bootstrap_interval(values)
    return asdict(found)


@dataclass(frozen=True, slots=True)
class Line:
    """One number of every model."""

    name: str
    note: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AnalysisPage:
    """Everything on the page."""

    source: str
    measured: tuple[ModelAnalysis, ...]
    lines: tuple[Line, ...]
    curves: tuple[pages.Curve, ...]
    command: str


def write(
    folder: Path, measured: Sequence[ModelAnalysis], *, source: Path, command: str
) -> list[dict[str, Any]]:
    """Write ``analysis.json`` and ``analysis.html`` into `folder`; returns the numbers.

    Args:
        measured: one model, or two in the order before, after.
        command: what made them, for the page.
    """
    numbers = summarize(measured)
    told = {"source": str(source), "command": command, "models": numbers}
    write_text_atomically(folder / "analysis.json", json.dumps(told, indent=2) + "\n")
    page = AnalysisPage(
        str(source), tuple(measured), tuple(_lines(numbers)), tuple(_curves(measured)), command
    )
    pages.write_page(folder / "analysis.html", "analysis.html", {"report": page})
    return numbers


def _lines(numbers: Sequence[dict[str, Any]]) -> Iterator[Line]:
    def row(
        name: str, note: str, *path: str, form: str = "{mean:.2f} ({low:.2f} to {high:.2f})"
    ) -> Iterator[Line]:
        values = []
        for one in numbers:
            value: Any = one
            for key in path:
                value = None if value is None else value[key]
            values.append(
                ""
                if value is None
                else form.format(**value)
                if isinstance(value, dict)
                else str(value)
            )
        if any(values):
            yield Line(name, note, tuple(values))

    for kind in ("images", "texts"):
        yield from row(f"Entropy, {kind}", "nats at the reading token", kind, "entropy")
        for share in VARIANCE_SHARES:
            note = f"for {100 * share:g} % of the squared singular values"
            yield from row(f"Components, {kind}", note, kind, "components", f"{share:g}")
    yield from row(
        "Attention to the image", "share of all, mean over layers and heads", "attention", "share"
    )
    yield from row(
        "Evenness of that attention", "1 where every part gets the same", "attention", "evenness"
    )


def _curves(measured: Sequence[ModelAnalysis]) -> Iterator[pages.Curve]:
    for kind in ("images", "texts"):
        readings = [
            (one.name, getattr(one, kind)) for one in measured if getattr(one, kind) is not None
        ]
        if not readings:
            continue
        yield pages.Curve(
            f"Explained variance, {kind}",
            "Share of the first components. A lower curve is spread over more of them.",
            tuple(
                Series(name, _points(explained_variance(one.embeddings))) for name, one in readings
            ),
            x_label="components",
            percent=True,
        )
        yield pages.Curve(
            f"Next-token entropy, {kind}",
            "Nats at the reading token, items in rising order.",
            tuple(Series(name, _quantiles(one.entropy)) for name, one in readings),
            x_label="percentile of items",
        )


def _points(curve: Floats) -> tuple[tuple[float, float], ...]:
    chosen = np.unique(np.linspace(1, len(curve), CURVE_POINTS).round().astype(int))
    return tuple((float(k), float(curve[k - 1])) for k in chosen)


def _quantiles(values: Floats) -> tuple[tuple[float, float], ...]:
    at = np.linspace(0, 100, CURVE_POINTS)
    return tuple(zip(at.tolist(), np.percentile(values, at).tolist(), strict=True))
