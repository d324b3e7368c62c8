"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL; GLM-4.1V and GLM-4.6V."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlduet.model.families.family import (
    Family,
    ImageDelimiters,
    ImageInputs,
    project_once,
    token_string,
)


def qwen_vl() -> Family:
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: an image in its own proportions, in patches of which m * m neighbours make a token.

    Dv is the width of m * m patches: the projector (`merger`) is a part of the tower, and its weights are trained here. A
    token's position is its image's place in time, its row and its column (multimodal rope). Qwen3-VL brings features of
    earlier layers of its tower, too, for the first layers of the trunk (DeepStack).
    """

    def vision(model: Any, inputs: ImageInputs) -> Tensor:
        unit = model.model.visual.spatial_merge_size**2
        # Qwen2.5-VL brings the tokens into the picture's order then, for it attends in windows.
        out = _without_merger(
            model, inputs, instead=nn.Sequential(nn.Unflatten(0, (-1, unit)), nn.Flatten(1))
        )
        # [tokens, m * m * width], and D more for each layer of the trunk that has features of its own
        return torch.cat([out.pooler_output, *getattr(out, "deepstack_features", ())], 1)

    def project(inner: Any, merger: nn.Module, features: Tensor) -> Tensor:
        norm: Any = merger.norm if hasattr(merger, "norm") else merger.ln_q
        projected: Tensor = merger(
            features.reshape(-1, norm.weight.shape[0])
        )  # patches go in, tokens come out
        return projected

    def grid(config: Any, inputs: ImageInputs) -> tuple[int, int]:
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        merge = config.vision_config.spatial_merge_size
        return rows // merge, columns // merge

    def count(config: Any, inputs: ImageInputs) -> int:
        rows, columns = grid(config, inputs)
        return rows * columns

    def pixels(config: Any, inputs: ImageInputs) -> Tensor:
        shape = config.vision_config
        patch, merge, times = shape.patch_size, shape.spatial_merge_size, shape.temporal_patch_size
        rows, columns = grid(config, inputs)
        patches = inputs["pixel_values"].view(rows, columns, merge, merge, -1, times, patch, patch)[
            ..., 0, :, :
        ]
        return patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(
            -1, rows * merge * patch, columns * merge * patch
        )

    def frame(config: Any, tokenizer: Any) -> ImageDelimiters:
        return token_string(tokenizer, config.vision_start_token_id), token_string(
            tokenizer, config.vision_end_token_id
        )

    return Family(
        num_image_tokens=count,
        vision_features=vision,
        vision_tower_path="visual",
        projector_path="visual.merger",
        project=project,
        vision_tower_pixels=pixels,
        token_grid=grid,
        image_delimiters=frame,
    )


def glm_vl() -> Family:
    """GLM-4.1V and GLM-4.6V: as Qwen2-VL, but the tower itself makes one token of m * m patches; Dv is the trunk's width."""

    def vision(model: Any, inputs: ImageInputs) -> Tensor:
        tokens: Tensor = _without_merger(model, inputs, instead=nn.Identity()).pooler_output
        return tokens

    def frame(config: Any, tokenizer: Any) -> ImageDelimiters:
        return token_string(tokenizer, config.image_start_token_id), token_string(
            tokenizer, config.image_end_token_id
        )

    return replace(qwen_vl(), vision_features=vision, project=project_once, image_delimiters=frame)


def _without_merger(model: Any, inputs: ImageInputs, *, instead: nn.Module) -> Any:
    """What the tower makes with another module for its merger; the model, which another thread may use, stays as it is."""
    whole = model.model.visual
    tower = copy.copy(whole)
    tower._modules = whole._modules | {"merger": instead}
    return tower(inputs["pixel_values"].to(model.dtype), grid_thw=inputs["image_grid_thw"])
