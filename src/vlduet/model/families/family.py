"""What a family of checkpoints is to the rest: how an image becomes vision features and how it stands among the words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

ImageInputs = Mapping[str, Tensor]
"""What the image processor made of one image or several; an image's tiles are rows of `pixel_values`."""
ImageDelimiters = tuple[str, str]
"""What is written before and after an image's own tokens."""


def run_image_processor(processor: Any, picture: Any) -> Mapping[str, Any]:
    """A picture as its processor makes it."""
    made: Mapping[str, Any] = processor(images=picture, return_tensors="pt")
    return made


def token_string(tokenizer: Any, token_id: int) -> str:
    """How a token is written."""
    return str(tokenizer.convert_ids_to_tokens(token_id))


def project_once(inner: Any, projector: nn.Module, features: Tensor) -> Tensor:
    projected: Tensor = projector(features)
    return projected


def first_linear_width(projector: nn.Module) -> int:
    return next(m.in_features for m in projector.modules() if isinstance(m, nn.Linear))


def last_pixel_values(config: Any, inputs: ImageInputs) -> Tensor:
    return inputs["pixel_values"][-1]  # behind its tiles, where there are any


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between families of checkpoints; everything else is shared."""

    num_image_tokens: Callable[[Any, ImageInputs], int]
    """config, prepared image -> tokens that features fill."""
    vision_features: Callable[[Any, ImageInputs], Tensor]
    """model, inputs of several images -> float[tokens, Dv], what the projector reads; behind it, D numbers for each of the
    trunk's first layers that has image features of its own."""
    language_model_path: str = "language_model"
    """Attribute of the inner model: the language model without its head."""
    vision_tower_path: str = "vision_tower"
    """The same, of the vision tower."""
    projector_path: str = "multi_modal_projector"
    """The same, of what stands between tower and language model; a dotted path."""
    preprocess: Callable[[Any, Any], Mapping[str, Any]] = run_image_processor
    """image processor, picture -> what it makes of it."""
    project: Callable[[Any, nn.Module, Tensor], Tensor] = project_once
    """inner model, projector, float[tokens, Dv] -> float[tokens, D]."""
    vision_tower_pixels: Callable[[Any, ImageInputs], Tensor] = last_pixel_values
    """config, prepared image -> float[3, H, W], the picture as it enters the tower."""
    overview_features: Callable[[Any, ImageInputs], slice] = lambda config, inputs: slice(None)
    """config, prepared image -> of its features those that stand for this picture."""
    token_grid: Callable[[Any, ImageInputs], tuple[int, int]] | None = None
    """config, prepared image -> rows and columns of its tokens, where the model counts positions in both directions."""
    image_delimiters: Callable[[Any, Any], ImageDelimiters] = lambda config, tokenizer: ("", "")
    """config, tokenizer -> what stands around every image."""
    image_placeholder: Callable[[Any, Any], str] = lambda config, tokenizer: token_string(
        tokenizer, config.image_token_id
    )
    """config, tokenizer -> what the chat template writes for an image."""
    interleaved_tokens: Callable[[Any, Any, ImageInputs], Mapping[int, int]] = (
        lambda config, tokenizer, inputs: {}
    )
    """config, tokenizer, prepared image -> the words that stand among its tokens: place in the image -> id."""
    attention_mask_kinds: Callable[[Any], Mapping[str, bool]] = lambda config: {}
    """config -> the kinds of the trunk's layers, where each takes a mask of its own, and whether the tokens of an image see
    each other there, those behind them, too."""
    extra_inputs: Callable[[Any, Tensor], Mapping[str, Tensor]] = lambda trunk, ids: {}
    """trunk, int64[B, T] -> what it takes beside the embeddings of these tokens; -1 is an image's."""
    on_vocab_resize: Callable[[Any, int], None] = lambda trunk, known: None
    """trunk, how many words it knew before -> nothing; `beside` says of the new ones what it said before."""
    logit_softcap: Callable[[Any], float | None] = lambda config: None
    """config -> c, where logits are c tanh(logits / c)."""
    vision_width: Callable[[nn.Module], int] = first_linear_width
    """projector -> Dv."""
    processor_overrides: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    """config -> of the image processor what is not the checkpoint's; an exported model keeps them."""
