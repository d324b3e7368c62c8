"""Mistral Small 3.1 and Ministral 3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlduet.model.families.family import Family, ImageDelimiters, ImageInputs, run_image_processor


class Mistral3(Family):
    """Mistral 3: an image keeps its proportions; m * m patches make a token; text ends each row.

    Dv is the width of m * m patches: the projector merges them. Preprocessed images are stored as
    cells float[tokens, 3, side, side] of m * m patches, so that images of several sizes can be
    concatenated.
    """

    def _cell_side(self) -> int:
        """Return the side of a cell in pixels: the patch size times m."""
        return int(self.config.vision_config.patch_size * self.config.spatial_merge_size)

    def _cell_grid(self, inputs: ImageInputs) -> tuple[int, int]:
        """Return (rows, columns) of the cells of one image."""
        rows, columns = (inputs["image_sizes"][0] // self._cell_side()).tolist()
        return rows, columns

    def num_image_tokens(self, inputs: ImageInputs) -> int:
        return math.prod(self._cell_grid(inputs))

    def bounded_settings(self, image_processor: Any, max_tokens: int) -> Mapping[str, Any]:
        """Return a `size` of fewer cells along the longest edge; ends of rows count as tokens."""
        longest_edge = image_processor.size.longest_edge
        if longest_edge is None:
            return {}
        most_per_side = per_side = math.ceil(longest_edge / self._cell_side())
        while per_side > 1 and per_side * (per_side + 1) - 1 > max_tokens:
            per_side -= 1
        if per_side == most_per_side:
            return {}
        return {"size": {"longest_edge": per_side * self._cell_side()}}

    def preprocess(self, image_processor: Any, picture: Any) -> Mapping[str, Any]:
        """Preprocess one PIL image and cut it into cells.

        Returns:
            `pixel_values`, float[tokens, 3, side, side], its cells row by row, and `image_sizes`,
            int64[1, 2], height and width of the resized image in pixels.
        """
        outputs = run_image_processor(image_processor, picture)
        side = image_processor.patch_size["height"]  # of a cell; see `processor_overrides`
        # [3, rows, columns, side, side]
        cells = outputs["pixel_values"][0].unfold(1, side, side).unfold(2, side, side)
        return {
            "pixel_values": cells.permute(1, 2, 0, 3, 4).flatten(0, 1),
            "image_sizes": outputs["image_sizes"],
        }

    def vision_tower_pixels(self, inputs: ImageInputs) -> Tensor:
        """Return the picture float[3, H, W], assembled from its cells."""
        cells: Tensor = inputs["pixel_values"].unflatten(0, self._cell_grid(inputs))
        return cells.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)

    def vision_features(self, model: Any, inputs: ImageInputs) -> Tensor:
        """Run the vision tower and return float[tokens of all images, width * m * m].

        Each row holds a token's m * m patches for the first channel, then for the second, and so
        on, of the tower's layer `config.vision_feature_layer`.
        """
        image_sizes = inputs["image_sizes"]
        pictures = self._pad_pictures(inputs["pixel_values"].to(model.dtype), image_sizes)
        outputs = model.model.vision_tower(
            pictures, image_sizes=image_sizes, output_hidden_states=True
        )
        states = outputs.hidden_states[self.config.vision_feature_layer][0]  # patches of all images
        merge = self.config.spatial_merge_size
        patch_grids = image_sizes // self.config.vision_config.patch_size
        features = []
        for patches, (rows, columns) in zip(
            states.split(patch_grids.prod(1).tolist()), patch_grids, strict=True
        ):
            grid = patches.view(rows // merge, merge, columns // merge, merge, -1)
            features.append(grid.permute(0, 2, 4, 1, 3).flatten(0, 1).flatten(1))
        return torch.cat(features)

    def _pad_pictures(self, cells: Tensor, image_sizes: Tensor) -> Tensor:
        """Assemble N pictures from cells and return them in one tensor, float[N, 3, H, W].

        H and W are the largest height and width; zeros are on the right and at the bottom.

        Args:
            cells: float[cells of all images, 3, side, side].
            image_sizes: int64[N, 2], (height, width) of each picture in pixels.
        """
        height, width = image_sizes.amax(0).tolist()
        cells_per_image = (image_sizes // self._cell_side()).prod(1).tolist()
        pictures = []
        for image_cells, size in zip(cells.split(cells_per_image), image_sizes, strict=True):
            inputs = {"pixel_values": image_cells, "image_sizes": size[None]}
            picture = self.vision_tower_pixels(inputs)
            missing = (0, width - picture.shape[2], 0, height - picture.shape[1])
            pictures.append(nn.functional.pad(picture, missing))
        return torch.stack(pictures)

    def project(self, model: Any, projector: Any, features: Tensor) -> Tensor:
        """Project features float[tokens, width * m * m] to token embeddings float[tokens, D].

        This is the projector's own forward, but for the search of the patches of a token: `norm`
        for each patch, then the layer that merges m * m patches, then two linear layers.
        """
        merger = projector.patch_merger
        patches = features.unflatten(1, (-1, merger.spatial_merge_size**2)).transpose(1, 2)
        normed = projector.norm(patches).transpose(1, 2).flatten(1)
        hidden = projector.act(projector.linear_1(merger.merging_layer(normed)))
        projected: Tensor = projector.linear_2(hidden)
        return projected

    def image_delimiters(self, tokenizer: Any) -> ImageDelimiters:
        return "", "[IMG_END]"

    def interleaved_tokens(self, tokenizer: Any, inputs: ImageInputs) -> Mapping[int, int]:
        """Return the `[IMG_BREAK]` after every row but the last, {offset in the image: id}."""
        rows, columns = self._cell_grid(inputs)
        row_end = tokenizer.convert_tokens_to_ids("[IMG_BREAK]")
        return {row * (columns + 1) - 1: row_end for row in range(1, rows)}

    def processor_overrides(self) -> Mapping[str, Any]:
        """Return the cell as patch size: images are then resized to multiples of a cell."""
        return {"patch_size": {"height": self._cell_side(), "width": self._cell_side()}}
