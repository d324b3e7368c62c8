"""Mistral Small 3.1 and Ministral 3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlduet.model.families.family import Family, ImageInputs, run_image_processor


def mistral3() -> Family:
    """Mistral Small 3.1 and Ministral 3: an image in its own proportions, m * m patches a token, a word between its rows.

    Dv is the width of m * m patches, each number of theirs side by side: the projector merges them. What is prepared of an
    image are its cells of m * m patches, so that images of several sizes make one batch.
    """

    def side(config: Any) -> int:
        return int(config.vision_config.patch_size * config.spatial_merge_size)

    def process(processor: Any, picture: Any) -> Mapping[str, Any]:
        made = run_image_processor(processor, picture)
        cell = processor.patch_size["height"]
        parts = (
            made["pixel_values"][0].unfold(1, cell, cell).unfold(2, cell, cell)
        )  # [3, rows, columns, cell, cell]
        return {
            "pixel_values": parts.permute(1, 2, 0, 3, 4).flatten(0, 1),
            "image_sizes": made["image_sizes"],
        }

    def shape(config: Any, inputs: ImageInputs) -> tuple[int, int]:
        rows, columns = (inputs["image_sizes"][0] // side(config)).tolist()
        return rows, columns

    def pixels(config: Any, inputs: ImageInputs) -> Tensor:
        rows, columns = shape(config, inputs)
        parts: Tensor = inputs["pixel_values"].unflatten(0, (rows, columns))
        return parts.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)

    def vision(model: Any, inputs: ImageInputs) -> Tensor:
        config, sizes = model.config, inputs["image_sizes"]
        counts = (sizes // side(config)).prod(1).tolist()
        cells = inputs["pixel_values"].to(model.dtype).split(counts)
        each = [
            pixels(config, {"pixel_values": c, "image_sizes": s[None]})
            for c, s in zip(cells, sizes, strict=True)
        ]
        height, width = sizes.amax(0).tolist()
        padded = [
            nn.functional.pad(one, (0, width - one.shape[2], 0, height - one.shape[1]))
            for one in each
        ]
        out = model.model.vision_tower(
            torch.stack(padded), image_sizes=sizes, output_hidden_states=True
        )
        states = out.hidden_states[config.vision_feature_layer][0]  # [patches of all images, width]
        merge, patch = config.spatial_merge_size, config.vision_config.patch_size
        found = []
        for one, (rows, columns) in zip(
            states.split((sizes // patch).prod(1).tolist()), sizes // patch, strict=True
        ):
            grid = one.view(rows // merge, merge, columns // merge, merge, -1)
            found.append(grid.permute(0, 2, 4, 1, 3).flatten(0, 1).flatten(1))
        return torch.cat(found)  # [tokens, width * m * m]

    def project(inner: Any, projector: nn.Module, features: Tensor) -> Tensor:
        merger: Any = projector.patch_merger
        patches = features.unflatten(1, (-1, merger.spatial_merge_size**2)).transpose(1, 2)
        normed = projector.norm(patches).transpose(1, 2).flatten(1)  # type: ignore[operator]
        hidden = projector.act(projector.linear_1(merger.merging_layer(normed)))  # type: ignore[operator]
        projected: Tensor = projector.linear_2(hidden)  # type: ignore[operator]
        return projected

    def words(config: Any, tokenizer: Any, inputs: ImageInputs) -> Mapping[int, int]:
        rows, columns = shape(config, inputs)
        end = tokenizer.convert_tokens_to_ids("[IMG_BREAK]")
        return {row * (columns + 1) - 1: end for row in range(1, rows)}

    return Family(
        num_image_tokens=lambda config, inputs: math.prod(shape(config, inputs)),
        vision_features=vision,
        preprocess=process,
        project=project,
        vision_tower_pixels=pixels,
        image_delimiters=lambda config, tokenizer: ("", "[IMG_END]"),
        interleaved_tokens=words,
        processor_overrides=lambda config: {
            "patch_size": {"height": side(config), "width": side(config)}
        },
    )
