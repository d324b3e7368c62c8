"""InternVL."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from vlduet.model.families.family import Family, ImageDelimiters, ImageInputs


def internvl() -> Family:
    """InternVL, converted for transformers: squares of one size, in patches of which n * n neighbours make a token.

    Dv is the width of n * n patches. Whether a picture is cut into tiles, with itself as the last one, is what the
    checkpoint's image processor says (`crop_to_patches`).
    """

    def vision(model: Any, inputs: ImageInputs) -> Tensor:
        config, inner = model.config, model.model
        layer = config.vision_feature_layer
        out = inner.vision_tower(
            inputs["pixel_values"].to(model.dtype), output_hidden_states=layer != -1
        )
        states = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        if config.vision_feature_select_strategy == "default":
            states = states[:, 1:]
        side = math.isqrt(states.shape[1])
        tokens: Tensor = inner.pixel_shuffle(
            states.unflatten(1, (side, side)), scale_factor=config.downsample_ratio
        )
        return tokens.flatten(0, 2)  # [tiles * rows * columns, Dv]

    def count(config: Any, inputs: ImageInputs) -> int:
        tiles, _, height, width = inputs["pixel_values"].shape
        patch_height, patch_width = config.vision_config.patch_size
        return int(
            tiles * (height // patch_height) * (width // patch_width) * config.downsample_ratio**2
        )

    def shown(config: Any, inputs: ImageInputs) -> slice:
        return slice(-(count(config, inputs) // len(inputs["pixel_values"])), None)

    def frame(config: Any, tokenizer: Any) -> ImageDelimiters:
        return tokenizer.start_image_token, tokenizer.end_image_token

    return Family(
        num_image_tokens=count,
        vision_features=vision,
        overview_features=shown,
        image_delimiters=frame,
    )
