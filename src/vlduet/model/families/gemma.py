"""Gemma 3."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlduet.model.families.family import Family, Frame, Inputs, named, processed


def gemma3() -> Family:
    """Gemma 3: every picture becomes one square of tokens, means of n * n patches, which see each other both ways.

    Pan-and-scan, which its processor can do and does not unless asked, is not done.
    """

    def vision(model: Any, inputs: Inputs) -> Tensor:
        states = model.model.vision_tower(inputs["pixel_values"].to(model.dtype)).last_hidden_state  # [N, patches, Dv]
        projector = model.model.multi_modal_projector
        side = projector.patches_per_image
        tokens: Tensor = projector.avg_pool(states.mT.unflatten(2, (side, side)))  # [N, Dv, rows, columns]
        return tokens.flatten(2).mT.flatten(0, 1)

    def project(inner: Any, projector: Any, features: Tensor) -> Tensor:
        projected: Tensor = projector.mm_soft_emb_norm(features) @ projector.mm_input_projection_weight
        return projected

    def width(projector: Any) -> int:
        return int(projector.mm_input_projection_weight.shape[0])

    def frame(config: Any, tokenizer: Any) -> Frame:
        first, last = named(tokenizer, config.boi_token_id), named(tokenizer, config.eoi_token_id)
        return f"\n\n{first}", f"{last}\n\n"

    return Family(
        count=lambda config, inputs: int(config.mm_tokens_per_image),
        vision=vision,
        process=lambda processor, picture: {"pixel_values": processed(processor, picture)["pixel_values"]},
        project=project,
        frame=frame,
        mark=lambda config, tokenizer: named(tokenizer, config.boi_token_id),
        mutual=True,
        width=width,
        settings=lambda config: {"do_pan_and_scan": False},
    )
