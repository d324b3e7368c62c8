"""FROMAGe: linear maps around a frozen language model (Koh et al. 2023, arXiv 2301.13823).

    text sequence      caption [RET]             hidden state at [RET] -> W_t -> a
    image sequence     image                     mean of the vision tower's features -> W_i -> b;
                                                 the language model does not see it
    caption sequence   image, then caption </s>  features -> W_c -> image tokens; labels: caption

    L = L_c + L_CE             variant d of the paper: L_c alone; g+d: both

L_c is half the symmetric InfoNCE of all a and b. L_CE is the mean over the supervised tokens of the
global batch. Trained are W_t, W_i, the temperature, the embedding of [RET], which keeps the mean
norm of the embedding table, and in g+d W_c. W_c is the last linear layer of the checkpoint's
projector (`train.projector: last`); the layers before it are frozen like the vision tower. In the
paper, W_c is new and makes k tokens of one pooled vector; here every feature vector makes one.

Pairs and retrieval records take part. The mixtures of a retrieval record are read at their [RET],
and their images go through W_c.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlduet.config import RunConfig
from vlduet.data.records import Record
from vlduet.data.sequences import Sequence
from vlduet.data.stream import Sample
from vlduet.errors import ConfigError, DataError
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import Readout
from vlduet.model.prompts import Renderer
from vlduet.model.soft_prompts import SoftPrompts, soft_prompt_token
from vlduet.recipes.contrast import (
    compute_contrastive_loss,
    compute_language_loss,
    layout_embedding,
    layout_hard_negatives,
    layout_retrieval_record,
)
from vlduet.recipes.recipe import Recipe

RET_TOKEN = soft_prompt_token(0)
"""Learned token [RET] that ends every text."""


@dataclass(frozen=True, slots=True)
class FromageOptions:
    """Keys of `recipe` in a config beside `name`."""

    temperature_floor: float = 0.01
    """Lowest temperature of L_c."""


# ------------------------------------------------------------------ layout


def layout(sample: Sample, renderer: Renderer, options: FromageOptions) -> list[Sequence]:
    """Return the sequences of a record.

    A pair: the image (with the anchor) followed by a caption as labels, the same caption as text
    sequence with an anchor, and its hard negatives. The sample's own random generator draws one of
    the short captions; without any, it is the long one. A retrieval record: see
    `layout_retrieval_record`.

    Raises:
        DataError: another kind of record, a pair without image or caption, or content that cannot
            be rendered.
        ImageError: an unreadable image.
    """
    record = sample.record
    if record.kind == "retrieval":
        return layout_retrieval_record(sample, renderer)
    captions = record.short or ((record.long,) if record.long else ())
    if record.image is None or not captions:
        fix = "Train this recipe on pairs or retrieval records"
        raise DataError("no image with a caption", fix=fix)
    caption = sample.rng().choice(captions)
    return [
        renderer.render_caption(record.image, caption, record_name=sample.record_name),
        layout_embedding(sample, renderer, (caption,), role="text"),
        *layout_hard_negatives(sample, renderer),
    ]


def find_losses(record: Record, options: FromageOptions) -> tuple[str, ...]:
    """Return the names of the losses that a record may have something for, see `layout`."""
    if record.kind == "retrieval":
        return ("contrastive",)
    has_caption = record.image is not None and bool(record.short or record.long)
    return ("contrastive", "language") if has_caption else ()


# ------------------------------------------------------------------ losses


def objective(readout: Readout, logit_scale: Tensor, options: FromageOptions) -> dict[str, Tensor]:
    """Return this rank's shares of L_c, `contrastive`, and L_CE, `language`."""
    symmetric_infonce = compute_contrastive_loss(
        readout, logit_scale, min_temperature=options.temperature_floor
    )
    return {
        "contrastive": 0.5 * symmetric_infonce,
        "language": compute_language_loss(readout),
    }


# ------------------------------------------------------------------ model


def prepare_model(model: DuetModel, config: RunConfig) -> None:
    """Add [RET] and the maps W_t and W_i to a starting model, in place.

    [RET] is added to the tokenizer and at the end of the prompts of texts and mixtures; its
    embedding starts as the mean of the table, scaled to the mean norm. Images are read from the
    vision tower. The head becomes a new one of kind `split`, and torch's global seed is set to that
    of the config. A model that an earlier FROMAGe run has written is only checked.

    Raises:
        ConfigError: `train.lora` or `model.head` is set, `train.soft_prompts` is off, the prompts
            are in a chat turn, or the model has learned prompts of another recipe.
    """
    train = config.train
    has_chat_prompt = model.prompts.chat
    requirements = (
        ("train.lora", train.lora is None, "FROMAGe's language model is frozen", "Set it to null"),
        ("train.soft_prompts", train.soft_prompts, "[RET] is a learned token", "Set it to true"),
        ("model.head", config.model.head is None, "FROMAGe has heads of its own", "Leave it out"),
        (
            "model.prompts.chat",
            not has_chat_prompt,
            "[RET] must be the last token",
            "Set it to false",
        ),
    )
    for place, is_met, message, fix in requirements:
        if not is_met:
            raise ConfigError(message, place=place, fix=fix)
    if model.prompts.image_pool == "vision":
        return
    if RET_TOKEN in model.backbone.tokenizer.get_vocab():
        fix = "Start from one without them"
        raise ConfigError("the model has learned prompts", place="model.path", fix=fix)
    prompts = model.prompts
    text = prompts.text + RET_TOKEN
    parts = prompts.parts + RET_TOKEN
    model.set_prompts(replace(prompts, text=text, parts=parts, image_pool="vision"))
    mean_embedding = model.backbone.token_embedding.weight.float().mean(0, keepdim=True)
    model.soft_prompts = SoftPrompts(model.backbone, mean_embedding)
    rescale_ret_token(model)
    torch.manual_seed(config.seed)
    model.reset_head("split", config.model.dim)


@torch.no_grad()
def rescale_ret_token(model: DuetModel) -> None:
    """Scale the embedding of [RET], in place, to the mean norm of the rows of the table."""
    assert model.soft_prompts is not None
    rows = model.soft_prompts.rows
    mean_norm = model.backbone.token_embedding.weight.norm(dim=1).mean().to(rows.dtype)
    rows.mul_(mean_norm / rows.norm(dim=1, keepdim=True))


RECIPE = Recipe(
    name="fromage",
    options=FromageOptions,
    objectives=("contrastive", "language"),
    layout=layout,
    objective=objective,
    find_losses=find_losses,
    requirements={
        "contrastive": "an image with a caption, or a query with a positive",
        "language": "an image with a caption",
    },
    start=prepare_model,
    after_step=rescale_ret_token,
    betas=(0.9, 0.95),  # of the paper
)
