"""Gemma 3 and Gemma 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlduet.errors import ModelError
from vlduet.model.families.family import (
    Family,
    ImageDelimiters,
    ImageInputs,
    run_image_processor,
    token_string,
)

GEMMA4_MAX_TOKENS = (70, 140, 280, 560, 1120)
"""Values of `max_soft_tokens` that the image processor of Gemma 4 accepts."""


class Gemma3(Family):
    """Gemma 3: every image becomes a fixed number of tokens, which attend to each other both ways.

    A token is the mean of n * n patches, taken before the projector. Pan-and-scan, an optional
    feature of the image processor that is off by default, is switched off.
    """

    def num_image_tokens(self, inputs: ImageInputs) -> int:
        return int(self.config.mm_tokens_per_image)

    def vision_features(self, model: Any, inputs: ImageInputs) -> Tensor:
        """Run the vision tower on N images and return float[N * tokens, Dv].

        Each row is the mean of n * n patch features; the rows of an image are in reading order.
        """
        pixel_values = inputs["pixel_values"].to(model.dtype)
        states = model.model.vision_tower(pixel_values).last_hidden_state  # [N, patches, Dv]
        projector = model.model.multi_modal_projector
        side = projector.patches_per_image
        patch_grid = states.mT.unflatten(2, (side, side))  # [N, Dv, rows, columns]
        tokens: Tensor = projector.avg_pool(patch_grid)
        return tokens.flatten(2).mT.flatten(0, 1)

    def project(self, model: Any, projector: Any, features: Tensor) -> Tensor:
        """Project features without the pooling of the projector's own forward."""
        normed = projector.mm_soft_emb_norm(features)
        projected: Tensor = normed @ projector.mm_input_projection_weight
        return projected

    def vision_width(self, projector: Any) -> int:
        return int(projector.mm_input_projection_weight.shape[0])

    def processor_overrides(self) -> Mapping[str, Any]:
        return {"do_pan_and_scan": False}

    def preprocess(self, image_processor: Any, picture: Any) -> Mapping[str, Any]:
        """Return only the `pixel_values` of one PIL image."""
        return {"pixel_values": run_image_processor(image_processor, picture)["pixel_values"]}

    def image_delimiters(self, tokenizer: Any) -> ImageDelimiters:
        """Return the begin and end tokens with two line ends outside of each."""
        begin = token_string(tokenizer, self.config.boi_token_id)
        end = token_string(tokenizer, self.config.eoi_token_id)
        return f"\n\n{begin}", f"{end}\n\n"

    def image_placeholder(self, tokenizer: Any) -> str:
        """Return the token that begins an image: the template writes nothing else for one."""
        return token_string(tokenizer, self.config.boi_token_id)

    def attention_mask_kinds(self) -> Mapping[str, bool]:
        return {"full_attention": True, "sliding_attention": True}


class Gemma4(Family):
    """Gemma 4: an image keeps its proportions; k * k patches make a token.

    The number of tokens has a maximum, set by the image processor. Small models have an embedding
    table for every layer besides that of the input (per-layer embeddings). In large models the
    tokens of an image attend to each other both ways in layers with sliding-window attention.
    """

    projector_path = "embed_vision"

    def num_image_tokens(self, inputs: ImageInputs) -> int:
        """Return the number of patches of one image that are not padding, divided by k * k."""
        is_patch = (inputs["image_position_ids"] >= 0).all(2)  # bool[1, patches]
        return int(is_patch.sum() // self.config.vision_config.pooling_kernel_size**2)

    def vision_features(self, model: Any, inputs: ImageInputs) -> Tensor:
        """Run the vision tower and return float[tokens of all images, Dv] without padding."""
        pixel_values = inputs["pixel_values"].to(model.dtype)
        outputs = model.model.vision_tower(pixel_values, inputs["image_position_ids"])
        features: Tensor = outputs.last_hidden_state
        return features

    def bounded_settings(self, image_processor: Any, max_tokens: int) -> Mapping[str, Any]:
        if image_processor.max_soft_tokens <= max_tokens:
            return {}
        allowed = [count for count in GEMMA4_MAX_TOKENS if count <= max_tokens]
        return {"max_soft_tokens": max(allowed, default=GEMMA4_MAX_TOKENS[0])}

    def preprocess(self, image_processor: Any, picture: Any) -> Mapping[str, Any]:
        """Return `pixel_values` (patches) and `image_position_ids` (-1 at padding) of one image."""
        outputs = dict(run_image_processor(image_processor, picture))
        outputs.pop("num_soft_tokens_per_image", None)
        return outputs

    def vision_tower_pixels(self, inputs: ImageInputs) -> Tensor:
        """Return the preprocessed picture float[3, H, W], assembled from its patches."""
        size = self.config.vision_config.patch_size
        columns, rows = (inputs["image_position_ids"][0].amax(0) + 1).tolist()
        patches = inputs["pixel_values"][0, : rows * columns].view(rows, columns, size, size, 3)
        return patches.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)

    def image_delimiters(self, tokenizer: Any) -> ImageDelimiters:
        begin = token_string(tokenizer, self.config.boi_token_id)
        return begin, token_string(tokenizer, self.config.eoi_token_id)

    def attention_mask_kinds(self) -> Mapping[str, bool]:
        """Return both layer types; only sliding layers of large models see images both ways.

        Raises:
            ModelError: text attends to later text, so that the model cannot generate.
        """
        bidirectional = self.config.get_text_config().use_bidirectional_attention
        if bidirectional == "all":
            raise ModelError(
                "the model attends to later text tokens, so it cannot write",
                fix="Use a checkpoint that generates",
            )
        return {"full_attention": False, "sliding_attention": bidirectional == "vision"}

    def extra_inputs(self, language_model: Any, token_ids: Tensor) -> Mapping[str, Tensor]:
        """Return the per-layer embeddings of tokens as {"per_layer_inputs": float[B, T, L, d]}.

        Image tokens (-1) and ids beyond the table get those of the padding token. Empty for large
        models, which have none.
        """
        if not language_model.hidden_size_per_layer_input:
            return {}
        table = language_model.embed_tokens_per_layer
        is_known = (token_ids >= 0) & (token_ids < table.num_embeddings)
        known_ids = token_ids.where(is_known, language_model.config.pad_token_id)
        return {"per_layer_inputs": language_model.get_per_layer_inputs(known_ids, None)}

    def on_vocab_resize(self, language_model: Any, old_vocab_size: int) -> None:
        """Set the per-layer embeddings of new tokens to that of padding, in place."""
        if language_model.hidden_size_per_layer_input:
            table = language_model.embed_tokens_per_layer.weight.detach()
            table[old_vocab_size:] = table[language_model.config.pad_token_id]

    def logit_softcap(self) -> float | None:
        softcap: float | None = self.config.get_text_config().final_logit_softcapping
        return softcap
