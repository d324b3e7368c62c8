"""Tiny random models and images, which most tests use instead of real weights.

Builders of checkpoints and tokenizers are defined in `tiny_families`, `tiny_encoders` and
`tiny_tokenizers`; tests reach them through this module.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from helpers.tiny_encoders import (
    build_bart,
    build_cross_encoder,
    build_frozen_encoders,
    build_text_encoder,
    build_vision_encoder,
)
from helpers.tiny_families import (
    FAMILY_BUILDERS,
    MISTRAL3_TOKEN_PIXELS,
    PIXTRAL_TOKENS,
    SMOLVLM_TOKENS,
    build_gemma3,
    build_internvl,
)
from helpers.tiny_llava import build_fast_vlm, build_llava
from helpers.tiny_parts import build_clip_image_processor
from helpers.tiny_qwen import build_qwen2_vl
from helpers.tiny_tokenizers import (
    SPECIAL_TOKENS,
    VISION_TOKENS,
    build_tokenizer,
    gemma_chat_template,
)
from vlduet.data import images
from vlduet.data.records import ImageRef
from vlduet.data.sequences import PreparedImage
from vlduet.model.duet import DuetModel
from vlduet.model.prompts import Prompts, Renderer

__all__ = [
    "FAMILY_BUILDERS",
    "PIXTRAL_TOKENS",
    "SMOLVLM_TOKENS",
    "SPECIAL_TOKENS",
    "VISION_TOKENS",
    "build_bart",
    "build_clip_image_processor",
    "build_cross_encoder",
    "build_fast_vlm",
    "build_frozen_encoders",
    "build_gemma3",
    "build_internvl",
    "build_llava",
    "build_qwen2_vl",
    "build_text_encoder",
    "build_tokenizer",
    "build_vision_encoder",
    "gemma_chat_template",
]

PLAIN_PROMPTS = Prompts(
    image="{image}", text="{text}</s>", parts="{parts}</s>", chat=False, image_pool="mean"
)
"""Embedding prompts that add nothing but the end of a text."""


def build_duet_model(
    folder: Path, *, family: str = "fast_vlm", head: str = "mlp", prompts: Prompts = PLAIN_PROMPTS
) -> DuetModel:
    """Write a tiny checkpoint to `folder` and return a DuetModel on it, in evaluation mode."""
    # Imported when called: some tests replace functions of the module before.
    from vlduet.model.backbone import load_backbone

    torch.manual_seed(1)
    backbone = load_backbone(FAMILY_BUILDERS[family](folder))
    return DuetModel(backbone, prompts=prompts, head=head, dim=12).eval()


def scale_up_weights(model: DuetModel) -> DuetModel:
    """Multiply the backbone's matrices by four, in place, and return the model.

    With the default standard deviation of 0.02, the effect of a wrong position or of a wrong
    neighbour would be smaller than the tolerance of a test.
    """
    with torch.no_grad():
        for parameter in model.backbone.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def transformers_inputs(
    model: DuetModel, token_ids: torch.Tensor, prepared: Iterable[PreparedImage] = ()
) -> dict[str, torch.Tensor]:
    """Return the inputs of the plain transformers model for token ids and preprocessed images."""
    image_inputs = [image.inputs for image in prepared]
    inputs = {"input_ids": token_ids}
    if image_inputs:
        for name in image_inputs[0]:
            inputs[name] = torch.cat([one_image[name] for one_image in image_inputs])
        if "image_sizes" in inputs and inputs["pixel_values"].shape[-1] == MISTRAL3_TOKEN_PIXELS:
            inputs["pixel_values"] = torch.stack([_assemble_cells(**i) for i in image_inputs])
    if inputs.pop("tiles", None) is not None:  # Idefics3 takes [N, squares, 3, H, W]
        inputs["pixel_values"] = inputs["pixel_values"][:, None]
    # Some models must be told which tokens are images.
    is_image = (token_ids == SPECIAL_TOKENS.index("<image>")).int()
    model_type = model.backbone.model.config.model_type
    if model_type == "gemma3":
        inputs["token_type_ids"] = is_image
    elif model_type == "gemma4" or "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = is_image
    return inputs


def _assemble_cells(pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
    """Return the picture of a Mistral 3 from its cells, padded with zeros to float[3, 32, 32]."""
    height, width = image_sizes[0].tolist()
    side = MISTRAL3_TOKEN_PIXELS
    picture = torch.zeros(3, 32, 32)
    cells = iter(pixel_values)
    for y in range(0, height, side):
        for x in range(0, width, side):
            picture[:, y : y + side, x : x + side] = next(cells)
    assert next(cells, None) is None
    return picture


def image_as_text(renderer: Renderer, ref: ImageRef) -> str:
    """Return all tokens of an image in a sequence as text, with its delimiters."""
    before, after = renderer.image_delimiters
    token_ids = renderer.prepare_image(ref).token_ids(renderer.image_token_id)
    return f"{before}{renderer.tokenizer.decode(token_ids)}{after}"


def random_image(seed: int = 0, side: int = 24, *, width: int | None = None) -> ImageRef:
    """Return a random image as PNG bytes, `side` pixels high; a square unless it has a `width`."""
    shape = (side, width or side, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return ImageRef(data=images.encode_png(images.from_pixels(pixels)))
