"""Idefics3 and SmolVLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlduet.model.families.family import Family, ImageInputs, token_string


def idefics3() -> Family:
    """Idefics3 and SmolVLM: squares, in patches of which n * n neighbours make a token; words between and around them.

    Dv is the width of n * n patches. Whether a picture is cut into tiles, with itself as the last one, is what the
    checkpoint's image processor says (`do_image_splitting`).
    """

    def process(processor: Any, picture: Any) -> Mapping[str, Any]:
        made = processor(images=picture, return_tensors="pt", return_row_col_info=True)
        tiles = torch.tensor(
            [[made["rows"][0][0], made["cols"][0][0]]]
        )  # 0, 0 of a picture that is not cut
        return {"pixel_values": made["pixel_values"], "tiles": tiles}

    def vision(model: Any, inputs: ImageInputs) -> Tensor:
        inner = model.model
        states = inner.vision_model(inputs["pixel_values"].to(model.dtype)).last_hidden_state
        tokens: Tensor = inner.connector.pixel_shuffle(states, model.config.scale_factor)
        return tokens.flatten(0, 1)  # [squares * tokens, Dv]

    def square(config: Any, inputs: ImageInputs) -> int:
        height, width = inputs["pixel_values"].shape[-2:]
        patch = config.vision_config.patch_size
        return int((height // patch) * (width // patch) // config.scale_factor**2)

    def words(config: Any, tokenizer: Any, inputs: ImageInputs) -> Mapping[int, int]:
        rows, columns = inputs["tiles"][0].tolist()
        fake, image = "<fake_token_around_image>", token_string(tokenizer, config.image_token_id)
        tokens = image * square(config, inputs)
        cut = [
            [f"{fake}<row_{r}_col_{c}>{tokens}" for c in range(1, columns + 1)]
            for r in range(1, rows + 1)
        ]
        text = (
            "".join("".join(row) + "\n" for row in cut)
            + "\n" * bool(cut)
            + f"{fake}<global-img>{tokens}{fake}"
        )
        ids = tokenizer.encode(text, add_special_tokens=False)
        return {place: id for place, id in enumerate(ids) if id != config.image_token_id}

    return Family(
        num_image_tokens=lambda config, inputs: (
            len(inputs["pixel_values"]) * square(config, inputs)
        ),
        vision_features=vision,
        language_model_path="text_model",
        vision_tower_path="vision_model",
        projector_path="connector.modality_projection",
        preprocess=process,
        overview_features=lambda config, inputs: slice(-square(config, inputs), None),
        interleaved_tokens=words,
    )
