"""Idefics3 and SmolVLM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlduet.model.families.family import Family, ImageInputs, token_string


class Idefics3(Family):
    """Idefics3 and SmolVLM: squares in which n * n patches make a token; text between the squares.

    Dv is the width of n * n patches. The image processor of the checkpoint decides
    (`do_image_splitting`) whether an image is cut into tiles, followed by the whole image.
    """

    language_model_path = "text_model"
    vision_tower_path = "vision_model"
    projector_path = "connector.modality_projection"

    def num_image_tokens(self, inputs: ImageInputs) -> int:
        """Return the number of feature tokens of all squares of one image."""
        return len(inputs["pixel_values"]) * self._tokens_per_square(inputs)

    def _tokens_per_square(self, inputs: ImageInputs) -> int:
        """Return the number of feature tokens of one square, as all have the same size."""
        height, width = inputs["pixel_values"].shape[-2:]
        patch_size = self.config.vision_config.patch_size
        num_patches = (height // patch_size) * (width // patch_size)
        return int(num_patches // self.config.scale_factor**2)

    def bounded_settings(self, image_processor: Any, max_tokens: int) -> Mapping[str, Any]:
        """Return a `size` of fewer tiles along the longest edge; texts between squares count."""
        longest_edge = image_processor.size.longest_edge
        if not (image_processor.do_image_splitting and longest_edge):
            return {}
        edge = image_processor.max_image_size["longest_edge"]
        patches_per_side = edge // self.config.vision_config.patch_size
        tokens_per_square = patches_per_side**2 // self.config.scale_factor**2
        most_per_side = per_side = math.ceil(longest_edge / edge)
        while per_side > 1:
            num_tiles = per_side**2
            # Two tokens before each tile, one after each row, four around the whole image.
            num_text_tokens = 2 * num_tiles + per_side + 4
            if (num_tiles + 1) * tokens_per_square + num_text_tokens <= max_tokens:
                break
            per_side -= 1
        return {} if per_side == most_per_side else {"size": {"longest_edge": per_side * edge}}

    def vision_features(self, model: Any, inputs: ImageInputs) -> Tensor:
        """Run the vision tower on all squares and return float[squares * tokens, Dv].

        Each row holds the features of n * n neighbouring patches side by side.
        """
        pixel_values = inputs["pixel_values"].to(model.dtype)
        states = model.model.vision_model(pixel_values).last_hidden_state
        tokens: Tensor = model.model.connector.pixel_shuffle(states, self.config.scale_factor)
        return tokens.flatten(0, 1)

    def preprocess(self, image_processor: Any, picture: Any) -> Mapping[str, Any]:
        """Return `pixel_values` and `tiles`, int64[1, 2]: rows and columns, (0, 0) if not cut."""
        outputs = image_processor(images=picture, return_tensors="pt", return_row_col_info=True)
        tiles = torch.tensor([[outputs["rows"][0][0], outputs["cols"][0][0]]])
        return {"pixel_values": outputs["pixel_values"], "tiles": tiles}

    def overview_features(self, inputs: ImageInputs) -> slice:
        """Return the slice of the last square's rows, which is the whole image."""
        return slice(-self._tokens_per_square(inputs), None)

    def interleaved_tokens(self, tokenizer: Any, inputs: ImageInputs) -> Mapping[int, int]:
        """Return the text tokens before, between and after the squares of one image.

        They name each tile by row and column, end each row of tiles, name the whole image, and end
        it. An image that is not cut has only the last two.

        Returns:
            {offset in the image: token id}, in increasing order. Offsets count feature tokens, too.
        """
        rows, columns = inputs["tiles"][0].tolist()
        boundary = "<fake_token_around_image>"
        image_token_id = self.config.image_token_id
        square = token_string(tokenizer, image_token_id) * self._tokens_per_square(inputs)
        text = ""
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                text += f"{boundary}<row_{row}_col_{column}>{square}"
            text += "\n"
        if rows:
            text += "\n"
        text += f"{boundary}<global-img>{square}{boundary}"
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        return {i: token_id for i, token_id in enumerate(token_ids) if token_id != image_token_id}
