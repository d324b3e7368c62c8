"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL; GLM-4.1V and GLM-4.6V."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlduet.model.families.family import Family, ImageDelimiters, ImageInputs, token_string


class MergedPatchImages:
    """Image handling of Qwen-VL and GLM-V: proportions are kept, m * m patches make a token.

    A token has three position ids: the time of its image, its row and its column (multimodal RoPE).
    """

    config: Any
    template_delimits_images = True
    vision_tower_path = "visual"
    projector_path = "visual.merger"

    def bounded_settings(self, image_processor: Any, max_tokens: int) -> Mapping[str, Any]:
        """Return a `size` of fewer pixels; its edges are numbers of pixels, not lengths.

        An image whose longer side is more than `max_tokens` times the other takes more tokens.
        """
        size = image_processor.size
        most_pixels = max_tokens * self.pixels_per_token(image_processor)
        if size.longest_edge <= most_pixels:
            return {}
        least_pixels = min(size.shortest_edge, most_pixels)
        return {"size": {"shortest_edge": least_pixels, "longest_edge": most_pixels}}

    def pixels_per_token(self, image_processor: Any) -> int:
        """Return the number of pixels of a token, as the `size` of the image processor counts."""
        side: int = image_processor.patch_size * image_processor.merge_size
        return side**2

    def token_grid(self, inputs: ImageInputs) -> tuple[int, int]:
        """Return (rows, columns) of the tokens of one image."""
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        merge = self.config.vision_config.spatial_merge_size
        return rows // merge, columns // merge

    def num_image_tokens(self, inputs: ImageInputs) -> int:
        rows, columns = self.token_grid(inputs)
        return rows * columns

    def vision_tower_pixels(self, inputs: ImageInputs) -> Tensor:
        """Return the preprocessed picture float[3, H, W], assembled from its patches.

        Of the equal frames of which a patch consists, the first is taken.
        """
        vision_config = self.config.vision_config
        size = vision_config.patch_size
        merge = vision_config.spatial_merge_size
        rows, columns = self.token_grid(inputs)
        shape = (rows, columns, merge, merge, -1, vision_config.temporal_patch_size, size, size)
        patches = inputs["pixel_values"].view(shape)[..., 0, :, :]  # an image repeats over time
        pixels = patches.permute(4, 0, 2, 5, 1, 3, 6)
        return pixels.reshape(-1, rows * merge * size, columns * merge * size)


def _run_tower(model: Any, inputs: ImageInputs, *, merger: nn.Module) -> Any:
    """Return the outputs of the vision tower with `merger` in place of its own merger.

    The tower itself stays as it is, because another thread may be using it.
    """
    tower = copy.copy(model.model.visual)
    tower._modules = model.model.visual._modules | {"merger": merger}
    return tower(inputs["pixel_values"].to(model.dtype), grid_thw=inputs["image_grid_thw"])


class QwenVL(MergedPatchImages, Family):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: the projector (`merger`) merges patches and is trained.

    Dv is the width of m * m patches, although the projector is a part of the tower. Qwen3-VL adds
    features of earlier tower layers to the first layers of the language model (DeepStack).
    """

    def vision_features(self, model: Any, inputs: ImageInputs) -> Tensor:
        """Run the vision tower and return float[tokens of all images, m * m * width + D * layers].

        In place of the merger, the m * m patches of each token are put side by side. The columns
        after them are the DeepStack features of Qwen3-VL; other models have none.
        """
        # The tower of Qwen2.5-VL, which attends in windows, restores the order of tokens only
        # after its merger; therefore the replacement is inside the tower.
        patches_per_token = self.config.vision_config.spatial_merge_size**2
        concatenate = nn.Sequential(nn.Unflatten(0, (-1, patches_per_token)), nn.Flatten(1))
        outputs = _run_tower(model, inputs, merger=concatenate)
        return torch.cat([outputs.pooler_output, *getattr(outputs, "deepstack_features", ())], 1)

    def project(self, model: Any, projector: Any, features: Tensor) -> Tensor:
        """Merge features float[tokens, m * m * width] to token embeddings float[tokens, D].

        The merger takes the patches in rows of their own, float[tokens * m * m, width].
        """
        norm = projector.norm if hasattr(projector, "norm") else projector.ln_q
        patches = features.reshape(-1, norm.weight.shape[0])  # [tokens * m * m, width]
        projected: Tensor = projector(patches)
        return projected

    def image_delimiters(self, tokenizer: Any) -> ImageDelimiters:
        begin = token_string(tokenizer, self.config.vision_start_token_id)
        return begin, token_string(tokenizer, self.config.vision_end_token_id)


class GlmVL(MergedPatchImages, Family):
    """GLM-4.1V and GLM-4.6V: the tower itself makes one token of m * m patches.

    Dv is therefore the hidden size of the language model.
    """

    def pixels_per_token(self, image_processor: Any) -> int:
        """Return the pixels of a token in all frames of which an image consists."""
        frames: int = image_processor.temporal_patch_size
        return frames * super().pixels_per_token(image_processor)

    def vision_features(self, model: Any, inputs: ImageInputs) -> Tensor:
        """Return float[tokens, D], what the tower gives to its merger."""
        tokens: Tensor = _run_tower(model, inputs, merger=nn.Identity()).pooler_output
        return tokens

    def image_delimiters(self, tokenizer: Any) -> ImageDelimiters:
        begin = token_string(tokenizer, self.config.image_start_token_id)
        return begin, token_string(tokenizer, self.config.image_end_token_id)
