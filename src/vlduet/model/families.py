"""What differs between families of checkpoints, a function each: from a `model_type` to its `Family`.

They get loaded models and their configs; this file opens nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlduet.errors import ModelError, closest
from vlduet.model.family import Family, Frame, Inputs, once, processed

SQUARES = 8
"""That go through a tower at once whose every layer is kept while they do."""
MOST_TILES = 3
"""Of LLaVA-OneVision, a side: `anyres_max_9`."""


def family_of(model_type: str, folder: Path) -> Family:
    """The family of a `model_type`. Raises ModelError that lists the known ones."""
    if model_type not in BACKBONES:
        raise ModelError(
            f"no backbone for model_type '{model_type}'",
            place=folder / "config.json",
            fix=closest(model_type, BACKBONES),
        )
    return BACKBONES[model_type]()


def llava() -> Family:
    """LLaVA 1.5: one layer of the tower, without the class token when the strategy is `default`."""

    def vision(model: Any, inputs: Inputs) -> Tensor:
        return _layers(model, inputs["pixel_values"]).flatten(0, 1)  # [images * tokens, Dv]

    def count(config: Any, inputs: Inputs) -> int:
        if config.vision_config.model_type == "pixtral":
            fix = "Take a checkpoint of model_type 'mistral3'"
            raise ModelError("LLaVA with a Pixtral tower is not supported", place="config.json", fix=fix)
        height, width = inputs["pixel_values"].shape[-2:]
        patch = config.vision_config.patch_size
        return int((height // patch) * (width // patch) + (config.vision_feature_select_strategy != "default"))

    return Family(count=count, vision=vision)


def _layers(model: Any, pixels: Tensor) -> Tensor:
    """float[squares, 3, H, W] -> float[squares, tokens, Dv], the tower's layers that the config names, side by side."""
    config = model.config
    layers = config.vision_feature_layer
    first = int(config.vision_feature_select_strategy == "default")
    found = []
    for some in pixels.to(model.dtype).split(SQUARES):
        states = model.model.vision_tower(some, output_hidden_states=True).hidden_states
        chosen = [states[i][:, first:] for i in ([layers] if isinstance(layers, int) else layers)]
        found.append(torch.cat(chosen, dim=-1))
    return torch.cat(found)


def llava_next() -> Family:
    """LLaVA 1.6 (NeXT): the picture whole and small, then large and cut into tiles, whose tokens are read across
    them, row by row and without the padding; the same learned embedding ends every row.

    That one knows no projector, so among the features it is a row of zeros, which no picture makes.
    """
    return _tiles_in_rows(lambda config: {"vision_feature_select_strategy": config.vision_feature_select_strategy})


