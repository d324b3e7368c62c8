"""What a family of checkpoints is to the rest: how an image becomes vision features and how it stands among the words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Inputs = Mapping[str, Tensor]
"""What the image processor made of one image or several; an image's tiles are rows of `pixel_values`."""
Frame = tuple[str, str]
"""What is written before and after an image's own tokens."""


def processed(processor: Any, picture: Any) -> Mapping[str, Any]:
    """A picture as its processor makes it."""
    made: Mapping[str, Any] = processor(images=picture, return_tensors="pt")
    return made


def named(tokenizer: Any, token_id: int) -> str:
    """How a token is written."""
    return str(tokenizer.convert_ids_to_tokens(token_id))


def once(inner: Any, projector: nn.Module, features: Tensor) -> Tensor:
    projected: Tensor = projector(features)
    return projected


def of_linear(projector: nn.Module) -> int:
    return next(m.in_features for m in projector.modules() if isinstance(m, nn.Linear))


def whole(config: Any, inputs: Inputs) -> Tensor:
    return inputs["pixel_values"][-1]  # behind its tiles, where there are any


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between families of checkpoints; everything else is shared."""

    count: Callable[[Any, Inputs], int]
    """config, prepared image -> tokens that features fill."""
    vision: Callable[[Any, Inputs], Tensor]
    """model, inputs of several images -> float[tokens, Dv], what the projector reads; behind it, D numbers for each of the
    trunk's first layers that has image features of its own."""
    trunk: str = "language_model"
    """Attribute of the inner model: the language model without its head."""
    tower: str = "vision_tower"
    """The same, of the vision tower."""
    projector: str = "multi_modal_projector"
    """The same, of what stands between tower and language model; a dotted path."""
    process: Callable[[Any, Any], Mapping[str, Any]] = processed
    """image processor, picture -> what it makes of it."""
    project: Callable[[Any, nn.Module, Tensor], Tensor] = once
    """inner model, projector, float[tokens, Dv] -> float[tokens, D]."""
    pixels: Callable[[Any, Inputs], Tensor] = whole
    """config, prepared image -> float[3, H, W], the picture as it enters the tower."""
    shown: Callable[[Any, Inputs], slice] = lambda config, inputs: slice(None)
    """config, prepared image -> of its features those that stand for this picture."""
    grid: Callable[[Any, Inputs], tuple[int, int]] | None = None
    """config, prepared image -> rows and columns of its tokens, where the model counts positions in both directions."""
    frame: Callable[[Any, Any], Frame] = lambda config, tokenizer: ("", "")
    """config, tokenizer -> what stands around every image."""
    mark: Callable[[Any, Any], str] = lambda config, tokenizer: named(tokenizer, config.image_token_id)
    """config, tokenizer -> what the chat template writes for an image."""
    words: Callable[[Any, Any, Inputs], Mapping[int, int]] = lambda config, tokenizer, inputs: {}
    """config, tokenizer, prepared image -> the words that stand among its tokens: place in the image -> id."""
    masks: Callable[[Any], Mapping[str, bool]] = lambda config: {}
    """config -> the kinds of the trunk's layers, where each takes a mask of its own, and whether the tokens of an image see
    each other there, those behind them, too."""
    beside: Callable[[Any, Tensor], Mapping[str, Tensor]] = lambda trunk, ids: {}
    """trunk, int64[B, T] -> what it takes beside the embeddings of these tokens; -1 is an image's."""
    grown: Callable[[Any, int], None] = lambda trunk, known: None
    """trunk, how many words it knew before -> nothing; `beside` says of the new ones what it said before."""
    cap: Callable[[Any], float | None] = lambda config: None
    """config -> c, where logits are c tanh(logits / c)."""
    width: Callable[[nn.Module], int] = of_linear
    """projector -> Dv."""
    settings: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    """config -> of the image processor what is not the checkpoint's; an exported model keeps them."""
