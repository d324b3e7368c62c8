"""LLaVA 1.5, LLaVA-NeXT (1.6), LLaVA-OneVision, and FastVLM, the family of the default model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlduet.errors import ModelError
from vlduet.model.families.family import (
    Family,
    ImageInputs,
    replace_attributes,
    run_image_processor,
)

MAX_SQUARES_PER_FORWARD = 8
"""Number of image squares encoded at once; limits memory, as the tower keeps all hidden states."""
MAX_TILES_PER_SIDE = 3
"""Largest number of tiles along one side of a LLaVA-OneVision image: `anyres_max_9` is 3 * 3."""


class Llava(Family):
    """LLaVA 1.5: features of one or several layers of a CLIP or SigLIP tower.

    The class token is dropped if `vision_feature_select_strategy` is `default`.
    """

    def num_image_tokens(self, inputs: ImageInputs) -> int:
        """Return the number of patches of one image, and one more if the class token is kept.

        Raises:
            ModelError: the vision tower is a Pixtral.
        """
        if self.config.vision_config.model_type == "pixtral":
            raise ModelError(
                "LLaVA with a Pixtral tower is not supported",
                place="config.json",
                fix="Use a checkpoint of model_type 'mistral3'",
            )
        height, width = inputs["pixel_values"].shape[-2:]
        patch_size = self.config.vision_config.patch_size
        num_patches = int((height // patch_size) * (width // patch_size))
        if self.config.vision_feature_select_strategy != "default":
            return num_patches + 1  # the class token stays
        return num_patches

    def vision_features(self, model: Any, inputs: ImageInputs) -> Tensor:
        """Run the vision tower and return float[images * tokens, Dv] (see `_encode_squares`)."""
        return _encode_squares(model, self.config, inputs["pixel_values"]).flatten(0, 1)


def _encode_squares(model: Any, config: Any, pixel_values: Tensor) -> Tensor:
    """Encode squares float[squares, 3, H, W] with the vision tower, a few at a time.

    Returns:
        float[squares, tokens, Dv] in the model's dtype: the hidden states of the layer or layers
        `config.vision_feature_layer`, concatenated along Dv. The first token (the class token) is
        dropped if `config.vision_feature_select_strategy` is `default`.
    """
    layers = config.vision_feature_layer
    if isinstance(layers, int):
        layers = [layers]
    first_token = int(config.vision_feature_select_strategy == "default")
    features = []
    for squares in pixel_values.to(model.dtype).split(MAX_SQUARES_PER_FORWARD):
        states = model.model.vision_tower(squares, output_hidden_states=True).hidden_states
        features.append(torch.cat([states[layer][:, first_token:] for layer in layers], dim=-1))
    return torch.cat(features)


class TiledImages:
    """Image handling of LLaVA-NeXT and LLaVA-OneVision: an overview, then the image in tiles.

    Tokens of the tiles are read across tiles, row by row, without the padding of the image; a
    learned embedding (`image_newline`) ends every row. It is a row of zeros among the features,
    which the tower produces for no image, and it does not pass the projector.
    """

    config: Any

    packing_option: str
    """Config entry that transformers' `pack_image_features` takes as a keyword argument."""

    def _tile_grid(self, image_size: Tensor) -> tuple[int, int]:
        """Return (rows, columns) of the tiles of an image, without the overview.

        Args:
            image_size: int64[2], height and width of the picture in pixels before it was resized.
        """
        # Imported lazily: only checkpoints of these families need the modelling code.
        from transformers.models.llava_next import modeling_llava_next as llava_next

        tile_size = self.config.vision_config.image_size
        grid: tuple[int, int] = llava_next.get_anyres_image_grid_shape(
            image_size, self.config.image_grid_pinpoints, tile_size
        )
        return grid

    def _tokens_per_side(self) -> int:
        """Return the number of tokens along one side of a tile."""
        vision_config = self.config.vision_config
        return int(vision_config.image_size // vision_config.patch_size)

    def bounded_settings(self, image_processor: Any, max_tokens: int) -> Mapping[str, Any]:
        """Return the `image_grid_pinpoints` that keep to `max_tokens`, or else a single tile."""
        tile_size = self.config.vision_config.image_size
        side = self._tokens_per_side()
        pinpoints = image_processor.image_grid_pinpoints
        allowed = []
        for height, width in pinpoints:
            rows, columns = height // tile_size, width // tile_size
            if side**2 + rows * side * (columns * side + 1) <= max_tokens:
                allowed.append([height, width])
        if len(allowed) == len(pinpoints):
            return {}
        return {"image_grid_pinpoints": allowed or [[tile_size, tile_size]]}

    def apply_settings(self, image_processor: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Set attributes of the image processor, and pinpoints in the model's config, in place.

        Returns the earlier values.
        """
        if "image_grid_pinpoints" in settings:  # the model finds the tiles of an image by them
            self.config.image_grid_pinpoints = settings["image_grid_pinpoints"]
        return replace_attributes(image_processor, settings)

    def num_image_tokens(self, inputs: ImageInputs) -> int:
        """Return the number of tokens of one image: overview and unpadded tiles with newlines.

        Each row of tokens across the tiles counts one more, for its newline.
        """
        from transformers.models.llava_next import modeling_llava_next as llava_next

        image_size = inputs["image_sizes"][0]
        side = self._tokens_per_side()
        rows, columns = self._tile_grid(image_size)
        padded = torch.empty(1, rows * side, columns * side)
        _, height, width = llava_next.unpad_image(padded, image_size).shape
        return side**2 + int(height) * (int(width) + 1)

    def vision_features(self, model: Any, inputs: ImageInputs) -> Tensor:
        """Run the vision tower on several images and return float[tokens of all images, Dv].

        An image has the rows of its overview first, then those of its tiles without the padding;
        a row of zeros stands for each newline.
        """
        image_sizes = inputs["image_sizes"]
        states = _encode_squares(model, self.config, inputs["pixel_values"])
        squares_per_image = [1 + math.prod(self._tile_grid(size)) for size in image_sizes]
        newline = states.new_zeros(states.shape[-1])
        packed, _ = model.model.pack_image_features(
            states.split(squares_per_image),  # float[squares, tokens, Dv] of each image
            image_sizes,
            image_newline=newline,
            **{self.packing_option: getattr(self.config, self.packing_option)},
        )
        return torch.cat(packed)

    def project(self, model: Any, projector: Any, features: Tensor) -> Tensor:
        """Project features; rows of zeros become the learned newline embedding instead."""
        is_newline = ~features.any(1, keepdim=True)
        newline = model.model.image_newline.to(features.dtype)
        return torch.where(is_newline, newline, projector(features))

    def vision_tower_pixels(self, inputs: ImageInputs) -> Tensor:
        """Return the overview float[3, H, W], which precedes the tiles."""
        return inputs["pixel_values"][0]

    def overview_features(self, inputs: ImageInputs) -> slice:
        """Return the slice of the first rows: those of the overview."""
        return slice(self._tokens_per_side() ** 2)


class LlavaNext(TiledImages, Family):
    """LLaVA-NeXT (1.6): `TiledImages` without the class token, if the config says so."""

    packing_option = "vision_feature_select_strategy"


class LlavaOneVision(TiledImages, Family):
    """LLaVA-OneVision: `TiledImages` with at most nine tiles.

    Its own processor cuts larger images into more tiles and downsamples behind the projector.
    Features here end before the projector, so a large image is downscaled before it is cut. All
    images of a prompt with several images are cut as well.
    """

    packing_option = "vision_aspect_ratio"

    def num_image_tokens(self, inputs: ImageInputs) -> int:
        """Return the number of tokens of one image, as `TiledImages` does.

        Raises:
            ModelError: `config.vision_aspect_ratio` is not `anyres_max_9`.
        """
        aspect_ratio = self.config.vision_aspect_ratio
        if aspect_ratio != f"anyres_max_{MAX_TILES_PER_SIDE**2}":
            raise ModelError(
                f"vision_aspect_ratio '{aspect_ratio}' is not supported", place="config.json"
            )
        return super().num_image_tokens(inputs)

    def preprocess(self, image_processor: Any, picture: Any) -> Mapping[str, Any]:
        """Downscale the PIL image in place to at most nine tiles, then preprocess it."""
        side = MAX_TILES_PER_SIDE * image_processor.size["height"]
        picture.thumbnail((side, side))
        return run_image_processor(image_processor, picture)


class FastVLM(Family):
    """FastVLM: every position of a convolutional tower's last feature map is a token."""

    def num_image_tokens(self, inputs: ImageInputs) -> int:
        """Return the number of positions of the feature map, as the config has it."""
        return int(self.config.image_seq_length)

    def vision_features(self, model: Any, inputs: ImageInputs) -> Tensor:
        """Run the vision tower on N images and return float[N * rows * columns, Dv].

        These are the positions of its last feature map, row by row. Converts the tower's weights,
        in place, to the channels-last memory layout; their values and shapes stay.
        """
        tower = model.model.vision_tower
        # Convolutions take two thirds of the time where the channels of a pixel are adjacent.
        layout = torch.channels_last
        kernel = next(p for p in tower.parameters() if p.ndim == 4)
        if not kernel.is_contiguous(memory_format=layout):
            tower.to(memory_format=layout)
        pixel_values = inputs["pixel_values"].to(model.dtype, memory_format=layout)
        feature_map = tower(pixel_values).last_hidden_state  # [N, Dv, rows, columns]
        tokens: Tensor = feature_map.flatten(2).transpose(1, 2).flatten(0, 1)
        return tokens
