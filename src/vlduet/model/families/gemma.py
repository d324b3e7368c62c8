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


def gemma3() -> Family:
    """Gemma 3: every picture becomes one square of tokens, means of n * n patches, which see each other both ways.

    Pan-and-scan, which its processor can do and does not unless asked, is not done.
    """

    def vision(model: Any, inputs: ImageInputs) -> Tensor:
        states = model.model.vision_tower(
            inputs["pixel_values"].to(model.dtype)
        ).last_hidden_state  # [N, patches, Dv]
        projector = model.model.multi_modal_projector
        side = projector.patches_per_image
        tokens: Tensor = projector.avg_pool(
            states.mT.unflatten(2, (side, side))
        )  # [N, Dv, rows, columns]
        return tokens.flatten(2).mT.flatten(0, 1)

    def project(inner: Any, projector: Any, features: Tensor) -> Tensor:
        projected: Tensor = (
            projector.mm_soft_emb_norm(features) @ projector.mm_input_projection_weight
        )
        return projected

    def width(projector: Any) -> int:
        return int(projector.mm_input_projection_weight.shape[0])

    def frame(config: Any, tokenizer: Any) -> ImageDelimiters:
        first, last = (
            token_string(tokenizer, config.boi_token_id),
            token_string(tokenizer, config.eoi_token_id),
        )
        return f"\n\n{first}", f"{last}\n\n"

    return Family(
        num_image_tokens=lambda config, inputs: int(config.mm_tokens_per_image),
        vision_features=vision,
        preprocess=lambda processor, picture: {
            "pixel_values": run_image_processor(processor, picture)["pixel_values"]
        },
        project=project,
        image_delimiters=frame,
        image_placeholder=lambda config, tokenizer: token_string(tokenizer, config.boi_token_id),
        attention_mask_kinds=lambda config: {"full_attention": True, "sliding_attention": True},
        vision_width=width,
        processor_overrides=lambda config: {"do_pan_and_scan": False},
    )


def gemma4() -> Family:
    """Gemma 4: an image in its own proportions, k * k patches a token, up to as many tokens as its processor says.

    Its small models have a table of words for every layer beside that of the embeddings; in its large ones the tokens of an
    image see each other both ways, in the layers that have a window.
    """

    def places(inputs: ImageInputs) -> Tensor:
        """bool[N, patches], which are no padding."""
        return (inputs["image_position_ids"] >= 0).all(2)

    def count(config: Any, inputs: ImageInputs) -> int:
        return int(places(inputs).sum() // config.vision_config.pooling_kernel_size**2)

    def vision(model: Any, inputs: ImageInputs) -> Tensor:
        found: Tensor = model.model.vision_tower(
            inputs["pixel_values"].to(model.dtype), inputs["image_position_ids"]
        ).last_hidden_state
        return found  # [tokens of all images, Dv]

    def pixels(config: Any, inputs: ImageInputs) -> Tensor:
        size = config.vision_config.patch_size
        columns, rows = (inputs["image_position_ids"][0].amax(0) + 1).tolist()
        patches = inputs["pixel_values"][0, : rows * columns].view(rows, columns, size, size, 3)
        return patches.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)

    def masks(config: Any) -> Mapping[str, bool]:
        told = config.get_text_config().use_bidirectional_attention
        if told == "all":
            raise ModelError(
                "its words see those behind them: it cannot write",
                fix="Use a checkpoint that generates",
            )
        return {"full_attention": False, "sliding_attention": told == "vision"}

    def beside(trunk: Any, ids: Tensor) -> Mapping[str, Tensor]:
        if not trunk.hidden_size_per_layer_input:
            return {}
        known = (ids >= 0) & (ids < trunk.embed_tokens_per_layer.num_embeddings)
        return {
            "per_layer_inputs": trunk.get_per_layer_inputs(
                ids.where(known, trunk.config.pad_token_id), None
            )
        }

    def grown(trunk: Any, known: int) -> None:
        if trunk.hidden_size_per_layer_input:
            table = trunk.embed_tokens_per_layer.weight.detach()
            table[known:] = table[trunk.config.pad_token_id]

    return Family(
        num_image_tokens=count,
        vision_features=vision,
        projector_path="embed_vision",
        preprocess=lambda processor, picture: {
            name: value
            for name, value in run_image_processor(processor, picture).items()
            if name != "num_soft_tokens_per_image"
        },
        vision_tower_pixels=pixels,
        image_delimiters=lambda config, tokenizer: (
            token_string(tokenizer, config.boi_token_id),
            token_string(tokenizer, config.eoi_token_id),
        ),
        attention_mask_kinds=masks,
        extra_inputs=beside,
        on_vocab_resize=grown,
        logit_softcap=lambda config: config.get_text_config().final_logit_softcapping,
    )
