"""LLaVA and its relatives: 1.5, NeXT (1.6), OneVision; and FastVLM, which the default model is one of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlduet.errors import ModelError
from vlduet.model.families.family import Family, ImageInputs, run_image_processor

MAX_SQUARES_PER_FORWARD = 8
"""That go through a tower at once whose every layer is kept while they do."""
MAX_TILES_PER_SIDE = 3
"""Of LLaVA-OneVision, a side: `anyres_max_9`."""


def llava() -> Family:
    """LLaVA 1.5: one layer of the tower, without the class token when the strategy is `default`."""

    def vision(model: Any, inputs: ImageInputs) -> Tensor:
        return _layers(model, inputs["pixel_values"]).flatten(0, 1)  # [images * tokens, Dv]

    def count(config: Any, inputs: ImageInputs) -> int:
        if config.vision_config.model_type == "pixtral":
            fix = "Take a checkpoint of model_type 'mistral3'"
            raise ModelError(
                "LLaVA with a Pixtral tower is not supported", place="config.json", fix=fix
            )
        height, width = inputs["pixel_values"].shape[-2:]
        patch = config.vision_config.patch_size
        return int(
            (height // patch) * (width // patch)
            + (config.vision_feature_select_strategy != "default")
        )

    return Family(num_image_tokens=count, vision_features=vision)


def _layers(model: Any, pixels: Tensor) -> Tensor:
    """float[squares, 3, H, W] -> float[squares, tokens, Dv], the tower's layers that the config names, side by side."""
    config = model.config
    layers = config.vision_feature_layer
    first = int(config.vision_feature_select_strategy == "default")
    found = []
    for some in pixels.to(model.dtype).split(MAX_SQUARES_PER_FORWARD):
        states = model.model.vision_tower(some, output_hidden_states=True).hidden_states
        chosen = [states[i][:, first:] for i in ([layers] if isinstance(layers, int) else layers)]
        found.append(torch.cat(chosen, dim=-1))
    return torch.cat(found)


def llava_next() -> Family:
    """LLaVA 1.6 (NeXT): the picture whole and small, then large and cut into tiles, whose tokens are read across
    them, row by row and without the padding; the same learned embedding ends every row.

    That one knows no projector, so among the features it is a row of zeros, which no picture makes.
    """
    return _tiles_in_rows(
        lambda config: {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    )


def _tiles_in_rows(told: Callable[[Any], dict[str, Any]]) -> Family:
    """`llava_next`, of whose relatives each tells its geometry something else: config -> arguments."""
    from transformers.models.llava_next import (
        modeling_llava_next as geometry,  # for who has such a checkpoint
    )

    def tiles(config: Any, size: Tensor) -> tuple[int, int]:
        found: tuple[int, int] = geometry.get_anyres_image_grid_shape(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )
        return found

    def whole(config: Any) -> int:
        return int((config.vision_config.image_size // config.vision_config.patch_size) ** 2)

    def count(config: Any, inputs: ImageInputs) -> int:
        size, side = inputs["image_sizes"][0], math.isqrt(whole(config))
        rows, columns = tiles(config, size)
        padded = torch.empty(1, rows * side, columns * side)
        _, height, width = geometry.unpad_image(padded, size).shape
        return whole(config) + int(height) * (int(width) + 1)

    def vision(model: Any, inputs: ImageInputs) -> Tensor:
        config, sizes = model.config, inputs["image_sizes"]
        states = _layers(model, inputs["pixel_values"])  # [tiles of all images, tokens, Dv]
        each = states.split([1 + math.prod(tiles(config, size)) for size in sizes])
        end = states.new_zeros(states.shape[-1])
        packed, _ = model.model.pack_image_features(each, sizes, image_newline=end, **told(config))
        return torch.cat(packed)

    def project(inner: Any, projector: nn.Module, features: Tensor) -> Tensor:
        ends = ~features.any(1, keepdim=True)
        return torch.where(ends, inner.image_newline.to(features.dtype), projector(features))

    return Family(
        num_image_tokens=count,
        vision_features=vision,
        project=project,
        vision_tower_pixels=lambda config, inputs: inputs["pixel_values"][0],
        overview_features=lambda config, inputs: slice(whole(config)),
    )


def llava_onevision() -> Family:
    """LLaVA-OneVision: as NeXT, from up to nine tiles.

    Larger pictures are taken at more tiles by their own processor, and made smaller behind the projector. Features here end
    in front of it, so a picture is made small enough before. Each is tiled, of several in one prompt, too.
    """

    def process(processor: Any, picture: Any) -> Mapping[str, Any]:
        side = MAX_TILES_PER_SIDE * processor.size["height"]
        picture.thumbnail((side, side))
        return run_image_processor(processor, picture)

    def count(config: Any, inputs: ImageInputs) -> int:
        if config.vision_aspect_ratio != f"anyres_max_{MAX_TILES_PER_SIDE**2}":
            raise ModelError(
                f"vision_aspect_ratio '{config.vision_aspect_ratio}' is not supported",
                place="config.json",
            )
        return family.num_image_tokens(config, inputs)

    family = _tiles_in_rows(lambda config: {"vision_aspect_ratio": config.vision_aspect_ratio})
    return replace(family, preprocess=process, num_image_tokens=count)


def fast_vlm() -> Family:
    """FastVLM, and so the default model: a convolutional tower, every position of its last map is a token."""

    def vision(model: Any, inputs: ImageInputs) -> Tensor:
        tower = model.model.vision_tower
        # Where the channels of a pixel lie together, convolutions take two thirds of the time.
        together = torch.channels_last
        if not next(p for p in tower.parameters() if p.ndim == 4).is_contiguous(
            memory_format=together
        ):
            tower.to(memory_format=together)
        out = tower(
            inputs["pixel_values"].to(model.dtype, memory_format=together)
        ).last_hidden_state  # [N, Dv, h, w]
        tokens: Tensor = out.flatten(2).transpose(1, 2).flatten(0, 1)  # [N * h * w, Dv]
        return tokens

    def count(config: Any, inputs: ImageInputs) -> int:
        return int(config.image_seq_length)

    return Family(num_image_tokens=count, vision_features=vision)
