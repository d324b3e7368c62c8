"""InternVL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlduet.model.families.family import Family, ImageDelimiters, ImageInputs


class InternVL(Family):
    """InternVL in its transformers format: fixed-size squares in which n * n patches make a token.

    Dv is the width of n * n patches. The image processor of the checkpoint decides
    (`crop_to_patches`) whether an image is cut into tiles, followed by the whole image.
    """

    def num_image_tokens(self, inputs: ImageInputs) -> int:
        """Return the number of feature tokens of all tiles of one image, the whole one included."""
        num_tiles, _, height, width = inputs["pixel_values"].shape
        patch_height, patch_width = self.config.vision_config.patch_size
        num_patches = num_tiles * (height // patch_height) * (width // patch_width)
        return int(num_patches * self.config.downsample_ratio**2)

    def bounded_settings(self, image_processor: Any, max_tokens: int) -> Mapping[str, Any]:
        """Return fewer `max_patches`, which are tiles; the whole image is one more square."""
        if not image_processor.crop_to_patches:
            return {}
        patch_height, patch_width = self.config.vision_config.patch_size
        size = image_processor.size
        num_patches = (size.height // patch_height) * (size.width // patch_width)
        tokens_per_square = int(num_patches * self.config.downsample_ratio**2)
        most_tiles = max(1, max_tokens // tokens_per_square - 1)
        if image_processor.max_patches <= most_tiles:
            return {}
        least_tiles = min(image_processor.min_patches, most_tiles)
        return {"max_patches": most_tiles, "min_patches": least_tiles}

    def vision_features(self, model: Any, inputs: ImageInputs) -> Tensor:
        """Run the vision tower on all tiles and return float[tiles * rows * columns, Dv].

        Each row holds n * n neighbouring patches side by side, of the tower's layer
        `config.vision_feature_layer`. Patches must form a square; a class token is dropped if
        `config.vision_feature_select_strategy` is `default`.
        """
        layer = self.config.vision_feature_layer
        pixel_values = inputs["pixel_values"].to(model.dtype)
        outputs = model.model.vision_tower(pixel_values, output_hidden_states=layer != -1)
        states = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
        if self.config.vision_feature_select_strategy == "default":
            states = states[:, 1:]  # drop the class token
        side = math.isqrt(states.shape[1])
        patch_grid = states.unflatten(1, (side, side))
        scale = self.config.downsample_ratio
        tokens: Tensor = model.model.pixel_shuffle(patch_grid, scale_factor=scale)
        return tokens.flatten(0, 2)

    def overview_features(self, inputs: ImageInputs) -> slice:
        """Return the slice of the last tile's rows, which is the whole image."""
        num_tiles = len(inputs["pixel_values"])
        return slice(-(self.num_image_tokens(inputs) // num_tiles), None)

    def image_delimiters(self, tokenizer: Any) -> ImageDelimiters:
        return tokenizer.start_image_token, tokenizer.end_image_token
