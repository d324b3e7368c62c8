"""FROMAGe: a frozen language model that retrieves, by linear maps around it alone (Koh et al. 2023, arXiv 2301.13823).

    text     caption [RET]        hidden state at [RET]  -> W_t -> a
    image    mean of the frozen vision tower's features  -> W_i -> b        the language model does not see it
    image, then caption </s>      its features -> W_c -> tokens             labels on the caption

    L = L_c + L_CE         d: L_c alone        g+d: both

L_c is the symmetric InfoNCE of all a and b, half of both directions' sum; L_CE the mean over supervised tokens of the global
batch. Trained are W_t, W_i and the temperature, the one embedding of [RET], which keeps the mean length of the table's, and
in g+d W_c. W_c is the last linear layer of the checkpoint's projector (`train.projector: last`): what stands before it is
frozen like the tower. In the paper it is new and makes its k tokens of one pooled vector; here every vector makes one.

Pairs and retrieval records take part. A retrieval record's mixtures are read at their [RET], their images through W_c.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlduet import distributed
from vlduet.config import RunConfig
from vlduet.data.sequences import Sequence
from vlduet.data.stream import Sample
from vlduet.errors import ConfigError, DataError
from vlduet.model.duet import DuetModel
from vlduet.model.pooling import Readout
from vlduet.model.prompts import Renderer
from vlduet.model.soft_prompts import SoftPrompts, soft_prompt_token
from vlduet.objectives.language import language_loss
from vlduet.recipes.contrast import (
    compute_contrastive_loss,
    layout_embedding,
    layout_hard_negatives,
    layout_retrieval_record,
)
from vlduet.recipes.recipe import Recipe

RET_TOKEN = soft_prompt_token(0)
"""The learned token that ends every text."""


@dataclass(frozen=True, slots=True)
class FromageOptions:
    """What a config may set beside `recipe.name`."""

    temperature_floor: float = 0.01
    """Lowest temperature of the contrastive loss."""


def prepare_model(model: DuetModel, config: RunConfig) -> None:
    """Give the starting model [RET] and the two maps; one that an earlier run made has them.

    Raises:
        ConfigError: settings under which something else than FROMAGe would be trained.
    """
    train = config.train
    wanted = (
        ("train.lora", train.lora is None, "FROMAGe's language model is frozen", "Set it to null"),
        ("train.soft_prompts", train.soft_prompts, "[RET] is a learned token", "Set it to true"),
        ("model.head", config.model.head is None, "FROMAGe has heads of its own", "Leave it out"),
        (
            "model.prompts.chat",
            not model.prompts.chat,
            "[RET] must be the last token",
            "Set it to false",
        ),
    )
    for place, holds, what, fix in wanted:
        if not holds:
            raise ConfigError(what, place=place, fix=fix)
    if model.prompts.image_pool == "vision":
        return
    if RET_TOKEN in model.backbone.tokenizer.get_vocab():
        raise ConfigError(
            "the model has learned prompts", place="model.path", fix="Start from one without them"
        )
    written = model.prompts
    model.set_prompts(
        replace(
            written,
            text=written.text + RET_TOKEN,
            parts=written.parts + RET_TOKEN,
            image_pool="vision",
        )
    )
    model.soft_prompts = SoftPrompts(
        model.backbone, model.backbone.token_embedding.weight.float().mean(0, keepdim=True)
    )
    rescale_ret_token(model)
    torch.manual_seed(config.seed)
    model.reset_head("split", config.model.dim)


@torch.no_grad()
def rescale_ret_token(model: DuetModel) -> None:
    """After every step: [RET] is as long as the rows of the table are on average."""
    assert model.soft_prompts is not None
    rows = model.soft_prompts.rows
    length = model.backbone.token_embedding.weight.norm(dim=1).mean().to(rows.dtype)
    rows.mul_(length / rows.norm(dim=1, keepdim=True))


def layout(sample: Sample, renderer: Renderer, options: FromageOptions) -> list[Sequence]:
    """One record -> its sequences (the figure above). Raises DataError for a record that this method cannot use."""
    record = sample.record
    if record.kind == "retrieval":
        return layout_retrieval_record(sample, renderer)
    captions = record.short or ((record.long,) if record.long else ())
    if record.image is None or not captions:
        raise DataError(
            "no image with a caption", fix="Train this recipe on pairs or retrieval records"
        )
    caption = sample.rng().choice(captions)
    return [
        renderer.render_caption(record.image, caption, record_name=sample.record_name),
        layout_embedding(sample, renderer, (caption,), role="text"),
        *layout_hard_negatives(sample, renderer),
    ]


def objective(readout: Readout, logit_scale: Tensor, options: FromageOptions) -> dict[str, Tensor]:
    """The two losses of this process's share of the batch, by name (see `vlduet.distributed` for the scaling)."""
    count = distributed.all_reduce_sum(len(readout.nll))
    return {
        "contrastive": 0.5
        * compute_contrastive_loss(readout, logit_scale, min_temperature=options.temperature_floor),
        "language": language_loss(
            readout.nll, global_token_count=count, world_size=distributed.get_world_size()
        ),
    }


RECIPE = Recipe(
    name="fromage",
    options=FromageOptions,
    objectives=("contrastive", "language"),
    layout=layout,
    objective=objective,
    start=prepare_model,
    after_step=rescale_ret_token,
    betas=(0.9, 0.95),
)
