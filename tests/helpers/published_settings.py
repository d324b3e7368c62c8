"""Checkpoint folders without weights, with the image settings that families are published with.

Configs have the geometry of the published vision towers (image and patch sizes, merging), and
no weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    FastVlmConfig,
    Gemma3Config,
    Gemma4Config,
    Glm4vConfig,
    Idefics3Config,
    InternVLConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Mistral3Config,
    PixtralVisionConfig,
    PreTrainedConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)

from helpers.tiny_parts import build_text_config, save_tokenizer
from helpers.tiny_tokenizers import LINE_END_MERGES, VISION_TOKENS, build_tokenizer
from vlduet.model.families.registry import find_family
from vlduet.model.limits import DEFAULT_MAX_IMAGE_TOKENS
from vlduet.model.processing import build_prepared_image, load_tokenizer_and_image_processor

SIZES = {"phone": (4032, 3024), "screenshot": (1920, 1080), "square": (448, 448)}
"""Width and height of a photo of a phone, a screenshot, and a small square."""
NEXT_TILES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_TILES = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
TILE_NAMES = [f"<row_{row}_col_{column}>" for row in range(1, 9) for column in range(1, 9)]
PIXTRAL_ENDS = ["[IMG_BREAK]", "[IMG_END]"]


@dataclass(frozen=True)
class PublishedFamily:
    """One row of the table in docs/train.md: a family, or checkpoints of it with equal settings."""

    label: str
    growth: str
    """How the tokens of an image grow."""
    bound: str
    """What the limit of tokens changes, and to which value by default."""
    build_config: Callable[[], PreTrainedConfig]
    """Function that returns the config of the checkpoint."""
    settings: dict[str, Any]
    """Content of preprocessor_config.json, without means and standard deviations."""


def _merged_patches(config_class: type, patch_size: int) -> Callable[[], PreTrainedConfig]:
    """Return a builder of a config of Qwen-VL or GLM-V."""
    vision = {"patch_size": patch_size, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return lambda: config_class(vision_config=vision, image_token_id=3)  # type: ignore[no-any-return]


def _qwen_settings(**settings: Any) -> dict[str, Any]:
    """Return settings of `Qwen2VLImageProcessor`."""
    common = {"image_processor_type": "Qwen2VLImageProcessor", "merge_size": 2}
    return common | {"temporal_patch_size": 2} | settings


def _siglip(image_size: int, patch_size: int) -> SiglipVisionConfig:
    """Return the config of a SigLIP tower."""
    return SiglipVisionConfig(image_size=image_size, patch_size=patch_size)


def _clip() -> CLIPVisionConfig:
    """Return the config of CLIP-L at 336 pixels."""
    return CLIPVisionConfig(image_size=336, patch_size=14)


def _idefics(config_class: type, image_size: int, patch_size: int, scale: int) -> Any:
    """Return a builder of a config of Idefics3 or SmolVLM."""
    vision = {"image_size": image_size, "patch_size": patch_size}
    return lambda: config_class(
        vision_config=vision,
        text_config=build_text_config(),
        image_token_id=3,
        scale_factor=scale,
    )


def _idefics_settings(name: str, tile: int) -> dict[str, Any]:
    """Return settings of an image processor that cuts up to 4 x 4 tiles."""
    size = {"size": {"longest_edge": 4 * tile}, "max_image_size": {"longest_edge": tile}}
    return {"image_processor_type": f"{name}ImageProcessor", "do_image_splitting": True, **size}


def _square_settings(name: str, side: int) -> dict[str, Any]:
    """Return settings of an image processor that makes every image one square."""
    square = {"height": side, "width": side}
    return {"image_processor_type": f"{name}ImageProcessor", "size": square, "crop_size": square}


def _internvl() -> PreTrainedConfig:
    """Return the config of InternVL3."""
    vision = {"image_size": [448, 448], "patch_size": [14, 14]}
    return InternVLConfig(vision_config=vision, text_config=build_text_config(), image_token_id=3)


def _mistral3() -> PreTrainedConfig:
    """Return the config of Mistral Small 3.1."""
    vision = PixtralVisionConfig(image_size=1540, patch_size=14)
    return Mistral3Config(
        vision_config=vision,
        text_config=build_text_config(),
        image_token_index=3,
        spatial_merge_size=2,
    )


def _llava(config_class: type, **options: Any) -> Callable[[], PreTrainedConfig]:
    """Return a builder of a config of a LLaVA."""

    def build() -> PreTrainedConfig:
        config: PreTrainedConfig = config_class(
            text_config=build_text_config(), image_token_index=3, **options
        )
        return config

    return build


def _gemma(config_class: type) -> Callable[[], PreTrainedConfig]:
    """Return a builder of a config of Gemma with the default geometry."""
    names = {"boi_token_id": 5, "eoi_token_id": 6, "vision_config": {}}
    return lambda: config_class(**names)  # type: ignore[no-any-return]


FAMILIES = (
    PublishedFamily(
        "Qwen2-VL, Qwen2.5-VL",
        "with the pixels",
        "`size.longest_edge` (pixels) 1,204,224",
        _merged_patches(Qwen2VLConfig, 14),
        _qwen_settings(min_pixels=3136, max_pixels=12845056, patch_size=14),
    ),
    PublishedFamily(
        "Qwen3-VL",
        "with the pixels",
        "`size.longest_edge` (pixels) 1,572,864",
        _merged_patches(Qwen3VLConfig, 16),
        _qwen_settings(size={"shortest_edge": 65536, "longest_edge": 16777216}, patch_size=16),
    ),
    PublishedFamily(
        "GLM-4.1V, GLM-4.6V",
        "with the pixels",
        "`size.longest_edge` (pixels) 2,408,448",
        _merged_patches(Glm4vConfig, 14),
        _qwen_settings(
            image_processor_type="Glm4vImageProcessor",
            size={"shortest_edge": 12544, "longest_edge": 9633792},
            patch_size=14,
        ),
    ),
    PublishedFamily(
        "Mistral Small 3.1, Ministral 3",
        "with the pixels",
        "`size.longest_edge` 1,064",
        _mistral3,
        {
            "image_processor_type": "PixtralImageProcessor",
            "size": {"longest_edge": 1540},
            "patch_size": 14,
        },
    ),
    PublishedFamily(
        "LLaVA-NeXT",
        "with the tiles, 576 each",
        "`image_grid_pinpoints` 336 x 336",
        _llava(LlavaNextConfig, vision_config=_clip(), image_grid_pinpoints=NEXT_TILES),
        {
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": 336},
            "crop_size": {"height": 336, "width": 336},
            "image_grid_pinpoints": NEXT_TILES,
        },
    ),
    PublishedFamily(
        "LLaVA-OneVision",
        "with the tiles, 729 each",
        "`image_grid_pinpoints` 384 x 384",
        _llava(
            LlavaOnevisionConfig,
            vision_config=_siglip(384, 14),
            image_grid_pinpoints=ONEVISION_TILES,
        ),
        _square_settings("LlavaOnevision", 384) | {"image_grid_pinpoints": ONEVISION_TILES},
    ),
    PublishedFamily(
        "Idefics3",
        "fixed by proportions, 4 x 4 tiles of 169",
        "`size.longest_edge` 728",
        _idefics(Idefics3Config, 364, 14, 2),
        _idefics_settings("Idefics3", 364),
    ),
    PublishedFamily(
        "SmolVLM 2.2B",
        "fixed by proportions, 4 x 4 tiles of 81",
        "none needed",
        _idefics(SmolVLMConfig, 384, 14, 3),
        _idefics_settings("SmolVLM", 384),
    ),
    PublishedFamily(
        "SmolVLM 256M, 500M",
        "fixed by proportions, 4 x 4 tiles of 64",
        "none needed",
        _idefics(SmolVLMConfig, 512, 16, 4),
        _idefics_settings("SmolVLM", 512),
    ),
    PublishedFamily(
        "InternVL3",
        "fixed: one square",
        "none needed",
        _internvl,
        _square_settings("GotOcr2", 448) | {"crop_to_patches": False},
    ),
    PublishedFamily(
        "InternVL3, `crop_to_patches`",
        "with the tiles, 256 each",
        "`max_patches` 5",
        _internvl,
        _square_settings("GotOcr2", 448) | {"crop_to_patches": True, "max_patches": 12},
    ),
    PublishedFamily(
        "Gemma 4",
        "fixed by proportions",
        "none needed",
        _gemma(Gemma4Config),
        {"image_processor_type": "Gemma4ImageProcessor", "max_soft_tokens": 280},
    ),
    PublishedFamily(
        "Gemma 3",
        "fixed: one square",
        "none needed",
        _gemma(Gemma3Config),
        _square_settings("Gemma3", 896),
    ),
    PublishedFamily(
        "LLaVA 1.5",
        "fixed: one square",
        "none needed",
        _llava(LlavaConfig, vision_config=_clip()),
        _square_settings("CLIP", 336),
    ),
    PublishedFamily(
        "FastVLM",
        "fixed: one square",
        "none needed",
        _llava(FastVlmConfig, image_seq_length=256),
        _square_settings("CLIP", 1024),
    ),
)
"""Families of the table in docs/train.md, in its order."""


def write_checkpoint(family: PublishedFamily, folder: Path) -> Path:
    """Write config, tokenizer and image processor of a family to a new folder and return it."""
    folder.mkdir(parents=True)
    statistics = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(family.settings | statistics))
    special = [*VISION_TOKENS, *PIXTRAL_ENDS, *TILE_NAMES, "<fake_token_around_image>"]
    names = dict(zip(("start_image_token", "end_image_token"), VISION_TOKENS, strict=True))
    tokenizer = build_tokenizer(
        bos=False, more=[*special, "<global-img>"], names=names, merges=LINE_END_MERGES
    )
    config = family.build_config()
    config.get_text_config().vocab_size = len(tokenizer)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    return save_tokenizer(folder, tokenizer)


def count_tokens(
    checkpoint: Path, size: tuple[int, int], *, max_image_tokens: int | None = None
) -> int:
    """Return the number of tokens of a picture of a size (width, height) in a checkpoint.

    Args:
        checkpoint: folder of `write_checkpoint`.
        size: width and height.
        max_image_tokens: most tokens of an image; None: the checkpoint's own settings.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    family = find_family(config.model_type, checkpoint)(config)
    tokenizer, image_processor = load_tokenizer_and_image_processor(checkpoint, family)
    if max_image_tokens is not None:
        settings = family.bounded_settings(image_processor, max_image_tokens)
        family.apply_settings(image_processor, settings)
    # The number of tokens does not depend on the values of pixels.
    image_processor.resample = Image.Resampling.NEAREST
    image_processor.do_rescale = image_processor.do_normalize = False
    outputs = family.preprocess(image_processor, Image.new("RGB", size))
    inputs = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
    if inputs["pixel_values"].ndim == 5:
        inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)
    return build_prepared_image(family, tokenizer, inputs=inputs, cache_key="").num_tokens


def describe_row(family: PublishedFamily, checkpoint: Path) -> str:
    """Return the row of a family in the table of docs/train.md, in Markdown."""
    counts = [
        count_tokens(checkpoint, size, max_image_tokens=DEFAULT_MAX_IMAGE_TOKENS)
        for size in SIZES.values()
    ]
    is_bounded = family.bound != "none needed"
    own_count = count_tokens(checkpoint, SIZES["phone"]) if is_bounded else counts[0]
    numbers = " | ".join(f"{count:,}" for count in (*counts, own_count))
    return f"| {family.label} | {family.growth} | {family.bound} | {numbers} |"