def _tiles_in_rows(told: Callable[[Any], dict[str, Any]]) -> Family:
    """`llava_next`, of whose relatives each tells its geometry something else: config -> arguments."""
    from transformers.models.llava_next import modeling_llava_next as geometry  # for who has such a checkpoint

    def tiles(config: Any, size: Tensor) -> tuple[int, int]:
        found: tuple[int, int] = geometry.get_anyres_image_grid_shape(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )
        return found

    def whole(config: Any) -> int:
        return int((config.vision_config.image_size // config.vision_config.patch_size) ** 2)

    def count(config: Any, inputs: Inputs) -> int:
        size, side = inputs["image_sizes"][0], math.isqrt(whole(config))
        rows, columns = tiles(config, size)
        padded = torch.empty(1, rows * side, columns * side)
        _, height, width = geometry.unpad_image(padded, size).shape
        return whole(config) + int(height) * (int(width) + 1)

    def vision(model: Any, inputs: Inputs) -> Tensor:
        config, sizes = model.config, inputs["image_sizes"]
        states = _layers(model, inputs["pixel_values"])  # [tiles of all images, tokens, Dv]
        each = states.split([1 + math.prod(tiles(config, size)) for size in sizes])
        end = states.new_zeros(states.shape[-1])
        packed, _ = model.model.pack_image_features(each, sizes, image_newline=end, **told(config))
        return torch.cat(packed)

    def project(inner: Any, projector: nn.Module, features: Tensor) -> Tensor:
        ends = ~features.any(1, keepdim=True)
        return torch.where(ends, inner.image_newline.to(features.dtype), projector(features))

    return Family(
        count=count,
        vision=vision,
        project=project,
        pixels=lambda config, inputs: inputs["pixel_values"][0],
        shown=lambda config, inputs: slice(whole(config)),
    )


def llava_onevision() -> Family:
    """LLaVA-OneVision: as NeXT, from up to nine tiles.

    Larger pictures are taken at more tiles by their own processor, and made smaller behind the projector. Features here end
    in front of it, so a picture is made small enough before. Each is tiled, of several in one prompt, too.
    """

    def process(processor: Any, picture: Any) -> Mapping[str, Any]:
        side = MOST_TILES * processor.size["height"]
        picture.thumbnail((side, side))
        return processed(processor, picture)

    def count(config: Any, inputs: Inputs) -> int:
        if config.vision_aspect_ratio != f"anyres_max_{MOST_TILES**2}":
            raise ModelError(
                f"vision_aspect_ratio '{config.vision_aspect_ratio}' is not supported", place="config.json"
            )
        return family.count(config, inputs)

    family = _tiles_in_rows(lambda config: {"vision_aspect_ratio": config.vision_aspect_ratio})
    return replace(family, process=process, count=count)


def fast_vlm() -> Family:
    """FastVLM, and so the default model: a convolutional tower, every position of its last map is a token."""

    def vision(model: Any, inputs: Inputs) -> Tensor:
        out = model.model.vision_tower(inputs["pixel_values"].to(model.dtype)).last_hidden_state  # [N, Dv, h, w]
        tokens: Tensor = out.flatten(2).transpose(1, 2).flatten(0, 1)  # [N * h * w, Dv]
        return tokens

    def count(config: Any, inputs: Inputs) -> int:
        return int(config.image_seq_length)

    return Family(count=count, vision=vision)


def qwen_vl() -> Family:
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: an image in its own proportions, in patches of which m * m neighbours make a token.

    Dv is the width of m * m patches: the projector (`merger`) is a part of the tower, and its weights are trained here. A
    token's position is its image's place in time, its row and its column (multimodal rope). Qwen3-VL brings features of
    earlier layers of its tower, too, for the first layers of the trunk (DeepStack).
    """

    def vision(model: Any, inputs: Inputs) -> Tensor:
        unit = model.model.visual.spatial_merge_size**2
        # Qwen2.5-VL brings the tokens into the picture's order then, for it attends in windows.
        out = _without_merger(model, inputs, instead=nn.Sequential(nn.Unflatten(0, (-1, unit)), nn.Flatten(1)))
        # [tokens, m * m * width], and D more for each layer of the trunk that has features of its own
        return torch.cat([out.pooler_output, *getattr(out, "deepstack_features", ())], 1)

    def project(inner: Any, merger: nn.Module, features: Tensor) -> Tensor:
        norm: Any = merger.norm if hasattr(merger, "norm") else merger.ln_q
        projected: Tensor = merger(features.reshape(-1, norm.weight.shape[0]))  # patches go in, tokens come out
        return projected

    def grid(config: Any, inputs: Inputs) -> tuple[int, int]:
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        merge = config.vision_config.spatial_merge_size
        return rows // merge, columns // merge

    def count(config: Any, inputs: Inputs) -> int:
        rows, columns = grid(config, inputs)
        return rows * columns

    def pixels(config: Any, inputs: Inputs) -> Tensor:
        shape = config.vision_config
        patch, merge, times = shape.patch_size, shape.spatial_merge_size, shape.temporal_patch_size
        rows, columns = grid(config, inputs)
        patches = inputs["pixel_values"].view(rows, columns, merge, merge, -1, times, patch, patch)[..., 0, :, :]
        return patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(-1, rows * merge * patch, columns * merge * patch)

    def frame(config: Any, tokenizer: Any) -> Frame:
        return (config.vision_start_token_id,), (config.vision_end_token_id,)

    return Family(
        count=count,
        vision=vision,
        tower="visual",
        projector="visual.merger",
        project=project,
        pixels=pixels,
        grid=grid,
        frame=frame,
    )


def glm_vl() -> Family:
    """GLM-4.1V and GLM-4.6V: as Qwen2-VL, but the tower itself makes one token of m * m patches; Dv is the trunk's width."""

    def vision(model: Any, inputs: Inputs) -> Tensor:
        tokens: Tensor = _without_merger(model, inputs, instead=nn.Identity()).pooler_output
        return tokens

    def frame(config: Any, tokenizer: Any) -> Frame:
        return (config.image_start_token_id,), (config.image_end_token_id,)

    return replace(qwen_vl(), vision=vision, project=once, frame=frame)


def _without_merger(model: Any, inputs: Inputs, *, instead: nn.Module) -> Any:
    """What the tower makes with another module for its merger; the model, which another thread may use, stays as it is."""
    whole = model.model.visual
    tower = copy.copy(whole)
    tower._modules = whole._modules | {"merger": instead}
    return tower(inputs["pixel_values"].to(model.dtype), grid_thw=inputs["image_grid_thw"])


def internvl() -> Family:
    """InternVL, converted for transformers: squares of one size, in patches of which n * n neighbours make a token.

    Dv is the width of n * n patches. Whether a picture is cut into tiles, with itself as the last one, is what the
    checkpoint's image processor says (`crop_to_patches`).
    """

    def vision(model: Any, inputs: Inputs) -> Tensor:
        config, inner = model.config, model.model
        layer = config.vision_feature_layer
        out = inner.vision_tower(inputs["pixel_values"].to(model.dtype), output_hidden_states=layer != -1)
        states = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        if config.vision_feature_select_strategy == "default":
            states = states[:, 1:]
        side = math.isqrt(states.shape[1])
        tokens: Tensor = inner.pixel_shuffle(states.unflatten(1, (side, side)), scale_factor=config.downsample_ratio)
        return tokens.flatten(0, 2)  # [tiles * rows * columns, Dv]

    def count(config: Any, inputs: Inputs) -> int:
        tiles, _, height, width = inputs["pixel_values"].shape
        patch_height, patch_width = config.vision_config.patch_size
        return int(tiles * (height // patch_height) * (width // patch_width) * config.downsample_ratio**2)

    def shown(config: Any, inputs: Inputs) -> slice:
        return slice(-(count(config, inputs) // len(inputs["pixel_values"])), None)

    def frame(config: Any, tokenizer: Any) -> Frame:
        return (tokenizer.start_image_token_id,), (tokenizer.end_image_token_id,)

    return Family(count=count, vision=vision, shown=shown, frame=frame)


def idefics3() -> Family:
    """Idefics3 and SmolVLM: squares, in patches of which n * n neighbours make a token; words between and around them.

    Dv is the width of n * n patches. Whether a picture is cut into tiles, with itself as the last one, is what the
    checkpoint's image processor says (`do_image_splitting`).
    """

    def process(processor: Any, picture: Any) -> Mapping[str, Any]:
        made = processor(images=picture, return_tensors="pt", return_row_col_info=True)
        tiles = torch.tensor([[made["rows"][0][0], made["cols"][0][0]]])  # 0, 0 of a picture that is not cut
        return {"pixel_values": made["pixel_values"], "tiles": tiles}

    def vision(model: Any, inputs: Inputs) -> Tensor:
        inner = model.model
        states = inner.vision_model(inputs["pixel_values"].to(model.dtype)).last_hidden_state
        tokens: Tensor = inner.connector.pixel_shuffle(states, model.config.scale_factor)
        return tokens.flatten(0, 1)  # [squares * tokens, Dv]

    def square(config: Any, inputs: Inputs) -> int:
        height, width = inputs["pixel_values"].shape[-2:]
        patch = config.vision_config.patch_size
        return int((height // patch) * (width // patch) // config.scale_factor**2)

    def words(config: Any, tokenizer: Any, inputs: Inputs) -> Mapping[int, int]:
        rows, columns = inputs["tiles"][0].tolist()
        fake, image = "<fake_token_around_image>", tokenizer.convert_ids_to_tokens(config.image_token_id)
        tokens = image * square(config, inputs)
        cut = [[f"{fake}<row_{r}_col_{c}>{tokens}" for c in range(1, columns + 1)] for r in range(1, rows + 1)]
        text = "".join("".join(row) + "\n" for row in cut) + "\n" * bool(cut) + f"{fake}<global-img>{tokens}{fake}"
        ids = tokenizer.encode(text, add_special_tokens=False)
        return {place: id for place, id in enumerate(ids) if id != config.image_token_id}

    return Family(
        count=lambda config, inputs: len(inputs["pixel_values"]) * square(config, inputs),
        vision=vision,
        trunk="text_model",
        tower="vision_model",
        projector="connector.modality_projection",
        process=process,
        shown=lambda config, inputs: slice(-square(config, inputs), None),
        words=words,
    )


def mistral3() -> Family:
    """Mistral Small 3.1 and Ministral 3: an image in its own proportions, m * m patches a token, a word between its rows.

    Dv is the width of m * m patches, each number of theirs side by side: the projector merges them. What is prepared of an
    image are its cells of m * m patches, so that images of several sizes make one batch.
    """

    def side(config: Any) -> int:
        return int(config.vision_config.patch_size * config.spatial_merge_size)

    def process(processor: Any, picture: Any) -> Mapping[str, Any]:
        made = processed(processor, picture)
        cell = processor.patch_size["height"]
        parts = made["pixel_values"][0].unfold(1, cell, cell).unfold(2, cell, cell)  # [3, rows, columns, cell, cell]
        return {"pixel_values": parts.permute(1, 2, 0, 3, 4).flatten(0, 1), "image_sizes": made["image_sizes"]}

    def shape(config: Any, inputs: Inputs) -> tuple[int, int]:
        rows, columns = (inputs["image_sizes"][0] // side(config)).tolist()
        return rows, columns

    def pixels(config: Any, inputs: Inputs) -> Tensor:
        rows, columns = shape(config, inputs)
        parts: Tensor = inputs["pixel_values"].unflatten(0, (rows, columns))
        return parts.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)

    def vision(model: Any, inputs: Inputs) -> Tensor:
        config, sizes = model.config, inputs["image_sizes"]
        counts = (sizes // side(config)).prod(1).tolist()
        cells = inputs["pixel_values"].to(model.dtype).split(counts)
        each = [pixels(config, {"pixel_values": c, "image_sizes": s[None]}) for c, s in zip(cells, sizes, strict=True)]
        height, width = sizes.amax(0).tolist()
        padded = [nn.functional.pad(one, (0, width - one.shape[2], 0, height - one.shape[1])) for one in each]
        out = model.model.vision_tower(torch.stack(padded), image_sizes=sizes, output_hidden_states=True)
        states = out.hidden_states[config.vision_feature_layer][0]  # [patches of all images, width]
        merge, patch = config.spatial_merge_size, config.vision_config.patch_size
        found = []
        for one, (rows, columns) in zip(states.split((sizes // patch).prod(1).tolist()), sizes // patch, strict=True):
            grid = one.view(rows // merge, merge, columns // merge, merge, -1)
            found.append(grid.permute(0, 2, 4, 1, 3).flatten(0, 1).flatten(1))
        return torch.cat(found)  # [tokens, width * m * m]

    def project(inner: Any, projector: nn.Module, features: Tensor) -> Tensor:
        merger: Any = projector.patch_merger
        patches = features.unflatten(1, (-1, merger.spatial_merge_size**2)).transpose(1, 2)
        normed = projector.norm(patches).transpose(1, 2).flatten(1)  # type: ignore[operator]
        hidden = projector.act(projector.linear_1(merger.merging_layer(normed)))  # type: ignore[operator]
        projected: Tensor = projector.linear_2(hidden)  # type: ignore[operator]
        return projected

    def words(config: Any, tokenizer: Any, inputs: Inputs) -> Mapping[int, int]:
        rows, columns = shape(config, inputs)
        end = tokenizer.convert_tokens_to_ids("[IMG_BREAK]")
        return {row * (columns + 1) - 1: end for row in range(1, rows)}

    return Family(
        count=lambda config, inputs: math.prod(shape(config, inputs)),
        vision=vision,
        process=process,
        project=project,
        pixels=pixels,
        frame=lambda config, tokenizer: ((), (tokenizer.convert_tokens_to_ids("[IMG_END]"),)),
        words=words,
        settings=lambda config: {"patch_size": {"height": side(config), "width": side(config)}},
    )


BACKBONES: dict[str, Callable[[], Family]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "fast_vlm": fast_vlm,
    "glm4v": glm_vl,
    "glm46v": glm_vl,
    "qwen2_vl": qwen_vl,
    "qwen2_5_vl": qwen_vl,
    "qwen3_vl": qwen_vl,
    "qwen3_vl_moe": qwen_vl,
    "internvl": internvl,
    "idefics3": idefics3,
    "mistral3": mistral3,
    "smolvlm": idefics3,
}
"""model_type -> function that makes its `Family`."""
